#include "cuda/bind_packed.h"
#include "cuda/cross.h"
#include "cuda/fields.h"

namespace ep::cuda {

void bind_cross(py::module_& m) {
    Fields<CrossLayArgs>(m, "CrossLayArgs")
        .add("by_node", &CrossLayArgs::by_node)
        .add("routes", &CrossLayArgs::routes)
        .add("topk_idx", &CrossLayArgs::topk_idx)
        .add("weights", &CrossLayArgs::weights)
        .add("num_tokens", &CrossLayArgs::num_tokens)
        .add("num_topk", &CrossLayArgs::num_topk)
        .add("num_nodes", &CrossLayArgs::num_nodes)
        .add("node", &CrossLayArgs::node)
        .add("is_int64", &CrossLayArgs::is_int64)
        .add("weight_bytes", &CrossLayArgs::weight_bytes)
        .add("experts_per_rank", &CrossLayArgs::experts_per_rank)
        .add("to_routes", &CrossLayArgs::to_routes)
        .add("to_idx", &CrossLayArgs::to_idx)
        .add("to_weights", &CrossLayArgs::to_weights)
        .add("num_to", &CrossLayArgs::num_to)
        .add("node_of", &CrossLayArgs::node_of)
        .add("index_of", &CrossLayArgs::index_of);
    Fields<CrossWeightsArgs>(m, "CrossWeightsArgs")
        .add("by_node", &CrossWeightsArgs::by_node)
        .add("out", &CrossWeightsArgs::out)
        .add("num_tokens", &CrossWeightsArgs::num_tokens)
        .add("num_topk", &CrossWeightsArgs::num_topk)
        .add("num_nodes", &CrossWeightsArgs::num_nodes)
        .add("weight_bytes", &CrossWeightsArgs::weight_bytes)
        .add("expand", &CrossWeightsArgs::expand)
        .add("from_weights", &CrossWeightsArgs::from_weights);
    Fields<CrossWaitArgs>(m, "CrossWaitArgs")
        .add("signals", &CrossWaitArgs::signals)
        .add("expected", &CrossWaitArgs::expected)
        .add("num_ranks", &CrossWaitArgs::num_ranks)
        .add("epoch", &CrossWaitArgs::epoch)
        .add("timeout_ns", &CrossWaitArgs::timeout_ns)
        .add("error", &CrossWaitArgs::error);
    Fields<CrossPutArgs>(m, "CrossPutArgs")
        .add("state", &CrossPutArgs::state)
        .add("piles", &CrossPutArgs::piles)
        .add("outbox", &CrossPutArgs::outbox)
        .add("inbox", &CrossPutArgs::inbox)
        .add("signals", &CrossPutArgs::signals)
        .add("starts", &CrossPutArgs::starts)
        .add("place_bytes", &CrossPutArgs::place_bytes)
        .add("rank", &CrossPutArgs::rank)
        .add("num_ranks", &CrossPutArgs::num_ranks);
    Fields<CrossAwaitArgs>(m, "CrossAwaitArgs")
        .add("state", &CrossAwaitArgs::state)
        .add("piles", &CrossAwaitArgs::piles)
        .add("signals", &CrossAwaitArgs::signals)
        .add("parts", &CrossAwaitArgs::parts)
        .add("source", &CrossAwaitArgs::source)
        .add("num_ranks", &CrossAwaitArgs::num_ranks)
        .add("timeout_ns", &CrossAwaitArgs::timeout_ns)
        .add("error", &CrossAwaitArgs::error);
    m.attr("NUM_CROSS_PARTS") = static_cast<int>(kNumCrossParts);
    m.attr("CROSS_ROUTES") = static_cast<int>(kCrossRoutes);
    m.attr("CROSS_PLAN_BYTES") = sizeof(CrossPlan);
    m.attr("CROSS_PILE_BYTES") = sizeof(CrossPile);
    m.attr("CROSS_CAME_AT") = offsetof(CrossPlan, came);
    m.attr("CROSS_NODE_STARTS_AT") = offsetof(CrossPlan, node_starts);
    m.attr("PILE_ALIGNMENT") = kPileAlignment;
    m.def("plan_cross_put", &plan_cross_put, py::arg("args"));
    m.def("plan_cross_await", &plan_cross_await, py::arg("args"));
    m.def("plan_cross_lay", &plan_cross_lay, py::arg("args"), py::arg("num_sms"));
    m.def("plan_cross_weights", &plan_cross_weights, py::arg("args"), py::arg("num_sms"));
    m.def("plan_cross_wait", &plan_cross_wait, py::arg("args"));
}

}  // namespace ep::cuda
