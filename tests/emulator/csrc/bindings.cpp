// The machine as a Python module. Everything that may wait frees the GIL.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bulk.h"
#include "forms.h"
#include "races.h"
#include "store_buffers.h"

namespace py = pybind11;
using namespace ptx;

namespace {

using Dimensions = std::variant<u32, std::vector<u32>>;

std::array<u32, 3> to_dimensions(const Dimensions& given) {
    std::array<u32, 3> all{1, 1, 1};
    if (const u32* one = std::get_if<u32>(&given)) {
        all[0] = *one;
        return all;
    }
    const auto& list = std::get<std::vector<u32>>(given);
    if (list.empty() || list.size() > 3)
        throw std::invalid_argument("launch: expected 1 to 3 dimensions");
    std::copy(list.begin(), list.end(), all.begin());
    return all;
}

std::unique_ptr<Machine> make_machine(
    int num_ranks, u64 seed, const std::string& mode, u64 patience, u64 nanoseconds, double grace) {
    Options options;
    options.seed = seed;
    options.race = mode == "race" || mode == "race+weak";
    options.weak = mode == "weak" || mode == "race+weak";
    if (!options.race && !options.weak && mode != "plain")
        throw std::invalid_argument(
            "Machine: expected mode to be plain, race, weak or race+weak, got '" + mode + "'");
    options.patience = patience;
    options.nanoseconds_per_instruction = nanoseconds;
    options.grace_seconds = grace;
    return std::make_unique<Machine>(num_ranks, options);
}

py::bytes read_memory(Machine& machine, int rank, u64 address, u64 count) {
    std::string bytes(count, '\0');
    {
        // Whoever runs the machine may need the GIL for an intrinsic before it lets go of the lock.
        const py::gil_scoped_release no_gil;
        machine.read(rank, address, reinterpret_cast<u8*>(bytes.data()), count);
    }
    return py::bytes(bytes);
}

void write_memory(Machine& machine, int rank, u64 address, const py::buffer& data) {
    const py::buffer_info info = data.request();
    py::ssize_t expected = info.itemsize;
    for (py::ssize_t i = info.ndim; i-- > 0; expected *= info.shape[size_t(i)])
        if (info.strides[size_t(i)] != expected && info.shape[size_t(i)] > 1)
            throw std::invalid_argument("write: expected contiguous data");
    const py::gil_scoped_release no_gil;
    machine.write(rank, address, static_cast<const u8*>(info.ptr), u64(info.size * info.itemsize));
}

py::list blocks_of(const Module& module, const Kernel& kernel) {
    py::list blocks;
    for (const u32 start : kernel.block_starts) {
        const Instruction& first = kernel.code[start];
        py::dict block;
        block["ptx_line"] = first.line;
        block["source"] = module.describe(first);
        block["executed"] = kernel.reached[start];
        blocks.append(block);
    }
    return blocks;
}

py::dict kernels_of(const Machine& machine) {
    py::dict all;
    for (const auto& [name, pair] : machine.kernels()) {
        const auto& [module, kernel] = pair;
        py::dict entry;
        py::list parameters;
        for (const Parameter& parameter : kernel->parameters)
            parameters.append(
                py::make_tuple(parameter.name, parameter.offset, parameter.num_bytes));
        entry["parameters"] = parameters;
        entry["parameter_bytes"] = kernel->parameter_bytes;
        entry["shared_bytes"] = kernel->shared_bytes;
        entry["local_bytes"] = kernel->local_bytes;
        entry["num_instructions"] = kernel->code.size();
        entry["blocks"] = blocks_of(*module, *kernel);
        py::dict opcodes;
        for (const Instruction& instruction : kernel->code) {
            if (instruction.line == 0) continue;
            const py::str opcode(module->opcodes[size_t(instruction.opcode)]);
            opcodes[opcode] = (opcodes.contains(opcode) ? opcodes[opcode].cast<u64>() : 0) +
                              kernel->executed[size_t(&instruction - kernel->code.data())];
        }
        entry["opcodes"] = opcodes;
        all[py::str(name)] = entry;
    }
    return all;
}

py::dict counts_of(const Machine& machine) {
    py::dict all;
    for (const auto& [name, c] : machine.counts()) {
        py::dict entry;
        entry["launches"] = c.launches;
        entry["warp_instructions"] = c.warp_instructions;
        entry["lane_instructions"] = c.lane_instructions;
        entry["global_read"] = c.global_read;
        entry["global_written"] = c.global_written;
        entry["peer_read"] = c.peer_read;
        entry["peer_written"] = c.peer_written;
        entry["shared_read"] = c.shared_read;
        entry["shared_written"] = c.shared_written;
        entry["local_read"] = c.local_read;
        entry["local_written"] = c.local_written;
        entry["bulk_read"] = c.bulk_read;
        entry["bulk_written"] = c.bulk_written;
        entry["atomics"] = c.atomics;
        all[py::str(name)] = entry;
    }
    return all;
}

void on_call(Machine& machine, const std::string& name, py::function function) {
    auto shared =
        std::shared_ptr<py::function>(new py::function(std::move(function)), [](py::function* f) {
            const py::gil_scoped_acquire gil;
            delete f;
        });
    Intrinsic intrinsic = [shared](Call& call) {
        const py::gil_scoped_acquire gil;
        for_lanes(call.lanes, [&](int lane) {
            py::tuple arguments(call.arguments.size());
            for (size_t i = 0; i < call.arguments.size(); ++i)
                arguments[i] = call.arguments[i][size_t(lane)];
            const py::object result = (*shared)(call.rank, lane, arguments);
            if (!result.is_none()) call.result[size_t(lane)] = result.cast<u64>();
        });
    };
    const py::gil_scoped_release no_gil;
    machine.set_intrinsic(name, std::move(intrinsic));
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
    py::register_exception<ParseError>(m, "ParseError", PyExc_ValueError);
    py::register_exception<Fault>(m, "Fault", PyExc_RuntimeError);
    m.def("forms", [] {
        std::vector<std::string> names;
        for (const auto& [name, form] : computing_forms()) names.push_back(name);
        return names;
    });
    const auto free_gil = py::call_guard<py::gil_scoped_release>();
    py::class_<Machine>(m, "Machine")
        .def(py::init(&make_machine), py::arg("num_ranks"), py::arg("seed") = 0,
             py::arg("mode") = "plain", py::kw_only(), py::arg("patience") = 2'000'000,
             py::arg("nanoseconds_per_instruction") = 10, py::arg("grace_seconds") = 0.02)
        .def_property_readonly("num_ranks", &Machine::num_ranks)
        .def_property_readonly("steps", &Machine::steps)
        .def("allocate", &Machine::allocate, py::arg("rank"), py::arg("num_bytes"),
             py::arg("symmetric") = false, py::arg("name") = "memory", free_gil)
        .def("free", &Machine::free, py::arg("address"), free_gil)
        .def("write", &write_memory, py::arg("rank"), py::arg("address"), py::arg("data"))
        .def("read", &read_memory, py::arg("rank"), py::arg("address"), py::arg("num_bytes"))
        .def("load", &Machine::load, py::arg("ptx"), free_gil)
        .def(
            "launch",
            [](Machine& machine, int rank, const std::string& kernel, const Dimensions& grid,
               const Dimensions& block, u32 shared_bytes, const py::bytes& parameters, int stream,
               bool on_host) {
                const std::string_view view(parameters);
                std::vector<u8> bytes(view.begin(), view.end());
                const py::gil_scoped_release no_gil;
                machine.launch(rank, kernel, to_dimensions(grid), to_dimensions(block),
                               shared_bytes, std::move(bytes), stream, on_host);
            },
            py::arg("rank"), py::arg("kernel"), py::arg("grid"), py::arg("block"),
            py::arg("shared_bytes"), py::arg("params"), py::arg("stream") = 0,
            py::arg("on_host") = false)
        .def("run", &Machine::run, free_gil)
        .def("synchronize", &Machine::synchronize, py::arg("rank"), py::arg("stream") = -1,
             free_gil)
        .def("advance", &Machine::advance, py::arg("rank"), py::arg("max_instructions") = 20'000,
             free_gil)
        .def("meet", &Machine::meet, free_gil)
        .def("on_call", &on_call, py::arg("name"), py::arg("function"))
        .def("report",
             [](const Machine& machine) {
                 std::vector<std::pair<std::string, std::string>> all;
                 for (const Report& report : machine.reports())
                     all.emplace_back(report.kind, report.text);
                 return all;
             })
        .def("counts", &counts_of)
        .def("kernels", &kernels_of);
}
