// Floating-point arithmetic. Every rounded operation is exact; "approx" ones, whose bits PTX leaves
// to the device, are computed as well as the host can.
#include <cfenv>

#include "elementwise.h"

namespace ptx {
namespace {

float canonical(float value) {
    return std::isnan(value) ? std::bit_cast<float>(0x7fffffffu) : value;
}
double canonical(double value) { return value; }
float flush(float value) {
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.f, value) : value;
}

template <class T>
T add(T a, T b) {
    return canonical(a + b);
}
template <class T>
T subtract(T a, T b) {
    return canonical(a - b);
}
template <class T>
T multiply(T a, T b) {
    return canonical(a * b);
}
template <class T>
T divide(T a, T b) {
    return canonical(a / b);
}
template <class T>
T multiply_add(T a, T b, T c) {
    return canonical(std::fma(a, b, c));
}
template <class T>
T reciprocal(T a) {
    return canonical(T(1) / a);
}
template <class T>
T square_root(T a) {
    return canonical(std::sqrt(a));
}
template <class T>
T reciprocal_root(T a) {
    return canonical(T(1) / std::sqrt(a));
}
template <class T>
T absolute(T a) {
    return std::fabs(a);
}
template <class T>
T negate(T a) {
    return -a;
}
float power_of_two(float a) { return canonical(std::exp2(a)); }
float logarithm(float a) { return canonical(std::log2(a)); }
float hyperbolic_tangent(float a) { return canonical(std::tanh(a)); }
float sine(float a) { return canonical(std::sin(a)); }
float cosine(float a) { return canonical(std::cos(a)); }

/// A NaN loses against a number unless `kNan`; -0 is less than +0.
template <class T, bool kLess, bool kNan>
T extreme(T a, T b) {
    if (std::isnan(a) || std::isnan(b)) {
        if (kNan || (std::isnan(a) && std::isnan(b))) return canonical(T(NAN));
        return std::isnan(a) ? b : a;
    }
    if (a == b) return std::signbit(a) == kLess ? a : b;
    return (a < b) == kLess ? a : b;
}

template <class T>
T saturate(T value) {
    return std::isnan(value) ? T(0) : std::fmin(std::fmax(value, T(0)), T(1));
}

/// Hide a value from the compiler, which would otherwise compute before the mode has changed.
template <class T>
T opaque(T value) {
    volatile T hidden = value;
    return hidden;
}
/// One operation in another rounding mode.
template <auto kFunction, int kMode, class... Args>
auto in_mode(Args... args) {
    const int before = std::fegetround();
    std::fesetround(kMode);
    const auto result = opaque(kFunction(opaque(args)...));
    std::fesetround(before);
    return result;
}
template <class T, auto kFunction, int kMode>
T rounded1(T a) {
    return in_mode<kFunction, kMode>(a);
}
template <class T, auto kFunction, int kMode>
T rounded2(T a, T b) {
    return in_mode<kFunction, kMode>(a, b);
}
template <class T, auto kFunction, int kMode>
T rounded3(T a, T b, T c) {
    return in_mode<kFunction, kMode>(a, b, c);
}
template <auto kFunction>
float flushed1(float a) {
    return flush(kFunction(flush(a)));
}
template <auto kFunction>
float flushed2(float a, float b) {
    return flush(kFunction(flush(a), flush(b)));
}
template <auto kFunction>
float flushed3(float a, float b, float c) {
    return flush(kFunction(flush(a), flush(b), flush(c)));
}
template <auto kFunction>
float saturated2(float a, float b) {
    return saturate(kFunction(a, b));
}
template <auto kFunction>
float saturated3(float a, float b, float c) {
    return saturate(kFunction(a, b, c));
}

template <class T, auto kFunction>
void add_rounded1(Forms& forms, const std::string& name, const std::string& type) {
    forms[name + ".rn." + type] = {apply1<T, kFunction>, 1};
    forms[name + ".rz." + type] = {apply1<T, rounded1<T, kFunction, FE_TOWARDZERO>>, 1};
    forms[name + ".rm." + type] = {apply1<T, rounded1<T, kFunction, FE_DOWNWARD>>, 1};
    forms[name + ".rp." + type] = {apply1<T, rounded1<T, kFunction, FE_UPWARD>>, 1};
}
template <class T, auto kFunction>
void add_rounded2(Forms& forms, const std::string& name, const std::string& type) {
    forms[name + ".rn." + type] = {apply2<T, T, kFunction>, 2};
    forms[name + ".rz." + type] = {apply2<T, T, rounded2<T, kFunction, FE_TOWARDZERO>>, 2};
    forms[name + ".rm." + type] = {apply2<T, T, rounded2<T, kFunction, FE_DOWNWARD>>, 2};
    forms[name + ".rp." + type] = {apply2<T, T, rounded2<T, kFunction, FE_UPWARD>>, 2};
}
template <class T, auto kFunction>
void add_rounded3(Forms& forms, const std::string& name, const std::string& type) {
    forms[name + ".rn." + type] = {apply3<T, T, T, kFunction>, 3};
    forms[name + ".rz." + type] = {apply3<T, T, T, rounded3<T, kFunction, FE_TOWARDZERO>>, 3};
    forms[name + ".rm." + type] = {apply3<T, T, T, rounded3<T, kFunction, FE_DOWNWARD>>, 3};
    forms[name + ".rp." + type] = {apply3<T, T, T, rounded3<T, kFunction, FE_UPWARD>>, 3};
}

template <class T>
void add_wide_formats(Forms& forms, const std::string& type) {
    add_rounded2<T, add<T>>(forms, "add", type);
    add_rounded2<T, subtract<T>>(forms, "sub", type);
    add_rounded2<T, multiply<T>>(forms, "mul", type);
    add_rounded2<T, divide<T>>(forms, "div", type);
    add_rounded3<T, multiply_add<T>>(forms, "fma", type);
    add_rounded3<T, multiply_add<T>>(forms, "mad", type);
    add_rounded1<T, reciprocal<T>>(forms, "rcp", type);
    add_rounded1<T, square_root<T>>(forms, "sqrt", type);
    for (const char* name : {"add.", "sub.", "mul."})  // nearest is the default
        forms[name + type] = forms[name + ("rn." + type)];
    forms["abs." + type] = {apply1<T, absolute<T>>, 1};
    forms["neg." + type] = {apply1<T, negate<T>>, 1};
    forms["min." + type] = {apply2<T, T, extreme<T, true, false>>, 2};
    forms["max." + type] = {apply2<T, T, extreme<T, false, false>>, 2};
}

void add_single_only(Forms& forms) {
    forms["min.NaN.f32"] = {apply2<float, float, extreme<float, true, true>>, 2};
    forms["max.NaN.f32"] = {apply2<float, float, extreme<float, false, true>>, 2};
    forms["add.ftz.f32"] =
        forms["add.rn.ftz.f32"] = {apply2<float, float, flushed2<add<float>>>, 2};
    forms["sub.ftz.f32"] =
        forms["sub.rn.ftz.f32"] = {apply2<float, float, flushed2<subtract<float>>>, 2};
    forms["mul.ftz.f32"] =
        forms["mul.rn.ftz.f32"] = {apply2<float, float, flushed2<multiply<float>>>, 2};
    forms["fma.rn.ftz.f32"] = {apply3<float, float, float, flushed3<multiply_add<float>>>, 3};
    forms["add.sat.f32"] = {apply2<float, float, saturated2<add<float>>>, 2};
    forms["mul.sat.f32"] = {apply2<float, float, saturated2<multiply<float>>>, 2};
    forms["fma.rn.sat.f32"] = {apply3<float, float, float, saturated3<multiply_add<float>>>, 3};
    forms["ex2.approx.f32"] = {apply1<float, power_of_two>, 1};
    forms["ex2.approx.ftz.f32"] = {apply1<float, flushed1<power_of_two>>, 1};
    forms["lg2.approx.f32"] = {apply1<float, logarithm>, 1};
    forms["lg2.approx.ftz.f32"] = {apply1<float, flushed1<logarithm>>, 1};
    forms["rcp.approx.f32"] = {apply1<float, reciprocal<float>>, 1};
    forms["rcp.approx.ftz.f32"] = {apply1<float, flushed1<reciprocal<float>>>, 1};
    forms["rsqrt.approx.f32"] = {apply1<float, reciprocal_root<float>>, 1};
    forms["rsqrt.approx.ftz.f32"] = {apply1<float, flushed1<reciprocal_root<float>>>, 1};
    forms["sqrt.approx.f32"] = {apply1<float, square_root<float>>, 1};
    forms["sqrt.approx.ftz.f32"] = {apply1<float, flushed1<square_root<float>>>, 1};
    forms["div.approx.f32"] = forms["div.full.f32"] = {apply2<float, float, divide<float>>, 2};
    forms["tanh.approx.f32"] = {apply1<float, hyperbolic_tangent>, 1};
    forms["sin.approx.f32"] = {apply1<float, sine>, 1};
    forms["cos.approx.f32"] = {apply1<float, cosine>, 1};
}

// 16-bit formats are computed in double and rounded once; sums are rounded to odd before that.
double add_wide(double a, double b) { return add_to_odd(a, b); }
double subtract_wide(double a, double b) { return add_to_odd(a, -b); }
double multiply_wide(double a, double b) { return a * b; }  // exact: 22 bits at most
double multiply_add_wide(double a, double b, double c) { return add_to_odd(a * b, c); }

template <class Format, auto kFunction>
u16 narrow2(u16 a, u16 b) {
    return u16(Format::narrow(kFunction(Format::widen(a), Format::widen(b)), false));
}
template <class Format, auto kFunction>
u16 narrow3(u16 a, u16 b, u16 c) {
    return u16(
        Format::narrow(kFunction(Format::widen(a), Format::widen(b), Format::widen(c)), false));
}
template <class Format, bool kLess, bool kNan>
u16 narrow_extreme(u16 a, u16 b) {
    const double result = extreme<double, kLess, kNan>(Format::widen(a), Format::widen(b));
    return u16(Format::narrow(result, false));
}
u16 absolute16(u16 a) { return a & 0x7fff; }
u16 negate16(u16 a) { return a ^ 0x8000; }

// The same on both halves of a register.
template <auto kFunction>
u32 halves1(u32 a) {
    return u32(kFunction(u16(a >> 16))) << 16 | kFunction(u16(a));
}
template <auto kFunction>
u32 halves2(u32 a, u32 b) {
    return u32(kFunction(u16(a >> 16), u16(b >> 16))) << 16 | kFunction(u16(a), u16(b));
}
template <auto kFunction>
u32 halves3(u32 a, u32 b, u32 c) {
    return u32(kFunction(u16(a >> 16), u16(b >> 16), u16(c >> 16))) << 16 |
           kFunction(u16(a), u16(b), u16(c));
}

template <auto kFunction>
void add_narrow2(Forms& forms, const std::string& name, const std::string& type) {
    forms[name + type] = {apply2<u16, u16, kFunction>, 2};
    forms[name + type + "x2"] = {apply2<u32, u32, halves2<kFunction>>, 2};
}
template <class Format>
void add_narrow_formats(Forms& forms, const std::string& type) {
    for (const char* rounding : {".", ".rn."}) {
        add_narrow2<narrow2<Format, add_wide>>(forms, std::string("add") + rounding, type);
        add_narrow2<narrow2<Format, subtract_wide>>(forms, std::string("sub") + rounding, type);
        add_narrow2<narrow2<Format, multiply_wide>>(forms, std::string("mul") + rounding, type);
    }
    add_narrow2<narrow_extreme<Format, true, false>>(forms, "min.", type);
    add_narrow2<narrow_extreme<Format, false, false>>(forms, "max.", type);
    add_narrow2<narrow_extreme<Format, true, true>>(forms, "min.NaN.", type);
    add_narrow2<narrow_extreme<Format, false, true>>(forms, "max.NaN.", type);
    forms["fma.rn." + type] = {apply3<u16, u16, u16, narrow3<Format, multiply_add_wide>>, 3};
    forms["fma.rn." + type + "x2"] = {
        apply3<u32, u32, u32, halves3<narrow3<Format, multiply_add_wide>>>, 3};
    forms["abs." + type] = {apply1<u16, absolute16>, 1};
    forms["neg." + type] = {apply1<u16, negate16>, 1};
    forms["abs." + type + "x2"] = {apply1<u32, halves1<absolute16>>, 1};
    forms["neg." + type + "x2"] = {apply1<u32, halves1<negate16>>, 1};
}

}  // namespace

void add_float_forms(Forms& forms) {
    add_wide_formats<float>(forms, "f32");
    add_wide_formats<double>(forms, "f64");
    add_single_only(forms);
    add_narrow_formats<Half>(forms, "f16");
    add_narrow_formats<Brain>(forms, "bf16");
}

}  // namespace ptx
