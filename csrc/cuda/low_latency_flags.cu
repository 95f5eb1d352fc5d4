// Flags of low-latency calls, one block each. Sending: begin waits until nobody reads what will be
// overwritten, post tells all ranks what was sent. Receiving: meet waits for the posts and works
// out where rows are, finish says that they have been read and tells the host. Between them run the
// kernels of low_latency.cu, which neither wait nor raise a flag: what earlier kernels of this
// stream wrote happens before a later one's flag. Far ranks' flags are raised behind post, finish
// and mask by csrc/nvshmem/send.cu, from what these note in PackedState and `outgoing`.
//
// Who writes, who reads: see PackedControl in packed_protocol.h.
#include "cuda/packed_protocol.h"
#include "cuda/packed_slots.cuh"
#include "cuda/ptx.cuh"

namespace ep::cuda {
namespace {

constexpr int kMeetWarps = kMeetThreads / kWarpSize;

enum class Outcome { kCame, kMasked, kLate };

/// Looks at both: what a rank has read before it masked this one comes before what is written there
/// from now on, also where this one masks it, too.
__device__ __forceinline__ bool is_masked(const PackedArgs& args, int peer) {
    const bool masks_this = load_acquire_system(&args.control[args.rank]->masked_by[peer]) != 0;
    return masks_this || args.state->masked[peer] != 0;
}

/// Wait for a peer's flag, unless it is masked, or masks this rank meanwhile.
__device__ __forceinline__ Outcome wait_for_peer(
    const PackedArgs& args, const uint64_t* flag, uint64_t number, int peer, uint64_t start) {
    if (is_masked(args, peer)) return Outcome::kMasked;
    const uint64_t* masked_by = &args.control[args.rank]->masked_by[peer];
    do {
        if (load_acquire_system(flag) >= number) return Outcome::kCame;
        if (load_acquire_system(masked_by) != 0) return Outcome::kMasked;
    } while (now_nanoseconds() - start < args.timeout_ns);
    return Outcome::kLate;
}

/// Mask a rank that is late, or note that this Buffer cannot go on. Peers' memory first: the masked
/// rank must know before anything that it may read is overwritten by later kernels. A far one reads
/// what was put into its own memory, and nothing is put there from now on.
__device__ __forceinline__ void lose(const PackedArgs& args, int peer) {
    if (args.masks_late) {
        args.state->masked[peer] = 1;
        if (is_far(args, peer)) return;
        store_release_system(&args.control[peer]->masked_by[args.rank], uint64_t{1});
    } else {
        args.state->late[peer] = 1;
    }
}

/// Note a call's end for good if one of the block's threads says so. All threads take part.
__device__ __forceinline__ bool is_broken(const PackedArgs& args, bool is_late) {
    const bool is_any_late = __syncthreads_or(is_late && !args.masks_late);
    if (is_any_late && threadIdx.x == 0) args.state->broken = 1;
    return is_any_late;
}

constexpr uint32_t kNone = 0xffffffffu;

/// The least of all threads' numbers. All threads of the block take part; `by_warp` is for one
/// call.
__device__ __forceinline__ uint32_t least(uint32_t mine, uint32_t* by_warp) {
    const uint32_t of_warp = __reduce_min_sync(kAllLanes, mine);
    if (threadIdx.x % kWarpSize == 0) by_warp[threadIdx.x / kWarpSize] = of_warp;
    __syncthreads();
    return __reduce_min_sync(kAllLanes, by_warp[threadIdx.x % kWarpSize]);
}

__device__ __forceinline__ int64_t index_at(const PackedArgs& args, int64_t slot) {
    return args.is_int64 ? static_cast<const int64_t*>(args.topk_idx)[slot]
                         : static_cast<const int32_t*>(args.topk_idx)[slot];
}

/// What is wrong with the first slot that holds no expert and not -1, the first expert that is
/// named too often, or the first entry of the layout that cannot be. All threads take part.
__device__ __forceinline__ void refuse_bad_values(const PackedArgs& args,
                                                  const int32_t* counts,
                                                  uint32_t (*by_warp)[kMeetWarps],
                                                  PackedHead& head) {
    const int thread = threadIdx.x;
    const int64_t num_slots = args.num_tokens * args.num_topk;
    uint32_t bad = kNone;
#pragma unroll 1
    for (int64_t slot = thread; slot < num_slots; slot += kMeetThreads) {
        const int64_t expert = index_at(args, slot);
        if (expert < -1 || expert >= args.num_experts) bad = min(bad, static_cast<uint32_t>(slot));
    }
    const uint32_t bad_slot = least(bad, by_warp[0]);
    // From here on every thread sees all counts and the head.
    int64_t range = 0;  // first row and rows, of expert (dispatch) or layout entry `thread`
    if (thread < args.num_experts)
        range = args.operation == kPackedCombine ? args.layout_range[thread] : counts[thread];
    const uint32_t bad_range =
        least(is_inside(args, range) ? kNone : static_cast<uint32_t>(thread), by_warp[1]);
    if (bad_slot != kNone) {
        if (thread != 0) return;
        head.kind = kPackedBadIndex;
        head.error_at = bad_slot / args.num_topk;
        head.error_value = index_at(args, bad_slot);
    } else if (bad_range == static_cast<uint32_t>(thread)) {
        head.kind = args.operation == kPackedCombine ? kPackedBadRange : kPackedTooMany;
        head.error_at = thread;
        head.error_value = range;
    }
}

/// A warp per peer copies the head and the peer's numbers, and raises the flag; to masked ranks
/// too, which are then at the same call when they are taken back. For far peers both are send's,
/// and a masked one gets nothing: its last post may still be on its way.
__device__ __forceinline__ void push_posts(const PackedArgs& args,
                                           const PackedHead& head,
                                           const int32_t* counts) {
    const int lane = threadIdx.x % kWarpSize;
    const int local = args.num_experts / args.num_ranks;
    const uint64_t number = number_of(args);
    const uint64_t parity = number % 2;
#pragma unroll 1
    for (int i = threadIdx.x / kWarpSize; i < args.num_ranks; i += kMeetWarps) {
        // Each rank begins with its neighbour, so that not all write to rank 0 first.
        const int peer = (args.rank + 1 + i) % args.num_ranks;
        const bool is_near = !is_far(args, peer);
        if (!is_near && args.state->masked[peer] != 0) continue;
        PackedControl* there = args.control[is_near ? peer : args.rank];
        PackedPost& post =
            is_near ? there->posts[parity][args.rank] : there->outgoing[parity][peer];
#pragma unroll 1
        for (int word = lane; word < static_cast<int>(sizeof(PackedHead) / 16); word += kWarpSize)
            reinterpret_cast<uint4*>(&post.head)[word] =
                reinterpret_cast<const uint4*>(&head)[word];
#pragma unroll 1
        for (int expert = lane; expert < static_cast<int>(head.num_numbers); expert += kWarpSize) {
            if (args.operation == kPackedDispatch) {
                post.numbers[expert] = counts[peer * local + expert];
                continue;
            }
            const int64_t range = args.layout_range[expert * args.num_ranks + peer];
            post.numbers[2 * expert] = static_cast<int32_t>(range >> 32);
            post.numbers[2 * expert + 1] = is_inside(args, range) ? static_cast<int32_t>(range) : 0;
        }
        __syncwarp();  // all lanes' words before lane 0's flag
        if (lane == 0 && is_near) store_release_system(&there->sent[parity][args.rank], number);
    }
}

/// Each expert's slots here, a warp per expert. All threads take part, and a barrier must follow.
__device__ __forceinline__ void count_slots(const PackedArgs& args, int32_t* counts) {
#pragma unroll 1
    for (int expert = threadIdx.x / kWarpSize; expert < args.num_experts; expert += kMeetWarps) {
        const int count = count_of(args, expert);
        if (threadIdx.x % kWarpSize == 0) counts[expert] = count;
    }
}

// A rank that has given this one up may write its post of two calls later where this one still
// reads the last: finish finds that out. Until then, whatever is read, rows are inside of their
// window.

/// From the posts of a dispatch: where each block of rows starts, for take and for the caller.
/// Thread i does block i: the rows of rank i % R for local expert i / R. No rows where ranks
/// disagree, so that what a graph does with those of a replay before comes to an end.
__device__ __forceinline__ void lay_out(const PackedArgs& args,
                                        const PackedPost* posts,
                                        const uint32_t* is_there,
                                        bool is_agreed) {
    const int block = threadIdx.x;
    if (block >= args.num_experts) return;
    const int local = block / args.num_ranks, source = block % args.num_ranks;
    int begin = 0, count = 0;
#pragma unroll 1
    for (int rank = 0; rank <= source; ++rank) {
        begin += count;
        count = is_agreed && is_there[rank]
                    ? min(max(posts[rank].numbers[local], 0), args.max_tokens)
                    : 0;
    }
    args.state->begins[block] = begin;
    args.state->counts[block] = count;
    args.layout_range[block] = static_cast<int64_t>(begin) << 32 | count;
    if (source == args.num_ranks - 1) args.out_count[local] = begin + count;
}

/// From the posts of a combine: where this rank's rows of each expert are. Returns whether rank
/// `threadIdx.x` has as many as there are slots here. All threads take part.
__device__ __forceinline__ bool look_up(const PackedArgs& args,
                                        const PackedPost* posts,
                                        const uint32_t* is_there,
                                        int32_t* counts) {
    const int thread = threadIdx.x, local = args.num_experts / args.num_ranks;
    count_slots(args, counts);
    __syncthreads();
    if (thread < args.num_experts) {
        const int rank = thread / local;
        int begin = -1;
        bool is_same = true;
        if (is_there[rank]) {
            const int32_t* numbers = posts[rank].numbers + 2 * (thread % local);
            begin = numbers[0];
            is_same = numbers[1] == counts[thread] && begin >= 0 &&
                      static_cast<int64_t>(begin) + counts[thread] <=
                          static_cast<int64_t>(args.num_ranks) * args.max_tokens;
        }
        args.state->begins[thread] = begin;
        counts[thread] = !is_same;  // from here on: whether rows are elsewhere, or another number
    }
    __syncthreads();
    if (thread >= args.num_ranks || !is_there[thread]) return true;
    args.state->rows[thread] = posts[thread].head.rows;
    bool is_same = true;
#pragma unroll 1
    for (int expert = 0; expert < local; ++expert)
        is_same = is_same && counts[thread * local + expert] == 0;
    return is_same;
}

__device__ __forceinline__ bool agrees(const PackedHead& head, const PackedHead& own) {
    bool is_same = head.kind == kPackedTakesPart;
    for (int i = 0; i < kNumPackedFields; ++i) is_same = is_same && head.call[i] == own.call[i];
    return is_same;
}

/// Wait for all rows that a far rank's post announces, whether they will be taken or not.
__device__ __forceinline__ Outcome wait_for_rows(const PackedArgs& args, int peer, uint64_t start) {
    const PackedControl& own = *args.control[args.rank];
    const uint64_t call = number_of(args);
    const PackedPost& post = own.posts[call % 2][peer];
    const bool is_dispatch = post.head.operation == kPackedDispatch;
    const int local = static_cast<int>(post.head.num_numbers);
#pragma unroll 1
    for (int expert = 0; expert < local; ++expert) {
        if (post.numbers[is_dispatch ? expert : 2 * expert + 1] == 0) continue;
        const int number = is_dispatch ? expert * args.num_ranks + peer : peer * local + expert;
        const uint64_t* signal = &own.rows[call % 2][number];
        const Outcome outcome = wait_for_peer(args, signal, call, peer, start);
        if (outcome != Outcome::kCame) return outcome;
    }
    return Outcome::kCame;
}

}  // namespace

/// Counts the call, once its places may be written; also where rows of a combine are to be. Without
/// a call: waits for who still reads rows there, before the caller writes them.
extern "C" __global__ void __launch_bounds__(kMaskThreads)
    ep_packed_begin_kernel(const __grid_constant__ PackedArgs args) {
    PackedState& state = *args.state;
    if (state.broken != 0) return;
    const int peer = threadIdx.x;
    const bool is_call = args.call >= 0, has_rows = args.rows_place >= 0;
    const uint64_t number = state.num_calls + is_call;
    // Calls that must have been read, or 0: no call.
    const uint64_t before = is_call && number > 2 ? number - 2 : 0;
    const uint64_t reader = has_rows ? state.readers[args.rows_place] : 0;
    bool is_late = false;
    if (peer < args.num_ranks) {
        const uint64_t start = now_nanoseconds();
        Outcome outcome = Outcome::kCame;
#pragma unroll 1
        for (int i = 0; i < 2 && outcome == Outcome::kCame; ++i) {
            const uint64_t call = i == 0 ? before : reader;
            const uint64_t* done = &args.control[args.rank]->done[call % 2][peer];
            outcome = wait_for_peer(args, done, call, peer, start);
        }
        is_late = outcome == Outcome::kLate;
        if (is_late) lose(args, peer);
    }
    is_broken(args, is_late);  // from here on all threads have read the state
    if (peer != 0 || !is_call) return;
    state.num_calls = state.calls[args.call] = number;
    if (has_rows) state.readers[args.rows_place] = number;
}

extern "C" __global__ void __launch_bounds__(kMeetThreads)
    ep_packed_post_kernel(const __grid_constant__ PackedArgs args) {
    __shared__ PackedHead head;
    __shared__ int32_t counts[kMaxExperts];
    __shared__ uint32_t by_warp[2][kMeetWarps];
    if (args.state->broken != 0) return;
    const int thread = threadIdx.x;
    if (thread < static_cast<int>(sizeof(PackedHead) / 16))
        reinterpret_cast<uint4*>(&head)[thread] =
            reinterpret_cast<const uint4*>(&args.head)[thread];
    if (args.operation == kPackedDispatch) count_slots(args, counts);
    __syncthreads();
    if (thread == 0) {
        head.operation = static_cast<uint32_t>(args.operation);
        head.num_numbers = args.operation == kPackedNothing ? 0 : args.num_experts / args.num_ranks;
    }
    if (args.operation != kPackedNothing) refuse_bad_values(args, counts, by_warp, head);
    __syncthreads();
    push_posts(args, head, counts);
}

extern "C" __global__ void __launch_bounds__(kMeetThreads)
    ep_packed_meet_kernel(const __grid_constant__ PackedArgs args) {
    __shared__ uint32_t is_there[kMaxRanks];
    __shared__ int32_t counts[kMaxExperts];
    const int thread = threadIdx.x;
    PackedState& state = *args.state;
    const uint64_t number = number_of(args), turn = number % 2;
    const bool was_broken = state.broken != 0;
    bool is_heard = args.is_awaited;
    if (!is_heard)
        is_heard = __syncthreads_or(thread == 0 && load_acquire_system(&args.report->ticket) == 0);
    PackedReport& report = is_heard ? *args.report : state.unheard;
    bool is_late = false;
    if (thread < args.num_ranks) {
        const uint64_t start = now_nanoseconds();
        Outcome outcome = Outcome::kMasked;
        const uint64_t* sent = &args.control[args.rank]->sent[turn][thread];
        if (!was_broken) outcome = wait_for_peer(args, sent, number, thread, start);
        if (outcome == Outcome::kCame && is_far(args, thread))
            outcome = wait_for_rows(args, thread, start);
        is_late = outcome == Outcome::kLate;
        if (is_late) lose(args, thread);
        is_there[thread] = outcome == Outcome::kCame;
        state.is_there[thread] = outcome == Outcome::kCame;
        report.is_there[thread] = outcome == Outcome::kCame;
        report.waited[thread] = thread == args.rank ? 0 : now_nanoseconds() - start;
        report.other_routing[thread] = 0;
    }
    // From here on every thread sees every post of a rank that is there.
    const bool is_over = is_broken(args, is_late) || was_broken;
    const PackedPost* posts = args.control[args.rank]->posts[turn];
    const bool is_agreed =
        __syncthreads_and(!is_over && (thread >= args.num_ranks || !is_there[thread] ||
                                       agrees(posts[thread].head, posts[args.rank].head)));
    const int words_per_head = sizeof(PackedHead) / 16;
#pragma unroll 1
    for (int i = thread; i < args.num_ranks * words_per_head; i += kMeetThreads)
        if (is_there[i / words_per_head])
            reinterpret_cast<uint4*>(report.heads)[i] =
                reinterpret_cast<const uint4*>(&posts[i / words_per_head].head)[i % words_per_head];
    bool is_same = true;
    if (args.operation == kPackedDispatch) lay_out(args, posts, is_there, is_agreed);
    if (is_agreed && args.operation == kPackedCombine) {
        is_same = look_up(args, posts, is_there, counts);
        if (!is_same) report.other_routing[thread] = 1;
    }
    is_same = __syncthreads_and(is_same);
    if (thread != 0) return;
    state.is_heard = is_heard;
    report.operation = static_cast<uint32_t>(args.operation);
    state.status = is_over      ? kPackedTimedOut
                   : !is_agreed ? kPackedDisagreed
                   : is_same    ? kPackedAgreed
                                : kPackedOtherRouting;
}

/// Where no host waits, nobody launches the call again without those who have masked this rank: its
/// rows are lost, which is a failure.
extern "C" __global__ void __launch_bounds__(kMaskThreads)
    ep_packed_finish_kernel(const __grid_constant__ PackedArgs args) {
    const int peer = threadIdx.x;
    const bool is_rank = peer < args.num_ranks;
    PackedState& state = *args.state;
    const uint64_t number = number_of(args), turn = number % 2;
    PackedReport& report = args.is_alone || state.is_heard ? *args.report : state.unheard;
    const bool is_over = state.broken != 0;
    const PackedControl* own = args.control[args.rank];
    // What the kernels before have read of a rank that has masked this one may be another call's.
    bool is_stale = false;
    if (is_rank && !args.is_alone && !is_over && state.is_there[peer])
        is_stale = load_acquire_system(&own->masked_by[peer]) != 0;
    const bool is_any_stale = __syncthreads_or(is_stale);
    const bool is_done = !is_over && !(is_any_stale && args.is_awaited);
    if (is_rank) {
        report.masked[peer] = is_masked(args, peer);
        report.late[peer] = state.late[peer];
        if (is_done && !is_far(args, peer))
            store_release_system(&args.control[peer]->done[turn][args.rank], number);
    }
    const uint32_t status = is_over ? kPackedTimedOut : is_any_stale ? kPackedAgain : state.status;
    if (peer == 0 && is_done) state.finished[turn] = number;
    if (peer == 0) report.status = status;
    __syncthreads();  // all threads' part of the report before its ticket
    if (peer == 0 && (args.is_awaited || status != kPackedAgreed))
        store_release_system(&report.ticket, args.ticket);
}

/// Mask a rank or take it back; tell the host who is masked.
extern "C" __global__ void __launch_bounds__(kMaskThreads)
    ep_packed_mask_kernel(const __grid_constant__ PackedArgs args) {
    const int peer = threadIdx.x;
    if (peer < args.num_ranks) {
        if (peer == args.mask_rank && peer != args.rank) {
            args.state->masked[peer] = static_cast<uint32_t>(args.mask_value);
            const uint64_t value = static_cast<uint64_t>(args.mask_value);
            if (!is_far(args, peer))
                store_release_system(&args.control[peer]->masked_by[args.rank], value);
            if (args.mask_value == 0)
                store_release_system(&args.control[args.rank]->masked_by[peer], value);
        }
        args.report->masked[peer] = is_masked(args, peer);
    }
    __syncthreads();  // all threads' part of the report before its ticket
    if (peer == 0) store_release_system(&args.report->ticket, args.ticket);
}

}  // namespace ep::cuda
