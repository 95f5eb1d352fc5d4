#include "cuda/bind_packed.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>

#include "cuda/fields.h"
#include "cuda/packed_launch.h"

namespace ep::cuda {
namespace {

void set_packed_head(PackedArgs& args,
                     const std::vector<int64_t>& call,
                     const std::string& error,
                     uint64_t rows) {
    if (call.size() > kNumPackedFields)
        throw std::invalid_argument(text("low-latency post: expected at most ", kNumPackedFields,
                                         " numbers, got ", call.size()));
    args.head = PackedHead{};
    std::copy(call.begin(), call.end(), args.head.call);
    args.head.kind = error.empty() ? kPackedTakesPart : kPackedBadArguments;
    args.head.rows = rows;
    std::strncpy(args.head.error, error.c_str(), kErrorBytes - 1);
}

/// What one rank said, as Python reads it.
struct PackedWord {
    bool is_there, is_late, is_masked, has_other_routing;
    uint64_t waited;
    uint32_t kind;
    std::vector<int64_t> call;
    std::string error;
    int64_t error_value, error_at;
};

/// The operation, its status, and what every rank said.
std::tuple<uint32_t, uint32_t, std::vector<PackedWord>> read_packed_report(const py::buffer& bytes,
                                                                           int num_ranks) {
    const py::buffer_info info = bytes.request();
    if (info.size * info.itemsize < static_cast<py::ssize_t>(sizeof(PackedReport)) ||
        num_ranks > kMaxRanks)
        throw std::invalid_argument("read_packed_report: expected the bytes of one report");
    const auto& report = *static_cast<const PackedReport*>(info.ptr);
    std::vector<PackedWord> words;
    for (int rank = 0; rank < num_ranks; ++rank) {
        const PackedHead& head = report.heads[rank];
        words.push_back({report.is_there[rank] != 0,
                         report.late[rank] != 0,
                         report.masked[rank] != 0,
                         report.other_routing[rank] != 0,
                         report.waited[rank],
                         head.kind,
                         {std::begin(head.call), std::end(head.call)},
                         std::string(head.error, strnlen(head.error, kErrorBytes)),
                         head.error_value,
                         head.error_at});
    }
    return {report.operation, report.status, std::move(words)};
}

void bind_packed_args(py::module_& m) {
    Fields<PackedArgs> args(m, "PackedArgs");
    args.add("control", &PackedArgs::control)
        .add("window", &PackedArgs::window)
        .add("state", &PackedArgs::state)
        .add("report", &PackedArgs::report)
        .add("timeout_ns", &PackedArgs::timeout_ns)
        .add("window_bytes", &PackedArgs::window_bytes)
        .add("slots", &PackedArgs::slots)
        .add("outbox", &PackedArgs::outbox)
        .add("inbox", &PackedArgs::inbox)
        .add("place_bytes", &PackedArgs::place_bytes)
        .add("part_bytes", &PackedArgs::part_bytes)
        .add("block_bytes", &PackedArgs::block_bytes)
        .add("rank", &PackedArgs::rank)
        .add("num_ranks", &PackedArgs::num_ranks)
        .add("call", &PackedArgs::call)
        .add("rows_place", &PackedArgs::rows_place)
        .add("ticket", &PackedArgs::ticket)
        .add("is_awaited", &PackedArgs::is_awaited)
        .add("masks_late", &PackedArgs::masks_late)
        .add("operation", &PackedArgs::operation)
        .add("num_experts", &PackedArgs::num_experts)
        .add("max_tokens", &PackedArgs::max_tokens)
        .add("hidden", &PackedArgs::hidden)
        .add("x_bytes", &PackedArgs::x_bytes)
        .add("scale_bytes", &PackedArgs::scale_bytes)
        .add("slot_bytes", &PackedArgs::slot_bytes)
        .add("recipe", &PackedArgs::recipe)
        .add("num_topk", &PackedArgs::num_topk)
        .add("num_tokens", &PackedArgs::num_tokens)
        .add("topk_idx", &PackedArgs::topk_idx)
        .add("is_int64", &PackedArgs::is_int64)
        .add("mask_rank", &PackedArgs::mask_rank)
        .add("mask_value", &PackedArgs::mask_value)
        .add("is_alone", &PackedArgs::is_alone)
        .add("x", &PackedArgs::x)
        .add("weights", &PackedArgs::weights)
        .add("out", &PackedArgs::out)
        .add("out_scales", &PackedArgs::out_scales)
        .add("out_tokens", &PackedArgs::out_tokens)
        .add("out_count", &PackedArgs::out_count)
        .add("layout_range", &PackedArgs::layout_range);
    args.python_class().def("set_head", &set_packed_head, py::kw_only(), py::arg("call"),
                            py::arg("error"), py::arg("rows"));
}

}  // namespace

void bind_packed(py::module_& m) {
    bind_packed_args(m);
    py::enum_<PackedStep>(m, "PackedStep")
        .value("begin", PackedStep::kBegin)
        .value("push", PackedStep::kPush)
        .value("stage", PackedStep::kStage)
        .value("post", PackedStep::kPost)
        .value("meet", PackedStep::kMeet)
        .value("take", PackedStep::kTake)
        .value("sum", PackedStep::kSum)
        .value("finish", PackedStep::kFinish)
        .value("mask", PackedStep::kMask)
        .value("send", PackedStep::kSend)
        .value("tell", PackedStep::kTell);
    m.def("plan_packed", &plan_packed, py::arg("step"), py::arg("args"), py::arg("num_sms"));
    py::class_<PackedWord>(m, "PackedWord")
        .def_readonly("is_there", &PackedWord::is_there)
        .def_readonly("is_late", &PackedWord::is_late)
        .def_readonly("is_masked", &PackedWord::is_masked)
        .def_readonly("has_other_routing", &PackedWord::has_other_routing)
        .def_readonly("waited", &PackedWord::waited)
        .def_readonly("kind", &PackedWord::kind)
        .def_readonly("call", &PackedWord::call)
        .def_property_readonly(
            "error",
            [](const PackedWord& word) {  // may have been cut within a character
                return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(
                    word.error.data(), static_cast<Py_ssize_t>(word.error.size()), "replace"));
            })
        .def_readonly("error_value", &PackedWord::error_value)
        .def_readonly("error_at", &PackedWord::error_at);
    m.def("read_packed_report", &read_packed_report, py::arg("bytes"), py::arg("num_ranks"));
    m.attr("PACKED_CONTROL_BYTES") = sizeof(PackedControl);
    m.attr("PACKED_STATE_BYTES") = sizeof(PackedState);
    m.attr("PACKED_REPORT_BYTES") = sizeof(PackedReport);
    m.attr("PACKED_NUM_CALLS_AT") = offsetof(PackedState, num_calls);
    m.attr("PACKED_AGREED") = static_cast<uint32_t>(kPackedAgreed);
    m.attr("PACKED_DISAGREED") = static_cast<uint32_t>(kPackedDisagreed);
    m.attr("PACKED_OTHER_ROUTING") = static_cast<uint32_t>(kPackedOtherRouting);
    m.attr("PACKED_TIMED_OUT") = static_cast<uint32_t>(kPackedTimedOut);
    m.attr("PACKED_AGAIN") = static_cast<uint32_t>(kPackedAgain);
    m.attr("PACKED_BAD_INDEX") = static_cast<uint32_t>(kPackedBadIndex);
    m.attr("PACKED_TOO_MANY") = static_cast<uint32_t>(kPackedTooMany);
    m.attr("PACKED_BAD_RANGE") = static_cast<uint32_t>(kPackedBadRange);
}

}  // namespace ep::cuda
