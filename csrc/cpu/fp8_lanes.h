#pragma once
// Blocks of a row to e4m3 and back, a vector of floats in order at a time. Part of row_kernels.cpp
// and of no other source, like row_lanes.h. The reference of every bit is ep_megatron/fp8.py.
#include <cstdint>

#include "cpu/row_lanes.h"
#include "cpu/rows.h"

namespace ep {
namespace {

constexpr float kMaxE4m3 = 448.0f;
constexpr uint32_t kInfinity = 0x7f800000u, kQuietNan = 0x7fc00000u;
constexpr int kNanByte = 0x7f;
constexpr int kFloats = kVectorBytes / 4;  // of one vector

using Floats = Float<kVectorBytes>;
using Words = Word<kVectorBytes>;
using Ints = Vectors<kVectorBytes>::Int;
typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));

/// To the nearest e4m3, ties to even; of magnitudes that round to at most 448. As in
/// Float16::narrow, the adder rounds subnormals: 2^14 is where floats are 2^-9 apart.
inline Bytes to_e4m3(Floats x) {
    const Words sign = (Words)x & 0x80000000u;
    const Words magnitude = (Words)x ^ sign;
    const Words normal = (magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
    const Words subnormal = (Words)((Floats)magnitude + 0x1p14f) - 0x46800000u;
    const Words byte = (Ints)magnitude < 0x3c800000 ? subnormal : normal;
    return __builtin_convertvector(byte | sign >> 24, Bytes);
}

inline Floats from_e4m3(Bytes bytes) {
    const Words word = __builtin_convertvector(bytes, Words);
    const Words magnitude = word & 0x7fu;
    // Subnormals by way of integers: a float32 subnormal in between would slow some CPUs down.
    const Words subnormal = (Words)(__builtin_convertvector((Ints)magnitude, Floats) * 0x1p-9f);
    const Words normal = (magnitude << 20) + (120u << 23);
    Words bits = (Ints)magnitude < 8 ? subnormal : normal;
    bits = magnitude == kNanByte ? Words{} + kQuietNan : bits;
    return (Floats)(bits | (word & 0x80u) << 24);
}

template <int kBytes>
inline int32_t largest_lane(const char* lanes) {
    if constexpr (kBytes == 4) {
        return load<int32_t>(lanes);
    } else if constexpr (kBytes <= 16) {
        const int32_t a = largest_lane<kBytes / 2>(lanes);
        const int32_t b = largest_lane<kBytes / 2>(lanes + kBytes / 2);
        return a > b ? a : b;
    } else {
        using Half = typename Vectors<kBytes / 2>::Int;
        const Half a = load<Half>(lanes), b = load<Half>(lanes + kBytes / 2);
        const Half larger = a > b ? a : b;
        return largest_lane<kBytes / 2>(reinterpret_cast<const char*>(&larger));
    }
}

/// Write a block's e4m3 numbers; return the bits of its scale as a float32.
template <class D, int kBlock>
inline uint32_t quantize_block(char* out, const char* row, float min_amax, bool is_power_of_two) {
    constexpr int kCount = kBlock / kFloats;
    Floats x[kCount];
    Ints largest{};  // magnitudes of floats are ordered like integers, infinities and NaNs on top
    for (int i = 0; i < kCount; ++i) {
        x[i] = D::template read_floats<kVectorBytes>(row + i * kFloats * D::kItemBytes);
        const Ints magnitude = (Ints)x[i] & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const int32_t bits = largest_lane<kVectorBytes>(reinterpret_cast<const char*>(&largest));
    if (static_cast<uint32_t>(bits) >= kInfinity) {
        __builtin_memset(out, kNanByte, kBlock);
        return kQuietNan;
    }
    float amax = __builtin_bit_cast(float, bits);
    if (amax < min_amax) amax = min_amax;
    auto scale = __builtin_bit_cast(uint32_t, amax / kMaxE4m3);
    float factor = kMaxE4m3 / amax;
    if (is_power_of_two) {
        scale = (scale + 0x7fffffu) & kInfinity;
        // The reciprocal of a power of two, which is exact: multiplying by it is dividing.
        factor = __builtin_bit_cast(float, (254u << 23) - scale);
    }
    for (int i = 0; i < kCount; ++i) store<false>(out + i * kFloats, to_e4m3(x[i] * factor));
    return scale;
}

template <class D, int kBlock>
void quantize_as(const Fp8Format& format, char* out, char* scales, const char* row, size_t hidden) {
    const bool is_power_of_two = format.scales != ScaleFormat::kFloat32;
    for (size_t block = 0; block * kBlock < hidden; ++block) {
        const size_t column = block * kBlock;
        const uint32_t scale = quantize_block<D, kBlock>(out + column, row + column * D::kItemBytes,
                                                         format.min_amax, is_power_of_two);
        if (format.scales == ScaleFormat::kPackedUe8m0)
            scales[block] = static_cast<char>(scale >> 23);
        else
            store<false>(scales + 4 * block, scale);
    }
}

template <class D, int kBlock>
void dequantize_as(const Fp8Format& format,
                   char* out,
                   const char* data,
                   const char* scales,
                   size_t scale_stride,
                   size_t hidden) {
    for (size_t block = 0; block * kBlock < hidden; ++block) {
        float scale;
        if (format.scales == ScaleFormat::kPackedUe8m0) {
            const auto byte =
                static_cast<unsigned char>(scales[block / 4 * scale_stride + block % 4]);
            scale = __builtin_bit_cast(float, byte == 255 ? kQuietNan : uint32_t{byte} << 23);
        } else {
            scale = load<float>(scales + block * scale_stride);
        }
        for (int i = 0; i < kBlock; i += kFloats) {
            const size_t column = block * kBlock + static_cast<size_t>(i);
            D::template write_floats<kVectorBytes>(out + column * D::kItemBytes,
                                                   from_e4m3(load<Bytes>(data + column)) * scale);
        }
    }
}

}  // namespace
}  // namespace ep
