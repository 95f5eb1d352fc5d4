// Exchange for Python: the shared-memory backend's compiled side. Addresses come as integers and
// have been checked in ep_megatron/arguments.py; every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.h"
#include "core/errors.h"
#include "cpu/exchange.h"
#include "dlpack.h"

namespace py = pybind11;
using py::operator""_a;

namespace ep {
namespace {

constexpr double kSpinSeconds = 500e-6;
constexpr int kNumYields = 32;

void check_python_signals() {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

/// Code and bits, see DlpackType.
using DlpackTypeTuple = std::pair<uint8_t, uint8_t>;

py::capsule block_tensor(const std::shared_ptr<Block>& block,
                         size_t offset,
                         DlpackTypeTuple type,
                         std::vector<int64_t> shape) {
    size_t num_bytes = type.second / 8;
    for (int64_t size : shape) num_bytes *= static_cast<size_t>(size);
    if (offset > block->num_bytes() || num_bytes > block->num_bytes() - offset)
        throw std::invalid_argument(text("tensor: expected offset and shape to lie in ",
                                         block->num_bytes(), " bytes, got ", num_bytes, " at ",
                                         offset));
    char* data = block->data() + offset;
    return dlpack_capsule(block, data, {type.first, type.second}, std::move(shape));
}

py::capsule kept_routes(const Dispatched& result) {
    const KeptRouting& kept = result.kept;
    return dlpack_capsule(kept.memory, kept.routes.rank, {0, 32},
                          {3, kept.num_tokens, kept.num_topk});
}

py::object kept_topk_idx(const Dispatched& result) {
    const KeptRouting& kept = result.kept;
    if (kept.idx_item_bytes == 0) return py::none();
    const auto bits = static_cast<uint8_t>(8 * kept.idx_item_bytes);
    return dlpack_capsule(kept.memory, kept.topk_idx, {0, bits}, {kept.num_tokens, kept.num_topk});
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
    // Where ranks outnumber cores a spinning rank keeps the one it waits for from running. Where
    // each has its own, sleeping costs more than the wait: waking an idle core takes 50 us and
    // more.
    const WaitOptions wait{timeout, has_core_per_rank ? kSpinSeconds : 0.0,
                           has_core_per_rank ? 0 : kNumYields, check_python_signals};
    return std::make_unique<Exchange>(
        folder, name, rank, num_ranks,
        ExchangeOptions{max_bytes, max_view_bytes, streaming_bytes, num_threads, wait});
}

// dtype of x, hidden, format, whether scales arrive by column.
using DispatchCast = std::tuple<std::string, size_t, Fp8FormatTuple, bool>;

// Positional and flat: a call moves a few kilobytes at times, and looking up names costs as much.
Dispatched dispatch(Exchange& exchange,
                    const std::vector<int64_t>& call,
                    uintptr_t topk_idx,
                    size_t idx_item_bytes,
                    const std::tuple<int64_t, int, int, bool, int64_t>& routing,
                    const std::tuple<uintptr_t, uintptr_t, uintptr_t>& rows,
                    const std::tuple<size_t, size_t, size_t, size_t>& row_bytes,
                    uintptr_t routes,
                    const std::optional<std::vector<int64_t>>& num_rows_per_rank,
                    const std::optional<std::vector<int64_t>>& valid_per_expert,
                    const std::optional<DispatchCast>& cast,
                    const std::shared_ptr<Block>& block,
                    const py::object& on_planned) {
    DispatchArgs args{};
    args.block = block;
    if (!on_planned.is_none())
        args.on_planned = [&on_planned](const Dispatched& planned) {
            const py::gil_scoped_acquire gil;
            on_planned(planned);
        };
    args.call = call;
    args.operation = num_rows_per_rank ? kCachedDispatch : kDispatch;
    args.routing.topk_idx = pointer<void>(topk_idx);
    args.routing.is_int64 = idx_item_bytes == 8;
    args.routing.num_ranks = exchange.num_ranks();
    std::tie(args.routing.num_tokens, args.routing.num_topk, args.routing.num_experts,
             args.routing.expand, args.routing.alignment) = routing;
    if (num_rows_per_rank) args.num_rows_per_rank = *num_rows_per_rank;
    if (valid_per_expert) args.valid_per_expert = *valid_per_expert;
    if (args.operation == kDispatch) {
        args.kept = KeptRouting(args.routing);
        args.routes = args.kept.routes;
    } else {
        args.routes = routes_in(pointer<int32_t>(routes), args.routing.num_slots());
    }
    std::tie(args.row_bytes.x, args.row_bytes.scales, args.row_bytes.weights, args.row_bytes.idx) =
        row_bytes;
    if (cast) {
        const auto& [dtype, hidden, format, by_column] = *cast;
        args.cast = fp8_cast("dispatch", dtype, hidden, format);
        args.row_bytes.scales_by_column = by_column;
    }
    args.x = pointer<const char>(std::get<0>(rows));
    args.scales = pointer<const char>(std::get<1>(rows));
    args.weights = pointer<const char>(std::get<2>(rows));
    const py::gil_scoped_release no_gil;
    return exchange.dispatch(args);
}

void widen(Exchange& exchange,
           const std::string& dtype,
           const Fp8FormatTuple& format,
           uintptr_t out,
           uintptr_t data,
           uintptr_t scales,
           const std::pair<size_t, size_t>& strides,
           int64_t num_rows,
           size_t hidden) {
    const Fp8Cast cast = fp8_cast("dispatch", dtype, hidden, format);
    const py::gil_scoped_release no_gil;
    exchange.widen(cast, pointer<char>(out), pointer<const char>(data), pointer<const char>(scales),
                   {strides.first, strides.second}, num_rows);
}

bool combine(Exchange& exchange,
             const std::vector<int64_t>& call,
             const std::tuple<int64_t, int, bool, int64_t>& sizes,
             const std::vector<int64_t>& num_rows_per_rank,
             int dtype,
             size_t hidden,
             size_t weight_bytes,
             const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>& inputs,
             uintptr_t out,
             uintptr_t out_weights) {
    CombineArgs args{};
    args.call = call;
    std::tie(args.num_tokens, args.num_topk, args.expand, args.num_rows) = sizes;
    if (num_rows_per_rank.size() != static_cast<size_t>(exchange.num_ranks()))
        throw std::invalid_argument(text("combine: expected num_rows_per_rank to have ",
                                         exchange.num_ranks(), " numbers, got ",
                                         num_rows_per_rank.size()));
    args.num_rows_per_rank = num_rows_per_rank;
    args.dtype = static_cast<DType>(dtype);
    args.hidden = hidden;
    args.weight_bytes = weight_bytes;
    args.routes = routes_in(pointer<int32_t>(std::get<0>(inputs)),
                            static_cast<size_t>(args.num_tokens * args.num_topk));
    args.x = pointer<const char>(std::get<1>(inputs));
    args.weights = pointer<const char>(std::get<2>(inputs));
    args.bias_0 = pointer<const char>(std::get<3>(inputs));
    args.bias_1 = pointer<const char>(std::get<4>(inputs));
    args.out = pointer<char>(out);
    args.out_weights = pointer<char>(out_weights);
    const py::gil_scoped_release no_gil;
    return exchange.combine(args);
}

/// Where the words of a segment's control part lie, in bytes, for whoever looks at a live group.
std::map<std::string, size_t> control_layout() {
    return {
        {"magic", offsetof(Control, head.magic)},
        {"rank", offsetof(Control, head.rank)},
        {"num_ranks", offsetof(Control, head.num_ranks)},
        {"epoch", offsetof(Control, epoch)},
        {"operation", offsetof(Control, operation)},
        {"gave_up", offsetof(Control, gave_up)},
        {"gave_up_because", offsetof(Control, gave_up_because)},
        {"posted", offsetof(Control, posted)},
        {"finished", offsetof(Control, finished)},
        {"flag_bytes", sizeof(Flag)},
        {"grant", offsetof(Control, grant)},
        {"grant.rows_offset", offsetof(Grant, rows_offset)},
        {"grant.committed", offsetof(Grant, committed)},
        {"grant.error", offsetof(Grant, error)},
        {"posts", offsetof(Control, posts)},
        {"post_bytes", sizeof(Post)},
        {"post.epoch", offsetof(Post, epoch)},
        {"post.error_kind", offsetof(Post, error_kind)},
        {"post.call", offsetof(Post, call)},
        {"post.error", offsetof(Post, error)},
        {"post.rows_offset", offsetof(Post, rows_offset)},
        {"post.rows_bytes", offsetof(Post, rows_bytes)},
        {"post.weights_offset", offsetof(Post, weights_offset)},
        {"post.committed", offsetof(Post, committed)},
        {"post.posted_at", offsetof(Post, posted_at)},
        {"post.num_tokens_per_rank", offsetof(Post, num_tokens_per_rank)},
        {"post.num_tokens_per_expert", offsetof(Post, num_tokens_per_expert)},
        {"error_bytes", kErrorBytes},
        {"control_bytes", kControlBytes},
    };
}

}  // namespace

void bind_exchange(py::module_& m) {
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    py::class_<Block, std::shared_ptr<Block>>(m, "Block")
        .def("tensor", &block_tensor)
        .def("__len__", &Block::num_bytes);
    py::class_<Dispatched>(m, "Dispatched")
        .def_readonly("is_agreed", &Dispatched::is_agreed)
        .def_readonly("block", &Dispatched::block)
        .def_readonly("must_copy", &Dispatched::must_copy)
        .def_readonly("num_rows_per_rank", &Dispatched::num_rows_per_rank)
        .def_readonly("num_tokens_per_rank", &Dispatched::num_tokens_per_rank)
        .def_readonly("num_recv_tokens_per_rank", &Dispatched::num_recv_tokens_per_rank)
        .def_readonly("valid_per_expert", &Dispatched::valid_per_expert)
        .def("routes", &kept_routes)
        .def("topk_idx", &kept_topk_idx);
    // Where scales, weights and expert ids of received rows start, and where the last end.
    m.def("sections", [](const std::tuple<size_t, size_t, size_t, size_t>& row_bytes,
                         int64_t num_rows, int num_topk, bool expand, bool by_column) {
        const auto& [x, scales, weights, idx] = row_bytes;
        const Sections sections({x, scales, weights, idx, by_column}, num_rows, num_topk, expand);
        return std::make_tuple(sections.scales, sections.weights, sections.idx, sections.end);
    });
    py::class_<Exchange::Report>(m, "Report")
        .def_readonly("call", &Exchange::Report::call)
        .def_readonly("error", &Exchange::Report::error)
        .def_readonly("is_out_of_memory", &Exchange::Report::is_out_of_memory);
    py::class_<PeerStatistics>(m, "PeerStatistics")
        .def_readonly("num_last", &PeerStatistics::num_last)
        .def_readonly("seconds_behind", &PeerStatistics::seconds_behind)
        .def_readonly("seconds_waited", &PeerStatistics::seconds_waited)
        .def_readonly("num_bytes", &PeerStatistics::num_bytes);
    py::class_<CallStatistics>(m, "CallStatistics")
        .def_readonly("num_calls", &CallStatistics::num_calls)
        .def_readonly("seconds_waiting", &CallStatistics::seconds_waiting)
        .def_readonly("seconds_finishing", &CallStatistics::seconds_finishing)
        .def_readonly("peers", &CallStatistics::peers);
    py::class_<Exchange>(m, "Exchange")
        .def(py::init(&make_exchange), "folder"_a, "name"_a, "rank"_a, "num_ranks"_a, "max_bytes"_a,
             "max_view_bytes"_a, "streaming_bytes"_a, "num_threads"_a, "timeout"_a,
             "has_core_per_rank"_a)
        .def("attach", &Exchange::attach, "names"_a, no_gil)
        .def("unlink", &Exchange::unlink)
        .def("reserve", &Exchange::reserve, "num_bytes"_a, no_gil)
        .def("dispatch", &dispatch)
        .def("widen", &widen)
        .def("combine", &combine)
        .def("report_failure", &Exchange::report_failure, "operation"_a, "error"_a, no_gil)
        .def("reports", &Exchange::reports)
        .def("allocate", &Exchange::allocate, "num_bytes"_a, no_gil)
        .def("interrupt", &Exchange::interrupt)
        .def("limit_threads", &Exchange::limit_threads, "num_threads"_a)
        .def("statistics", &Exchange::statistics)
        .def("close", &Exchange::close, no_gil)
        .def_property_readonly("is_broken", &Exchange::is_broken)
        .def_property_readonly("committed", &Exchange::committed)
        .def_property_readonly("num_bytes_in_use", &Exchange::num_bytes_in_use);
    m.def("remove_stale_segments", &remove_stale_segments, "folder"_a, "prefix"_a, no_gil);
    m.def("control_layout", &control_layout);
    m.attr("MAX_EXPERTS") = kMaxExperts;
}

}  // namespace ep
