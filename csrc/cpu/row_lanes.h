#pragma once
// Vectors of the row kernels, and how each dtype is read into accumulators and rounded back. Part
// of row_kernels.cpp and of no other source: its names are local to each build of that file.
//
// A bfloat16 row is added without widening it: a 32-bit word holds two elements, one moved to the
// top of a float32 by a shift, the other by a mask; the two sums share a word again when stored.
#include <cstdint>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#if !defined(__clang__)
// GCC 12's header, in undefined vectors.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace ep {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "element 0 is the low half of a word");

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON; elsewhere the compiler splits it
#endif
constexpr int kSmallBytes = 16;  // what every row is a multiple of

template <int kBytes>
struct Vectors {
    typedef uint32_t Word __attribute__((vector_size(kBytes)));
    typedef int32_t Int __attribute__((vector_size(kBytes)));
    typedef float Float __attribute__((vector_size(kBytes)));
    typedef double Double __attribute__((vector_size(kBytes)));
    typedef uint64_t Long __attribute__((vector_size(kBytes)));
    typedef uint16_t Half __attribute__((vector_size(kBytes / 2)));  // as many as Word has
};
template <int kBytes>
using Word = typename Vectors<kBytes>::Word;
template <int kBytes>
using Float = typename Vectors<kBytes>::Float;
template <int kBytes>
using Double = typename Vectors<kBytes>::Double;

template <class V>
inline V load(const char* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <bool kStreaming, class V>
inline void store(char* p, V v) {
#if defined(__x86_64__)
    if constexpr (kStreaming && sizeof(V) == 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
        return;
    }
#if defined(__AVX2__)
    if constexpr (kStreaming && sizeof(V) == 32) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
        return;
    }
#endif
#if defined(__AVX512F__)
    if constexpr (kStreaming && sizeof(V) == 64) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
        return;
    }
#endif
#endif
    __builtin_memcpy(p, &v, sizeof v);
}

/// kBytes / 4 elements of 2 bytes, one in each word.
template <int kBytes>
inline Word<kBytes> widen_words(const char* p) {
    return __builtin_convertvector(load<typename Vectors<kBytes>::Half>(p), Word<kBytes>);
}

template <int kBytes>
inline void store_halves(char* p, Word<kBytes> words) {
    store<false>(p, __builtin_convertvector(words, typename Vectors<kBytes>::Half));
}

// Per dtype: Lanes<kBytes> holds the accumulators of kBytes of a row; read, add and pack them.
// Casts to and from e4m3 read and write floats in the order of the row.

template <int kBytes>
struct FloatPair {
    Float<kBytes> a, b;
    void operator+=(const FloatPair& other) { a += other.a, b += other.b; }
};

struct BFloat16 {
    static constexpr int kItemBytes = 2;
    template <int kBytes>
    using Lanes = FloatPair<kBytes>;  // a: even elements, b: odd elements

    template <int kBytes>
    static Lanes<kBytes> read(const char* p) {
        const auto word = load<Word<kBytes>>(p);
        return {(Float<kBytes>)(word << 16), (Float<kBytes>)(word & 0xffff0000u)};
    }

    template <int kBytes>
    static Word<kBytes> pack(const Lanes<kBytes>& sum) {
        return round<kBytes>(sum.a) >> 16 | (round<kBytes>(sum.b) & 0xffff0000u);
    }

    template <int kBytes>
    static Float<kBytes> read_floats(const char* p) {
        return (Float<kBytes>)(widen_words<kBytes>(p) << 16);
    }

    template <int kBytes>
    static void write_floats(char* p, Float<kBytes> x) {
        store_halves<kBytes>(p, round<kBytes>(x) >> 16);
    }

 private:
    // The upper half is the nearest bfloat16, ties to even.
    template <int kBytes>
    static Word<kBytes> round(Float<kBytes> x) {
        const Word<kBytes> bits = (Word<kBytes>)x;
        const Word<kBytes> rounded = bits + 0x7fffu + (bits >> 16 & 1u);
        return x == x ? rounded : Word<kBytes>{} + 0x7fc00000u;
    }
};

struct Float16 {
    static constexpr int kItemBytes = 2;
    template <int kBytes>
    using Lanes = FloatPair<kBytes>;  // F16C: lower, upper half of the vector; else even, odd

    template <int kBytes>
    static Lanes<kBytes> read(const char* p) {
#if defined(__F16C__) && defined(__AVX512F__)
        if constexpr (kBytes == 64)
            return {(Float<kBytes>)_mm512_cvtph_ps(load<__m256i>(p)),
                    (Float<kBytes>)_mm512_cvtph_ps(load<__m256i>(p + 32))};
#endif
#if defined(__F16C__)
        if constexpr (kBytes == 32)
            return {(Float<kBytes>)_mm256_cvtph_ps(load<__m128i>(p)),
                    (Float<kBytes>)_mm256_cvtph_ps(load<__m128i>(p + 16))};
#endif
        const auto word = load<Word<kBytes>>(p);
        return {widen<kBytes>(word & 0xffffu), widen<kBytes>(word >> 16)};
    }

    template <int kBytes>
    static Word<kBytes> pack(const Lanes<kBytes>& sum) {
        constexpr int kNearest = 0x08;  // to nearest even, no exceptions
#if defined(__F16C__) && defined(__AVX512F__)
        if constexpr (kBytes == 64) {
            const __m256i a = _mm512_cvtps_ph((__m512)quiet<kBytes>(sum.a), kNearest);
            const __m256i b = _mm512_cvtps_ph((__m512)quiet<kBytes>(sum.b), kNearest);
            return (Word<kBytes>)_mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        }
#endif
#if defined(__F16C__)
        if constexpr (kBytes == 32) {
            const __m128i a = _mm256_cvtps_ph((__m256)quiet<kBytes>(sum.a), kNearest);
            const __m128i b = _mm256_cvtps_ph((__m256)quiet<kBytes>(sum.b), kNearest);
            return (Word<kBytes>)_mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
        }
#endif
        (void)kNearest;
        return narrow<kBytes>(sum.a) | narrow<kBytes>(sum.b) << 16;
    }

    template <int kBytes>
    static Float<kBytes> read_floats(const char* p) {
#if defined(__F16C__) && defined(__AVX512F__)
        if constexpr (kBytes == 64) return (Float<kBytes>)_mm512_cvtph_ps(load<__m256i>(p));
#endif
#if defined(__F16C__)
        if constexpr (kBytes == 32) return (Float<kBytes>)_mm256_cvtph_ps(load<__m128i>(p));
#endif
        return widen<kBytes>(widen_words<kBytes>(p));
    }

    template <int kBytes>
    static void write_floats(char* p, Float<kBytes> x) {
        store_halves<kBytes>(p, narrow<kBytes>(x));
    }

 private:
    template <int kBytes>
    static Float<kBytes> quiet(Float<kBytes> x) {
        return x == x ? x : (Float<kBytes>)(Word<kBytes>{} + 0x7fc00000u);
    }

    // The exponent is rebiased by a multiplication, which also normalises subnormals.
    template <int kBytes>
    static Float<kBytes> widen(Word<kBytes> half) {
        const Word<kBytes> sign = (half & 0x8000u) << 16;
        const Word<kBytes> magnitude = half & 0x7fffu;
        Word<kBytes> bits = (Word<kBytes>)((Float<kBytes>)(magnitude << 13) * 0x1p112f);
        bits |= magnitude >= 0x7c00u ? Word<kBytes>{} + 0x7f800000u : Word<kBytes>{};
        return (Float<kBytes>)(bits | sign);
    }

    // Normal: integer rounding. Subnormal: adding 0.5 lets the adder round at bit 2^-24.
    template <int kBytes>
    static Word<kBytes> narrow(Float<kBytes> x) {
        const Word<kBytes> sign = (Word<kBytes>)x & 0x80000000u;
        const Word<kBytes> magnitude = (Word<kBytes>)x ^ sign;
        const Word<kBytes> normal =
            (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
        const Word<kBytes> subnormal =
            (Word<kBytes>)((Float<kBytes>)magnitude + 0.5f) - 0x3f000000u;
        Word<kBytes> half = magnitude < 0x38800000u ? subnormal : normal;
        half = magnitude >= 0x47800000u ? Word<kBytes>{} + 0x7c00u : half;
        half |= sign >> 16;
        return x == x ? half : Word<kBytes>{} + 0x7e00u;
    }
};

struct Float32 {
    static constexpr int kItemBytes = 4;
    template <int kBytes>
    using Lanes = Float<kBytes>;

    template <int kBytes>
    static Lanes<kBytes> read(const char* p) {
        return load<Float<kBytes>>(p);
    }

    template <int kBytes>
    static Word<kBytes> pack(const Lanes<kBytes>& sum) {
        return sum == sum ? (Word<kBytes>)sum : Word<kBytes>{} + 0x7fc00000u;
    }

    template <int kBytes>
    static Float<kBytes> read_floats(const char* p) {
        return read<kBytes>(p);
    }

    template <int kBytes>
    static void write_floats(char* p, Float<kBytes> x) {
        store<false>(p, pack<kBytes>(x));
    }
};

struct Float64 {
    static constexpr int kItemBytes = 8;
    template <int kBytes>
    using Lanes = Double<kBytes>;

    template <int kBytes>
    static Lanes<kBytes> read(const char* p) {
        return load<Double<kBytes>>(p);
    }

    template <int kBytes>
    static Word<kBytes> pack(const Lanes<kBytes>& sum) {
        using Long = typename Vectors<kBytes>::Long;
        return (Word<kBytes>)(sum == sum ? (Long)sum : Long{} + 0x7ff8000000000000u);
    }
};

}  // namespace
}  // namespace ep
