// `ep_megatron._nvshmem`: optional, for GPUs of several hosts. Importing it needs NVSHMEM's library
// and no driver. Calls that wait for other ranks let go of the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "nvshmem/world.h"

namespace py = pybind11;

namespace {

std::optional<std::tuple<py::bytes, int, int>> world() {
    const auto world = ep::nvshmem::world();
    if (!world) return std::nullopt;
    return std::tuple(py::bytes(world->unique_id), world->rank, world->num_ranks);
}

}  // namespace

PYBIND11_MODULE(_nvshmem, m) {
    using WithoutGil = py::call_guard<py::gil_scoped_release>;
    m.def("version", &ep::nvshmem::version);
    m.def("unique_id", [] { return py::bytes(ep::nvshmem::unique_id()); });
    m.def("join", &ep::nvshmem::join, py::arg("unique_id"), py::arg("rank"), py::arg("num_ranks"),
          py::arg("device"), WithoutGil());
    m.def("world", &world);
    m.def("allocate", &ep::nvshmem::allocate, py::arg("num_bytes"), WithoutGil());
    m.def("peer_address", &ep::nvshmem::peer_address, py::arg("address"), py::arg("peer"));
    m.def(
        "launch",
        [](const std::string& kernel, unsigned grid, unsigned block, const py::bytes& params,
           uintptr_t stream) { ep::nvshmem::launch(kernel, grid, block, params, stream); },
        py::arg("kernel"), py::arg("grid"), py::arg("block"), py::arg("params"), py::arg("stream"));
    m.def("put_signal", &ep::nvshmem::put_signal, py::arg("peer"), py::arg("source"),
          py::arg("target"), py::arg("num_bytes"), py::arg("signal"), py::arg("value"),
          py::arg("stream"));
    m.attr("UNIQUE_ID_BYTES") = ep::nvshmem::kUniqueIdBytes;
}
