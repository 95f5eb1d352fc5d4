// Casts of rows to LogFMT and back for Python. Addresses come as integers and have been checked in
// ep_megatron/casts.py.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"

namespace py = pybind11;

namespace ep {

void bind_logfmt(py::module_& m) {
    m.def(
        "encode_logfmt",
        [](const std::string& isa, uintptr_t extremes, uintptr_t data, uintptr_t x, size_t num_rows,
           size_t hidden) {
            const RowKernels& kernels = kernels_of("encode_logfmt", isa);
            const py::gil_scoped_release no_gil;
            size_t num_bytes = 0;
            for (size_t row = 0; row < num_rows; ++row)
                num_bytes += kernels.encode_logfmt(
                    pointer<char>(extremes) + row * logfmt_extreme_bytes(hidden),
                    pointer<char>(data) + num_bytes, pointer<char>(x) + 2 * row * hidden, hidden);
            return num_bytes;
        },
        py::arg("isa"), py::arg("extremes_ptr"), py::arg("data_ptr"), py::arg("x_ptr"),
        py::arg("num_rows"), py::arg("hidden"));
    m.def(
        "decode_logfmt",
        [](const std::string& isa, uintptr_t out, uintptr_t extremes, uintptr_t data,
           size_t num_rows, size_t hidden) {
            const RowKernels& kernels = kernels_of("decode_logfmt", isa);
            const py::gil_scoped_release no_gil;
            LogCursor next = {pointer<char>(extremes), pointer<char>(data)};
            for (size_t row = 0; row < num_rows; ++row)
                kernels.decode_logfmt(pointer<float>(out) + row * hidden, next, hidden);
        },
        py::arg("isa"), py::arg("out_ptr"), py::arg("extremes_ptr"), py::arg("data_ptr"),
        py::arg("num_rows"), py::arg("hidden"));
}

}  // namespace ep
