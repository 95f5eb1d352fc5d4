#pragma once
// Number formats narrower than float, and register bits as C++ values.
#include <bit>
#include <cmath>
#include <concepts>

#include "ptx.h"

namespace ptx {

template <class T>
inline T from_bits(u64 bits) {
    if constexpr (std::same_as<T, float>)
        return std::bit_cast<float>(static_cast<u32>(bits));
    else if constexpr (std::same_as<T, double>)
        return std::bit_cast<double>(bits);
    else
        return static_cast<T>(bits);
}

/// Registers hold a value zero-extended from its own width.
template <class T>
inline u64 to_bits(T value) {
    if constexpr (std::same_as<T, float>)
        return std::bit_cast<u32>(value);
    else if constexpr (std::same_as<T, double>)
        return std::bit_cast<u64>(value);
    else if constexpr (std::same_as<T, bool>)
        return value;
    else
        return static_cast<std::make_unsigned_t<T>>(value);
}

constexpr u64 keep_bits(u64 value, int bits) {
    return bits >= 64 ? value : value & ((u64{1} << bits) - 1);
}
constexpr u64 sign_extend(u64 value, int bits) {
    return bits >= 64 ? value
                      : static_cast<u64>(static_cast<i64>(value << (64 - bits)) >> (64 - bits));
}

enum class Rounding : u8 { kNearest, kZero, kDown, kUp };

/// A binary format of 16 bits or fewer with `kFraction` stored fraction bits and `kExponent`
/// exponent bits. Formats without infinities (e4m3) use the topmost exponent for numbers as well.
template <int kFraction, int kExponent, bool kHasInfinity>
struct SmallFloat {
    static constexpr int kBits = 1 + kExponent + kFraction;
    static constexpr int kBias = (1 << (kExponent - 1)) - 1;
    static constexpr u32 kSign = 1u << (kBits - 1);
    static constexpr u32 kNan = kSign - 1;  // the quiet NaN that conversions produce
    // The largest finite value: all ones but for the NaN (no infinities) or the top exponent.
    static constexpr u32 kLargest = kHasInfinity ? kSign - 1 - (1u << kFraction) : kSign - 2;

    static double widen(u32 bits) {
        const u32 exponent = (bits & ~kSign & (kSign - 1)) >> kFraction;
        const u32 fraction = bits & ((1u << kFraction) - 1);
        const double sign = bits & kSign ? -1.0 : 1.0;
        if (kHasInfinity && exponent == (1u << kExponent) - 1)
            return fraction ? std::nan("") : sign * INFINITY;
        if (!kHasInfinity && (bits & (kSign - 1)) == kNan) return std::nan("");
        if (exponent == 0) return sign * std::ldexp(fraction, 1 - kBias - kFraction);
        return sign * std::ldexp((1u << kFraction) + fraction, int(exponent) - kBias - kFraction);
    }

    /// Round `value`. `saturate` turns what is too large into the largest finite value.
    static u32 narrow(double value, bool saturate, Rounding rounding = Rounding::kNearest) {
        if (std::isnan(value)) return kNan;
        const u32 sign = std::signbit(value) ? kSign : 0;
        const double magnitude = std::fabs(value);
        if (magnitude == 0) return sign;
        if (std::isinf(magnitude))
            return sign | (saturate ? kLargest : kHasInfinity ? kLargest + 1 : kNan);
        int exponent = 0;
        std::frexp(magnitude, &exponent);
        exponent = std::max(exponent - 1, 1 - kBias);
        // Units in the last place; a carry into the next exponent comes out right in the sum below.
        const double scaled = std::ldexp(magnitude, kFraction - exponent);
        double units = std::floor(scaled);
        const double rest = scaled - units;
        const bool odd = std::fmod(units, 2) == 1;
        if (rounding == Rounding::kNearest ? rest > 0.5 || (rest == 0.5 && odd)
            : rounding == Rounding::kUp    ? rest > 0 && !sign
            : rounding == Rounding::kDown  ? rest > 0 && sign
                                           : false)
            units += 1;
        const i64 bits = (i64(exponent + kBias - 1) << kFraction) + i64(units);
        if (bits > i64(kLargest))
            return sign | (saturate ? kLargest : kHasInfinity ? kLargest + 1 : kNan);
        return sign | u32(bits);
    }
};

using Half = SmallFloat<10, 5, true>;
using Brain = SmallFloat<7, 8, true>;
using E4m3 = SmallFloat<3, 4, false>;
using E5m2 = SmallFloat<2, 5, true>;

/// The sum rounded to odd: a later rounding to fewer bits gives what one rounding would have given.
inline double add_to_odd(double a, double b) {
    const double sum = a + b;
    if (!std::isfinite(sum)) return sum;
    const double shadow = sum - a;
    const double error = (a - (sum - shadow)) + (b - shadow);
    if (error == 0 || (std::bit_cast<u64>(sum) & 1)) return sum;
    return std::nextafter(sum, (error > 0) ? INFINITY : -INFINITY);
}

}  // namespace ptx
