#include "cpu/fp8_rows.h"

namespace ep {

void quantize_rows(const RowKernels& kernels,
                   const Fp8Cast& cast,
                   char* data,
                   char* scales,
                   ScaleStrides strides,
                   const char* rows,
                   size_t num_rows) {
    std::vector<char> row_scales(cast.scale_bytes());
    for (size_t row = 0; row < num_rows; ++row) {
        kernels.quantize(cast.dtype, cast.format, data + row * cast.hidden, row_scales.data(),
                         rows + row * cast.row_bytes(), cast.hidden);
        store_scales(scales + row * strides.row, strides.word, row_scales.data(),
                     row_scales.size());
    }
}

void dequantize_rows(const RowKernels& kernels,
                     const Fp8Cast& cast,
                     char* out,
                     const char* data,
                     const char* scales,
                     ScaleStrides strides,
                     size_t num_rows) {
    for (size_t row = 0; row < num_rows; ++row)
        kernels.dequantize(cast.dtype, cast.format, out + row * cast.row_bytes(),
                           data + row * cast.hidden, scales + row * strides.row, strides.word,
                           cast.hidden);
}

}  // namespace ep
