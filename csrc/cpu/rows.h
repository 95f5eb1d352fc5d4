#pragma once
// Row kernels: the loops that move and add token rows, compiled once per instruction set from
// row_kernels.cpp and chosen at run time. Every build gives the same bits.
#include <cstddef>
#include <string_view>
#include <vector>

namespace ep {

enum class DType : int { kBFloat16, kFloat16, kFloat32, kFloat64 };

constexpr size_t item_size(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

/// As fp8.ScaleFormat in ep_megatron/fp8.py.
enum class ScaleFormat : int { kFloat32, kUe8m0, kPackedUe8m0 };

/// How a row becomes e4m3 numbers with a scale per block of columns; see Fp8Recipe in fp8.py.
struct Fp8Format {
    int block;  // 32 or 128 columns
    ScaleFormat scales;
    float min_amax;

    size_t num_scales(size_t hidden) const { return hidden / static_cast<size_t>(block); }
    size_t scale_bytes(size_t hidden) const {
        return num_scales(hidden) * (scales == ScaleFormat::kPackedUe8m0 ? 1 : 4);
    }
};

/// Where a LogFMT row is read next: its extremes and its data, see logfmt.py.
struct LogCursor {
    const char* extremes;
    const char* data;
};

constexpr size_t kLogBlock = 128;       // columns
constexpr size_t kLogExtremeBytes = 4;  // of a block

constexpr size_t logfmt_extreme_bytes(size_t hidden) {
    return hidden / kLogBlock * kLogExtremeBytes;
}

/// The most bytes of a row of `hidden` columns with its extremes: that of one that is not coded.
constexpr size_t max_logfmt_bytes(size_t hidden) {
    return logfmt_extreme_bytes(hidden) + 2 * hidden;
}

/// One build of the kernels. Sizes are multiples of 16 bytes; rows are read at any alignment, and
/// `out` should be aligned to 16 bytes (to 64 for full speed), else streaming stores become plain.
/// Nothing is checked here: that is the caller's job, once per call and not once per row.
struct RowKernels {
    const char* name;  // "baseline", "avx2", "avx512"

    /// Copy one row.
    void (*copy)(void* out, const void* row, size_t num_bytes);

    /// Copy one row past the caches, for bytes that no core here reads soon: no read of the line
    /// before it is written, nothing useful evicted. Such stores are weakly ordered: call
    /// stream_fence() before the store that tells another thread or process about them.
    void (*copy_streaming)(void* out, const void* row, size_t num_bytes);

    /// Write the sum of groups of rows (one group per source rank), in an order that is part of
    /// the contract: total = bias_0 + bias_1; then for each group, partial = its rows added in
    /// order, total += partial; what is absent is skipped, not added as zero, so -0.0 survives.
    /// Accumulates in float32 (float64 for float64) and rounds once, to nearest even. A NaN becomes
    /// the positive quiet NaN without payload (bfloat16 0x7fc0), except that the sum of one row
    /// alone is a copy of its bits. No row and no bias gives zeros.
    /// @param dtype       of `out`, the rows and the biases alike.
    /// @param out         [hidden]; may be one of the rows or biases, may not overlap them
    /// otherwise.
    /// @param rows        pointers to rows [hidden], group after group.
    /// @param group_ends  [num_groups]: where each group ends in `rows`, ascending. Empty groups
    /// are
    ///                    allowed; they cost time.
    /// @param bias_0      [hidden] or null; likewise `bias_1`.
    /// @param streaming   write `out` as copy_streaming does.
    void (*reduce)(DType dtype,
                   void* out,
                   const void* const* rows,
                   const int* group_ends,
                   int num_groups,
                   const void* bias_0,
                   const void* bias_1,
                   size_t hidden,
                   bool streaming);

    /// Write the sum over rows of weight times row, in order, from 0: every product and every sum
    /// rounded to float32, the total once more to bfloat16 as by reduce. No row gives zeros.
    /// @param out, rows  bfloat16 [hidden]; may not overlap.
    void (*weighted_sum)(
        void* out, const void* const* rows, const float* weights, int num_rows, size_t hidden);

    /// Cast one row to e4m3, reading it once; fp8.quantize in fp8.py defines every bit.
    /// @param dtype   of `row`: not float64.
    /// @param data    [hidden] bytes.
    /// @param scales  [hidden / block] float32, or bytes where packed.
    /// @param hidden  a multiple of the block.
    void (*quantize)(DType dtype,
                     const Fp8Format& format,
                     void* data,
                     void* scales,
                     const void* row,
                     size_t hidden);

    /// Multiply a row of e4m3 numbers by their scales: one product in float32, rounded once. A NaN
    /// becomes the positive quiet NaN without payload.
    /// @param dtype         of `out`: not float64.
    /// @param scale_stride  bytes from one 4-byte scale (packed: four scales) to the row's next.
    void (*dequantize)(DType dtype,
                       const Fp8Format& format,
                       void* out,
                       const void* data,
                       const void* scales,
                       size_t scale_stride,
                       size_t hidden);

    /// Cast one bfloat16 row to LogFMT; logfmt.encode in logfmt.py defines every bit.
    /// @param extremes  4 bytes for every 128 columns.
    /// @param data      at most 256 bytes for every 128 columns; how many is returned.
    size_t (*encode_logfmt)(void* extremes, void* data, const void* row, size_t hidden);

    /// Write the numbers of a LogFMT row as float32 [hidden], and advance `row` behind it.
    void (*decode_logfmt)(float* out, LogCursor& row, size_t hidden);

    /// As weighted_sum, of LogFMT rows, which are advanced.
    void (*weighted_sum_logfmt)(
        void* out, LogCursor* rows, const float* weights, int num_rows, size_t hidden);
};

/// The fastest build that this CPU runs; chosen on the first call.
const RowKernels& row_kernels();

/// The build of that name, or null where it was not compiled or this CPU lacks the instructions.
const RowKernels* find_row_kernels(std::string_view name);

/// Names of the builds that this CPU runs, slowest first.
std::vector<const char*> row_kernel_names();

/// Order earlier streaming stores before later stores of this thread.
void stream_fence();

}  // namespace ep
