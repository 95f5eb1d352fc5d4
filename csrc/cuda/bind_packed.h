#pragma once
#include <pybind11/pybind11.h>

namespace ep::cuda {

/// Plans and reports of low-latency calls.
void bind_packed(pybind11::module_& m);

/// What crosses the network.
void bind_cross(pybind11::module_& m);

}  // namespace ep::cuda
