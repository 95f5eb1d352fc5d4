#pragma once
// The parts that make up the Python module ep_megatron._cpu.
#include <pybind11/pybind11.h>

namespace ep {

void bind_exchange(pybind11::module_& m);

}  // namespace ep
