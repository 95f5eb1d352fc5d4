// The Python module ep_megatron._cuda: plans of launches (anywhere), a device (where there is one),
// and how the report that kernels write is read.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#include "core/errors.h"
#include "cuda/bind_packed.h"
#include "cuda/device.h"
#include "cuda/fields.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace ep::cuda {
namespace {

/// Put in what `scan` counts, so that it is exchanged and routes can be made of it.
void set_counts(NotifyArgs& args, const ScanArgs& scan, int64_t num_blocks, int64_t alignment) {
    if (scan.num_ranks < 1) throw std::invalid_argument("notify: expected a scan with ranks");
    args.has_counts = 1;
    args.num_experts = scan.num_experts;
    args.experts_per_rank = scan.num_experts / scan.num_ranks;
    args.expand = scan.expand;
    args.is_int64 = scan.is_int64;
    args.alignment = alignment;
    args.num_blocks = num_blocks;
    args.num_nodes = scan.num_nodes;
    args.block_counts = scan.block_counts;
    args.block_bad = scan.block_bad;
    args.topk_idx = scan.topk_idx;
    args.key_starts = const_cast<int32_t*>(scan.key_starts);
}

void set_head(NotifyArgs& args,
              const std::vector<int64_t>& call,
              uint32_t kind,
              const std::string& error,
              uint64_t rows_place,
              uint64_t rows_bytes,
              uint64_t weights_place) {
    if (call.size() > kNumCallFields)
        throw std::invalid_argument(
            text("notify: expected at most ", kNumCallFields, " numbers, got ", call.size()));
    args.head = PostHead{};
    std::copy(call.begin(), call.end(), args.head.call);
    args.head.kind = kind;
    args.head.rows_place = rows_place;
    args.head.rows_bytes = rows_bytes;
    args.head.weights_place = weights_place;
    std::strncpy(args.head.error, error.c_str(), kErrorBytes - 1);
}

/// One rank's post, as Python reads it.
struct Word {
    uint32_t seen;
    uint32_t kind;
    std::vector<int64_t> call;
    std::string error;
    int64_t error_value;
    uint64_t rows_place, rows_bytes, weights_place;
};

struct ReadReport {
    uint32_t ticket, epoch, status;
    std::vector<Word> words;                     // by rank
    std::vector<std::vector<int32_t>> per_rank;  // [source][destination]
    std::vector<std::vector<int32_t>> per_node;  // [source][node]
    std::vector<int64_t> per_expert;             // of all ranks together
};

ReadReport read_report(const py::buffer& bytes, int num_ranks, int num_experts, int num_nodes) {
    const py::buffer_info info = bytes.request();
    if (info.size * info.itemsize < static_cast<py::ssize_t>(sizeof(Report)) ||
        num_ranks > kMaxRanks || num_experts > kMaxExperts || num_nodes > kMaxNodes)
        throw std::invalid_argument("read_report: expected the bytes of one report");
    const auto& report = *static_cast<const Report*>(info.ptr);
    ReadReport read{report.ticket, report.epoch, report.status, {}, {}, {}, {}};
    for (int rank = 0; rank < num_ranks; ++rank) {
        const PostHead& head = report.heads[rank];
        read.words.push_back({report.seen[rank],
                              head.kind,
                              {std::begin(head.call), std::end(head.call)},
                              std::string(head.error, strnlen(head.error, kErrorBytes)),
                              head.error_value,
                              head.rows_place,
                              head.rows_bytes,
                              head.weights_place});
        const int32_t* row = report.per_rank + rank * num_ranks;
        read.per_rank.emplace_back(row, row + num_ranks);
        const int32_t* nodes = report.per_node + rank * num_nodes;
        read.per_node.emplace_back(nodes, nodes + num_nodes);
    }
    read.per_expert.assign(report.per_expert, report.per_expert + num_experts);
    return read;
}

/// Wait for a word of mapped host memory to reach `epoch`; false after `timeout` seconds. Frees the
/// GIL, hears Ctrl-C.
bool wait_for_word(uintptr_t address, uint32_t epoch, double timeout) {
    using Clock = std::chrono::steady_clock;
    const std::atomic_ref<uint32_t> word(*reinterpret_cast<uint32_t*>(address));
    const auto is_there = [&] {
        return static_cast<int32_t>(word.load(std::memory_order_acquire) - epoch) >= 0;
    };
    const auto deadline = Clock::now() + std::chrono::duration<double>(timeout);
    while (!is_there()) {
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        if (Clock::now() >= deadline) return false;
        const py::gil_scoped_release release;
        const auto until = Clock::now() + std::chrono::milliseconds(50);
        while (!is_there() && Clock::now() < until)
            for (int i = 0; i < 64 && !is_there(); ++i) std::this_thread::yield();
    }
    return true;
}

void bind_args(py::module_& m) {
    py::class_<CastRecipe>(m, "CastRecipe")
        .def(py::init([](int block, const std::string& scales, float min_amax) {
                 const auto formats = {"float32", "ue8m0", "packed_ue8m0"};
                 const auto found = std::find(formats.begin(), formats.end(), scales);
                 return CastRecipe{block / kCastColumns,
                                   static_cast<int32_t>(found - formats.begin()), min_amax};
             }),
             py::arg("block"), py::arg("scales"), py::arg("min_amax"));
    Fields<ScanArgs>(m, "ScanArgs")
        .add("topk_idx", &ScanArgs::topk_idx)
        .add("num_tokens", &ScanArgs::num_tokens)
        .add("num_topk", &ScanArgs::num_topk)
        .add("is_int64", &ScanArgs::is_int64)
        .add("num_experts", &ScanArgs::num_experts)
        .add("num_ranks", &ScanArgs::num_ranks)
        .add("expand", &ScanArgs::expand)
        .add("num_nodes", &ScanArgs::num_nodes)
        .add("node", &ScanArgs::node)
        .add("node_of", &ScanArgs::node_of)
        .add("by_node", &ScanArgs::by_node)
        .add("node_starts", &ScanArgs::node_starts)
        .add("block_counts", &ScanArgs::block_counts)
        .add("block_bad", &ScanArgs::block_bad)
        .add("key_starts", &ScanArgs::key_starts)
        .add("state", &ScanArgs::state)
        .add("routes", &ScanArgs::routes);
    Fields<NotifyArgs> notify(m, "NotifyArgs");
    notify.add("control", &NotifyArgs::control)
        .add("rank", &NotifyArgs::rank)
        .add("num_ranks", &NotifyArgs::num_ranks)
        .add("posts", &NotifyArgs::posts)
        .add("meets", &NotifyArgs::meets)
        .add("has_far", &NotifyArgs::has_far)
        .add("ticket", &NotifyArgs::ticket)
        .add("is_awaited", &NotifyArgs::is_awaited)
        .add("piles", &NotifyArgs::piles)
        .add("node_of", &NotifyArgs::node_of)
        .add("index_of", &NotifyArgs::index_of)
        .add("size_of", &NotifyArgs::size_of)
        .add("gate", &NotifyArgs::gate)
        .add("capacity", &NotifyArgs::capacity)
        .add("numbers", &NotifyArgs::numbers)
        .add("slabs", &NotifyArgs::slabs)
        .add("state", &NotifyArgs::state)
        .add("report", &NotifyArgs::report)
        .add("timeout_ns", &NotifyArgs::timeout_ns);
    notify.python_class().def("set_counts", &set_counts, py::arg("scan"), py::kw_only(),
                              py::arg("num_blocks"), py::arg("alignment"));
    notify.python_class().def("set_head", &set_head, py::kw_only(), py::arg("call"),
                              py::arg("kind"), py::arg("error"), py::arg("rows_place"),
                              py::arg("rows_bytes"), py::arg("weights_place"));
    Fields<ArriveArgs>(m, "ArriveArgs")
        .add("control", &ArriveArgs::control)
        .add("rank", &ArriveArgs::rank)
        .add("num_ranks", &ArriveArgs::num_ranks)
        .add("state", &ArriveArgs::state)
        .add("waits", &ArriveArgs::waits)
        .add("timeout_ns", &ArriveArgs::timeout_ns)
        .add("error", &ArriveArgs::error);
    Fields<DispatchArgs>(m, "DispatchArgs")
        .add("state", &DispatchArgs::state)
        .add("x", &DispatchArgs::x)
        .add("scales", &DispatchArgs::scales)
        .add("weights", &DispatchArgs::weights)
        .add("topk_idx", &DispatchArgs::topk_idx)
        .add("routes", &DispatchArgs::routes)
        .add("route_plane", &DispatchArgs::route_plane)
        .add("valid", &DispatchArgs::valid)
        .add("pile", &DispatchArgs::pile)
        .add("num_tokens", &DispatchArgs::num_tokens)
        .add("alignment", &DispatchArgs::alignment)
        .add("num_topk", &DispatchArgs::num_topk)
        .add("row_bytes", &DispatchArgs::row_bytes)
        .add("out_row_bytes", &DispatchArgs::out_row_bytes)
        .add("scale_bytes", &DispatchArgs::scale_bytes)
        .add("weight_bytes", &DispatchArgs::weight_bytes)
        .add("idx_bytes", &DispatchArgs::idx_bytes)
        .add("link_bytes", &DispatchArgs::link_bytes)
        .add("is_int64", &DispatchArgs::is_int64)
        .add("expand", &DispatchArgs::expand)
        .add("experts_per_rank", &DispatchArgs::experts_per_rank)
        .add("recipe", &DispatchArgs::recipe)
        .add("rank", &DispatchArgs::rank)
        .add("to_x", &DispatchArgs::to_x)
        .add("to_scales", &DispatchArgs::to_scales)
        .add("to_weights", &DispatchArgs::to_weights)
        .add("to_idx", &DispatchArgs::to_idx)
        .add("to_links", &DispatchArgs::to_links);
    Fields<ExpandArgs>(m, "ExpandArgs")
        .add("x", &ExpandArgs::x)
        .add("scales", &ExpandArgs::scales)
        .add("links", &ExpandArgs::links)
        .add("num_rows", &ExpandArgs::num_rows)
        .add("row_bytes", &ExpandArgs::row_bytes)
        .add("scale_bytes", &ExpandArgs::scale_bytes);
    Fields<TakeArgs>(m, "TakeArgs")
        .add("state", &TakeArgs::state)
        .add("num_rows", &TakeArgs::num_rows)
        .add("capacity", &TakeArgs::capacity)
        .add("from_x", &TakeArgs::from_x)
        .add("from_scales", &TakeArgs::from_scales)
        .add("from_weights", &TakeArgs::from_weights)
        .add("from_idx", &TakeArgs::from_idx)
        .add("links", &TakeArgs::links)
        .add("x", &TakeArgs::x)
        .add("scales", &TakeArgs::scales)
        .add("weights", &TakeArgs::weights)
        .add("idx", &TakeArgs::idx)
        .add("to_links", &TakeArgs::to_links)
        .add("row_bytes", &TakeArgs::row_bytes)
        .add("scale_bytes", &TakeArgs::scale_bytes)
        .add("weight_bytes", &TakeArgs::weight_bytes)
        .add("idx_bytes", &TakeArgs::idx_bytes);
    Fields<StageArgs>(m, "StageArgs")
        .add("num_rows", &StageArgs::num_rows)
        .add("row_bytes", &StageArgs::row_bytes)
        .add("weight_row_bytes", &StageArgs::weight_row_bytes)
        .add("rows", &StageArgs::rows)
        .add("to_rows", &StageArgs::to_rows)
        .add("weights", &StageArgs::weights)
        .add("to_weights", &StageArgs::to_weights)
        .add("num_row_bytes", &StageArgs::num_row_bytes)
        .add("num_weight_bytes", &StageArgs::num_weight_bytes);
    Fields<ReduceArgs>(m, "ReduceArgs")
        .add("stage", &ReduceArgs::stage)
        .add("links", &ReduceArgs::links)
        .add("num_rows", &ReduceArgs::num_rows)
        .add("row_bytes", &ReduceArgs::row_bytes);
    Fields<CombineArgs>(m, "CombineArgs")
        .add("state", &CombineArgs::state)
        .add("routes", &CombineArgs::routes)
        .add("route_plane", &CombineArgs::route_plane)
        .add("pile", &CombineArgs::pile)
        .add("num_tokens", &CombineArgs::num_tokens)
        .add("num_topk", &CombineArgs::num_topk)
        .add("row_bytes", &CombineArgs::row_bytes)
        .add("weight_bytes", &CombineArgs::weight_bytes)
        .add("expand", &CombineArgs::expand)
        .add("bias_0", &CombineArgs::bias_0)
        .add("bias_1", &CombineArgs::bias_1)
        .add("out", &CombineArgs::out)
        .add("out_weights", &CombineArgs::out_weights)
        .add("from_x", &CombineArgs::from_x)
        .add("from_weights", &CombineArgs::from_weights)
        .add("is_reduced", &CombineArgs::is_reduced);
    Fields<CastArgs>(m, "CastArgs")
        .add("x", &CastArgs::x)
        .add("data", &CastArgs::data)
        .add("scales", &CastArgs::scales)
        .add("num_tokens", &CastArgs::num_tokens)
        .add("hidden", &CastArgs::hidden)
        .add("recipe", &CastArgs::recipe);
}

void bind_plans(py::module_& m) {
    py::class_<Launch>(m, "Launch")
        .def_readonly("kernel", &Launch::kernel)
        .def_readonly("grid", &Launch::grid)
        .def_readonly("block", &Launch::block)
        .def_readonly("shared_bytes", &Launch::shared_bytes)
        .def_property_readonly("params",
                               [](const Launch& launch) { return py::bytes(launch.params); });
    py::enum_<DType>(m, "DType")
        .value("bfloat16", DType::kBFloat16)
        .value("float16", DType::kFloat16)
        .value("float32", DType::kFloat32)
        .value("float64", DType::kFloat64);
    m.def("num_scan_blocks", &num_scan_blocks, py::arg("num_tokens"), py::arg("num_sms"));
    m.def("plan_count", &plan_count, py::arg("args"), py::arg("num_sms"));
    m.def("plan_route", &plan_route, py::arg("args"), py::arg("num_sms"));
    m.def("plan_notify", &plan_notify, py::arg("args"));
    m.def("plan_notify_send", &plan_notify_send, py::arg("args"));
    m.def("plan_arrive", &plan_arrive, py::arg("args"));
    m.def("plan_dispatch", &plan_dispatch, py::arg("args"), py::arg("num_sms"));
    m.def("plan_dispatch_cast", &plan_dispatch_cast, py::arg("args"), py::arg("dtype"),
          py::arg("num_sms"));
    m.def("plan_expand", &plan_expand, py::arg("args"), py::arg("num_sms"));
    m.def("plan_take", &plan_take, py::arg("args"), py::arg("num_sms"));
    m.def("plan_stage", &plan_stage, py::arg("args"), py::arg("num_sms"));
    m.def("plan_reduce", &plan_reduce, py::arg("args"), py::arg("dtype"), py::arg("num_sms"));
    m.def("plan_combine", &plan_combine, py::arg("args"), py::arg("dtype"), py::arg("num_sms"));
    m.def("plan_cast", &plan_cast, py::arg("args"), py::arg("dtype"), py::arg("num_sms"));
}

void bind_report(py::module_& m) {
    py::class_<Word>(m, "Word")
        .def_readonly("seen", &Word::seen)
        .def_readonly("kind", &Word::kind)
        .def_readonly("call", &Word::call)
        .def_property_readonly(
            "error",
            [](const Word& word) {  // may have been cut within a character
                return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(
                    word.error.data(), static_cast<Py_ssize_t>(word.error.size()), "replace"));
            })
        .def_readonly("error_value", &Word::error_value)
        .def_readonly("rows_place", &Word::rows_place)
        .def_readonly("rows_bytes", &Word::rows_bytes)
        .def_readonly("weights_place", &Word::weights_place);
    py::class_<ReadReport>(m, "Report")
        .def_readonly("ticket", &ReadReport::ticket)
        .def_readonly("epoch", &ReadReport::epoch)
        .def_readonly("status", &ReadReport::status)
        .def_readonly("words", &ReadReport::words)
        .def_readonly("per_rank", &ReadReport::per_rank)
        .def_readonly("per_node", &ReadReport::per_node)
        .def_readonly("per_expert", &ReadReport::per_expert);
    m.def("read_report", &read_report, py::arg("bytes"), py::arg("num_ranks"),
          py::arg("num_experts"), py::arg("num_nodes") = 0);
    m.def(
        "read_arrive_error",
        [](const py::buffer& bytes, int num_ranks) {
            const py::buffer_info info = bytes.request();
            if (info.size * info.itemsize < static_cast<py::ssize_t>(sizeof(ArriveError)) ||
                num_ranks > kMaxRanks)
                throw std::invalid_argument("read_arrive_error: expected the bytes of one error");
            const auto& error = *static_cast<const ArriveError*>(info.ptr);
            return std::pair(error.epoch,
                             std::vector<uint32_t>(error.seen, error.seen + num_ranks));
        },
        py::arg("bytes"), py::arg("num_ranks"));
    m.def("wait_for_word", &wait_for_word, py::arg("address"), py::arg("epoch"),
          py::arg("timeout"));
    m.attr("CONTROL_BYTES") = sizeof(Control);
    m.attr("CALL_STATE_BYTES") = sizeof(CallState);
    m.attr("REPORT_BYTES") = sizeof(Report);
    m.attr("ARRIVE_ERROR_BYTES") = sizeof(ArriveError);
    m.attr("MAX_RANKS") = kMaxRanks;
    m.attr("MAX_EXPERTS") = kMaxExperts;
    m.attr("MAX_TOPK") = kMaxTopk;
    m.attr("MAX_NODES") = kMaxNodes;
    m.attr("MAX_HIDDEN") = kMaxHidden;
    m.attr("MAX_ERROR_BYTES") = kErrorBytes - 1;
    m.attr("TAKES_PART") = static_cast<uint32_t>(kTakesPart);
    m.attr("BAD_ARGUMENTS") = static_cast<uint32_t>(kBadArguments);
    m.attr("BAD_INDEX") = static_cast<uint32_t>(kBadIndex);
    m.attr("NEEDS_ROOM") = static_cast<uint32_t>(kNeedsRoom);
    m.attr("AGREED") = static_cast<uint32_t>(kAgreed);
    m.attr("DISAGREED") = static_cast<uint32_t>(kDisagreed);
    m.attr("TOO_MANY_ROWS") = static_cast<uint32_t>(kTooManyRows);
    m.attr("EXPERT_NUMBERS") = static_cast<int32_t>(kExpertNumbers);
    m.attr("SLABS_BYTES") = sizeof(Slabs);
    m.attr("MAX_SLABS") = kMaxSlabs;
    m.attr("SLAB_SHIFT") = kSlabShift;
    m.attr("NO_PLACE") = kNoPlace;
    m.attr("TIMED_OUT") = static_cast<uint32_t>(kTimedOut);
}

void bind_device(py::module_& m) {
    m.def("kernel_names", &kernel_names);
    m.def("count_devices", &count_devices);
    m.def("kernel_names", &kernel_names);
    py::class_<Device>(m, "Device")
        .def(py::init<int>(), py::arg("ordinal"))
        .def_property_readonly("num_sms", &Device::num_sms)
        .def("allocate", &Device::allocate, py::arg("num_bytes"), py::arg("is_zeroed"))
        .def("free", &Device::free, py::arg("address"))
        .def("export_memory",
             [](Device& device, uintptr_t address) {
                 return py::bytes(device.export_memory(address));
             })
        .def("open_memory", &Device::open_memory, py::arg("handle"))
        .def("close_memory", &Device::close_memory, py::arg("address"))
        .def("allocate_host", &Device::allocate_host, py::arg("num_bytes"))
        .def("free_host", &Device::free_host, py::arg("address"))
        .def("launch", &Device::launch, py::arg("launch"), py::arg("stream"))
        .def("graph_id", &Device::graph_id, py::arg("stream"))
        .def("synchronize", &Device::synchronize, py::arg("stream"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Dispatch and combine on GPUs; see docs/kernels.md.";
    bind_args(m);
    bind_plans(m);
    bind_report(m);
    bind_packed(m);
    bind_cross(m);
    bind_device(m);
}

}  // namespace ep::cuda
