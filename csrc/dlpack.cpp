#include "dlpack.h"

#include <cstddef>
#include <utility>

namespace py = pybind11;

namespace ep {
namespace {

constexpr int32_t kOnCpu = 1;
constexpr char kName[] = "dltensor";  // a consumer renames the capsule and calls the deleter itself

struct DlDevice {
    int32_t type;
    int32_t id;
};

struct DlDataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct DlTensor {
    void* data;
    DlDevice device;
    int32_t ndim;
    DlDataType dtype;
    int64_t* shape;
    int64_t* strides;  // null: dense
    uint64_t byte_offset;
};

struct DlManagedTensor {
    DlTensor tensor;
    void* context;
    void (*deleter)(DlManagedTensor*);
};

struct Owned {
    DlManagedTensor managed;
    std::shared_ptr<void> owner;
    std::vector<int64_t> shape;
};

void destroy(PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, kName) == 0) return;
    auto* managed = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, kName));
    managed->deleter(managed);
}

}  // namespace

py::capsule dlpack_capsule(std::shared_ptr<void> owner,
                           void* data,
                           DlpackType type,
                           std::vector<int64_t> shape) {
    auto owned = std::make_unique<Owned>();
    owned->owner = std::move(owner);
    owned->shape = std::move(shape);
    owned->managed.tensor = {data,
                             {kOnCpu, 0},
                             static_cast<int32_t>(owned->shape.size()),
                             {type.code, type.bits, 1},
                             owned->shape.data(),
                             nullptr,
                             0};
    owned->managed.context = owned.get();
    owned->managed.deleter = [](DlManagedTensor* managed) {
        delete static_cast<Owned*>(managed->context);
    };
    PyObject* capsule = PyCapsule_New(&owned->managed, kName, destroy);
    if (capsule == nullptr) throw py::error_already_set();
    owned.release();
    return py::reinterpret_steal<py::capsule>(capsule);
}

}  // namespace ep
