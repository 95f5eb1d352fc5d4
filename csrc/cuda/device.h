#pragma once
// One GPU: its memory, the memory of its peers, and launches. Needs a driver only when called:
// loading the library does not. Throws std::runtime_error with CUDA's reason.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace ep::cuda {

/// GPUs this process sees; throws where there is no driver.
int count_devices();

/// What can be launched.
std::vector<std::string> kernel_names();

class Device {
 public:
    explicit Device(int ordinal);

    int num_sms() const { return num_sms_; }

    /// Memory of this GPU, aligned to 256 bytes.
    uintptr_t allocate(size_t num_bytes, bool is_zeroed);
    void free(uintptr_t address);

    /// What another process of this host needs to reach memory of allocate().
    std::string export_memory(uintptr_t address);
    /// Map what another process exported. Fails where the GPUs are not linked.
    uintptr_t open_memory(const std::string& handle);
    void close_memory(uintptr_t address);

    /// Zeroed host memory that kernels reach: its address here and theirs.
    std::pair<uintptr_t, uintptr_t> allocate_host(size_t num_bytes);
    void free_host(uintptr_t address);

    void launch(const Launch& launch, uintptr_t stream);
    void synchronize(uintptr_t stream);
    /// A number of the graph that a stream is captured into; 0 for none.
    uint64_t graph_id(uintptr_t stream) const;

 private:
    void use() const;

    const int ordinal_;
    int num_sms_ = 0;
};

}  // namespace ep::cuda
