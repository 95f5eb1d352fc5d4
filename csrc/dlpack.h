#pragma once
// Memory handed to Python as a DLPack capsule, which torch.from_dlpack takes without a copy. The
// layout is DLPack's (github.com/dmlc/dlpack, version 0.8), which libraries may rely on.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace ep {

/// DLPack's class of a dtype and its bits: (4, 16) for bfloat16.
struct DlpackType {
    uint8_t code;
    uint8_t bits;
};

/// A dense tensor of `shape` at `data`. `owner` lives as long as the capsule, or as the tensor that
/// is made of it, which may be dropped on any thread.
pybind11::capsule dlpack_capsule(std::shared_ptr<void> owner,
                                 void* data,
                                 DlpackType type,
                                 std::vector<int64_t> shape);

}  // namespace ep
