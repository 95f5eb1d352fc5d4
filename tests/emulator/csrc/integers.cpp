// Integer and logic instructions.
#include <algorithm>

#include "elementwise.h"

namespace ptx {
namespace {

template <class T>
constexpr int kWidth = int(sizeof(T) * 8);
template <class T>
using Unsigned = std::make_unsigned_t<T>;
// Twice as wide, with the same sign.
template <class T>
using Wide = std::conditional_t<
    sizeof(T) == 2,
    std::conditional_t<std::is_signed_v<T>, i32, u32>,
    std::conditional_t<sizeof(T) == 4,
                       std::conditional_t<std::is_signed_v<T>, i64, u64>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

// Sums wrap: compute without a sign.
template <class T>
T add(T a, T b) {
    return T(u64(a) + u64(b));
}
template <class T>
T subtract(T a, T b) {
    return T(u64(a) - u64(b));
}
template <class T>
T multiply_low(T a, T b) {
    return T(u64(a) * u64(b));
}
template <class T>
T multiply_high(T a, T b) {
    return T((Wide<T>(a) * Wide<T>(b)) >> kWidth<T>);
}
template <class T>
Wide<T> multiply_wide(T a, T b) {
    return Wide<T>(a) * Wide<T>(b);
}
template <class T>
T multiply_add_low(T a, T b, T c) {
    return T(u64(a) * u64(b) + u64(c));
}
template <class T>
T multiply_add_high(T a, T b, T c) {
    return T(u64(multiply_high(a, b)) + u64(c));
}
template <class T>
Wide<T> multiply_add_wide(T a, T b, Wide<T> c) {
    return Wide<T>(u64(multiply_wide(a, b)) + u64(c));
}
// Division by zero is unspecified in PTX; all ones is what devices give.
template <class T>
T divide(T a, T b) {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return T(0 - u64(a));
    return T(a / b);
}
template <class T>
T remainder(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return 0;
    return T(a % b);
}
template <class T>
T minimum(T a, T b) {
    return std::min(a, b);
}
template <class T>
T maximum(T a, T b) {
    return std::max(a, b);
}
template <class T>
T absolute(T a) {
    return a < 0 ? T(0 - u64(a)) : a;
}
template <class T>
T negate(T a) {
    return T(0 - u64(a));
}
template <class T>
T sum_of_differences(T a, T b, T c) {
    return T(u64(c) + (a < b ? u64(b) - u64(a) : u64(a) - u64(b)));
}
template <class T>
T bit_and(T a, T b) {
    return a & b;
}
template <class T>
T bit_or(T a, T b) {
    return a | b;
}
template <class T>
T bit_xor(T a, T b) {
    return a ^ b;
}
template <class T>
T bit_not(T a) {
    if constexpr (std::same_as<T, bool>)
        return !a;
    else
        return T(~a);
}
// Amounts beyond the width shift everything out.
template <class T>
T shift_left(T a, u32 n) {
    return n >= u32(kWidth<T>) ? T(0) : T(u64(a) << n);
}
template <class T>
T shift_right(T a, u32 n) {
    if (n >= u32(kWidth<T>)) return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
    return T(a >> n);
}
template <class T>
u32 count_ones(T a) {
    return u32(std::popcount(a));
}
template <class T>
u32 leading_zeros(T a) {
    return u32(std::countl_zero(a));
}
template <class T>
T reverse_bits(T a) {
    T result = 0;
    for (int bit = 0; bit < kWidth<T>; ++bit) result |= T((a >> bit) & 1) << (kWidth<T> - 1 - bit);
    return result;
}
/// The position of the highest bit that differs from the sign; 0xffffffff when there is none.
template <class T>
u32 find_highest(T a) {
    const Unsigned<T> bits = std::is_signed_v<T> && a < 0 ? Unsigned<T>(~a) : Unsigned<T>(a);
    return bits == 0 ? 0xffffffffu : u32(kWidth<T> - 1 - std::countl_zero(bits));
}
template <class T>
u32 find_highest_shift(T a) {
    const u32 position = find_highest(a);
    return position == 0xffffffffu ? position : u32(kWidth<T>) - 1 - position;
}
template <class T>
T extract_bits(T a, u32 position, u32 length) {
    position &= 255, length &= 255;
    const Unsigned<T> bits = Unsigned<T>(a);
    const u32 width = kWidth<T>;
    const bool fill = std::is_signed_v<T> && length > 0 &&
                      ((bits >> std::min(position + length - 1, width - 1)) & 1);
    Unsigned<T> result = 0;
    for (u32 bit = 0; bit < width; ++bit) {
        const bool one =
            bit < length && position + bit < width ? (bits >> (position + bit)) & 1 : fill;
        result |= Unsigned<T>(one) << bit;
    }
    return T(result);
}
template <class T>
T insert_bits(T a, T b, u32 position, u32 length) {
    position &= 255, length &= 255;
    for (u32 bit = 0; bit < length && position + bit < u32(kWidth<T>); ++bit) {
        const T mask = T(T(1) << (position + bit));
        b = (a >> bit) & 1 ? T(b | mask) : T(b & ~mask);
    }
    return b;
}
u32 permute_bytes(u32 a, u32 b, u32 selectors) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int to = 0; to < 4; ++to) {
        const u32 selector = selectors >> (4 * to) & 15;
        u32 byte = u32(bytes >> (8 * (selector & 7))) & 255;
        if (selector & 8) byte = byte & 128 ? 255 : 0;  // replicate the sign
        result |= byte << (8 * to);
    }
    return result;
}
template <bool kLeft, bool kClamp>
u32 funnel_shift(u32 a, u32 b, u32 c) {
    const u32 n = kClamp ? std::min(c, 32u) : c & 31;
    const u64 both = u64(b) << 32 | a;
    if (kLeft) return n == 32 ? a : u32((both << n) >> 32);
    return u32(both >> n);
}
template <class A, class B>
i32 dot_product4(A a, B b, i32 c) {
    using ByteA = std::conditional_t<std::is_signed_v<A>, i8, u8>;
    using ByteB = std::conditional_t<std::is_signed_v<B>, i8, u8>;
    for (int byte = 0; byte < 4; ++byte)
        c = i32(u32(c) + u32(i32(ByteA(a >> (8 * byte))) * i32(ByteB(b >> (8 * byte)))));
    return c;
}

/// lop3: any function of three bits, given as its truth table.
Outcome logic3(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    const u64* b = step.source(instruction, 1);
    const u64* c = step.source(instruction, 2);
    const u32 table = u32(step.source(instruction, 3)[0]);
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) {
        const u32 x = u32(a[lane]), y = u32(b[lane]), z = u32(c[lane]);
        u32 result = 0;
        for (u32 row = 0; row < 8; ++row)
            if (table >> row & 1)
                result |= (row & 4 ? x : ~x) & (row & 2 ? y : ~y) & (row & 1 ? z : ~z);
        d[lane] = result;
    });
    return Outcome::kAdvance;
}

template <class T>
void add_arithmetic(Forms& forms, const std::string& type) {
    forms["add." + type] = {apply2<T, T, add<T>>, 2};
    forms["sub." + type] = {apply2<T, T, subtract<T>>, 2};
    forms["mul.lo." + type] = {apply2<T, T, multiply_low<T>>, 2};
    forms["mul.hi." + type] = {apply2<T, T, multiply_high<T>>, 2};
    forms["mad.lo." + type] = {apply3<T, T, T, multiply_add_low<T>>, 3};
    forms["mad.hi." + type] = {apply3<T, T, T, multiply_add_high<T>>, 3};
    forms["div." + type] = {apply2<T, T, divide<T>>, 2};
    forms["rem." + type] = {apply2<T, T, remainder<T>>, 2};
    forms["min." + type] = {apply2<T, T, minimum<T>>, 2};
    forms["max." + type] = {apply2<T, T, maximum<T>>, 2};
    forms["sad." + type] = {apply3<T, T, T, sum_of_differences<T>>, 3};
    forms["shr." + type] = {apply2<T, u32, shift_right<T>>, 2};
    if constexpr (sizeof(T) < 8) {
        forms["mul.wide." + type] = {apply2<T, T, multiply_wide<T>>, 2};
        forms["mad.wide." + type] = {apply3<T, T, Wide<T>, multiply_add_wide<T>>, 3};
    }
    if constexpr (std::is_signed_v<T>) {
        forms["abs." + type] = {apply1<T, absolute<T>>, 1};
        forms["neg." + type] = {apply1<T, negate<T>>, 1};
    }
    if constexpr (sizeof(T) >= 4) {
        forms["bfind." + type] = {apply1<T, find_highest<T>>, 1};
        forms["bfind.shiftamt." + type] = {apply1<T, find_highest_shift<T>>, 1};
        forms["bfe." + type] = {apply3<T, u32, u32, extract_bits<T>>, 3};
    }
}

template <class T>
void add_logic(Forms& forms, const std::string& type) {
    forms["and." + type] = {apply2<T, T, bit_and<T>>, 2};
    forms["or." + type] = {apply2<T, T, bit_or<T>>, 2};
    forms["xor." + type] = {apply2<T, T, bit_xor<T>>, 2};
    forms["not." + type] = {apply1<T, bit_not<T>>, 1};
    if constexpr (!std::same_as<T, bool>) {
        forms["shl." + type] = {apply2<T, u32, shift_left<T>>, 2};
        forms["shr." + type] = {apply2<T, u32, shift_right<T>>, 2};
    }
    if constexpr (sizeof(T) >= 4) {
        forms["popc." + type] = {apply1<T, count_ones<T>>, 1};
        forms["clz." + type] = {apply1<T, leading_zeros<T>>, 1};
        forms["brev." + type] = {apply1<T, reverse_bits<T>>, 1};
        forms["bfi." + type] = {apply4<T, insert_bits<T>>, 4};
    }
}

}  // namespace

void add_integer_forms(Forms& forms) {
    add_arithmetic<i16>(forms, "s16");
    add_arithmetic<u16>(forms, "u16");
    add_arithmetic<i32>(forms, "s32");
    add_arithmetic<u32>(forms, "u32");
    add_arithmetic<i64>(forms, "s64");
    add_arithmetic<u64>(forms, "u64");
    add_logic<bool>(forms, "pred");
    add_logic<u16>(forms, "b16");
    add_logic<u32>(forms, "b32");
    add_logic<u64>(forms, "b64");
    forms["prmt.b32"] = {apply3<u32, u32, u32, permute_bytes>, 3};
    forms["shf.l.wrap.b32"] = {apply3<u32, u32, u32, funnel_shift<true, false>>, 3};
    forms["shf.r.wrap.b32"] = {apply3<u32, u32, u32, funnel_shift<false, false>>, 3};
    forms["shf.l.clamp.b32"] = {apply3<u32, u32, u32, funnel_shift<true, true>>, 3};
    forms["shf.r.clamp.b32"] = {apply3<u32, u32, u32, funnel_shift<false, true>>, 3};
    forms["dp4a.s32.s32"] = {apply3<i32, i32, i32, dot_product4<i32, i32>>, 3};
    forms["dp4a.u32.u32"] = {apply3<u32, u32, i32, dot_product4<u32, u32>>, 3};
    forms["dp4a.s32.u32"] = {apply3<i32, u32, i32, dot_product4<i32, u32>>, 3};
    forms["dp4a.u32.s32"] = {apply3<u32, i32, i32, dot_product4<u32, i32>>, 3};
    forms["lop3.b32"] = {logic3, 4};
}

const Forms& computing_forms() {
    static const Forms forms = [] {
        Forms all;
        add_integer_forms(all);
        add_float_forms(all);
        add_comparison_forms(all);
        add_conversion_forms(all);
        return all;
    }();
    return forms;
}

}  // namespace ptx
