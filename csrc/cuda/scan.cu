// Planning: how many rows go where, and the exact row of each. The same numbers as
// ep_megatron/layout.py and csrc/cpu/plan.cpp, without an atomic: order is the order of tokens.
//
// A block takes a range of tokens, each of its warps a part of it in order. A warp looks at several
// tokens at once, one lane per slot; lanes with the same expert (or rank) find each other by
// match_any, so a slot's index is a count of lanes before it plus the warp's running count. `count`
// leaves sums per block, notify turns them into sums over the blocks before, `route` counts its own
// warps again (the indices are in the L2 cache) and then knows where each of them starts.
#include "cuda/protocol.h"

namespace ep::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr uint32_t kNoSlot = 0xffffffffu;

/// One lane's slot in a step of its warp, seen beside the other lanes'.
struct Slot {
    int64_t at;  // in [T, K]; beyond it where is_there is false
    bool is_there;
    bool is_bad;             // holds no expert and not -1; counted as unused
    int expert, rank;        // -1: unused
    unsigned same_expert;    // lanes
    unsigned first_of_rank;  // lanes that stand for this rank, one per token; empty where unused
    bool is_first;           // whether this lane is one of those
    // The same for nodes, where there are several.
    int node;
    unsigned same_node, first_of_node;
    bool is_first_of_node;
};

__device__ __forceinline__ Slot look(const ScanArgs& args, int64_t first_token, int64_t end) {
    const int lane = threadIdx.x % kWarpSize;
    const int lanes_per_token = 1 << args.topk_shift;
    const int64_t token = first_token + (lane >> args.topk_shift);
    const int column = lane & (lanes_per_token - 1);
    Slot slot;
    slot.at = token * args.num_topk + column;
    slot.is_there = token < end && column < args.num_topk;
    int64_t expert = -1;
    if (slot.is_there)
        expert = args.is_int64 ? static_cast<const int64_t*>(args.topk_idx)[slot.at]
                               : static_cast<const int32_t*>(args.topk_idx)[slot.at];
    slot.is_bad = expert < -1 || expert >= args.num_experts;
    slot.expert = slot.is_bad ? -1 : static_cast<int>(expert);
    slot.rank = slot.expert < 0 ? -1 : slot.expert / args.experts_per_rank;
    slot.same_expert = __match_any_sync(kAllLanes, slot.expert);
    const unsigned same_rank = __match_any_sync(kAllLanes, slot.rank);
    const unsigned before = (1u << lane) - 1;
    const unsigned own_token = (kAllLanes >> (kWarpSize - lanes_per_token))
                               << (lane & ~(lanes_per_token - 1));
    slot.is_first = slot.rank >= 0 && (same_rank & own_token & before) == 0;
    slot.first_of_rank = __ballot_sync(kAllLanes, slot.is_first) & same_rank;
    slot.node = -1;
    slot.same_node = slot.first_of_node = 0;
    slot.is_first_of_node = false;
    if (args.num_nodes == 0) return slot;
    if (slot.rank >= 0) slot.node = args.node_of[slot.rank];
    slot.same_node = __match_any_sync(kAllLanes, slot.node);
    slot.is_first_of_node = slot.node >= 0 && (slot.same_node & own_token & before) == 0;
    slot.first_of_node = __ballot_sync(kAllLanes, slot.is_first_of_node) & slot.same_node;
    return slot;
}

/// A warp's counts; null: not counted.
struct Counts {
    int32_t *by_expert, *by_rank, *by_node;
};

/// Add to one count per group of equal lanes; its lowest lane writes.
__device__ __forceinline__ void add(const Slot& slot, const Counts& counts) {
    const int lane = threadIdx.x % kWarpSize;
    if (counts.by_expert != nullptr && slot.expert >= 0 && lane == __ffs(slot.same_expert) - 1)
        counts.by_expert[slot.expert] += __popc(slot.same_expert);
    if (counts.by_rank != nullptr && slot.rank >= 0 && lane == __ffs(slot.first_of_rank) - 1)
        counts.by_rank[slot.rank] += __popc(slot.first_of_rank);
    if (slot.node >= 0 && lane == __ffs(slot.first_of_node) - 1)
        counts.by_node[slot.node] += __popc(slot.first_of_node);
    __syncwarp();  // another lane may add to the same count in the next step
}

struct Range {
    int64_t begin, end;
};

/// The tokens of this warp.
__device__ __forceinline__ Range own_tokens(const ScanArgs& args) {
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kScanWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kScanWarps + threadIdx.x / kWarpSize;
    const int64_t each = (args.num_tokens + num_warps - 1) / num_warps;
    const int64_t begin = min(warp * each, args.num_tokens);
    return {begin, min(begin + each, args.num_tokens)};
}

/// Count this warp's tokens into its own counts; returns the first bad slot, or kNoSlot.
__device__ __forceinline__ uint32_t count_tokens(const ScanArgs& args, const Counts& counts) {
    const Range tokens = own_tokens(args);
    const int tokens_per_step = kWarpSize >> args.topk_shift;
    uint32_t bad = kNoSlot;
    for (int64_t token = tokens.begin; token < tokens.end; token += tokens_per_step) {
        const Slot slot = look(args, token, tokens.end);
        if (slot.is_bad) bad = min(bad, static_cast<uint32_t>(slot.at));
        add(slot, counts);
    }
    return __reduce_min_sync(kAllLanes, bad);
}

__device__ __forceinline__ void clear(int32_t* counts, int num_counts) {
    for (int i = threadIdx.x; i < num_counts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kScanWarps* kWarpSize)
    ep_count_kernel(const __grid_constant__ ScanArgs args) {
    extern __shared__ int32_t counts[];  // [warps, E + R + N]
    __shared__ uint32_t bad[kScanWarps];
    const int num_keys = args.num_experts + args.num_ranks + args.num_nodes;
    const int warp = threadIdx.x / kWarpSize;
    clear(counts, kScanWarps * num_keys);
    int32_t* own = counts + warp * num_keys;
    int32_t* by_rank = own + args.num_experts;
    const uint32_t first_bad = count_tokens(args, {own, by_rank, by_rank + args.num_ranks});
    if (threadIdx.x % kWarpSize == 0) bad[warp] = first_bad;
    __syncthreads();
    for (int key = threadIdx.x; key < num_keys; key += blockDim.x) {
        int32_t total = 0;
        for (int w = 0; w < kScanWarps; ++w) total += counts[w * num_keys + key];
        args.block_counts[static_cast<int64_t>(blockIdx.x) * num_keys + key] = total;
    }
    if (threadIdx.x == 0) {
        uint32_t first = kNoSlot;
        for (int w = 0; w < kScanWarps; ++w) first = min(first, bad[w]);
        args.block_bad[blockIdx.x] = first;
    }
}

extern "C" __global__ void __launch_bounds__(kScanWarps* kWarpSize)
    ep_route_kernel(const __grid_constant__ ScanArgs args) {
    extern __shared__ int32_t next_rows[];  // [warps, keys]
    if (args.state->is_agreed == 0) {       // the counts are of no use; no row has a way
        const int64_t num_routes = 3 * args.num_tokens * args.num_topk;
        const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
        for (int64_t i = thread; i < num_routes; i += static_cast<int64_t>(gridDim.x) * blockDim.x)
            args.routes[i] = -1;
        const int64_t num_nodes = 3 * args.num_tokens * args.num_nodes;
        for (int64_t i = thread; i < num_nodes; i += static_cast<int64_t>(gridDim.x) * blockDim.x)
            args.by_node[i] = -1;
        return;
    }
    const int num_row_keys = args.expand ? args.num_experts : args.num_ranks;
    const int num_keys = num_row_keys + args.num_nodes;
    const int num_counts = args.num_experts + args.num_ranks + args.num_nodes;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    clear(next_rows, kScanWarps * num_keys);
    int32_t* own = next_rows + warp * num_keys;
    const Counts counts{args.expand ? own : nullptr, args.expand ? nullptr : own,
                        own + num_row_keys};
    count_tokens(args, counts);
    __syncthreads();
    const int32_t* before = args.block_counts + static_cast<int64_t>(blockIdx.x) * num_counts;
    for (int key = threadIdx.x; key < num_keys; key += blockDim.x) {
        int32_t row;  // or a token's place among those that go to a node
        if (key < num_row_keys)
            row = args.key_starts[key] + before[key + (args.expand ? 0 : args.num_experts)];
        else
            row = before[args.num_experts + args.num_ranks + key - num_row_keys] +
                  (args.node_starts == nullptr ? 0 : args.node_starts[key - num_row_keys]);
        for (int w = 0; w < kScanWarps; ++w) {
            const int32_t count = next_rows[w * num_keys + key];
            next_rows[w * num_keys + key] = row;
            row += count;
        }
    }
    __syncthreads();

    const Range tokens = own_tokens(args);
    const int tokens_per_step = kWarpSize >> args.topk_shift;
    const int lanes_per_token = 1 << args.topk_shift;
    const int first_lane = lane & ~(lanes_per_token - 1), column = lane & (lanes_per_token - 1);
    const unsigned before_lane = (1u << lane) - 1;
    const unsigned own_token = (kAllLanes >> (kWarpSize - lanes_per_token)) << first_lane;
    const int64_t plane = args.num_tokens * args.num_topk;
    for (int64_t token = tokens.begin; token < tokens.end; token += tokens_per_step) {
        const Slot slot = look(args, token, tokens.end);
        const bool has_row = args.expand ? slot.expert >= 0 : slot.is_first;
        int32_t row = -1;
        if (has_row)
            row = own[args.expand ? slot.expert : slot.rank] +
                  __popc((args.expand ? slot.same_expert : slot.first_of_rank) & before_lane);
        int32_t place_at_node = 0;
        if (slot.node >= 0)
            place_at_node = counts.by_node[slot.node] + __popc(slot.first_of_node & before_lane);
        __syncwarp();  // all lanes have read what the next line changes
        add(slot, counts);
        // A token's rows stand in ascending (rank, slot) order, then -1.
        const unsigned with_row = __ballot_sync(kAllLanes, has_row) & own_token;
        int place = 0;
        for (int other = 0; other < lanes_per_token; ++other) {
            const int rank = __shfl_sync(kAllLanes, slot.rank, first_lane + other);
            const bool is_before = rank < slot.rank || (rank == slot.rank && other < column);
            place += is_before && (with_row >> (first_lane + other) & 1);
        }
        if (!has_row) place = __popc(with_row) + __popc(~with_row & own_token & before_lane);
        if (args.num_nodes != 0) {
            const unsigned of_nodes = __ballot_sync(kAllLanes, slot.is_first_of_node) & own_token;
            int node_place = 0;  // of this lane's node among the token's
            for (int other = 0; other < lanes_per_token; ++other)
                node_place +=
                    __shfl_sync(kAllLanes, slot.is_first_of_node ? slot.node : args.num_nodes,
                                first_lane + other) < slot.node;
            const int64_t mine = token + (lane >> args.topk_shift);
            const int64_t to = mine * args.num_nodes;
            const int64_t node_plane = args.num_tokens * args.num_nodes;
            if (slot.is_first_of_node) {
                args.by_node[to + node_place] = slot.node;
                args.by_node[node_plane + to + node_place] =
                    slot.node == args.node ? static_cast<int32_t>(mine) : place_at_node;
                args.by_node[2 * node_plane + to + node_place] =
                    static_cast<int32_t>((slot.same_node & own_token) >> first_lane);
            }
            if (slot.is_there)
                for (int i = __popc(of_nodes) + column; i < args.num_nodes; i += args.num_topk)
                    for (int plane_of = 0; plane_of < 3; ++plane_of)
                        args.by_node[plane_of * node_plane + to + i] = -1;
        }
        if (!slot.is_there) continue;
        const int64_t at = slot.at - column + place;
        args.routes[at] = has_row ? slot.rank : -1;
        args.routes[plane + at] = row;
        args.routes[2 * plane + at] = has_row ? column : -1;
    }
}

}  // namespace ep::cuda
