// Push: a row goes straight to its address at each of its destination ranks, read once, cast on the
// way if asked. Where a rank has several of a token's experts, the row crosses once, to the first
// of its places there; a link says which others it belongs to, and ep_expand_kernel copies it
// there. A warp takes a token; lane k holds the token's k-th route. No kernel here waits or raises
// a flag: the rows are told of by ep_arrive_kernel, which comes after on the same stream.
#include "cuda/protocol.h"
#include "cuda/push.cuh"

namespace ep::cuda {
namespace {

/// A token's routes, one per lane, the used ones first; those of one rank stand side by side.
struct Routes {
    int num_routes;
    int rank, row, slot;  // this lane's; rank -1 where it has none
    RowLink link;         // of this lane's row to the others of its rank
};

__device__ __forceinline__ Routes load_routes(const DispatchArgs& args, int64_t token) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t at = token * args.num_topk + lane;
    Routes routes{0, -1, 0, 0, {0, -1}};
    if (lane < args.num_topk) routes.rank = args.routes[at];
    if (routes.rank >= 0) {
        routes.row = args.routes[args.route_plane + at];
        routes.slot = args.routes[2 * args.route_plane + at];
    }
    routes.num_routes = __popc(__ballot_sync(kAllLanes, routes.rank >= 0));
    const int rank_before = __shfl_up_sync(kAllLanes, routes.rank, 1);
    const unsigned heads = __ballot_sync(kAllLanes, lane == 0 || routes.rank != rank_before);
    const unsigned up_to_lane = kAllLanes >> (kWarpSize - 1 - lane);
    routes.link.head = from_lane(routes.row, kWarpSize - 1 - __clz(heads & up_to_lane));
    const int row_behind = __shfl_down_sync(kAllLanes, routes.row, 1);
    if (lane + 1 < routes.num_routes && (heads >> (lane + 1) & 1) == 0)
        routes.link.next = row_behind;
    return routes;
}

/// Where a part of a rank's rows starts.
template <class Part>
__device__ __forceinline__ Part* start_of(const DispatchArgs& args, Part* const* starts, int rank) {
    if (args.state == nullptr) return starts[rank];
    return reinterpret_cast<Part*>(args.state->rows[rank] +
                                   reinterpret_cast<uintptr_t>(starts[rank]));
}

/// Where this lane's route puts a part of the row, or null: a row that is not the first of its
/// token at a rank is copied there.
__device__ __forceinline__ char* target(const DispatchArgs& args,
                                        char* const* starts,
                                        const Routes& routes,
                                        int num_bytes) {
    if (routes.rank < 0 || routes.link.head != routes.row) return nullptr;
    if (args.state == nullptr && starts[routes.rank] == nullptr) return nullptr;
    return start_of(args, starts, routes.rank) + static_cast<int64_t>(routes.row) * num_bytes;
}

/// Expert ids and weights of a row that stands for all of its token's slots on a rank: lane k does
/// slot k, as seen from the destination.
template <class Weight>
__device__ __forceinline__ void push_columns(const DispatchArgs& args,
                                             const Routes& routes,
                                             int64_t token) {
    if (args.weight_bytes == 0 && args.idx_bytes == 0) return;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t at = token * args.num_topk + lane;
    int expert = -1;
    Weight weight{0};
    if (lane < args.num_topk) {
        expert = args.is_int64 ? static_cast<int>(static_cast<const int64_t*>(args.topk_idx)[at])
                               : static_cast<const int32_t*>(args.topk_idx)[at];
        if (args.weight_bytes != 0) weight = reinterpret_cast<const Weight*>(args.weights)[at];
    }
    const int rank_of_expert = expert < 0 ? -1 : expert / args.experts_per_rank;
    for (int route = 0; route < routes.num_routes; ++route) {
        const int rank = from_lane(routes.rank, route);
        const int64_t place =
            static_cast<int64_t>(from_lane(routes.row, route)) * args.num_topk + lane;
        if (lane >= args.num_topk) continue;
        const bool is_local = rank_of_expert == rank;
        const int local = is_local ? expert % args.experts_per_rank : -1;
        char* to_idx = start_of(args, args.to_idx, rank);
        if (args.idx_bytes == 8)
            store_global(reinterpret_cast<int64_t*>(to_idx) + place, int64_t{local});
        if (args.idx_bytes == 4) store_global(reinterpret_cast<int32_t*>(to_idx) + place, local);
        if (args.weight_bytes != 0)
            store_global(reinterpret_cast<Weight*>(start_of(args, args.to_weights, rank)) + place,
                         is_local ? weight : Weight{0});
    }
}

/// What belongs to a row beside its data. Every lane of a route does its own where it can.
template <class Weight>
__device__ __forceinline__ void push_beside(const DispatchArgs& args,
                                            const Routes& routes,
                                            int64_t token) {
    if (!args.expand) {
        push_columns<Weight>(args, routes, token);
        return;
    }
    if (routes.rank < 0) return;
    if (args.weight_bytes != 0)
        store_global(
            reinterpret_cast<Weight*>(start_of(args, args.to_weights, routes.rank)) + routes.row,
            reinterpret_cast<const Weight*>(args.weights)[token * args.num_topk + routes.slot]);
    if (args.link_bytes != 0)
        store_global(start_of(args, args.to_links, routes.rank) + routes.row, routes.link);
}

/// Fill an item of at most 128 bytes.
__device__ __forceinline__ void fill_item(char* item, int num_bytes, uint32_t word) {
    const int at = threadIdx.x % kWarpSize * 4;
    if (at < num_bytes) store_4(item + at, word);
}

/// Zero the padding rows of this rank's blocks; nobody else writes them. Warps take them in turn.
__device__ __forceinline__ void clear_padding(const DispatchArgs& args,
                                              int64_t warp,
                                              int64_t num_warps) {
    if (!args.expand || args.alignment == 1) return;
    char* to_x = start_of(args, args.to_x, args.rank);
    char* to_scales = start_of(args, args.to_scales, args.rank);
    char* to_weights = start_of(args, args.to_weights, args.rank);
    RowLink* to_links = start_of(args, args.to_links, args.rank);
    int64_t block_start = 0, num_before = 0;  // padding rows of the blocks before
    for (int expert = 0; expert < args.experts_per_rank; ++expert) {
        const int64_t valid = args.valid[expert];
        const int64_t end = (valid + args.alignment - 1) / args.alignment * args.alignment;
        int64_t first = (warp - num_before) % num_warps;
        if (first < 0) first += num_warps;
        for (int64_t row = block_start + valid + first; row < block_start + end; row += num_warps) {
            char* x = to_x + row * args.out_row_bytes;
            for (int at = threadIdx.x % kWarpSize * kLaneBytes; at < args.out_row_bytes;
                 at += kStepBytes)
                store_16(x + at, make_uint4(0, 0, 0, 0));
            char* scales = to_scales + row * args.scale_bytes;
            for (int at = threadIdx.x % kWarpSize * 4; at < args.scale_bytes; at += kWarpSize * 4)
                store_4(scales + at, 0);
            fill_item(to_weights + row * args.weight_bytes, args.weight_bytes, 0);
            fill_item(reinterpret_cast<char*>(to_links + row), args.link_bytes, kNoRow);
        }
        block_start += end;
        num_before += end - valid;
    }
}

template <class MoveRow>
__device__ __forceinline__ void push(const DispatchArgs& args, MoveRow move_row) {
    if (args.state != nullptr && args.state->is_agreed == 0) return;
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    const Tokens tokens = tokens_of(args.pile, args.num_tokens);
    for (int64_t token = tokens.begin + warp; token < tokens.end; token += num_warps) {
        const Routes routes = load_routes(args, token);
        if (routes.num_routes == 0) continue;
        move_row(args.x + token * args.row_bytes, routes, token);
        if (args.weight_bytes == 8)
            push_beside<double>(args, routes, token);
        else
            push_beside<float>(args, routes, token);
    }
    clear_padding(args, warp, num_warps);
}

template <class D>
__device__ __forceinline__ void push_cast(const DispatchArgs& args) {
    push(args, [&](const char* x, const Routes& routes, int64_t) {
        push_cast_row<D>(x, target(args, args.to_x, routes, args.out_row_bytes),
                         target(args, args.to_scales, routes, args.scale_bytes), args.out_row_bytes,
                         args.recipe);
    });
}

template <class D>
__device__ __forceinline__ void cast(const CastArgs& args) {
    constexpr int kSourceBytes = kLaneBytes / D::kLanes;
    const bool is_first_lane = threadIdx.x % kWarpSize == 0;
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    const int num_scale_bytes = args.hidden / (args.recipe.lanes_per_block * kCastColumns) *
                                (args.recipe.scale_format == kPackedScales ? 1 : 4);
    for (int64_t token = warp; token < args.num_tokens; token += num_warps)
        push_cast_row<D>(args.x + token * args.hidden * kSourceBytes,
                         is_first_lane ? args.data + token * args.hidden : nullptr,
                         args.scales + token * num_scale_bytes, args.hidden, args.recipe);
}

}  // namespace

#define EP_ROW_KERNEL extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)

EP_ROW_KERNEL ep_dispatch_kernel(const __grid_constant__ DispatchArgs args) {
    push(args, [&](const char* x, const Routes& routes, int64_t token) {
        push_row(x, target(args, args.to_x, routes, args.row_bytes), args.row_bytes);
        if (args.scale_bytes != 0)
            push_words(args.scales + token * args.scale_bytes,
                       target(args, args.to_scales, routes, args.scale_bytes), args.scale_bytes);
    });
}

EP_ROW_KERNEL ep_dispatch_cast_bfloat16_kernel(const __grid_constant__ DispatchArgs args) {
    push_cast<BFloat16>(args);
}
EP_ROW_KERNEL ep_dispatch_cast_float16_kernel(const __grid_constant__ DispatchArgs args) {
    push_cast<Float16>(args);
}
EP_ROW_KERNEL ep_dispatch_cast_float32_kernel(const __grid_constant__ DispatchArgs args) {
    push_cast<Float32>(args);
}

EP_ROW_KERNEL ep_cast_bfloat16_kernel(const __grid_constant__ CastArgs args) {
    cast<BFloat16>(args);
}
EP_ROW_KERNEL ep_cast_float16_kernel(const __grid_constant__ CastArgs args) { cast<Float16>(args); }
EP_ROW_KERNEL ep_cast_float32_kernel(const __grid_constant__ CastArgs args) { cast<Float32>(args); }

}  // namespace ep::cuda
