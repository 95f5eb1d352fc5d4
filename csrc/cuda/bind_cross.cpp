#include "cuda/bind_packed.h"
#include "cuda/cross.h"
#include "cuda/fields.h"

namespace ep::cuda {

void bind_cross(py::module_& m) {
    Fields<CrossWaitArgs>(m, "CrossWaitArgs")
        .add("signals", &CrossWaitArgs::signals)
        .add("expected", &CrossWaitArgs::expected)
        .add("num_ranks", &CrossWaitArgs::num_ranks)
        .add("epoch", &CrossWaitArgs::epoch)
        .add("timeout_ns", &CrossWaitArgs::timeout_ns)
        .add("error", &CrossWaitArgs::error);
    m.def("plan_cross_wait", &plan_cross_wait, py::arg("args"));
}

}  // namespace ep::cuda
