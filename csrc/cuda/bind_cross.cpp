#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "cuda/bind_packed.h"
#include "cuda/cross.h"
#include "cuda/fields.h"

namespace ep::cuda {

void bind_cross(py::module_& m) {
    Fields<CrossWaitArgs> args(m, "CrossWaitArgs");
    args.add("signals", &CrossWaitArgs::signals)
        .add("num_ranks", &CrossWaitArgs::num_ranks)
        .add("epoch", &CrossWaitArgs::epoch)
        .add("timeout_ns", &CrossWaitArgs::timeout_ns)
        .add("error", &CrossWaitArgs::error);
    args.python_class().def_property(
        "expected",
        [](const CrossWaitArgs& self) {
            return std::vector<uint32_t>(std::begin(self.expected), std::end(self.expected));
        },
        [](CrossWaitArgs& self, const std::vector<uint32_t>& expected) {
            if (expected.size() > kMaxRanks)
                throw std::invalid_argument(text("expected: expected at most ", kMaxRanks,
                                                 " numbers, got ", expected.size()));
            std::copy(expected.begin(), expected.end(), self.expected);
        });
    m.def("plan_cross_wait", &plan_cross_wait, py::arg("args"));
}

}  // namespace ep::cuda
