// Flags: notify tells all ranks what this one does and learns what they do, arrive tells them that
// its rows are there. The only kernels that wait; one block each, so nothing has to be resident
// with anything else, and no kernel that moves rows ever waits.
//
// Who writes, who reads: see Control in protocol.h. What earlier kernels of this stream have
// written happens before this kernel, hence before the flag.
#include "cuda/protocol.h"
#include "cuda/ptx.cuh"

namespace ep::cuda {
namespace {

constexpr int kBatch = 8;
constexpr int kWordCounts = 4;  // int32 of the 16 bytes that posts are copied by

/// Numbers come round from the largest to 2: two calls in a row are never both odd, or both even.
__device__ __forceinline__ uint32_t next_epoch(uint32_t epoch) {
    return epoch == 0xffffffffu ? 2 : epoch + 1;
}

/// Turn every block's counts into sums over the blocks before it; totals into the post.
__device__ __forceinline__ void sum_blocks(const NotifyArgs& args, Post& post) {
    const int num_keys = args.num_experts + args.num_ranks;
    for (int rank = args.num_ranks + threadIdx.x; rank < kMaxRanks; rank += kNotifyThreads)
        post.per_rank[rank] = 0;  // travels with the others
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
        else
            post.per_rank[key - args.num_experts] = total;
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

/// A warp per peer copies the post and raises the flag.
__device__ __forceinline__ void push_post(const NotifyArgs& args,
                                          const Post& post,
                                          uint32_t epoch) {
    const int lane = threadIdx.x % kWarpSize;
    const int num_bytes = args.has_counts
                              ? static_cast<int>(offsetof(Post, per_expert)) + args.num_experts * 4
                              : static_cast<int>(sizeof(PostHead));
    const int num_words = (num_bytes + 15) / 16;
    for (int i = threadIdx.x / kWarpSize; i < args.num_ranks; i += kNotifyThreads / kWarpSize) {
        // Each rank begins with its neighbour, so that not all write to rank 0 first.
        const int peer = (args.rank + 1 + i) % args.num_ranks;
        Control* there = args.control[peer];
        auto* to = reinterpret_cast<uint4*>(&there->posts[epoch % 2][args.rank]);
        const auto* from = reinterpret_cast<const uint4*>(&post);
        for (int word = lane; word < num_words; word += kWarpSize) to[word] = from[word];
        __syncwarp();  // all lanes' words before lane 0's flag
        if (lane == 0) store_release_system(&there->posted[args.rank], epoch);
    }
}

/// Whether rank `threadIdx.x` takes part and makes the call that rank 0 makes.
__device__ __forceinline__ bool agrees(const PostHead& head, const PostHead& first) {
    bool is_same = head.kind == kTakesPart;
    for (int i = 0; i < kNumCallFields; ++i) is_same = is_same && head.call[i] == first.call[i];
    return is_same;
}

/// From all ranks' counts: totals for the host, and the row of this rank's first token per key.
__device__ __forceinline__ void address(const NotifyArgs& args,
                                        const Post* posts,
                                        uint32_t* scanned) {
    const int num_ranks = args.num_ranks, thread = threadIdx.x;
    for (int i = thread; i < num_ranks * num_ranks; i += kNotifyThreads)
        args.report->per_rank[i] = posts[i / num_ranks].per_rank[i % num_ranks];
    if (!args.expand && thread < num_ranks) {
        int32_t start = 0;
        for (int source = 0; source < args.rank; ++source) start += posts[source].per_rank[thread];
        args.key_starts[thread] = start;
    }
    int64_t total = 0, before = 0;
    if (thread < args.num_experts) {
        for (int source = 0; source < num_ranks; ++source) {
            if (source == args.rank) before = total;
            total += posts[source].per_expert[thread];
        }
        args.report->per_expert[thread] = total;
    }
    if (!args.expand) return;
    // Sums of the blocks of the experts before, among those of the same rank. More than 2^31 rows
    // wrap here; the host, which adds in 64 bits, then stops the call.
    const auto rows =
        static_cast<uint32_t>((total + args.alignment - 1) / args.alignment * args.alignment);
    uint32_t sum = rows;
    for (int distance = 1; distance < args.experts_per_rank; distance *= 2) {
        scanned[thread] = sum;
        __syncthreads();
        if (thread % args.experts_per_rank >= distance) sum += scanned[thread - distance];
        __syncthreads();
    }
    if (thread < args.num_experts)
        args.key_starts[thread] = static_cast<int32_t>(sum - rows + static_cast<uint32_t>(before));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kNotifyThreads)
    ep_notify_kernel(const __grid_constant__ NotifyArgs args) {
    __shared__ Post post;
    __shared__ uint32_t scanned[kNotifyThreads];
    const int thread = threadIdx.x;
    const uint32_t epoch = next_epoch(args.state->epoch);
    for (int i = thread; i < static_cast<int>(sizeof(PostHead) / 4); i += kNotifyThreads)
        reinterpret_cast<uint32_t*>(&post.head)[i] =
            reinterpret_cast<const uint32_t*>(&args.head)[i];
    if (args.has_counts) sum_blocks(args, post);
    __syncthreads();
    if (args.has_counts && thread == 0) report_bad_index(args, post.head);
    __syncthreads();
    push_post(args, post, epoch);

    const Control* own = args.control[args.rank];
    bool is_there = true;
    if (thread < args.num_ranks) {
        const uint32_t seen = wait_for_epoch(&own->posted[thread], epoch, args.timeout_ns);
        is_there = static_cast<int32_t>(seen - epoch) >= 0;
        args.report->seen[thread] = seen;
    }
    // From here on every thread sees every post.
    const bool are_all_there = __syncthreads_and(is_there);
    const Post* posts = own->posts[epoch % 2];
    bool is_agreed = are_all_there;
    if (are_all_there) {
        is_agreed = __syncthreads_and(thread >= args.num_ranks ||
                                      agrees(posts[thread].head, posts[0].head));
        const int words_per_head = sizeof(PostHead) / 16;
        for (int i = thread; i < args.num_ranks * words_per_head; i += kNotifyThreads)
            reinterpret_cast<uint4*>(args.report->heads)[i] =
                reinterpret_cast<const uint4*>(&posts[i / words_per_head].head)[i % words_per_head];
        if (is_agreed && args.has_counts) address(args, posts, scanned);
    }
    if (thread == 0) {
        *args.state = {epoch, is_agreed};
        args.report->epoch = epoch;
        args.report->status = is_agreed ? kAgreed : are_all_there ? kDisagreed : kTimedOut;
    }
    __syncthreads();  // all threads' part of the report before the flag
    if (thread == 0) store_release_system(&args.report->ticket, args.ticket);
}

extern "C" __global__ void __launch_bounds__(kArriveThreads)
    ep_arrive_kernel(const __grid_constant__ ArriveArgs args) {
    const int thread = threadIdx.x;
    const bool is_rank = thread < args.num_ranks;
    const uint32_t epoch = args.state->epoch;
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
