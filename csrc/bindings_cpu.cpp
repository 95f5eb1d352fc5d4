// The Python module ep_megatron._cpu. Addresses come as integers: no torch header is needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/rows.h"

namespace py = pybind11;

namespace ep {

DType dtype_of(const std::string& operation, const std::string& name) {
    if (name == "bfloat16") return DType::kBFloat16;
    if (name == "float16") return DType::kFloat16;
    if (name == "float32") return DType::kFloat32;
    if (name == "float64") return DType::kFloat64;
    throw std::invalid_argument(
        operation + ": expected dtype to be bfloat16, float16, float32 or float64, got " + name);
}

const RowKernels& kernels_of(const std::string& operation, const std::string& isa) {
    if (isa.empty()) return row_kernels();
    if (const RowKernels* kernels = find_row_kernels(isa)) return *kernels;
    std::string names;
    for (const char* name : row_kernel_names())
        names += (names.empty() ? "" : ", ") + std::string(name);
    throw std::invalid_argument(operation + ": expected isa to be one of " + names + ", got " +
                                isa);
}

}  // namespace ep

namespace {

using ep::dtype_of;
using ep::kernels_of;
using ep::pointer;

void check_row_bytes(const std::string& operation, size_t num_bytes) {
    if (num_bytes % 16 == 0) return;
    throw std::invalid_argument(operation + ": expected a row to be a multiple of 16 bytes, got " +
                                std::to_string(num_bytes));
}

void reduce_rows(const std::string& isa,
                 const std::string& dtype_name,
                 uintptr_t out,
                 const std::vector<uintptr_t>& rows,
                 const std::vector<int>& group_ends,
                 const std::vector<uintptr_t>& biases,
                 size_t hidden,
                 bool streaming) {
    const ep::RowKernels& kernels = kernels_of("reduce_rows", isa);
    const ep::DType dtype = dtype_of("reduce_rows", dtype_name);
    check_row_bytes("reduce_rows", hidden * ep::item_size(dtype));
    int previous = 0;
    for (int end : group_ends) {
        if (end < previous)
            throw std::invalid_argument("reduce_rows: expected group_ends to ascend from 0, got " +
                                        std::to_string(end) + " after " + std::to_string(previous));
        previous = end;
    }
    if (static_cast<size_t>(previous) != rows.size())
        throw std::invalid_argument("reduce_rows: expected the last of group_ends to be " +
                                    std::to_string(rows.size()) + ", the number of rows, got " +
                                    std::to_string(previous));
    if (biases.size() > 2)
        throw std::invalid_argument("reduce_rows: expected bias_ptrs to hold at most 2, got " +
                                    std::to_string(biases.size()));
    std::vector<const void*> row_pointers;
    for (uintptr_t row : rows) row_pointers.push_back(pointer<const void>(row));
    kernels.reduce(dtype, pointer<void>(out), row_pointers.data(), group_ends.data(),
                   static_cast<int>(group_ends.size()),
                   biases.size() > 0 ? pointer<const void>(biases[0]) : nullptr,
                   biases.size() > 1 ? pointer<const void>(biases[1]) : nullptr, hidden, streaming);
    if (streaming) ep::stream_fence();
}

void copy_row(
    const std::string& isa, uintptr_t out, uintptr_t row, size_t num_bytes, bool streaming) {
    const ep::RowKernels& kernels = kernels_of("copy_row", isa);
    check_row_bytes("copy_row", num_bytes);
    const auto copy = streaming ? kernels.copy_streaming : kernels.copy;
    copy(pointer<void>(out), pointer<const void>(row), num_bytes);
    if (streaming) ep::stream_fence();
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Compiled CPU side of ep_megatron. Addresses are not checked.";
    m.def("row_kernel_names", &ep::row_kernel_names);
    m.def("reduce_rows", &reduce_rows, py::arg("isa"), py::arg("dtype"), py::arg("out_ptr"),
          py::arg("row_ptrs"), py::arg("group_ends"), py::arg("bias_ptrs"), py::arg("hidden"),
          py::arg("streaming"));
    m.def("copy_row", &copy_row, py::arg("isa"), py::arg("out_ptr"), py::arg("row_ptr"),
          py::arg("num_bytes"), py::arg("streaming"));
    ep::bind_exchange(m);
    ep::bind_plan(m);
    ep::bind_fp8(m);
    ep::bind_logfmt(m);
    ep::bind_low_latency(m);
}
