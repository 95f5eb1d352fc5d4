#pragma once
// A row to several places, read once: lane k of a warp holds the k-th place, or null. All lanes of
// a warp take part.
#include "cuda/rows.cuh"

namespace ep::cuda {

/// Copy `num_bytes` (a multiple of 16) to every place.
__device__ __forceinline__ void push_row(const char* x, char* to, int num_bytes) {
    constexpr int kUnroll = 4;  // 16-byte loads of a lane in flight
    const unsigned places = __ballot_sync(kAllLanes, to != nullptr);
    const int lane_at = threadIdx.x % kWarpSize * kLaneBytes;
    for (int step = 0; step < num_bytes; step += kUnroll * kStepBytes) {
        uint4 values[kUnroll];
        const int at = step + lane_at;
#pragma unroll
        for (int i = 0; i < kUnroll; ++i)
            if (at + i * kStepBytes < num_bytes) values[i] = load_16(x + at + i * kStepBytes);
        for (unsigned left = places; left != 0; left &= left - 1) {
            char* row = from_lane(to, __ffs(left) - 1);
#pragma unroll
            for (int i = 0; i < kUnroll; ++i)
                if (at + i * kStepBytes < num_bytes) store_16(row + at + i * kStepBytes, values[i]);
        }
    }
}

/// Copy `num_bytes` (a multiple of 4) to every place.
__device__ __forceinline__ void push_words(const char* from, char* to, int num_bytes) {
    const unsigned places = __ballot_sync(kAllLanes, to != nullptr);
    const int lane_at = threadIdx.x % kWarpSize * 4;
    for (int step = 0; step < num_bytes; step += kWarpSize * 4) {
        const int at = step + lane_at;
        const bool is_active = at < num_bytes;
        uint32_t value = 0;
        if (is_active) value = *reinterpret_cast<const uint32_t*>(from + at);
        for (unsigned left = places; left != 0; left &= left - 1) {
            char* words = from_lane(to, __ffs(left) - 1);
            if (is_active) store_4(words + at, value);
        }
    }
}

/// Cast a row of type D, `num_columns` wide, to every place, its scales to the places beside.
template <class D>
__device__ __forceinline__ void push_cast_row(
    const char* x, char* to, char* to_scales, int num_columns, const CastRecipe& recipe) {
    constexpr int kSourceBytes = kLaneBytes / D::kLanes;
    const unsigned places = __ballot_sync(kAllLanes, to != nullptr);
    const int lane = threadIdx.x % kWarpSize;
    for (int step = 0; step < num_columns; step += kCastStep) {
        const int column = step + lane * kCastColumns;
        const bool is_active = column < num_columns;
        const CastRow cast = cast_columns<D>(x + column * kSourceBytes, is_active, recipe);
        for (unsigned left = places; left != 0; left &= left - 1) {
            char* row = from_lane(to, __ffs(left) - 1);
            char* scales = from_lane(to_scales, __ffs(left) - 1);
            if (!is_active) continue;
            store_16(row + column, cast.data);
            store_scale(scales, column, cast.scale, recipe);
        }
    }
}

}  // namespace ep::cuda
