// setp and selp.
#include "elementwise.h"

namespace ptx {
namespace {

enum class Combine : u8 { kNone, kAnd, kOr, kXor };

/// setp[.combine] p|q, a, b[, c]: q gets the negated comparison, and both are combined with c.
template <class T, auto kCompare, Combine kCombine>
Outcome compare(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    const u64* b = step.source(instruction, 1);
    const u64* c = kCombine == Combine::kNone ? nullptr : step.source(instruction, 2);
    u64* p = step.destination(instruction, 0);
    u64* q = instruction.num_destinations > 1 ? step.destination(instruction, 1) : nullptr;
    const auto combine = [&](bool result, int lane) {
        if constexpr (kCombine == Combine::kAnd) return result && c[lane];
        if constexpr (kCombine == Combine::kOr) return result || c[lane];
        if constexpr (kCombine == Combine::kXor) return result != bool(c[lane]);
        return result;
    };
    for_lanes(step.active, [&](int lane) {
        const bool result = kCompare(from_bits<T>(a[lane]), from_bits<T>(b[lane]));
        const bool negated = combine(!result, lane);
        p[lane] = combine(result, lane);  // may be the register of c
        if (q) q[lane] = negated;
    });
    return Outcome::kAdvance;
}

template <class T, auto kCompare>
void add_comparison(Forms& forms, const std::string& name, const std::string& type) {
    forms["setp." + name + "." + type] = {compare<T, kCompare, Combine::kNone>, 2};
    forms["setp." + name + ".and." + type] = {compare<T, kCompare, Combine::kAnd>, 3};
    forms["setp." + name + ".or." + type] = {compare<T, kCompare, Combine::kOr>, 3};
    forms["setp." + name + ".xor." + type] = {compare<T, kCompare, Combine::kXor>, 3};
}

template <class T>
bool equal(T a, T b) {
    return a == b;
}
// Ordered comparisons are false when an operand is NaN, "u" ones true.
template <class T>
bool not_equal(T a, T b) {
    return a < b || a > b;
}
template <class T>
bool less(T a, T b) {
    return a < b;
}
template <class T>
bool less_equal(T a, T b) {
    return a <= b;
}
template <class T>
bool greater(T a, T b) {
    return a > b;
}
template <class T>
bool greater_equal(T a, T b) {
    return a >= b;
}
template <class T, auto kCompare>
bool negation(T a, T b) {
    return !kCompare(a, b);
}
template <class T>
bool is_number(T a, T b) {
    return a == a && b == b;
}

template <class T>
void add_integer_comparisons(Forms& forms, const std::string& type) {
    add_comparison<T, equal<T>>(forms, "eq", type);
    add_comparison<T, not_equal<T>>(forms, "ne", type);
    if (type[0] == 'b') return;
    add_comparison<T, less<T>>(forms, "lt", type);
    add_comparison<T, less_equal<T>>(forms, "le", type);
    add_comparison<T, greater<T>>(forms, "gt", type);
    add_comparison<T, greater_equal<T>>(forms, "ge", type);
    if (type[0] == 's') return;
    add_comparison<T, less<T>>(forms, "lo", type);
    add_comparison<T, less_equal<T>>(forms, "ls", type);
    add_comparison<T, greater<T>>(forms, "hi", type);
    add_comparison<T, greater_equal<T>>(forms, "hs", type);
}

template <class T>
void add_float_comparisons(Forms& forms, const std::string& type) {
    add_comparison<T, equal<T>>(forms, "eq", type);
    add_comparison<T, not_equal<T>>(forms, "ne", type);
    add_comparison<T, less<T>>(forms, "lt", type);
    add_comparison<T, less_equal<T>>(forms, "le", type);
    add_comparison<T, greater<T>>(forms, "gt", type);
    add_comparison<T, greater_equal<T>>(forms, "ge", type);
    add_comparison<T, negation<T, not_equal<T>>>(forms, "equ", type);
    add_comparison<T, negation<T, equal<T>>>(forms, "neu", type);
    add_comparison<T, negation<T, greater_equal<T>>>(forms, "ltu", type);
    add_comparison<T, negation<T, greater<T>>>(forms, "leu", type);
    add_comparison<T, negation<T, less_equal<T>>>(forms, "gtu", type);
    add_comparison<T, negation<T, less<T>>>(forms, "geu", type);
    add_comparison<T, is_number<T>>(forms, "num", type);
    add_comparison<T, negation<T, is_number<T>>>(forms, "nan", type);
}

template <class T>
T select(T a, T b, bool condition) {
    return condition ? a : b;
}

}  // namespace

void add_comparison_forms(Forms& forms) {
    add_integer_comparisons<u16>(forms, "b16");
    add_integer_comparisons<u32>(forms, "b32");
    add_integer_comparisons<u64>(forms, "b64");
    add_integer_comparisons<u16>(forms, "u16");
    add_integer_comparisons<u32>(forms, "u32");
    add_integer_comparisons<u64>(forms, "u64");
    add_integer_comparisons<i16>(forms, "s16");
    add_integer_comparisons<i32>(forms, "s32");
    add_integer_comparisons<i64>(forms, "s64");
    add_float_comparisons<float>(forms, "f32");
    add_float_comparisons<double>(forms, "f64");
    for (const char* type : {"b16", "u16", "s16"})
        forms[std::string("selp.") + type] = {apply3<u16, u16, bool, select<u16>>, 3};
    for (const char* type : {"b32", "u32", "s32", "f32"})
        forms[std::string("selp.") + type] = {apply3<u32, u32, bool, select<u32>>, 3};
    for (const char* type : {"b64", "u64", "s64", "f64"})
        forms[std::string("selp.") + type] = {apply3<u64, u64, bool, select<u64>>, 3};
}

}  // namespace ptx
