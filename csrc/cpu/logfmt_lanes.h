#pragma once
// Blocks of a row to LogFMT and back. Part of row_kernels.cpp and of no other source, like
// row_lanes.h. The reference of every bit is ep_megatron/logfmt.py, which says what they mean.
#include <cstddef>
#include <cstdint>

#include "cpu/fp8_lanes.h"
#include "cpu/row_lanes.h"
#include "cpu/rows.h"

namespace ep {
namespace {

constexpr size_t kCodedBytes = kLogBlock * 10 / 8, kPlainBytes = kLogBlock * 2;
constexpr float kNumSteps = 510.0f, kMaxRange = 32.0f;
constexpr int32_t kBFloatOne = 0x3f80, kMinNormal = 0x0080;
constexpr float kEighthOfLn2 = 0x1.62e42fefa39efp-4f;
constexpr float kLog2[] = {1.442667841911316f,    -0.7205854058265686f, 0.4735531508922577f,
                           -0.32590124011039734f, 0.19429320096969604f, -0.0795568972826004f,
                           0.015529675409197807f};
constexpr float kExp2[] = {-0.6931444406509399f, 0.24018670618534088f, -0.05531669408082962f,
                           0.009228377602994442f, -0.0009540333994664252f};

/// c0 x + c1 x^2 + ...
template <int kCount>
inline Floats polynomial(const float (&coefficients)[kCount], Floats x) {
    Floats total = Floats{} + coefficients[kCount - 1];
    for (int i = kCount - 2; i >= 0; --i) total = total * x + coefficients[i];
    return x * total;
}

inline Floats log2_mantissa(Ints bits) {
    return polynomial(kLog2, __builtin_convertvector(bits & 0x7f, Floats) * 0x1p-7f);
}

/// How far the logarithms of magnitudes with these bits are below those of `top`.
inline Floats log2_below(Ints bits, Ints top) {
    const auto exponents = __builtin_convertvector((top >> 7) - (bits >> 7), Floats);
    return exponents + (log2_mantissa(top) - log2_mantissa(bits));
}

struct LogExtremes {
    int32_t largest, smallest;  // bits of bfloat16 magnitudes

    bool is_coded() const { return largest < kBFloatOne; }
    float amax() const { return __builtin_bit_cast(float, static_cast<uint32_t>(largest) << 16); }
    float range() const {
        const Floats below = log2_below(Ints{} + smallest, Ints{} + largest);
        return smallest < kMinNormal || below[0] > kMaxRange ? kMaxRange : below[0];
    }
    static LogExtremes read(const char* p) {
        const auto word = load<uint32_t>(p);
        return {static_cast<int32_t>(word & 0xffffu), static_cast<int32_t>(word >> 16)};
    }
    void write(char* p) const {
        store<false>(p, static_cast<uint32_t>(largest) | static_cast<uint32_t>(smallest) << 16);
    }
};

inline LogExtremes extremes_of(const char* block) {
    Ints largest = {}, smallest = Ints{} + 0x7fff;
    for (size_t i = 0; i < kLogBlock; i += kFloats) {
        const auto bits = (Ints)(widen_words<kVectorBytes>(block + 2 * i) & 0x7fffu);
        largest = bits > largest ? bits : largest;
        smallest = bits < smallest ? bits : smallest;
    }
    LogExtremes extremes = {0, 0x7fff};
    for (int lane = 0; lane < kFloats; ++lane) {
        if (largest[lane] > extremes.largest) extremes.largest = largest[lane];
        if (smallest[lane] < extremes.smallest) extremes.smallest = smallest[lane];
    }
    return extremes;
}

// Four numbers of 16 bits share a 64-bit word: bit 15 a sign, bits 0 to 8 a code. Together four
// codes take 36 bits and four signs 4, closed up in two moves, or by one product of which only the
// wanted bits do not collide.

inline uint64_t close_codes(uint64_t four) {
    const uint64_t two = (four & 0x000001ff000001ffu) | (four & 0x01ff000001ff0000u) >> 7;
    return (two & 0x3ffffu) | (two & 0x3ffff00000000u) >> 14;
}

inline uint64_t spread_codes(uint64_t bits) {
    bits = (bits & 0x3ffffu) | (bits & 0xffffc0000u) << 14;
    return (bits & 0x000001ff000001ffu) | (bits & 0x0003fe000003fe00u) << 7;
}

inline uint64_t close_signs(uint64_t four) {
    return (four >> 15 & 0x0001000100010001u) * 0x0001000200040008u >> 48 & 0xfu;
}

inline uint64_t spread_signs(uint64_t bits) {
    return (bits & 0xfu) * 0x1000200040008000u & 0x8000800080008000u;
}

/// 16 numbers to 20 bytes.
inline void pack_numbers(char* out, const char* numbers) {
    uint64_t codes[4], signs = 0;
    for (int i = 0; i < 4; ++i) {
        const auto four = load<uint64_t>(numbers + 8 * i);
        codes[i] = close_codes(four);
        signs |= close_signs(four) << 4 * i;
    }
    store<false>(out, codes[0] | codes[1] << 36);
    store<false>(out + 8, codes[1] >> 28 | codes[2] << 8 | codes[3] << 44);
    store<false>(out + 16, static_cast<uint32_t>(codes[3] >> 20 | signs << 16));
}

inline void unpack_numbers(char* numbers, const char* p) {
    constexpr int kAt[] = {0, 4, 9, 12}, kShift[] = {0, 4, 0, 12};
    const uint64_t signs = load<uint32_t>(p + 16) >> 16;
    for (int i = 0; i < 4; ++i)
        store<false>(numbers + 8 * i, spread_codes(load<uint64_t>(p + kAt[i]) >> kShift[i]) |
                                          spread_signs(signs >> 4 * i));
}

/// Returns the bytes written.
inline size_t encode_block(char* out, const char* block, const LogExtremes& extremes) {
    if (!extremes.is_coded()) {
        __builtin_memcpy(out, block, kPlainBytes);
        return kPlainBytes;
    }
    const float range = extremes.range();
    const float steps = range > 0.0f ? kNumSteps / range : 0.0f;
    const float middle = kNumSteps + 1.5f - range * (1.0f / kNumSteps) * kEighthOfLn2;
    const Ints top = Ints{} + extremes.largest;
    alignas(kVectorBytes) char numbers[kPlainBytes];
    for (size_t i = 0; i < kLogBlock; i += kFloats) {
        const Words words = widen_words<kVectorBytes>(block + 2 * i);
        const auto bits = (Ints)(words & 0x7fffu);
        Floats level = middle - log2_below(bits, top) * steps;
        level = level > 0.0f ? level : Floats{};
        Ints code = __builtin_convertvector(level, Ints);
        code = bits < kMinNormal ? Ints{} : code;
        store_halves<kVectorBytes>(numbers + 2 * i, (Words)code | (words & 0x8000u));
    }
    for (size_t i = 0; i < kLogBlock / 16; ++i) pack_numbers(out + 20 * i, numbers + 32 * i);
    return kCodedBytes;
}

/// The next block of a row, read a vector of numbers at a time.
class LogBlock {
 public:
    explicit LogBlock(LogCursor& row) : data_(row.data) {
        const auto extremes = LogExtremes::read(row.extremes);
        is_coded_ = extremes.is_coded();
        row.extremes += kLogExtremeBytes;
        row.data += is_coded_ ? kCodedBytes : kPlainBytes;
        if (!is_coded_) return;
        amax_ = extremes.amax();
        step_ = extremes.range() * (1.0f / kNumSteps);
        for (size_t i = 0; i < kLogBlock / 16; ++i)
            unpack_numbers(numbers_ + 32 * i, data_ + 20 * i);
    }

    Floats at(size_t column) const {
        if (!is_coded_) return (Floats)(widen_words<kVectorBytes>(data_ + 2 * column) << 16);
        const Words words = widen_words<kVectorBytes>(numbers_ + 2 * column);
        const auto code = (Ints)(words & 0x1ffu);
        const Floats below = __builtin_convertvector(511 - code, Floats) * step_;
        const Ints whole = __builtin_convertvector(below, Ints);
        const Floats rest = below - __builtin_convertvector(whole, Floats);
        const auto power = (Floats)((Ints)(polynomial(kExp2, rest) + 1.0f) - (whole << 23));
        const Words bits = code > 0 ? (Words)(power * amax_) : Words{};
        return (Floats)(bits | (words & 0x8000u) << 16);
    }

 private:
    const char* const data_;
    bool is_coded_;
    float amax_ = 0, step_ = 0;
    alignas(kVectorBytes) char numbers_[kPlainBytes];
};

}  // namespace
}  // namespace ep
