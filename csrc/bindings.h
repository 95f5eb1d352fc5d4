#pragma once
// The parts that make up the Python module ep_megatron._cpu.
#include <pybind11/pybind11.h>

#include <cstdint>

namespace ep {

/// Addresses come from Python as integers.
template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_exchange(pybind11::module_& m);
void bind_plan(pybind11::module_& m);

}  // namespace ep
