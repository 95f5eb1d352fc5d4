// The row kernels, one source for all instruction sets: setup.py compiles this file once per set
// with -DEP_ISA=<name>, and each build exports one table, row_kernels_<name>.
//
// All but that table has internal linkage and no library template is used: a function shared
// between the builds would be kept by the linker in one copy only, perhaps the one for AVX-512.
#include <cstddef>
#include <cstdint>

#include "cpu/fp8_lanes.h"
#include "cpu/logfmt_lanes.h"
#include "cpu/row_lanes.h"
#include "cpu/rows.h"

namespace ep {
namespace {

// Left alone the compiler calls the inner loops and keeps the sums in memory, at half the speed.
#define EP_ALWAYS_INLINE __attribute__((always_inline))

constexpr int kLineBytes = 64;
// Vectors of a row in flight. Each holds four registers, a group's partial sum and the total; with
// more than two, 16 registers spill and 32 bring nothing.
constexpr int kUnroll = 2;

struct Sum {
    const char* const* rows;
    const int* group_ends;
    int num_groups;
    const char* biases[2];  // the first is null where there is none
};

template <class D, int kBytes, int kCount>
EP_ALWAYS_INLINE inline void add_row(typename D::template Lanes<kBytes> (&sum)[kCount],
                                     const char* p) {
    for (int i = 0; i < kCount; ++i) sum[i] += D::template read<kBytes>(p + i * kBytes);
}

template <class D, int kBytes, int kCount>
EP_ALWAYS_INLINE inline void set_row(typename D::template Lanes<kBytes> (&sum)[kCount],
                                     const char* p) {
    for (int i = 0; i < kCount; ++i) sum[i] = D::template read<kBytes>(p + i * kBytes);
}

// The row operations: columns() does bytes [at, at + kCount * kBytes), all loads before the stores.

struct CopyRow {
    char* out;
    const char* row;

    template <bool kStreaming, int kBytes, int kCount>
    EP_ALWAYS_INLINE void columns(size_t at) const {
        Word<kBytes> words[kCount];
        for (int i = 0; i < kCount; ++i) words[i] = load<Word<kBytes>>(row + at + i * kBytes);
        for (int i = 0; i < kCount; ++i) store<kStreaming>(out + at + i * kBytes, words[i]);
    }
};

template <class D>
struct SumRows {
    char* out;
    const Sum& sum;

    template <bool kStreaming, int kBytes, int kCount>
    EP_ALWAYS_INLINE void columns(size_t at) const {
        typename D::template Lanes<kBytes> total[kCount], partial[kCount];
        int row = 0, group = 0;
        if (sum.biases[0] != nullptr) {
            set_row<D, kBytes>(total, sum.biases[0] + at);
            if (sum.biases[1] != nullptr) add_row<D, kBytes>(total, sum.biases[1] + at);
        } else {
            set_row<D, kBytes>(total, sum.rows[row++] + at);
            const int end = sum.group_ends[group++];
            for (; row < end; ++row) add_row<D, kBytes>(total, sum.rows[row] + at);
        }
        for (; group < sum.num_groups; ++group) {
            const int end = sum.group_ends[group];
            if (row == end) continue;
            set_row<D, kBytes>(partial, sum.rows[row++] + at);
            for (; row < end; ++row) add_row<D, kBytes>(partial, sum.rows[row] + at);
            for (int i = 0; i < kCount; ++i) total[i] += partial[i];
        }
        for (int i = 0; i < kCount; ++i)
            store<kStreaming>(out + at + i * kBytes, D::template pack<kBytes>(total[i]));
    }
};

struct SumWeighted {
    char* out;
    const char* const* rows;
    const float* weights;
    int num_rows;

    template <bool kStreaming, int kBytes, int kCount>
    EP_ALWAYS_INLINE void columns(size_t at) const {
        FloatPair<kBytes> total[kCount] = {};
        for (int row = 0; row < num_rows; ++row)
            for (int i = 0; i < kCount; ++i) {
                auto value = BFloat16::read<kBytes>(rows[row] + at + i * kBytes);
                value.a *= weights[row];
                value.b *= weights[row];
                total[i] += value;
            }
        for (int i = 0; i < kCount; ++i)
            store<kStreaming>(out + at + i * kBytes, BFloat16::pack<kBytes>(total[i]));
    }
};

// Streaming stores need whole lines; the ends of the row are written plainly, 16 bytes at a time.
template <bool kStreaming, class Operation>
void for_columns(const Operation& operation, size_t num_bytes) {
    size_t at = 0;
    if (kStreaming)
        for (; at < num_bytes && reinterpret_cast<uintptr_t>(operation.out + at) % kLineBytes != 0;
             at += kSmallBytes)
            operation.template columns<false, kSmallBytes, 1>(at);
    for (; at + kUnroll * kVectorBytes <= num_bytes; at += kUnroll * kVectorBytes)
        operation.template columns<kStreaming, kVectorBytes, kUnroll>(at);
    for (; at + kVectorBytes <= num_bytes; at += kVectorBytes)
        operation.template columns<kStreaming, kVectorBytes, 1>(at);
    for (; at < num_bytes; at += kSmallBytes) operation.template columns<false, kSmallBytes, 1>(at);
}

bool can_stream(const void* out) { return reinterpret_cast<uintptr_t>(out) % kSmallBytes == 0; }

void copy(void* out, const void* row, size_t num_bytes) {
    for_columns<false>(CopyRow{static_cast<char*>(out), static_cast<const char*>(row)}, num_bytes);
}

void copy_streaming(void* out, const void* row, size_t num_bytes) {
    if (!can_stream(out)) return copy(out, row, num_bytes);
    for_columns<true>(CopyRow{static_cast<char*>(out), static_cast<const char*>(row)}, num_bytes);
}

template <bool kStreaming>
void reduce_as(DType dtype, char* out, const Sum& sum, size_t num_bytes) {
    switch (dtype) {
        case DType::kBFloat16:
            return for_columns<kStreaming>(SumRows<BFloat16>{out, sum}, num_bytes);
        case DType::kFloat16:
            return for_columns<kStreaming>(SumRows<Float16>{out, sum}, num_bytes);
        case DType::kFloat32:
            return for_columns<kStreaming>(SumRows<Float32>{out, sum}, num_bytes);
        case DType::kFloat64:
            return for_columns<kStreaming>(SumRows<Float64>{out, sum}, num_bytes);
    }
}

// Groups of one row add up in the order of one group, which takes less work.
bool is_one_row_each(const Sum& sum, int num_rows) {
    if (sum.num_groups != num_rows) return false;
    for (int group = 0; group < num_rows; ++group)
        if (sum.group_ends[group] != group + 1) return false;
    return true;
}

void reduce(DType dtype,
            void* out,
            const void* const* rows,
            const int* group_ends,
            int num_groups,
            const void* bias_0,
            const void* bias_1,
            size_t hidden,
            bool streaming) {
    const size_t num_bytes = hidden * item_size(dtype);
    const int num_rows = num_groups == 0 ? 0 : group_ends[num_groups - 1];
    if (bias_0 == nullptr) bias_0 = bias_1, bias_1 = nullptr;
    if (bias_0 == nullptr && num_rows == 0) {
        __builtin_memset(out, 0, num_bytes);
        return;
    }
    if (num_rows + (bias_0 != nullptr) + (bias_1 != nullptr) == 1) {
        const void* row = bias_0 != nullptr ? bias_0 : rows[0];
        return streaming ? copy_streaming(out, row, num_bytes) : copy(out, row, num_bytes);
    }
    Sum sum = {reinterpret_cast<const char* const*>(rows),
               group_ends,
               num_groups,
               {static_cast<const char*>(bias_0), static_cast<const char*>(bias_1)}};
    if (bias_0 == nullptr) {  // SumRows wants a row in the first group
        while (sum.group_ends[0] == 0) ++sum.group_ends, --sum.num_groups;
        if (is_one_row_each(sum, num_rows)) sum.group_ends = &num_rows, sum.num_groups = 1;
    }
    char* target = static_cast<char*>(out);
    if (streaming && can_stream(out)) return reduce_as<true>(dtype, target, sum, num_bytes);
    reduce_as<false>(dtype, target, sum, num_bytes);
}

void weighted_sum(
    void* out, const void* const* rows, const float* weights, int num_rows, size_t hidden) {
    const SumWeighted sum = {static_cast<char*>(out), reinterpret_cast<const char* const*>(rows),
                             weights, num_rows};
    for_columns<false>(sum, hidden * item_size(DType::kBFloat16));
}

template <class D>
void quantize_from(
    const Fp8Format& format, void* data, void* scales, const void* row, size_t hidden) {
    const auto cast = format.block == 32 ? quantize_as<D, 32> : quantize_as<D, 128>;
    cast(format, static_cast<char*>(data), static_cast<char*>(scales),
         static_cast<const char*>(row), hidden);
}

void quantize(DType dtype,
              const Fp8Format& format,
              void* data,
              void* scales,
              const void* row,
              size_t hidden) {
    const auto cast = dtype == DType::kBFloat16  ? quantize_from<BFloat16>
                      : dtype == DType::kFloat16 ? quantize_from<Float16>
                                                 : quantize_from<Float32>;
    cast(format, data, scales, row, hidden);
}

template <class D>
void dequantize_to(const Fp8Format& format,
                   void* out,
                   const void* data,
                   const void* scales,
                   size_t scale_stride,
                   size_t hidden) {
    const auto cast = format.block == 32 ? dequantize_as<D, 32> : dequantize_as<D, 128>;
    cast(format, static_cast<char*>(out), static_cast<const char*>(data),
         static_cast<const char*>(scales), scale_stride, hidden);
}

void dequantize(DType dtype,
                const Fp8Format& format,
                void* out,
                const void* data,
                const void* scales,
                size_t scale_stride,
                size_t hidden) {
    const auto cast = dtype == DType::kBFloat16  ? dequantize_to<BFloat16>
                      : dtype == DType::kFloat16 ? dequantize_to<Float16>
                                                 : dequantize_to<Float32>;
    cast(format, out, data, scales, scale_stride, hidden);
}

size_t encode_logfmt(void* extremes, void* data, const void* row, size_t hidden) {
    char* out = static_cast<char*>(data);
    for (size_t block = 0; block < hidden / kLogBlock; ++block) {
        const char* columns = static_cast<const char*>(row) + block * kPlainBytes;
        const LogExtremes both = extremes_of(columns);
        both.write(static_cast<char*>(extremes) + block * kLogExtremeBytes);
        out += encode_block(out, columns, both);
    }
    return static_cast<size_t>(out - static_cast<char*>(data));
}

void decode_logfmt(float* out, LogCursor& row, size_t hidden) {
    for (size_t column = 0; column < hidden; column += kLogBlock) {
        const LogBlock block(row);
        for (size_t i = 0; i < kLogBlock; i += kFloats)
            store<false>(reinterpret_cast<char*>(out + column + i), block.at(i));
    }
}

void weighted_sum_logfmt(
    void* out, LogCursor* rows, const float* weights, int num_rows, size_t hidden) {
    for (size_t column = 0; column < hidden; column += kLogBlock) {
        constexpr size_t kCount = kLogBlock / kFloats;
        Floats total[kCount] = {};
        for (int row = 0; row < num_rows; ++row) {
            const LogBlock block(rows[row]);
            for (size_t i = 0; i < kCount; ++i) total[i] += block.at(i * kFloats) * weights[row];
        }
        char* sums = static_cast<char*>(out) + 2 * column;
        for (size_t i = 0; i < kCount; ++i)
            BFloat16::write_floats<kVectorBytes>(sums + 2 * i * kFloats, total[i]);
    }
}

}  // namespace

#define EP_JOIN_(a, b) a##b
#define EP_JOIN(a, b) EP_JOIN_(a, b)
#define EP_QUOTE_(a) #a
#define EP_QUOTE(a) EP_QUOTE_(a)

extern const RowKernels EP_JOIN(row_kernels_, EP_ISA);
constinit const RowKernels EP_JOIN(row_kernels_, EP_ISA) = {
    EP_QUOTE(EP_ISA), copy,       copy_streaming, reduce,        weighted_sum,
    quantize,         dequantize, encode_logfmt,  decode_logfmt, weighted_sum_logfmt};

}  // namespace ep
