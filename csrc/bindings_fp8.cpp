// Casts of rows to e4m3 and back for Python. Addresses come as integers and have been checked in
// ep_megatron/casts.py; strides of scales are bytes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "cpu/fp8_rows.h"

namespace py = pybind11;

namespace ep {

Fp8Cast fp8_cast(const std::string& operation,
                 const std::string& dtype,
                 size_t hidden,
                 const Fp8FormatTuple& format) {
    const auto [block, scales, min_amax] = format;
    const Fp8Cast cast{
        dtype_of(operation, dtype), hidden, {block, static_cast<ScaleFormat>(scales), min_amax}};
    if (cast.dtype == DType::kFloat64)
        throw std::invalid_argument(operation +
                                    ": expected dtype to be bfloat16, float16 or "
                                    "float32, got float64");
    const bool is_packed = cast.format.scales == ScaleFormat::kPackedUe8m0;
    if ((block != 32 && block != 128) || hidden % static_cast<size_t>(block * (is_packed ? 4 : 1)))
        throw std::invalid_argument(operation +
                                    ": expected hidden to be a multiple of whole "
                                    "blocks of 32 or 128, got " +
                                    std::to_string(hidden) + " and " + std::to_string(block));
    return cast;
}

void bind_fp8(py::module_& m) {
    using Strides = std::pair<size_t, size_t>;
    m.def(
        "quantize_rows",
        [](const std::string& isa, const std::string& dtype, const Fp8FormatTuple& format,
           uintptr_t data, uintptr_t scales, Strides strides, uintptr_t x, size_t num_rows,
           size_t hidden) {
            const RowKernels& kernels = kernels_of("quantize_rows", isa);
            const Fp8Cast cast = fp8_cast("quantize_rows", dtype, hidden, format);
            const py::gil_scoped_release no_gil;
            quantize_rows(kernels, cast, pointer<char>(data), pointer<char>(scales),
                          {strides.first, strides.second}, pointer<const char>(x), num_rows);
        },
        py::arg("isa"), py::arg("dtype"), py::arg("format"), py::arg("data_ptr"),
        py::arg("scales_ptr"), py::arg("scale_strides"), py::arg("x_ptr"), py::arg("num_rows"),
        py::arg("hidden"));
    m.def(
        "dequantize_rows",
        [](const std::string& isa, const std::string& dtype, const Fp8FormatTuple& format,
           uintptr_t out, uintptr_t data, uintptr_t scales, Strides strides, size_t num_rows,
           size_t hidden) {
            const RowKernels& kernels = kernels_of("dequantize_rows", isa);
            const Fp8Cast cast = fp8_cast("dequantize_rows", dtype, hidden, format);
            const py::gil_scoped_release no_gil;
            dequantize_rows(kernels, cast, pointer<char>(out), pointer<const char>(data),
                            pointer<const char>(scales), {strides.first, strides.second}, num_rows);
        },
        py::arg("isa"), py::arg("dtype"), py::arg("format"), py::arg("out_ptr"),
        py::arg("data_ptr"), py::arg("scales_ptr"), py::arg("scale_strides"), py::arg("num_rows"),
        py::arg("hidden"));
}

}  // namespace ep
