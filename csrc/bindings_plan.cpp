// The plan for Python, for backends that move rows in more than one hop. Addresses come as integers
// and have been checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "core/errors.h"
#include "cpu/plan.h"
#include "cpu/rows.h"

namespace py = pybind11;
using py::operator""_a;

namespace ep {
namespace {

constexpr int kMaxParts = 256;

using RoutingSizes = std::tuple<int64_t, int, int, int, bool, int64_t>;

Routing routing_at(uintptr_t topk_idx, size_t idx_item_bytes, const RoutingSizes& sizes) {
    Routing routing{};
    routing.topk_idx = pointer<const void>(topk_idx);
    routing.is_int64 = idx_item_bytes == 8;
    std::tie(routing.num_tokens, routing.num_topk, routing.num_experts, routing.num_ranks,
             routing.expand, routing.alignment) = sizes;
    return routing;
}

int64_t count(uintptr_t topk_idx,
              size_t idx_item_bytes,
              const RoutingSizes& sizes,
              uintptr_t per_rank,
              uintptr_t per_expert) {
    const Routing routing = routing_at(topk_idx, idx_item_bytes, sizes);
    std::vector<int32_t> unused(3 * routing.num_slots());
    const Routes routes = routes_in(unused.data(), routing.num_slots());
    return count_and_route(routing, pointer<int32_t>(per_rank), pointer<int32_t>(per_expert),
                           routes);
}

void address(uintptr_t topk_idx,
             size_t idx_item_bytes,
             const RoutingSizes& sizes,
             const std::tuple<uintptr_t, uintptr_t, int>& counts,
             int source,
             const std::tuple<uintptr_t, uintptr_t, uintptr_t>& routes) {
    const Routing routing = routing_at(topk_idx, idx_item_bytes, sizes);
    const auto* per_rank = pointer<const int32_t>(std::get<0>(counts));
    const auto* per_expert = pointer<const int32_t>(std::get<1>(counts));
    Totals totals;
    for (int rank = 0; rank < std::get<2>(counts); ++rank) {
        totals.per_rank.push_back(per_rank + static_cast<ptrdiff_t>(rank) * routing.num_ranks);
        totals.per_expert.push_back(per_expert +
                                    static_cast<ptrdiff_t>(rank) * routing.num_experts);
    }
    make_routes(routing, totals, source,
                {pointer<int32_t>(std::get<0>(routes)), pointer<int32_t>(std::get<1>(routes)),
                 pointer<int32_t>(std::get<2>(routes))});
}

void sum_parts(const std::tuple<int, size_t, int64_t>& sizes,
               const std::vector<uintptr_t>& parts,
               uintptr_t rows,
               const std::tuple<uintptr_t, uintptr_t>& biases,
               uintptr_t out) {
    const auto [dtype_index, hidden, num_tokens] = sizes;
    const auto dtype = static_cast<DType>(dtype_index);
    const size_t row_bytes = hidden * item_size(dtype);
    if (parts.size() > kMaxParts)
        throw std::invalid_argument(
            text("sum_parts: expected at most ", kMaxParts, " parts, got ", parts.size()));
    const auto* row_of = pointer<const int32_t>(rows);
    const RowKernels& kernels = row_kernels();
    const void* addends[kMaxParts];
    int group_ends[kMaxParts];
    for (int part = 0; part < kMaxParts; ++part) group_ends[part] = part + 1;
    const auto bias_at = [&](uintptr_t bias, int64_t token) {
        return bias == 0 ? nullptr
                         : pointer<const char>(bias) + static_cast<size_t>(token) * row_bytes;
    };
    for (int64_t token = 0; token < num_tokens; ++token, row_of += parts.size()) {
        int num_rows = 0;
        for (size_t part = 0; part < parts.size(); ++part)
            if (row_of[part] >= 0)
                addends[num_rows++] = pointer<const char>(parts[part]) +
                                      static_cast<size_t>(row_of[part]) * row_bytes;
        kernels.reduce(dtype, pointer<char>(out) + static_cast<size_t>(token) * row_bytes, addends,
                       group_ends, num_rows, bias_at(std::get<0>(biases), token),
                       bias_at(std::get<1>(biases), token), hidden, false);
    }
}

}  // namespace

void bind_plan(py::module_& m) {
    const auto no_gil = py::call_guard<py::gil_scoped_release>();
    m.def("count_tokens", &count, "topk_idx"_a, "idx_item_bytes"_a, "sizes"_a, "per_rank"_a,
          "per_expert"_a, no_gil);
    m.def("make_routes", &address, "topk_idx"_a, "idx_item_bytes"_a, "sizes"_a, "counts"_a,
          "source"_a, "routes"_a, no_gil);
    m.def("sum_parts", &sum_parts, "sizes"_a, "parts"_a, "rows"_a, "biases"_a, "out"_a, no_gil);
}

}  // namespace ep
