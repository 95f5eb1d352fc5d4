// Push: every row goes straight to its address at each of its destinations, read once, cast on the
// way if asked. A warp takes a token; lane k holds the token's k-th route. No kernel here waits or
// raises a flag: the rows are told of by ep_arrive_kernel, which comes after on the same stream.
#include "cuda/protocol.h"
#include "cuda/rows.cuh"

namespace ep::cuda {
namespace {

constexpr int kUnroll = 4;  // 16-byte loads of a lane in flight

/// A token's routes, one per lane, the used ones first.
struct Routes {
    int num_routes;
    int rank, row, slot;  // this lane's; rank -1 where it has none
};

__device__ __forceinline__ Routes load_routes(const DispatchArgs& args, int64_t token) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t plane = args.num_tokens * args.num_topk;
    const int64_t at = token * args.num_topk + lane;
    Routes routes{0, -1, 0, 0};
    if (lane < args.num_topk) routes.rank = args.routes[at];
    if (routes.rank >= 0) {
        routes.row = args.routes[plane + at];
        routes.slot = args.routes[2 * plane + at];
    }
    routes.num_routes = __popc(__ballot_sync(kAllLanes, routes.rank >= 0));
    return routes;
}

/// Where this lane's route puts a part of the row, or null.
__device__ __forceinline__ char* target(char* const* starts, const Routes& routes, int num_bytes) {
    return routes.rank < 0 ? nullptr
                           : starts[routes.rank] + static_cast<int64_t>(routes.row) * num_bytes;
}

/// Copy `num_bytes` (a multiple of 16) to the target of every route.
__device__ __forceinline__ void copy_row(const char* x, char* to, int num_routes, int num_bytes) {
    const int lane_at = threadIdx.x % kWarpSize * kLaneBytes;
    for (int step = 0; step < num_bytes; step += kUnroll * kStepBytes) {
        uint4 values[kUnroll];
        const int at = step + lane_at;
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (at + i * kStepBytes < num_bytes) values[i] = load_16(x + at + i * kStepBytes);
        for (int route = 0; route < num_routes; ++route) {
            char* row = from_lane(to, route);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i)
                if (at + i * kStepBytes < num_bytes) store_16(row + at + i * kStepBytes, values[i]);
        }
    }
}

/// Copy the scales that came with a row: a multiple of 4 bytes.
__device__ __forceinline__ void copy_scales(const DispatchArgs& args,
                                            const Routes& routes,
                                            int64_t token) {
    const char* from = args.scales + token * args.scale_bytes;
    char* to = target(args.to_scales, routes, args.scale_bytes);
    const int lane_at = threadIdx.x % kWarpSize * 4;
    for (int step = 0; step < args.scale_bytes; step += kWarpSize * 4) {
        const int at = step + lane_at;
        const bool is_active = at < args.scale_bytes;
        uint32_t value = 0;
        if (is_active) value = *reinterpret_cast<const uint32_t*>(from + at);
        for (int route = 0; route < routes.num_routes; ++route) {
            char* row = from_lane(to, route);
            if (is_active) store_4(row + at, value);
        }
    }
}

/// Cast a row of type D to every route's target, scales beside it.
template <class D>
__device__ __forceinline__ void cast_row(const DispatchArgs& args,
                                         const Routes& routes,
                                         const char* x) {
    constexpr int kSourceBytes = kLaneBytes / D::kLanes;
    const int lane = threadIdx.x % kWarpSize;
    char* to = target(args.to_x, routes, args.out_row_bytes);
    char* to_scales = target(args.to_scales, routes, args.scale_bytes);
    for (int step = 0; step < args.out_row_bytes; step += kCastStep) {
        const int column = step + lane * kCastColumns;
        const bool is_active = column < args.out_row_bytes;
        const CastRow cast = cast_columns<D>(x + column * kSourceBytes, is_active, args.recipe);
        for (int route = 0; route < routes.num_routes; ++route) {
            char* row = from_lane(to, route);
            char* scales = from_lane(to_scales, route);
            if (!is_active) continue;
            store_16(row + column, cast.data);
            store_scale(scales, column, cast.scale, args.recipe);
        }
    }
}

/// Expert ids and weights of a row that stands for all of its token's slots on a rank: lane k does
/// slot k, as seen from the destination.
template <class Weight>
__device__ __forceinline__ void push_columns(const DispatchArgs& args,
                                             const Routes& routes,
                                             int64_t token) {
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
        if (args.idx_bytes == 8) reinterpret_cast<int64_t*>(args.to_idx[rank])[place] = local;
        if (args.idx_bytes == 4) reinterpret_cast<int32_t*>(args.to_idx[rank])[place] = local;
        if (args.weight_bytes != 0)
            reinterpret_cast<Weight*>(args.to_weights[rank])[place] = is_local ? weight : Weight{0};
    }
}

/// What belongs to a row beside its data. Every lane of a route does its own where it can.
template <class Weight>
__device__ __forceinline__ void push_beside(const DispatchArgs& args,
                                            const Routes& routes,
                                            int64_t token) {
    if (!args.expand) {
        push_columns<Weight>(args, routes, token);
    } else if (args.weight_bytes != 0 && routes.rank >= 0) {
        reinterpret_cast<Weight*>(args.to_weights[routes.rank])[routes.row] =
            reinterpret_cast<const Weight*>(args.weights)[token * args.num_topk + routes.slot];
    }
}

__device__ __forceinline__ void clear_row(char* row, int num_bytes) {
    for (int at = threadIdx.x % kWarpSize * 4; at < num_bytes; at += kWarpSize * 4)
        store_4(row + at, 0);
}

/// Zero the padding rows of this rank's blocks; nobody else writes them. Warps take them in turn.
__device__ __forceinline__ void clear_padding(const DispatchArgs& args,
                                              int64_t warp,
                                              int64_t num_warps) {
    if (!args.expand || args.alignment == 1) return;
    int64_t block_start = 0, num_before = 0;  // padding rows of the blocks before
    for (int expert = 0; expert < args.experts_per_rank; ++expert) {
        const int64_t valid = args.valid[expert];
        const int64_t end = (valid + args.alignment - 1) / args.alignment * args.alignment;
        int64_t first = (warp - num_before) % num_warps;
        if (first < 0) first += num_warps;
        for (int64_t row = block_start + valid + first; row < block_start + end; row += num_warps) {
            char* x = args.to_x[args.rank] + row * args.out_row_bytes;
            for (int at = threadIdx.x % kWarpSize * kLaneBytes; at < args.out_row_bytes;
                 at += kStepBytes)
                store_16(x + at, make_uint4(0, 0, 0, 0));
            clear_row(args.to_scales[args.rank] + row * args.scale_bytes, args.scale_bytes);
            clear_row(args.to_weights[args.rank] + row * args.weight_bytes, args.weight_bytes);
        }
        block_start += end;
        num_before += end - valid;
    }
}

template <class MoveRow>
__device__ __forceinline__ void push(const DispatchArgs& args, MoveRow move_row) {
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    for (int64_t token = warp; token < args.num_tokens; token += num_warps) {
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
    push(args, [&](const char* x, const Routes& routes, int64_t) { cast_row<D>(args, routes, x); });
}

template <class D>
__device__ __forceinline__ void cast(const CastArgs& args) {
    constexpr int kSourceBytes = kLaneBytes / D::kLanes;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    const int num_scale_bytes = args.hidden / (args.recipe.lanes_per_block * kCastColumns) *
                                (args.recipe.scale_format == kPackedScales ? 1 : 4);
    for (int64_t token = warp; token < args.num_tokens; token += num_warps) {
        const char* x = args.x + token * args.hidden * kSourceBytes;
        for (int step = 0; step < args.hidden; step += kCastStep) {
            const int column = step + lane * kCastColumns;
            const bool is_active = column < args.hidden;
            const CastRow row = cast_columns<D>(x + column * kSourceBytes, is_active, args.recipe);
            if (!is_active) continue;
            store_16(args.data + token * args.hidden + column, row.data);
            store_scale(args.scales + token * num_scale_bytes, column, row.scale, args.recipe);
        }
    }
}

}  // namespace

#define EP_ROW_KERNEL extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)

EP_ROW_KERNEL ep_dispatch_kernel(const __grid_constant__ DispatchArgs args) {
    push(args, [&](const char* x, const Routes& routes, int64_t token) {
        copy_row(x, target(args.to_x, routes, args.row_bytes), routes.num_routes, args.row_bytes);
        if (args.scale_bytes != 0) copy_scales(args, routes, token);
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
