#pragma once
// Many rows to e4m3 and back, with their scales in rows or in columns.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/rows.h"

namespace ep {

/// What becomes of a row on its way: `hidden` elements of `dtype` to e4m3 numbers, or back.
struct Fp8Cast {
    DType dtype;  // bfloat16, float16 or float32
    size_t hidden;
    Fp8Format format;

    size_t row_bytes() const { return hidden * item_size(dtype); }
    size_t scale_bytes() const { return format.scale_bytes(hidden); }
};

/// Bytes from one row's scales to the next row's, and from one 4-byte word of a row to its next.
struct ScaleStrides {
    size_t row;
    size_t word;
};

inline void store_scales(char* out, size_t word_stride, const char* scales, size_t num_bytes) {
    if (word_stride == 4 && num_bytes > 0) {  // rows without columns have no memory at all
        std::memcpy(out, scales, num_bytes);
        return;
    }
    for (size_t at = 0; at < num_bytes; at += 4, out += word_stride)
        std::memcpy(out, scales + at, 4);
}

/// Cast rows [num_rows, hidden] to `data` [num_rows, hidden] and `scales`.
void quantize_rows(const RowKernels& kernels,
                   const Fp8Cast& cast,
                   char* data,
                   char* scales,
                   ScaleStrides strides,
                   const char* rows,
                   size_t num_rows);

/// Widen `data` [num_rows, hidden] to `out` [num_rows, hidden] of `cast.dtype`.
void dequantize_rows(const RowKernels& kernels,
                     const Fp8Cast& cast,
                     char* out,
                     const char* data,
                     const char* scales,
                     ScaleStrides strides,
                     size_t num_rows);

/// Room for one row's numbers and scales, which stay in the first-level cache from the cast until
/// they have been stored at all of the row's destinations.
class CastRow {
 public:
    explicit CastRow(const Fp8Cast& cast)
        : cast_(cast), memory_(cast.hidden + cast.scale_bytes()) {}

    void read(const RowKernels& kernels, const char* row) {
        kernels.quantize(cast_.dtype, cast_.format, memory_.data(), memory_.data() + cast_.hidden,
                         row, cast_.hidden);
    }
    const char* data() const { return memory_.data(); }
    const char* scales() const { return memory_.data() + cast_.hidden; }

 private:
    const Fp8Cast cast_;
    std::vector<char> memory_;
};

}  // namespace ep
