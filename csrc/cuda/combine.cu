// Pull: every rank reads its tokens' rows where they are and sums them, in the nested order of the
// CPU backends: the biases, then rank after rank, each rank's rows in slot order first; one
// rounding. Rows that peers cannot reach are staged into the arena before; a rank that reduces
// stages the sum of a token's rows in place of the first of them, and only that is read. Nothing
// here waits: ep_notify_kernel, before on the same stream, has seen that all rows are there.
#include "cuda/links.cuh"
#include "cuda/protocol.h"
#include "cuda/rows.cuh"

namespace ep::cuda {
namespace {

constexpr int kUnroll = 2;  // 16-byte pieces of a row that a lane sums at once

/// One piece of a row, or of a sum.
template <class D>
struct Piece {
    Lanes<D> lanes[kUnroll];

    __device__ __forceinline__ void set(const uint4 (&bits)[kUnroll]) {
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) lanes[i].set(bits[i]);
    }
    __device__ __forceinline__ void operator+=(const Piece& other) {
#pragma unroll
        for (int i = 0; i < kUnroll; ++i) lanes[i] += other.lanes[i];
    }
};

/// A token's rows, in the order of the sum.
struct Addends {
    const char* row;        // this lane's
    unsigned rows;          // lanes that have one
    unsigned group_starts;  // lanes whose row is the first from its rank
};

/// Sum the biases and rows of one piece; at least two of them in all. Unless they are nested, the
/// rows are all of one rank.
template <class D, bool kIsNested>
__device__ __forceinline__ void sum_piece(const Addends& addends,
                                          const char* bias_0,
                                          const char* bias_1,
                                          int at,
                                          int num_bytes,
                                          Piece<D>& total) {
    uint4 bits[kUnroll], next[kUnroll];
    Piece<D> row, partial;
    bool has_total = bias_0 != nullptr, has_partial = false;
    const auto add = [&](const Piece<D>& addend) {
        if (has_total)
            total += addend;
        else
            total = addend;
        has_total = true;
    };
    if (addends.rows != 0)
        load_pieces(from_lane(addends.row, __ffs(addends.rows) - 1), at, num_bytes, next);
    if (bias_0 != nullptr) {
        load_pieces(bias_0, at, num_bytes, bits);
        total.set(bits);
    }
    if (bias_1 != nullptr) {
        load_pieces(bias_1, at, num_bytes, bits);
        row.set(bits);
        total += row;
    }
    for (unsigned left = addends.rows; left != 0;) {
        const int lane = __ffs(left) - 1;
        left &= left - 1;
        row.set(next);
        // The next row is on its way while this one is added.
        if (left != 0) load_pieces(from_lane(addends.row, __ffs(left) - 1), at, num_bytes, next);
        if (!kIsNested) {
            add(row);
            continue;
        }
        if ((addends.group_starts >> lane & 1) == 0) {
            partial += row;
            continue;
        }
        if (has_partial) add(partial);
        partial = row;
        has_partial = true;
    }
    if (has_partial) add(partial);
}

/// Sum a row's biases and addends into `out`; zeros where there are none. Rows that are not nested
/// are at least one.
template <class D, bool kIsNested = true>
__device__ __forceinline__ void sum_row(
    const Addends& addends, const char* bias_0, const char* bias_1, char* out, int num_bytes) {
    const int num_addends = __popc(addends.rows) + (bias_0 != nullptr) + (bias_1 != nullptr);
    const char* only =
        bias_0 != nullptr ? bias_0 : from_lane(addends.row, (__ffs(addends.rows) - 1) & 31);
    const int lane_at = threadIdx.x % kWarpSize * kLaneBytes;
    for (int step = 0; step < num_bytes; step += kUnroll * kStepBytes) {
        const int at = step + lane_at;
        uint4 bits[kUnroll];
        if (kIsNested && num_addends == 0) {
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) bits[i] = make_uint4(0, 0, 0, 0);
        } else if (num_addends == 1) {  // its bits, a NaN's payload included
            load_pieces(only, at, num_bytes, bits);
        } else {
            Piece<D> total;
            sum_piece<D, kIsNested>(addends, bias_0, bias_1, at, num_bytes, total);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) bits[i] = total.lanes[i].round();
        }
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (at + i * kStepBytes < num_bytes) store_16(out + at + i * kStepBytes, bits[i]);
    }
}

/// Where this lane's row is, and whether it stands for all of its token's at that rank.
struct Source {
    const char* rows;
    const char* weights;
    bool is_reduced;
};

__device__ __forceinline__ Source source_of(const CombineArgs& args, int rank) {
    if (args.state != nullptr)
        return {args.state->rows[rank], args.state->weights[rank],
                args.state->is_reduced[rank] != 0};
    return {args.from_x[rank], args.from_weights[rank], args.is_reduced[rank] != 0};
}

/// Weights come back likewise, lane k for slot k; in their own dtype.
template <class Weight>
__device__ __forceinline__ void sum_weights(
    const CombineArgs& args, int num_rows, const char* weights, int row, int slot, int64_t token) {
    const int lane = threadIdx.x % kWarpSize;
    Weight total{0};
    for (int k = 0; k < num_rows; ++k) {
        const auto* from = reinterpret_cast<const Weight*>(from_lane(weights, k));
        const int from_row = from_lane(row, k), from_slot = from_lane(slot, k);
        if (args.expand) {
            if (lane == from_slot) total = load_global(from + from_row);
        } else if (lane < args.num_topk) {
            const Weight value =
                load_global(from + static_cast<int64_t>(from_row) * args.num_topk + lane);
            total = k == 0 ? value : total + value;  // -0.0 must survive
        }
    }
    if (lane < args.num_topk)
        reinterpret_cast<Weight*>(args.out_weights)[token * args.num_topk + lane] = total;
}

template <class D>
__device__ __forceinline__ void combine(const CombineArgs& args) {
    if (args.state != nullptr && args.state->is_agreed == 0) return;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    const Tokens tokens = tokens_of(args.pile, args.num_tokens);
    for (int64_t token = tokens.begin + warp; token < tokens.end; token += num_warps) {
        const int64_t at = token * args.num_topk + lane;
        int rank = -1, row = 0, slot = 0;
        if (lane < args.num_topk) rank = args.routes[at];
        Source source{nullptr, nullptr, false};
        if (rank >= 0) {
            row = args.routes[args.route_plane + at];
            slot = args.routes[2 * args.route_plane + at];
            source = source_of(args, rank);
        }
        const unsigned routes = __ballot_sync(kAllLanes, rank >= 0);
        const int rank_before = __shfl_up_sync(kAllLanes, rank, 1);
        const bool is_first = lane == 0 || rank != rank_before;
        const bool is_read = rank >= 0 && (is_first || !source.is_reduced);
        Addends addends;
        addends.rows = __ballot_sync(kAllLanes, is_read);
        addends.group_starts = __ballot_sync(kAllLanes, is_first);
        addends.row = source.rows + static_cast<int64_t>(row) * args.row_bytes;
        const int64_t offset = token * args.row_bytes;
        sum_row<D>(addends, args.bias_0 == nullptr ? nullptr : args.bias_0 + offset,
                   args.bias_1 == nullptr ? nullptr : args.bias_1 + offset, args.out + offset,
                   args.row_bytes);
        if (args.weight_bytes == 4)
            sum_weights<float>(args, __popc(routes), source.weights, row, slot, token);
        if (args.weight_bytes == 8)
            sum_weights<double>(args, __popc(routes), source.weights, row, slot, token);
    }
}

/// Of `num_bytes`, those of the rows that are there.
__device__ __forceinline__ int64_t bytes_there(const StageArgs& args,
                                               int64_t num_bytes,
                                               int row_bytes) {
    return args.num_rows == nullptr ? num_bytes : static_cast<int64_t>(*args.num_rows) * row_bytes;
}

__device__ __forceinline__ void stage_weights(const StageArgs& args) {
    const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t num_bytes = bytes_there(args, args.num_weight_bytes, args.weight_row_bytes);
#pragma unroll 1
    for (int64_t at = thread * 4; at < num_bytes; at += num_threads * 4)
        *reinterpret_cast<uint32_t*>(args.to_weights + at) =
            *reinterpret_cast<const uint32_t*>(args.weights + at);
}

template <class D>
__device__ __forceinline__ void reduce(const ReduceArgs& args) {
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    const int64_t num_rows = args.stage.num_rows == nullptr ? args.num_rows : *args.stage.num_rows;
    for (int64_t head = warp; head < num_rows; head += num_warps) {
        if (args.links[head].head != head) continue;
        const int64_t mine = row_of_token(args.links, head);
        const Addends addends{args.stage.rows + mine * args.row_bytes,
                              __ballot_sync(kAllLanes, mine >= 0), 1u};
        sum_row<D, false>(addends, nullptr, nullptr, args.stage.to_rows + head * args.row_bytes,
                          args.row_bytes);
    }
    stage_weights(args.stage);
}

}  // namespace

#define EP_ROW_KERNEL extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)

EP_ROW_KERNEL ep_stage_kernel(const __grid_constant__ StageArgs args) {
    constexpr int kLoads = 4;
    const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t num_bytes = bytes_there(args, args.num_row_bytes, args.row_bytes);
    for (int64_t at = thread * kLaneBytes; at < num_bytes;
         at += kLoads * num_threads * kLaneBytes) {
        uint4 values[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            if (at + i * num_threads * kLaneBytes < num_bytes)
                values[i] = load_16(args.rows + at + i * num_threads * kLaneBytes);
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            if (at + i * num_threads * kLaneBytes < num_bytes)
                store_16(args.to_rows + at + i * num_threads * kLaneBytes, values[i]);
    }
    stage_weights(args);
}

EP_ROW_KERNEL ep_reduce_bfloat16_kernel(const __grid_constant__ ReduceArgs args) {
    reduce<BFloat16>(args);
}
EP_ROW_KERNEL ep_reduce_float16_kernel(const __grid_constant__ ReduceArgs args) {
    reduce<Float16>(args);
}
EP_ROW_KERNEL ep_reduce_float32_kernel(const __grid_constant__ ReduceArgs args) {
    reduce<Float32>(args);
}
EP_ROW_KERNEL ep_reduce_float64_kernel(const __grid_constant__ ReduceArgs args) {
    reduce<Float64>(args);
}

EP_ROW_KERNEL ep_combine_bfloat16_kernel(const __grid_constant__ CombineArgs args) {
    combine<BFloat16>(args);
}
EP_ROW_KERNEL ep_combine_float16_kernel(const __grid_constant__ CombineArgs args) {
    combine<Float16>(args);
}
EP_ROW_KERNEL ep_combine_float32_kernel(const __grid_constant__ CombineArgs args) {
    combine<Float32>(args);
}
EP_ROW_KERNEL ep_combine_float64_kernel(const __grid_constant__ CombineArgs args) {
    combine<Float64>(args);
}

}  // namespace ep::cuda
