// Exchange for Python: the shared-memory backend's compiled side. Addresses come as integers and
// have been checked in ep_megatron/arguments.py; every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu/exchange.h"

namespace py = pybind11;
using py::operator""_a;

namespace ep {
namespace {

void check_python_signals() {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Routes routes_at(uintptr_t address, int64_t num_slots) {
    auto* first = pointer<int32_t>(address);
    return {first, first + num_slots, first + 2 * num_slots};
}

std::unique_ptr<Exchange> make_exchange(const std::string& folder,
                                        const std::string& name,
                                        int rank,
                                        int num_ranks,
                                        size_t max_bytes,
                                        size_t max_view_bytes,
                                        size_t streaming_bytes,
                                        int num_threads,
                                        double timeout,
                                        bool has_core_per_rank) {
    // Where ranks outnumber cores a spinning rank keeps the one it waits for from running.
    const WaitOptions wait{timeout, has_core_per_rank ? 0 : 16, has_core_per_rank ? 2000 : 0,
                           check_python_signals};
    return std::make_unique<Exchange>(
        folder, name, rank, num_ranks,
        ExchangeOptions{max_bytes, max_view_bytes, streaming_bytes, num_threads, wait});
}

Dispatched dispatch(Exchange& exchange,
                    const std::vector<int64_t>& call,
                    const py::dict& routing,
                    const py::dict& rows,
                    uintptr_t routes) {
    const auto number = [](const py::dict& from, const char* key) {
        return from[key].cast<int64_t>();
    };
    const auto address = [](const py::dict& from, const char* key) {
        return from[key].cast<uintptr_t>();
    };
    const auto size = [&](const char* key) { return static_cast<size_t>(number(rows, key)); };
    DispatchArgs args{};
    args.call = call;
    args.routing = {
        .topk_idx = pointer<void>(address(routing, "topk_idx")),
        .is_int64 = number(routing, "is_int64") != 0,
        .num_tokens = number(routing, "num_tokens"),
        .num_topk = static_cast<int>(number(routing, "num_topk")),
        .num_experts = static_cast<int>(number(routing, "num_experts")),
        .num_ranks = static_cast<int>(number(routing, "num_ranks")),
        .expand = number(routing, "expand") != 0,
        .alignment = number(routing, "alignment"),
    };
    args.operation = routing.contains("num_rows_per_rank") ? kCachedDispatch : kDispatch;
    if (args.operation == kCachedDispatch) {
        args.num_rows_per_rank = routing["num_rows_per_rank"].cast<std::vector<int64_t>>();
        args.valid_per_expert = routing["valid_per_expert"].cast<std::vector<int64_t>>();
    }
    args.routes = routes_at(routes, args.routing.num_tokens * args.routing.num_topk);
    args.row_bytes = {size("x_bytes"), size("scales_bytes"), size("weights_bytes"),
                      size("idx_bytes")};
    args.x = pointer<const char>(address(rows, "x"));
    args.scales = pointer<const char>(address(rows, "scales"));
    args.weights = pointer<const char>(address(rows, "weights"));
    const py::gil_scoped_release no_gil;
    return exchange.dispatch(args);
}

bool combine(Exchange& exchange,
             const std::vector<int64_t>& call,
             const py::dict& sizes,
             const py::dict& addresses) {
    const auto number = [&](const char* key) { return sizes[key].cast<int64_t>(); };
    const auto address = [&](const char* key) { return addresses[key].cast<uintptr_t>(); };
    CombineArgs args{};
    args.call = call;
    args.num_tokens = number("num_tokens");
    args.num_topk = static_cast<int>(number("num_topk"));
    args.expand = number("expand") != 0;
    args.num_rows = number("num_rows");
    args.dtype = static_cast<DType>(number("dtype"));
    args.hidden = static_cast<size_t>(number("hidden"));
    args.weight_bytes = static_cast<size_t>(number("weight_bytes"));
    args.routes = routes_at(address("routes"), args.num_tokens * args.num_topk);
    args.x = pointer<const char>(address("x"));
    args.weights = pointer<const char>(address("weights"));
    args.bias_0 = pointer<const char>(address("bias_0"));
    args.bias_1 = pointer<const char>(address("bias_1"));
    args.out = pointer<char>(address("out"));
    args.out_weights = pointer<char>(address("out_weights"));
    const py::gil_scoped_release no_gil;
    return exchange.combine(args);
}

}  // namespace

void bind_exchange(py::module_& m) {
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    // The buffer protocol ties the memory to whatever tensor views it.
    py::class_<Block, std::shared_ptr<Block>>(m, "Block", py::buffer_protocol())
        .def_buffer([](Block& block) {
            return py::buffer_info(reinterpret_cast<uint8_t*>(block.data()),
                                   static_cast<py::ssize_t>(block.num_bytes()));
        })
        .def("__len__", &Block::num_bytes);
    py::class_<Dispatched>(m, "Dispatched")
        .def_readonly("is_agreed", &Dispatched::is_agreed)
        .def_readonly("block", &Dispatched::block)
        .def_readonly("scales_at", &Dispatched::scales_at)
        .def_readonly("weights_at", &Dispatched::weights_at)
        .def_readonly("idx_at", &Dispatched::idx_at)
        .def_readonly("must_copy", &Dispatched::must_copy)
        .def_readonly("num_rows_per_rank", &Dispatched::num_rows_per_rank)
        .def_readonly("num_tokens_per_rank", &Dispatched::num_tokens_per_rank)
        .def_readonly("num_recv_tokens_per_rank", &Dispatched::num_recv_tokens_per_rank)
        .def_readonly("valid_per_expert", &Dispatched::valid_per_expert);
    py::class_<Exchange::Report>(m, "Report")
        .def_readonly("call", &Exchange::Report::call)
        .def_readonly("error", &Exchange::Report::error)
        .def_readonly("is_out_of_memory", &Exchange::Report::is_out_of_memory);
    py::class_<Exchange>(m, "Exchange")
        .def(py::init(&make_exchange), "folder"_a, "name"_a, "rank"_a, "num_ranks"_a, "max_bytes"_a,
             "max_view_bytes"_a, "streaming_bytes"_a, "num_threads"_a, "timeout"_a,
             "has_core_per_rank"_a)
        .def("attach", &Exchange::attach, "names"_a, no_gil)
        .def("unlink", &Exchange::unlink)
        .def("reserve", &Exchange::reserve, "num_bytes"_a, no_gil)
        .def("dispatch", &dispatch, "call"_a, "routing"_a, "rows"_a, "routes"_a)
        .def("combine", &combine, "call"_a, "sizes"_a, "addresses"_a)
        .def("report_failure", &Exchange::report_failure, "operation"_a, "error"_a, no_gil)
        .def("reports", &Exchange::reports)
        .def("allocate", &Exchange::allocate, "num_bytes"_a, no_gil)
        .def("close", &Exchange::close, no_gil)
        .def_property_readonly("committed", &Exchange::committed)
        .def_property_readonly("num_bytes_in_use", &Exchange::num_bytes_in_use);
    m.def("remove_stale_segments", &remove_stale_segments, "folder"_a, "prefix"_a, no_gil);
    m.attr("MAX_RANKS") = kMaxRanks;
    m.attr("MAX_EXPERTS") = kMaxExperts;
}

}  // namespace ep
