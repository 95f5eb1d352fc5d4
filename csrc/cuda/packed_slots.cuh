#pragma once
// The token slots of a low-latency call as a warp sees them. The place of a slot among those of its
// expert is counted again wherever it is needed: for the few tokens of these calls that costs less
// than a kernel, or a barrier, between those who count and those who read.
#include "cuda/packed_protocol.h"
#include "cuda/rows.cuh"

namespace ep::cuda {

/// The expert of a slot; -1 where unused, out of range, or past the end.
__device__ __forceinline__ int expert_of(const PackedArgs& args, int64_t slot) {
    if (slot >= args.num_tokens * args.num_topk) return -1;
    const int64_t expert = args.is_int64 ? static_cast<const int64_t*>(args.topk_idx)[slot]
                                         : static_cast<const int32_t*>(args.topk_idx)[slot];
    return expert < 0 || expert >= args.num_experts ? -1 : static_cast<int>(expert);
}

/// Lane k: how many slots before slot k of the token have its expert. All lanes take part.
__device__ __forceinline__ int place_of(const PackedArgs& args, int64_t token, int expert) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t first = token * args.num_topk;
    int place = 0;
#pragma unroll 1
    for (int64_t base = 0; base < first + args.num_topk; base += kWarpSize) {
        const int64_t slot = base + lane;
        const int other = slot < first + args.num_topk ? expert_of(args, slot) : -1;
        for (int k = 0; k < args.num_topk; ++k) {
            const int wanted = from_lane(expert, k);
            const unsigned same = __ballot_sync(kAllLanes, other == wanted && slot < first + k);
            if (lane == k) place += __popc(same);
        }
    }
    return place;
}

/// How many slots have an expert. All lanes of a warp take part and get the answer.
__device__ __forceinline__ int count_of(const PackedArgs& args, int expert) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_slots = args.num_tokens * args.num_topk;
    int count = 0;
#pragma unroll 1
    for (int64_t base = 0; base < num_slots; base += kWarpSize)
        count += __popc(__ballot_sync(kAllLanes, expert_of(args, base + lane) == expert));
    return count;
}

/// Whether an entry of layout_range is one that dispatch can have written.
__device__ __forceinline__ bool is_inside(const PackedArgs& args, int64_t range) {
    const int64_t begin = range >> 32, count = range & 0xffffffff;
    return begin >= 0 && count <= args.max_tokens &&
           begin + count <= static_cast<int64_t>(args.num_ranks) * args.max_tokens;
}

/// Whether a rank's memory is out of reach.
__device__ __forceinline__ bool is_far(const PackedArgs& args, int rank) {
    return args.control[rank] == nullptr;
}

/// The number of the call, as begin has counted it.
__device__ __forceinline__ uint64_t number_of(const PackedArgs& args) {
    return args.state->calls[args.call];
}

/// Where in a window the call's own of two places is; `first` is that of even calls.
__device__ __forceinline__ uint64_t place_at(const PackedArgs& args, uint64_t first) {
    return first + number_of(args) % 2 * args.place_bytes;
}

/// What leaves for a far rank in this call is laid here, and nothing else ever is: it stays as it
/// was where that rank is masked, and a card may still be reading.
__device__ __forceinline__ char* outbox_of(const PackedArgs& args, int rank) {
    return args.window[args.rank] + place_at(args, args.outbox) + rank * args.part_bytes;
}

/// Slot 0 of a block. Before it are the tags, the tokens' indices at their source, the i-th at
/// `tag_of`: so the first n slots and their tags are one piece of memory, for every n.
__device__ __forceinline__ char* block_at(const PackedArgs& args, char* blocks, int64_t number) {
    const int64_t tag_bytes = (static_cast<int64_t>(args.max_tokens) * 4 + 15) / 16 * 16;
    return blocks + number * static_cast<int64_t>(args.block_bytes) + tag_bytes;
}

__device__ __forceinline__ char* tag_of(char* block, int64_t place) {
    return block - (place + 1) * 4;
}

/// Row 0 of the rows that a source has at a local expert.
__device__ __forceinline__ int64_t first_slot(const PackedArgs& args, int local, int source) {
    return (static_cast<int64_t>(local) * args.num_ranks + source) * args.max_tokens;
}

/// Call `row(pair, i)` for the rows i of every block, a warp per row, rows in turn; a block is a
/// (local expert, rank) pair with `count(pair)` rows.
template <class Count, class Row>
__device__ __forceinline__ void for_rows(const PackedArgs& args, Count count, Row row) {
    const int num_warps = static_cast<int>(gridDim.x) * kRowWarps;
    const int warp = static_cast<int>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    int before = 0;  // rows of the blocks before, modulo the warps
#pragma unroll 1
    for (int pair = 0; pair < args.num_experts; ++pair) {
        const int rows = count(pair);
        int first = warp - before;
        if (first < 0) first += num_warps;
#pragma unroll 1
        for (int i = first; i < rows; i += num_warps) row(pair, i);
        before = (before + rows) % num_warps;
    }
}

/// Copy `num_bytes` (a multiple of 16) by a warp.
__device__ __forceinline__ void copy_whole_row(const char* from, char* to, int num_bytes) {
    constexpr int kUnroll = 4;
    const int lane_at = threadIdx.x % kWarpSize * kLaneBytes;
#pragma unroll 1
    for (int step = lane_at; step < num_bytes; step += kUnroll * kStepBytes) {
        uint4 values[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (step + i * kStepBytes < num_bytes)
                values[i] = load_16(from + step + i * kStepBytes);
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (step + i * kStepBytes < num_bytes) store_16(to + step + i * kStepBytes, values[i]);
    }
}

}  // namespace ep::cuda
