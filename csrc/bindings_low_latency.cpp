// LowLatency for Python: the compiled side of backends/packed_shared.py. Addresses come as integers
// and have been checked in ep_megatron/packed_arguments.py; every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "bindings.h"
#include "cpu/low_latency.h"

namespace py = pybind11;
using py::operator""_a;

namespace ep {
namespace {

constexpr double kSpinSeconds = 500e-6;  // as bindings_exchange.cpp says
constexpr int kNumYields = 32;

void check_python_signals() {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::unique_ptr<LowLatency> make_low_latency(const std::string& folder,
                                             const std::string& name,
                                             int rank,
                                             int num_ranks,
                                             size_t max_bytes,
                                             int num_threads,
                                             double timeout,
                                             bool has_core_per_rank,
                                             bool enable_shrink) {
    const WaitOptions wait{timeout, has_core_per_rank ? kSpinSeconds : 0.0,
                           has_core_per_rank ? 0 : kNumYields, check_python_signals};
    return std::make_unique<LowLatency>(
        folder, name, rank, num_ranks,
        LowLatency::Options{max_bytes, num_threads, enable_shrink, wait});
}

// Address, bytes of an index, T, K.
using TopkTuple = std::tuple<uintptr_t, size_t, int64_t, int>;

PackedTopk topk_of(const TopkTuple& topk) {
    const auto& [address, item_bytes, num_tokens, num_topk] = topk;
    return {pointer<const void>(address), item_bytes == 8, num_tokens, num_topk};
}

PackedSizes sizes_of(const std::vector<int64_t>& call) {
    return {call[1], call[2], call[3], call[5] != 0};
}

std::optional<Fp8Cast> cast_of(const std::vector<int64_t>& call,
                               const std::optional<Fp8FormatTuple>& format) {
    if (!format) return std::nullopt;
    return fp8_cast("low_latency_dispatch", "bfloat16", static_cast<size_t>(call[2]), *format);
}

}  // namespace

void bind_low_latency(py::module_& m) {
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    py::class_<LowLatency::Report>(m, "LowLatencyReport")
        .def_readonly("rank", &LowLatency::Report::rank)
        .def_readonly("call", &LowLatency::Report::call)
        .def_readonly("error", &LowLatency::Report::error);
    py::class_<LowLatency>(m, "LowLatency")
        .def(py::init(&make_low_latency), "folder"_a, "name"_a, "rank"_a, "num_ranks"_a,
             "max_bytes"_a, "num_threads"_a, "timeout"_a, "has_core_per_rank"_a, "enable_shrink"_a)
        .def("attach", &LowLatency::attach, "names"_a, no_gil)
        .def("unlink", &LowLatency::unlink)
        .def("close", &LowLatency::close, no_gil)
        .def(
            "send_dispatch",
            [](LowLatency& self, const std::vector<int64_t>& call, uintptr_t x,
               const TopkTuple& topk, const std::optional<Fp8FormatTuple>& format) {
                return self.send_dispatch(call, pointer<const char>(x), topk_of(topk),
                                          sizes_of(call), cast_of(call, format));
            },
            no_gil)
        .def(
            "send_combine",
            [](LowLatency& self, const std::vector<int64_t>& call, uintptr_t x,
               uintptr_t layout_range, const TopkTuple& topk, const std::shared_ptr<Block>& place) {
                return self.send_combine(call, pointer<const char>(x),
                                         pointer<const int64_t>(layout_range), topk_of(topk),
                                         sizes_of(call), place);
            },
            no_gil)
        .def("send_nothing", &LowLatency::send_nothing, no_gil)
        .def("report_failure", &LowLatency::report_failure, no_gil)
        .def(
            "receive_dispatch",
            [](LowLatency& self, uint32_t epoch, const std::vector<int64_t>& call,
               const std::optional<Fp8FormatTuple>& format,
               const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>&
                   out) {
                const auto& [x, scales, count, src_info, layout_range, waited] = out;
                return self.receive_dispatch(
                    epoch, sizes_of(call), cast_of(call, format),
                    {pointer<char>(x), pointer<char>(scales), pointer<int32_t>(count),
                     pointer<int32_t>(src_info), pointer<int64_t>(layout_range),
                     pointer<int64_t>(waited)});
            },
            no_gil)
        .def(
            "receive_combine",
            [](LowLatency& self, uint32_t epoch, const std::vector<int64_t>& call,
               const TopkTuple& topk, uintptr_t weights, uintptr_t out, uintptr_t waited,
               uintptr_t num_bytes) {
                std::vector<int> other_routing;
                const bool is_agreed = self.receive_combine(
                    epoch, topk_of(topk), pointer<const float>(weights), sizes_of(call),
                    pointer<char>(out), pointer<int64_t>(waited), pointer<int64_t>(num_bytes),
                    other_routing);
                return std::make_pair(is_agreed, other_routing);
            },
            no_gil)
        .def("receive_nothing", &LowLatency::receive_nothing, no_gil)
        .def("limit_threads", &LowLatency::limit_threads, "num_threads"_a)
        .def("reports", &LowLatency::reports)
        .def("allocate", &LowLatency::allocate, "num_bytes"_a, no_gil)
        .def("mask", &LowLatency::mask, no_gil)
        .def("masks", &LowLatency::masks, no_gil)
        .def("interrupt", &LowLatency::interrupt)
        .def_property_readonly("committed", &LowLatency::committed);
}

}  // namespace ep
