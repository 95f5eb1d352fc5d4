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
    m.def("plan_cross_lay", &plan_cross_lay, py::arg("args"), py::arg("num_sms"));
    m.def("plan_cross_weights", &plan_cross_weights, py::arg("args"), py::arg("num_sms"));
    m.def("plan_cross_wait", &plan_cross_wait, py::arg("args"));
}

}  // namespace ep::cuda
