// The row kernels, one source for all instruction sets: setup.py compiles this file once per set
// with -DEP_ISA=<name>, and each build exports one table, row_kernels_<name>.
//
// All but that table has internal linkage and no library template is used: a function shared
// between the builds would be kept by the linker in one copy only, perhaps the one for AVX-512.
//
// A 16-bit row is added without widening it: a 32-bit word holds two elements, one moved to the top
// of a float32 by a shift, the other by a mask, and the two sums meet again in one word when
// stored.
#include <cstddef>
#include <cstdint>

#include "cpu/row_lanes.h"
#include "cpu/rows.h"

namespace ep {
namespace {

constexpr int kLineBytes = 64;
// Vectors in flight: a group's partial sum and the total, two registers per vector each, must fit.
constexpr int kUnroll = kVectorBytes == 64 ? 4 : 2;

struct Sum {
    const char* const* rows;
    const int* group_ends;
    int num_groups;
    const char* biases[2];  // the first is null where there is none
};

template <class D, int kBytes, int kCount>
inline void add_row(typename D::template Lanes<kBytes> (&sum)[kCount], const char* p) {
    for (int i = 0; i < kCount; ++i) sum[i] += D::template read<kBytes>(p + i * kBytes);
}

template <class D, int kBytes, int kCount>
inline void set_row(typename D::template Lanes<kBytes> (&sum)[kCount], const char* p) {
    for (int i = 0; i < kCount; ++i) sum[i] = D::template read<kBytes>(p + i * kBytes);
}

// Write columns [at, at + kCount * kBytes) of the sum; all loads come before the stores.
template <class D, bool kStreaming, int kBytes, int kCount>
inline void sum_columns(char* out, const Sum& sum, size_t at) {
    typename D::template Lanes<kBytes> total[kCount], partial[kCount];
    int row = 0, group = 0;
    if (sum.biases[0] != nullptr) {
        set_row<D, kBytes>(total, sum.biases[0] + at);
        if (sum.biases[1] != nullptr) add_row<D, kBytes>(total, sum.biases[1] + at);
    } else {
        set_row<D, kBytes>(total, sum.rows[0] + at);
        for (row = 1; row < sum.group_ends[0]; ++row) add_row<D, kBytes>(total, sum.rows[row] + at);
        group = 1;
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

// Walk a row from its first byte to its last: `small` takes 16 bytes at an offset, `one` a vector,
// `many` kUnroll vectors. Streaming stores need whole lines, so the ends of the row go to `small`.
template <bool kStreaming, class Small, class One, class Many>
inline void for_columns(const char* out, size_t num_bytes, Small small, One one, Many many) {
    size_t at = 0;
    if (kStreaming)
        for (; at < num_bytes && reinterpret_cast<uintptr_t>(out + at) % kLineBytes != 0;
             at += kSmallBytes)
            small(at);
    for (; at + kUnroll * kVectorBytes <= num_bytes; at += kUnroll * kVectorBytes) many(at);
    for (; at + kVectorBytes <= num_bytes; at += kVectorBytes) one(at);
    for (; at < num_bytes; at += kSmallBytes) small(at);
}

template <bool kStreaming, int kBytes, int kCount>
inline void copy_columns(char* out, const char* row, size_t at) {
    Word<kBytes> words[kCount];
    for (int i = 0; i < kCount; ++i) words[i] = load<Word<kBytes>>(row + at + i * kBytes);
    for (int i = 0; i < kCount; ++i) store<kStreaming>(out + at + i * kBytes, words[i]);
}

template <bool kStreaming>
void copy_columns_of(char* out, const char* row, size_t num_bytes) {
    for_columns<kStreaming>(
        out, num_bytes,  //
        [=](size_t at) { copy_columns<false, kSmallBytes, 1>(out, row, at); },
        [=](size_t at) { copy_columns<kStreaming, kVectorBytes, 1>(out, row, at); },
        [=](size_t at) { copy_columns<kStreaming, kVectorBytes, kUnroll>(out, row, at); });
}

bool can_stream(const void* out) { return reinterpret_cast<uintptr_t>(out) % kSmallBytes == 0; }

void copy(void* out, const void* row, size_t num_bytes) {
    copy_columns_of<false>(static_cast<char*>(out), static_cast<const char*>(row), num_bytes);
}

void copy_streaming(void* out, const void* row, size_t num_bytes) {
    if (!can_stream(out)) return copy(out, row, num_bytes);
    copy_columns_of<true>(static_cast<char*>(out), static_cast<const char*>(row), num_bytes);
}

template <class D, bool kStreaming>
void reduce_columns(char* out, const Sum& sum, size_t num_bytes) {
    for_columns<kStreaming>(
        out, num_bytes,  //
        [&](size_t at) { sum_columns<D, false, kSmallBytes, 1>(out, sum, at); },
        [&](size_t at) { sum_columns<D, kStreaming, kVectorBytes, 1>(out, sum, at); },
        [&](size_t at) { sum_columns<D, kStreaming, kVectorBytes, kUnroll>(out, sum, at); });
}

template <bool kStreaming>
void reduce_as(DType dtype, char* out, const Sum& sum, size_t num_bytes) {
    switch (dtype) {
        case DType::kBFloat16:
            return reduce_columns<BFloat16, kStreaming>(out, sum, num_bytes);
        case DType::kFloat16:
            return reduce_columns<Float16, kStreaming>(out, sum, num_bytes);
        case DType::kFloat32:
            return reduce_columns<Float32, kStreaming>(out, sum, num_bytes);
        case DType::kFloat64:
            return reduce_columns<Float64, kStreaming>(out, sum, num_bytes);
    }
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
    if (bias_0 == nullptr) {
        // Groups of one row add up like one group; sum_columns wants a row in the first group.
        while (sum.group_ends[0] == 0) ++sum.group_ends, --sum.num_groups;
        if (sum.num_groups == num_rows && sum.group_ends[0] == 1) {
            bool is_flat = true;
            for (int group = 0; group < num_rows; ++group)
                is_flat &= sum.group_ends[group] == group + 1;
            if (is_flat) sum.group_ends = &num_rows, sum.num_groups = 1;
        }
    }
    char* target = static_cast<char*>(out);
    if (streaming && can_stream(out)) return reduce_as<true>(dtype, target, sum, num_bytes);
    reduce_as<false>(dtype, target, sum, num_bytes);
}

}  // namespace

#define EP_JOIN_(a, b) a##b
#define EP_JOIN(a, b) EP_JOIN_(a, b)
#define EP_QUOTE_(a) #a
#define EP_QUOTE(a) EP_QUOTE_(a)

extern const RowKernels EP_JOIN(row_kernels_, EP_ISA);
constinit const RowKernels EP_JOIN(row_kernels_, EP_ISA) = {EP_QUOTE(EP_ISA), copy, copy_streaming,
                                                            reduce};

}  // namespace ep
