#pragma once
// The parts that make up the Python module ep_megatron._cpu.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>

#include "cpu/fp8_rows.h"

namespace ep {

/// Addresses come from Python as integers.
template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

/// Raise ValueError, naming the operation, for a name that is none; the fastest kernels have "".
DType dtype_of(const std::string& operation, const std::string& name);
const RowKernels& kernels_of(const std::string& operation, const std::string& isa);

/// Block, place in fp8.ScaleFormat, smallest amax.
using Fp8FormatTuple = std::tuple<int, int, float>;
Fp8Cast fp8_cast(const std::string& operation,
                 const std::string& dtype,
                 size_t hidden,
                 const Fp8FormatTuple& format);

void bind_exchange(pybind11::module_& m);
void bind_plan(pybind11::module_& m);
void bind_fp8(pybind11::module_& m);
void bind_logfmt(pybind11::module_& m);
void bind_low_latency(pybind11::module_& m);

}  // namespace ep
