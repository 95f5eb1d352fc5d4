// cvt: every form by its full name. Narrow integers in wider registers are extended by their sign,
// which the decoder asks for through Instruction::immediate, the width of the destination register.
#include <algorithm>
#include <limits>

#include "elementwise.h"

namespace ptx {
namespace {

template <class To, class From>
Outcome integer_to_integer(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    u64* d = step.destination(instruction, 0);
    const int width = int(instruction.immediate);
    for_lanes(step.active, [&](int lane) {
        const To value = static_cast<To>(from_bits<From>(a[lane]));
        d[lane] = keep_bits(static_cast<u64>(static_cast<i64>(value)), width);
    });
    return Outcome::kAdvance;
}

template <class To, class From>
Outcome integer_saturated(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    u64* d = step.destination(instruction, 0);
    const int width = int(instruction.immediate);
    for_lanes(step.active, [&](int lane) {
        const __int128 lowest = std::numeric_limits<To>::min(),
                       highest = std::numeric_limits<To>::max();
        const __int128 value = std::clamp<__int128>(from_bits<From>(a[lane]), lowest, highest);
        d[lane] = keep_bits(static_cast<u64>(static_cast<i64>(static_cast<To>(value))), width);
    });
    return Outcome::kAdvance;
}

template <Rounding kRounding>
double to_integral(double value) {
    switch (kRounding) {
        case Rounding::kZero:
            return std::trunc(value);
        case Rounding::kDown:
            return std::floor(value);
        case Rounding::kUp:
            return std::ceil(value);
        default:
            return std::nearbyint(value);  // ties to even: the host's mode is never left changed
    }
}

/// What does not fit becomes the nearest value that does; NaN becomes 0 (for 64 bits the lowest).
template <class To, class From, Rounding kRounding>
Outcome float_to_integer(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    u64* d = step.destination(instruction, 0);
    const int width = int(instruction.immediate);
    constexpr int kDigits = std::numeric_limits<To>::digits;
    for_lanes(step.active, [&](int lane) {
        const double value = to_integral<kRounding>(double(from_bits<From>(a[lane])));
        To result = 0;
        if (std::isnan(value))
            result = sizeof(To) == 8 ? To(u64{1} << 63) : To(0);
        else if (value >= std::ldexp(1.0, kDigits))
            result = std::numeric_limits<To>::max();
        else if (value < double(std::numeric_limits<To>::min()))
            result = std::numeric_limits<To>::min();
        else
            result = static_cast<To>(value);
        d[lane] = keep_bits(static_cast<u64>(static_cast<i64>(result)), width);
    });
    return Outcome::kAdvance;
}

/// Round an integer to To's precision by hand, so that the host's rounding mode does not matter.
template <class To, class From, Rounding kRounding>
To integer_to_float(From value) {
    const bool negative = std::is_signed_v<From> && value < 0;
    u64 magnitude =
        negative ? 0 - static_cast<u64>(static_cast<i64>(value)) : static_cast<u64>(value);
    const int surplus = std::bit_width(magnitude) - std::numeric_limits<To>::digits;
    if (surplus > 0) {
        const u64 rest = keep_bits(magnitude, surplus), half = u64{1} << (surplus - 1);
        magnitude -= rest;
        bool up = false;
        if (kRounding == Rounding::kNearest)
            up = rest > half || (rest == half && (magnitude >> surplus & 1));
        if (kRounding == Rounding::kUp) up = rest && !negative;
        if (kRounding == Rounding::kDown) up = rest && negative;
        const To above = up ? std::ldexp(To(1), surplus) : To(0);
        return (negative ? To(-1) : To(1)) * (To(magnitude) + above);
    }
    return negative ? -To(magnitude) : To(magnitude);
}

template <Rounding kRounding>
float round_float(float a) {
    return std::isnan(a) ? std::bit_cast<float>(0x7fffffffu) : float(to_integral<kRounding>(a));
}
template <Rounding kRounding>
double round_double(double a) {
    return to_integral<kRounding>(a);
}
double widen_float(float a) { return a; }
template <Rounding kRounding>
float narrow_double(double a) {
    if (std::isnan(a)) return std::bit_cast<float>(0x7fffffffu);
    const float nearest = float(a);
    if (kRounding == Rounding::kNearest || double(nearest) == a) return nearest;
    const bool too_large = double(nearest) > a;
    const bool want_below = kRounding == Rounding::kDown || (kRounding == Rounding::kZero && a > 0);
    if (want_below == too_large) return std::nextafter(nearest, want_below ? -INFINITY : INFINITY);
    return nearest;
}
float saturate_float(float a) { return std::isnan(a) ? 0.f : std::fmin(std::fmax(a, 0.f), 1.f); }

template <class Format>
float widen(u16 a) {
    const double value = Format::widen(a);
    return std::isnan(value) ? std::bit_cast<float>(0x7fffffffu) : float(value);
}
template <class Format, Rounding kRounding, bool kSaturate, bool kRelu>
u32 narrow(float a) {
    if (kRelu && a < 0) a = 0;
    if constexpr (std::same_as<Format, Brain> && kRounding == Rounding::kNearest && !kSaturate) {
        // The upper half of a float, which is what this format is; carries round to even.
        const u32 bits = std::bit_cast<u32>(a);
        return std::isnan(a) ? Brain::kNan : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
    // Cutting off digits of a finite number never gives infinity.
    const bool stays_finite = kRounding == Rounding::kZero && std::isfinite(a);
    return Format::narrow(a, kSaturate || stays_finite, kRounding);
}
// Two values in one register; the first operand becomes the upper half.
template <auto kNarrow, int kBits>
u32 pack(float a, float b) {
    return kNarrow(a) << kBits | kNarrow(b);
}
template <class Format>
u32 eights_to_halves(u16 a) {
    return Half::narrow(Format::widen(a >> 8), false) << 16 |
           Half::narrow(Format::widen(a & 255), false);
}
template <class Format>
u16 halves_to_eights(u32 a) {
    return u16(Format::narrow(Half::widen(a >> 16), true) << 8 |
               Format::narrow(Half::widen(a & 0xffff), true));
}
/// ue8m0: a power of two, no sign, 0xff is NaN.
template <Rounding kRounding>
u32 narrow_scale(float a) {
    const u32 bits = std::bit_cast<u32>(std::fabs(a));
    if (bits > 0x7f800000) return 0xff;
    u32 exponent = bits >> 23;
    const bool has_rest = exponent == 0 ? bits > 0x400000 : bits & 0x7fffff;
    if (kRounding == Rounding::kUp && has_rest) ++exponent;
    return std::min(exponent, 0xfeu);  // saturates to the largest finite value
}
u32 scales_to_brains(u16 a) {
    const auto one = [](u32 scale) {
        return scale == 0xff ? 0x7fffu : scale == 0 ? 0x40u : scale << 7;
    };
    return one(a >> 8) << 16 | one(a & 255);
}

template <class To, class From>
void add_integer_pair(Forms& forms, const std::string& to, const std::string& from) {
    forms["cvt." + to + "." + from] = {integer_to_integer<To, From>, 1};
    forms["cvt.sat." + to + "." + from] = {integer_saturated<To, From>, 1};
}
template <class From>
void add_from_integer(Forms& forms, const std::string& from) {
    add_integer_pair<i8, From>(forms, "s8", from);
    add_integer_pair<u8, From>(forms, "u8", from);
    add_integer_pair<i16, From>(forms, "s16", from);
    add_integer_pair<u16, From>(forms, "u16", from);
    add_integer_pair<i32, From>(forms, "s32", from);
    add_integer_pair<u32, From>(forms, "u32", from);
    add_integer_pair<i64, From>(forms, "s64", from);
    add_integer_pair<u64, From>(forms, "u64", from);
    forms["cvt.rn.f32." + from] = {apply1<From, integer_to_float<float, From, Rounding::kNearest>>,
                                   1};
    forms["cvt.rz.f32." + from] = {apply1<From, integer_to_float<float, From, Rounding::kZero>>, 1};
    forms["cvt.rm.f32." + from] = {apply1<From, integer_to_float<float, From, Rounding::kDown>>, 1};
    forms["cvt.rp.f32." + from] = {apply1<From, integer_to_float<float, From, Rounding::kUp>>, 1};
    forms["cvt.rn.f64." + from] = {apply1<From, integer_to_float<double, From, Rounding::kNearest>>,
                                   1};
}
template <class To, class From>
void add_float_to_integer(Forms& forms, const std::string& to, const std::string& from) {
    const std::string pair = "." + to + "." + from;
    forms["cvt.rni" + pair] = {float_to_integer<To, From, Rounding::kNearest>, 1};
    forms["cvt.rzi" + pair] = {float_to_integer<To, From, Rounding::kZero>, 1};
    forms["cvt.rmi" + pair] = {float_to_integer<To, From, Rounding::kDown>, 1};
    forms["cvt.rpi" + pair] = {float_to_integer<To, From, Rounding::kUp>, 1};
}
template <class From>
void add_to_integers(Forms& forms, const std::string& from) {
    add_float_to_integer<i16, From>(forms, "s16", from);
    add_float_to_integer<u16, From>(forms, "u16", from);
    add_float_to_integer<i32, From>(forms, "s32", from);
    add_float_to_integer<u32, From>(forms, "u32", from);
    add_float_to_integer<i64, From>(forms, "s64", from);
    add_float_to_integer<u64, From>(forms, "u64", from);
}

template <class Format>
void add_sixteen(Forms& forms, const std::string& type) {
    constexpr auto kNearest = narrow<Format, Rounding::kNearest, false, false>;
    constexpr auto kTowardsZero = narrow<Format, Rounding::kZero, false, false>;
    constexpr auto kRelu = narrow<Format, Rounding::kNearest, false, true>;
    forms["cvt.f32." + type] = {apply1<u16, widen<Format>>, 1};
    forms["cvt.rn." + type + ".f32"] = {apply1<float, kNearest>, 1};
    forms["cvt.rz." + type + ".f32"] = {apply1<float, kTowardsZero>, 1};
    forms["cvt.rn.relu." + type + ".f32"] = {apply1<float, kRelu>, 1};
    forms["cvt.rn." + type + "x2.f32"] = {apply2<float, float, pack<kNearest, 16>>, 2};
    forms["cvt.rz." + type + "x2.f32"] = {apply2<float, float, pack<kTowardsZero, 16>>, 2};
    forms["cvt.rn.relu." + type + "x2.f32"] = {apply2<float, float, pack<kRelu, 16>>, 2};
}
template <class Format>
void add_eight(Forms& forms, const std::string& type) {
    constexpr auto kNarrow = narrow<Format, Rounding::kNearest, true, false>;
    constexpr auto kRelu = narrow<Format, Rounding::kNearest, true, true>;
    forms["cvt.rn.satfinite." + type + ".f32"] = {apply2<float, float, pack<kNarrow, 8>>, 2};
    forms["cvt.rn.satfinite.relu." + type + ".f32"] = {apply2<float, float, pack<kRelu, 8>>, 2};
    forms["cvt.rn.satfinite." + type + ".f16x2"] = {apply1<u32, halves_to_eights<Format>>, 1};
    forms["cvt.rn.f16x2." + type] = {apply1<u16, eights_to_halves<Format>>, 1};
}

}  // namespace

void add_conversion_forms(Forms& forms) {
    add_from_integer<i8>(forms, "s8");
    add_from_integer<u8>(forms, "u8");
    add_from_integer<i16>(forms, "s16");
    add_from_integer<u16>(forms, "u16");
    add_from_integer<i32>(forms, "s32");
    add_from_integer<u32>(forms, "u32");
    add_from_integer<i64>(forms, "s64");
    add_from_integer<u64>(forms, "u64");
    add_to_integers<float>(forms, "f32");
    add_to_integers<double>(forms, "f64");
    forms["cvt.rni.f32.f32"] = {apply1<float, round_float<Rounding::kNearest>>, 1};
    forms["cvt.rzi.f32.f32"] = {apply1<float, round_float<Rounding::kZero>>, 1};
    forms["cvt.rmi.f32.f32"] = {apply1<float, round_float<Rounding::kDown>>, 1};
    forms["cvt.rpi.f32.f32"] = {apply1<float, round_float<Rounding::kUp>>, 1};
    forms["cvt.rni.f64.f64"] = {apply1<double, round_double<Rounding::kNearest>>, 1};
    forms["cvt.rzi.f64.f64"] = {apply1<double, round_double<Rounding::kZero>>, 1};
    forms["cvt.rmi.f64.f64"] = {apply1<double, round_double<Rounding::kDown>>, 1};
    forms["cvt.rpi.f64.f64"] = {apply1<double, round_double<Rounding::kUp>>, 1};
    forms["cvt.sat.f32.f32"] = {apply1<float, saturate_float>, 1};
    forms["cvt.f64.f32"] = {apply1<float, widen_float>, 1};
    forms["cvt.rn.f32.f64"] = {apply1<double, narrow_double<Rounding::kNearest>>, 1};
    forms["cvt.rz.f32.f64"] = {apply1<double, narrow_double<Rounding::kZero>>, 1};
    forms["cvt.rm.f32.f64"] = {apply1<double, narrow_double<Rounding::kDown>>, 1};
    forms["cvt.rp.f32.f64"] = {apply1<double, narrow_double<Rounding::kUp>>, 1};
    add_sixteen<Half>(forms, "f16");
    add_sixteen<Brain>(forms, "bf16");
    add_eight<E4m3>(forms, "e4m3x2");
    add_eight<E5m2>(forms, "e5m2x2");
    constexpr auto kScaleUp = narrow_scale<Rounding::kUp>;
    constexpr auto kScaleDown = narrow_scale<Rounding::kZero>;
    forms["cvt.rp.satfinite.ue8m0x2.f32"] = {apply2<float, float, pack<kScaleUp, 8>>, 2};
    forms["cvt.rz.satfinite.ue8m0x2.f32"] = {apply2<float, float, pack<kScaleDown, 8>>, 2};
    forms["cvt.rn.bf16x2.ue8m0x2"] = {apply1<u16, scales_to_brains>, 1};
}

}  // namespace ptx
