#pragma once
// Rows as a warp sees them: 16 bytes per lane, sums in float32 (float64 for float64), casts.
#include <cstdint>

#include "cuda/protocol.h"
#include "cuda/ptx.cuh"

namespace ep::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLaneBytes = 16;  // every row is a multiple of it
constexpr int kStepBytes = 32 * kLaneBytes;

template <class T>
__device__ __forceinline__ T from_lane(T value, int lane) {
    return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
__device__ __forceinline__ T* from_lane(T* pointer, int lane) {
    return reinterpret_cast<T*>(
        __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(pointer), lane));
}

// The compiler does not know that a pointer from another lane, or from memory, is one to global
// memory.
template <class T>
__device__ __forceinline__ T load_global(const T* from) {
    __builtin_assume(__isGlobal(from));
    return *from;
}
template <class T>
__device__ __forceinline__ void store_global(T* to, T value) {
    __builtin_assume(__isGlobal(to));
    *to = value;
}
__device__ __forceinline__ uint4 load_16(const char* from) {
    __builtin_assume(__isGlobal(from));
    return *reinterpret_cast<const uint4*>(from);
}
__device__ __forceinline__ void store_16(char* to, uint4 value) {
    __builtin_assume(__isGlobal(to));
    *reinterpret_cast<uint4*>(to) = value;
}
__device__ __forceinline__ void store_4(char* to, uint32_t value) {
    __builtin_assume(__isGlobal(to));
    *reinterpret_cast<uint32_t*>(to) = value;
}
__device__ __forceinline__ void store_1(char* to, uint8_t value) {
    __builtin_assume(__isGlobal(to));
    *reinterpret_cast<uint8_t*>(to) = value;
}

/// Every `kStepBytes`-th 16 bytes of a row from `at` on; zeros behind its end.
template <int kUnroll>
__device__ __forceinline__ void load_pieces(const char* row,
                                            int at,
                                            int num_bytes,
                                            uint4 (&bits)[kUnroll]) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
        bits[i] = make_uint4(0, 0, 0, 0);
        if (at + i * kStepBytes < num_bytes) bits[i] = load_16(row + at + i * kStepBytes);
    }
}

// Per dtype: the lanes of 16 bytes as accumulators; read, add and round them back. A NaN becomes
// the positive quiet NaN without payload, as in csrc/cpu/row_lanes.h.

struct BFloat16 {
    using Sum = float;
    static constexpr int kLanes = 8;
    static __device__ __forceinline__ void read(uint32_t word, float* out) {
        out[0] = __uint_as_float(word << 16);
        out[1] = __uint_as_float(word & 0xffff0000u);
    }
    static __device__ __forceinline__ uint32_t round(const float* sum) {
        const uint32_t word = to_bfloat16x2(sum[0], sum[1]);
        const uint32_t low = sum[0] == sum[0] ? word & 0xffffu : 0x7fc0u;
        return low | (sum[1] == sum[1] ? word & 0xffff0000u : 0x7fc00000u);
    }
};

struct Float16 {
    using Sum = float;
    static constexpr int kLanes = 8;
    static __device__ __forceinline__ void read(uint32_t word, float* out) {
        out[0] = from_float16(word & 0xffffu);
        out[1] = from_float16(word >> 16);
    }
    static __device__ __forceinline__ uint32_t round(const float* sum) {
        const uint32_t word = to_float16x2(sum[0], sum[1]);
        const uint32_t low = sum[0] == sum[0] ? word & 0xffffu : 0x7e00u;
        return low | (sum[1] == sum[1] ? word & 0xffff0000u : 0x7e000000u);
    }
};

struct Float32 {
    using Sum = float;
    static constexpr int kLanes = 4;
    static __device__ __forceinline__ void read(uint32_t word, float* out) {
        out[0] = __uint_as_float(word);
    }
    static __device__ __forceinline__ uint32_t round(const float* sum) {
        return sum[0] == sum[0] ? __float_as_uint(sum[0]) : 0x7fc00000u;
    }
};

template <class D>
struct Lanes {
    static constexpr int kPerWord = D::kLanes / 4;
    typename D::Sum lane[D::kLanes];

    __device__ __forceinline__ void set(uint4 bits) {
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) D::read(words[i], lane + i * kPerWord);
    }
    __device__ __forceinline__ uint4 round() const {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = D::round(lane + i * kPerWord);
        return {words[0], words[1], words[2], words[3]};
    }
    __device__ __forceinline__ void operator+=(const Lanes& other) {
#pragma unroll
        for (int i = 0; i < D::kLanes; ++i) lane[i] += other.lane[i];
    }
};

struct Float64;  // 8 bytes are two words
template <>
struct Lanes<Float64> {
    double lane[2];

    __device__ __forceinline__ void set(uint4 bits) {
        lane[0] = __hiloint2double(static_cast<int>(bits.y), static_cast<int>(bits.x));
        lane[1] = __hiloint2double(static_cast<int>(bits.w), static_cast<int>(bits.z));
    }
    __device__ __forceinline__ uint4 round() const {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool is_number = lane[i] == lane[i];
            words[2 * i] = is_number ? static_cast<uint32_t>(__double2loint(lane[i])) : 0u;
            words[2 * i + 1] =
                is_number ? static_cast<uint32_t>(__double2hiint(lane[i])) : 0x7ff80000u;
        }
        return {words[0], words[1], words[2], words[3]};
    }
    __device__ __forceinline__ void operator+=(const Lanes& other) {
        lane[0] += other.lane[0];
        lane[1] += other.lane[1];
    }
};

// The cast of ep_megatron/fp8.py, bit for bit: a lane holds 16 columns.

constexpr int kCastStep = 32 * kCastColumns;

struct CastRow {
    uint4 data;      // 16 e4m3 numbers
    uint32_t scale;  // of the block, in all of its lanes: the bits of a float32
};

/// Cast 16 columns of type D at `x`; zeros where the lane is past the row. All lanes take part.
template <class D>
__device__ __forceinline__ CastRow cast_columns(const char* x,
                                                bool is_active,
                                                const CastRecipe& recipe) {
    constexpr int kLoads = kCastColumns / D::kLanes;
    Lanes<D> values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
        values[i].set(is_active ? load_16(x + i * kLaneBytes) : make_uint4(0, 0, 0, 0));
    // Magnitudes compare as integers, and a NaN or infinity is larger than all others.
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
#pragma unroll
        for (int j = 0; j < D::kLanes; ++j)
            largest = max(largest, __float_as_uint(values[i].lane[j]) & 0x7fffffffu);
    for (int distance = 1; distance < recipe.lanes_per_block; distance *= 2)
        largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    const bool is_finite = largest < 0x7f800000u;
    const float amax = fmaxf(__uint_as_float(is_finite ? largest : 0u), recipe.min_amax);
    uint32_t scale = __float_as_uint(__fdiv_rn(amax, 448.0f));
    float factor;
    if (recipe.scale_format == kFloat32Scales) {
        factor = __fdiv_rn(448.0f, amax);
    } else {  // up to a power of two, whose reciprocal is exact
        scale = (scale + 0x7fffffu) & 0x7f800000u;
        factor = __uint_as_float((254u << 23) - scale);
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float four[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int column = 4 * i + j;
            four[j] = __fmul_rn(values[column / D::kLanes].lane[column % D::kLanes], factor);
        }
        words[i] = to_e4m3x2(four[0], four[1]) | to_e4m3x2(four[2], four[3]) << 16;
        if (!is_finite) words[i] = 0x7f7f7f7fu;
    }
    return {{words[0], words[1], words[2], words[3]}, is_finite ? scale : 0x7fc00000u};
}

/// Put a block's scale into a row's scales; one lane of the block does.
__device__ __forceinline__ void store_scale(char* scales,
                                            int column,
                                            uint32_t scale,
                                            const CastRecipe& recipe) {
    const int lane = column / kCastColumns;
    if (lane % recipe.lanes_per_block != 0) return;
    const int block = lane / recipe.lanes_per_block;
    if (recipe.scale_format == kPackedScales)
        store_1(scales + block, static_cast<uint8_t>(scale >> 23));
    else
        store_4(scales + block * 4, scale);
}

/// Which of the tokens of an array a launch is about.
struct Tokens {
    int64_t begin, end;
};

__device__ __forceinline__ Tokens tokens_of(const CrossPile* pile, int64_t num_tokens) {
    if (pile == nullptr) return {0, num_tokens};
    return {pile->start, int64_t{pile->start} + pile->count};
}

}  // namespace ep::cuda
