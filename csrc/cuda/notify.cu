// Flags: notify tells all ranks what this one does and learns what they do, arrive tells them that
// its rows are there. The only kernels that wait; one block each, so nothing has to be resident
// with anything else, and no kernel that moves rows ever waits.
//
// Who writes, who reads: see Control in protocol.h. What earlier kernels of this stream have
// written happens before this kernel, hence before the flag.
#include "cuda/posts.cuh"
#include "cuda/protocol.h"
#include "cuda/ptx.cuh"

namespace ep::cuda {
namespace {

constexpr int kBatch = 8;
constexpr int kWordCounts = 4;  // int32 of the 16 bytes that posts are copied by

/// Turn every block's counts into sums over the blocks before it; totals into the post.
__device__ __forceinline__ void sum_blocks(const NotifyArgs& args, Post& post) {
    const int num_keys = args.num_experts + args.num_ranks + args.num_nodes;
    const int node = args.num_nodes + threadIdx.x;
    if (node < kMaxNodes) post.per_node[node] = 0;  // travels with the others
    for (int rank = args.num_ranks + threadIdx.x; rank < kMaxRanks; rank += kNotifyThreads)
        post.per_rank[rank] = 0;
    const int expert = args.num_experts + threadIdx.x;
    if (threadIdx.x < kWordCounts - 1 && expert < kMaxExperts) post.per_expert[expert] = 0;
    for (int key = threadIdx.x; key < num_keys; key += kNotifyThreads) {
        int32_t total = 0;
        for (int64_t block = 0; block < args.num_blocks; block += kBatch) {
            int32_t counts[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                counts[i] = block + i < args.num_blocks
                                ? args.block_counts[(block + i) * num_keys + key]
                                : 0;
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (block + i < args.num_blocks)
                    args.block_counts[(block + i) * num_keys + key] = total;
                total += counts[i];
            }
        }
        if (key < args.num_experts)
            post.per_expert[key] = total;
        else if (key < args.num_experts + args.num_ranks)
            post.per_rank[key - args.num_experts] = total;
        else
            post.per_node[key - args.num_experts - args.num_ranks] = total;
    }
}

/// Put the first slot that holds no expert into the post. One thread.
__device__ __forceinline__ void report_bad_index(const NotifyArgs& args, PostHead& head) {
    uint32_t bad = 0xffffffffu;
    for (int64_t block = 0; block < args.num_blocks; ++block) bad = min(bad, args.block_bad[block]);
    if (bad == 0xffffffffu || head.kind == kBadArguments) return;
    head.kind = kBadIndex;
    head.error_value = args.is_int64 ? static_cast<const int64_t*>(args.topk_idx)[bad]
                                     : static_cast<const int32_t*>(args.topk_idx)[bad];
}

/// A warp per peer copies the post and raises the flag; one lays it out for far peers.
__device__ __forceinline__ void push_post(const NotifyArgs& args,
                                          const Post& post,
                                          uint32_t epoch) {
    const int lane = threadIdx.x % kWarpSize;
    const int num_words = num_post_bytes(args) / 16, num_targets = args.num_ranks + args.has_far;
    for (int i = threadIdx.x / kWarpSize; i < num_targets; i += kNotifyThreads / kWarpSize) {
        // Each rank begins with its neighbour, so that not all write to rank 0 first.
        const bool is_for_far = i == args.num_ranks;
        Control* there =
            args.control[is_for_far ? args.rank : (args.rank + 1 + i) % args.num_ranks];
        if (there == nullptr) continue;
        auto* to = reinterpret_cast<uint4*>(is_for_far ? &there->outgoing[epoch % 2]
                                                       : &there->posts[epoch % 2][args.rank]);
        const auto* from = reinterpret_cast<const uint4*>(&post);
        for (int word = lane; word < num_words; word += kWarpSize) to[word] = from[word];
        __syncwarp();  // all lanes' words before lane 0's flag
        if (lane == 0 && !is_for_far) store_release_system(&there->posted[args.rank], epoch);
    }
}

/// Wait for the post of rank `threadIdx.x`; returns the last epoch seen.
__device__ __forceinline__ uint32_t wait_for_post(const NotifyArgs& args, uint32_t epoch) {
    const int rank = threadIdx.x;
    if (rank >= args.num_ranks) return epoch;
    const Control* own = args.control[args.rank];
    if (args.control[rank] != nullptr)
        return wait_for_epoch(&own->posted[rank], epoch, args.timeout_ns);
    const uint64_t* signal = &own->far_posted[epoch % 2][rank];
    const uint64_t start = now_nanoseconds();
    uint32_t seen;
    do {
        seen = static_cast<uint32_t>(load_acquire_system(signal));
    } while (static_cast<int32_t>(seen - epoch) < 0 && now_nanoseconds() - start < args.timeout_ns);
    return seen;
}

/// Whether rank `threadIdx.x` takes part and makes the call that rank 0 makes.
__device__ __forceinline__ bool agrees(const PostHead& head, const PostHead& first) {
    bool is_same = head.kind == kTakesPart;
    for (int i = 0; i < kNumCallFields; ++i) is_same = is_same && head.call[i] == first.call[i];
    return is_same;
}

/// Slots of expert `threadIdx.x`, of all ranks and of those before this one.
struct ExpertCount {
    int64_t total, before;
};

__device__ __forceinline__ ExpertCount count_slots(const NotifyArgs& args, const Post* posts) {
    ExpertCount count{0, 0};
    if (static_cast<int>(threadIdx.x) >= args.num_experts) return count;
    for (int source = 0; source < args.num_ranks; ++source) {
        if (source == args.rank) count.before = count.total;
        count.total += posts[source].per_expert[threadIdx.x];
    }
    return count;
}

/// Rows of all this thread's keys, and where the last of a rank's keys is this thread's, of a rank.
struct RowCount {
    uint32_t rows;
    bool is_whole;
    int rank;
};

/// By rank: thread r counts what comes to rank r.
__device__ __forceinline__ RowCount address_by_rank(const NotifyArgs& args, const Post* posts) {
    const int thread = threadIdx.x;
    if (thread >= args.num_ranks) return {0, false, 0};
    int64_t rows = 0;
    for (int source = 0; source < args.num_ranks; ++source) {
        if (source == args.rank) args.key_starts[thread] = static_cast<int32_t>(rows);
        rows += posts[source].per_rank[thread];
    }
    return {static_cast<uint32_t>(min(rows, kMaxSlots)), true, thread};
}

/// By expert: sums of the blocks of the experts before, among those of the same rank.
__device__ __forceinline__ RowCount address_by_expert(const NotifyArgs& args,
                                                      const ExpertCount& count,
                                                      uint32_t rows,
                                                      uint32_t* scanned) {
    const int thread = threadIdx.x, local = thread % args.experts_per_rank;
    uint32_t sum = rows;
    for (int distance = 1; distance < args.experts_per_rank; distance *= 2) {
        scanned[thread] = sum;
        __syncthreads();
        if (local >= distance)
            sum = min(sum + scanned[thread - distance], static_cast<uint32_t>(kMaxSlots));
        __syncthreads();
    }
    if (thread >= args.num_experts) return {0, false, 0};
    args.key_starts[thread] =
        static_cast<int32_t>(sum - rows + static_cast<uint32_t>(count.before));
    return {sum, local == args.experts_per_rank - 1, thread / args.experts_per_rank};
}

/// Put the row of this rank's first token per key where route finds it, and this rank's numbers
/// where the caller does. Returns whether the rows of the rank that this thread stands for fit.
__device__ __forceinline__ bool address(const NotifyArgs& args,
                                        const Post* posts,
                                        const ExpertCount& count,
                                        uint32_t* scanned) {
    const int thread = threadIdx.x, per_rank = args.experts_per_rank;
    // Beyond 2^31 - 1 a sum stays there; the host, which adds in 64 bits, then stops the call.
    const auto rows = static_cast<uint32_t>(
        min((count.total + args.alignment - 1) / args.alignment * args.alignment, kMaxSlots));
    const RowCount whole =
        args.expand ? address_by_expert(args, count, rows, scanned) : address_by_rank(args, posts);
    if (args.numbers == nullptr) return true;
    int32_t* of_experts = args.numbers + kExpertNumbers;
    if (thread < args.num_experts && thread / per_rank == args.rank) {
        of_experts[thread % per_rank] = static_cast<int32_t>(rows);
        of_experts[per_rank + thread % per_rank] = static_cast<int32_t>(count.total);
    }
    if (thread < args.num_ranks)
        of_experts[2 * per_rank + thread] = posts[thread].per_rank[args.rank];
    if (!whole.is_whole) return true;
    if (whole.rank == args.rank) args.numbers[kRowsNumber] = static_cast<int32_t>(whole.rows);
    return static_cast<int64_t>(whole.rows) <= args.capacity;
}

/// Whether rank `target` takes what `source` sends to its node.
__device__ __forceinline__ bool is_gateway(const NotifyArgs& args, int source, int target) {
    return args.node_of[target] != args.node_of[source] &&
           args.index_of[source] % args.size_of[target] == args.index_of[target];
}

__device__ __forceinline__ int32_t num_places(int32_t count) {
    return (count + kPileAlignment - 1) / kPileAlignment * kPileAlignment;
}

/// Find where all piles of this rank are. Returns whether those of rank `threadIdx.x` fit.
__device__ __forceinline__ bool find_piles(const NotifyArgs& args, const Post* posts) {
    const int peer = threadIdx.x, own = args.rank;
    if (peer >= args.num_ranks) return true;
    const auto count = [&](int from, int to) {
        return is_gateway(args, from, to) ? posts[from].per_node[args.node_of[to]] : 0;
    };
    CrossPile sent{0, count(own, peer), 0}, came{0, count(peer, own), 0};
    int64_t num_sent = 0, num_came = 0;
#pragma unroll 1
    for (int other = 0; other < args.num_ranks; ++other) {
        if (other < peer) {
            sent.start += num_places(count(own, other));
            came.start += num_places(count(other, own));
        }
        if (other < own) {
            sent.there += num_places(count(other, peer));
            came.there += num_places(count(peer, other));
        }
        num_sent += count(peer, other);
        num_came += count(other, peer);
    }
    args.piles->sent[peer] = sent;
    args.piles->came[peer] = came;
    if (peer == own || is_gateway(args, own, peer))
        args.piles->node_starts[args.node_of[peer]] = sent.start;
    return num_sent <= args.capacity && num_came <= args.capacity;
}

__device__ __forceinline__ char* look_up(const NotifyArgs& args, int rank, uint64_t place) {
    if (place == kNoPlace) return nullptr;
    const uint64_t start = args.slabs->starts[rank][place >> kSlabShift];
    return reinterpret_cast<char*>(start + (place & ((uint64_t{1} << kSlabShift) - 1)));
}

/// Leave for later kernels where all ranks' rows are.
__device__ __forceinline__ void find_rows(const NotifyArgs& args, const Post* posts) {
    const int rank = threadIdx.x;
    if (rank >= args.num_ranks) return;
    const PostHead& head = posts[rank].head;
    args.state->rows[rank] = look_up(args, rank, head.rows_place);
    args.state->weights[rank] = look_up(args, rank, head.weights_place);
    args.state->is_reduced[rank] = head.rows_bytes == 1;
}

/// Tell the host, or who looks later, what the ranks said. `seen`: of rank `threadIdx.x`.
__device__ __forceinline__ void tell(const NotifyArgs& args,
                                     const Post* posts,
                                     const ExpertCount& count,
                                     uint32_t epoch,
                                     uint32_t status,
                                     uint32_t seen) {
    const int num_ranks = args.num_ranks, thread = threadIdx.x;
    Report* report = args.report;
    if (thread < num_ranks) report->seen[thread] = seen;
    if (status != kTimedOut) {
        const int words_per_head = sizeof(PostHead) / 16;
        for (int i = thread; i < num_ranks * words_per_head; i += kNotifyThreads)
            reinterpret_cast<uint4*>(report->heads)[i] =
                reinterpret_cast<const uint4*>(&posts[i / words_per_head].head)[i % words_per_head];
    }
    if (args.has_counts && (status == kAgreed || status == kTooManyRows)) {
        for (int i = thread; i < num_ranks * num_ranks; i += kNotifyThreads)
            report->per_rank[i] = posts[i / num_ranks].per_rank[i % num_ranks];
        for (int i = thread; i < num_ranks * args.num_nodes; i += kNotifyThreads)
            report->per_node[i] = posts[i / args.num_nodes].per_node[i % args.num_nodes];
        if (thread < args.num_experts) report->per_expert[thread] = count.total;
    }
    if (thread == 0) {
        report->epoch = epoch;
        report->status = status;
    }
    __syncthreads();  // all threads' part of the report before the flag
    if (thread == 0) store_release_system(&report->ticket, args.ticket);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kNotifyThreads)
    ep_notify_kernel(const __grid_constant__ NotifyArgs args) {
    __shared__ Post post;
    __shared__ uint32_t scanned[kNotifyThreads];
    const int thread = threadIdx.x;
    if (args.gate != nullptr && args.gate->is_agreed == 0) {
        // All ranks here find it closed, also those that refused the call and are not in this
        // meeting: so it is none, and has no number.
        if (thread == 0) args.state->is_agreed = 0;
        return;
    }
    const uint32_t epoch = next_epoch(args.state->epoch);
    if (args.posts) {
        for (int i = thread; i < static_cast<int>(sizeof(PostHead) / 4); i += kNotifyThreads)
            reinterpret_cast<uint32_t*>(&post.head)[i] =
                reinterpret_cast<const uint32_t*>(&args.head)[i];
        if (args.has_counts) sum_blocks(args, post);
        __syncthreads();
        if (args.has_counts && thread == 0) report_bad_index(args, post.head);
        __syncthreads();
        push_post(args, post, epoch);
    }
    if (!args.meets) return;

    const uint32_t seen = wait_for_post(args, epoch);
    // From here on every thread sees every post.
    const bool are_all_there = __syncthreads_and(static_cast<int32_t>(seen - epoch) >= 0);
    const Post* posts = args.control[args.rank]->posts[epoch % 2];
    uint32_t status = kTimedOut;
    ExpertCount count{0, 0};
    if (are_all_there) {
        status = kDisagreed;
        if (__syncthreads_and(thread >= args.num_ranks ||
                              agrees(posts[thread].head, posts[0].head))) {
            bool fits = true;
            if (args.has_counts) {
                count = count_slots(args, posts);
                fits = address(args, posts, count, scanned);
                if (args.piles != nullptr) fits = find_piles(args, posts) && fits;
            }
            find_rows(args, posts);
            status = __syncthreads_and(fits) ? kAgreed : kTooManyRows;
        }
    }
    if (args.numbers != nullptr && status != kAgreed)
        for (int i = thread; i < kExpertNumbers + 2 * args.experts_per_rank + args.num_ranks;
             i += kNotifyThreads)
            args.numbers[i] = 0;
    if (args.piles != nullptr && status != kAgreed)
        for (int i = thread; i < static_cast<int>(sizeof(CrossPlan) / 4); i += kNotifyThreads)
            reinterpret_cast<int32_t*>(args.piles)[i] = 0;
    const bool tells = args.is_awaited || (status != kAgreed && args.report->ticket == 0);
    if (thread == 0) {
        args.state->epoch = epoch;
        args.state->is_agreed = status == kAgreed;
        if (args.numbers != nullptr) args.numbers[kStatusNumber] = static_cast<int32_t>(status);
    }
    if (tells) tell(args, posts, count, epoch, status, seen);
    // Where nobody on the host waits for this call, what comes behind it must not go on, as in
    // arrive.
    if (thread == 0 && !args.is_awaited && status == kTimedOut) trap();
}

extern "C" __global__ void __launch_bounds__(kArriveThreads)
    ep_arrive_kernel(const __grid_constant__ ArriveArgs args) {
    const int thread = threadIdx.x;
    const bool is_rank = thread < args.num_ranks;
    const uint32_t epoch = args.state->epoch;
    if (args.state->is_agreed == 0) return;
    if (is_rank) store_release_system(&args.control[thread]->arrived[args.rank], epoch);
    if (!args.waits) return;
    uint32_t seen = epoch;
    if (is_rank)
        seen = wait_for_epoch(&args.control[args.rank]->arrived[thread], epoch, args.timeout_ns);
    if (__syncthreads_and(static_cast<int32_t>(seen - epoch) >= 0)) return;
    // Nobody on the host waits for this kernel: without a trap, what reads the rows would go on.
    if (is_rank) args.error->seen[thread] = seen;
    __syncthreads();
    if (thread == 0) {
        store_release_system(&args.error->epoch, epoch);
        trap();
    }
}

}  // namespace ep::cuda
