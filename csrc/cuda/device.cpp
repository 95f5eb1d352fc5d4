#include "cuda/device.h"

#include <cuda_runtime.h>

#include <cstring>
#include <map>

#include "core/errors.h"
#include "cuda/cross.h"
#include "cuda/packed_protocol.h"

// The host's stubs of the kernels, which nvcc makes: what a launch names.
#define EP_KERNELS(X)                                 \
    X(ep_count_kernel, ScanArgs)                      \
    X(ep_route_kernel, ScanArgs)                      \
    X(ep_notify_kernel, NotifyArgs)                   \
    X(ep_arrive_kernel, ArriveArgs)                   \
    X(ep_dispatch_kernel, DispatchArgs)               \
    X(ep_dispatch_cast_bfloat16_kernel, DispatchArgs) \
    X(ep_dispatch_cast_float16_kernel, DispatchArgs)  \
    X(ep_dispatch_cast_float32_kernel, DispatchArgs)  \
    X(ep_stage_kernel, StageArgs)                     \
    X(ep_combine_bfloat16_kernel, CombineArgs)        \
    X(ep_combine_float16_kernel, CombineArgs)         \
    X(ep_combine_float32_kernel, CombineArgs)         \
    X(ep_combine_float64_kernel, CombineArgs)         \
    X(ep_cast_bfloat16_kernel, CastArgs)              \
    X(ep_cast_float16_kernel, CastArgs)               \
    X(ep_cast_float32_kernel, CastArgs)               \
    X(ep_expand_kernel, ExpandArgs)                   \
    X(ep_take_kernel, TakeArgs)                       \
    X(ep_reduce_bfloat16_kernel, ReduceArgs)          \
    X(ep_reduce_float16_kernel, ReduceArgs)           \
    X(ep_reduce_float32_kernel, ReduceArgs)           \
    X(ep_reduce_float64_kernel, ReduceArgs)           \
    X(ep_cross_lay_kernel, CrossLayArgs)              \
    X(ep_cross_weights_kernel, CrossWeightsArgs)      \
    X(ep_cross_wait_kernel, CrossWaitArgs)            \
    X(ep_cross_await_kernel, CrossAwaitArgs)          \
    X(ep_packed_begin_kernel, PackedArgs)             \
    X(ep_packed_push_kernel, PackedArgs)              \
    X(ep_packed_push_cast_kernel, PackedArgs)         \
    X(ep_packed_stage_kernel, PackedArgs)             \
    X(ep_packed_post_kernel, PackedArgs)              \
    X(ep_packed_meet_kernel, PackedArgs)              \
    X(ep_packed_take_kernel, PackedArgs)              \
    X(ep_packed_sum_kernel, PackedArgs)               \
    X(ep_packed_finish_kernel, PackedArgs)            \
    X(ep_packed_mask_kernel, PackedArgs)

namespace ep::cuda {

#define EP_DECLARE(name, Args) extern "C" void name(const Args);
EP_KERNELS(EP_DECLARE)

namespace {

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // else the next call would report it again
    fail("cuda: expected ", what, ", got ", cudaGetErrorString(error));
}

#define EP_ENTRY(name, Args) {#name, reinterpret_cast<const void*>(name)},
const std::map<std::string, const void*>& kernels() {
    static const std::map<std::string, const void*> all = {EP_KERNELS(EP_ENTRY)};
    return all;
}

const void* find_kernel(const std::string& name) {
    const auto found = kernels().find(name);
    if (found == kernels().end())
        throw std::invalid_argument(text("launch: expected one of the kernels, got ", name));
    return found->second;
}

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

}  // namespace

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const auto& [name, function] : kernels()) names.push_back(name);
    return names;
}

int count_devices() {
    int count = 0;
    check(cudaGetDeviceCount(&count), "a CUDA driver and a GPU");
    return count;
}

Device::Device(int ordinal) : ordinal_(ordinal) {
    const int count = count_devices();
    if (ordinal < 0 || ordinal >= count)
        throw std::invalid_argument(
            text("cuda: expected a device from 0 to ", count - 1, ", got ", ordinal));
    use();
    check(cudaDeviceGetAttribute(&num_sms_, cudaDevAttrMultiProcessorCount, ordinal),
          "the number of SMs");
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal),
          "the compute capability");
    if (major != 9 && major != 10)
        fail("cuda: expected a GPU of compute capability 9.0 or 10.0, got ", major, ".x");
}

void Device::use() const { check(cudaSetDevice(ordinal_), "to use the GPU"); }

uintptr_t Device::allocate(size_t num_bytes, bool is_zeroed) {
    use();
    void* memory = nullptr;
    check(cudaMalloc(&memory, num_bytes), "room for a buffer on the GPU");
    if (is_zeroed) {
        check(cudaMemset(memory, 0, num_bytes), "to clear a buffer");
        check(cudaDeviceSynchronize(), "to clear a buffer");
    }
    return reinterpret_cast<uintptr_t>(memory);
}

void Device::free(uintptr_t address) {
    use();
    check(cudaFree(pointer(address)), "to free a buffer");
}

std::string Device::export_memory(uintptr_t address) {
    use();
    cudaIpcMemHandle_t handle;
    check(cudaIpcGetMemHandle(&handle, pointer(address)), "a handle of GPU memory");
    return std::string(reinterpret_cast<const char*>(&handle), sizeof handle);
}

uintptr_t Device::open_memory(const std::string& bytes) {
    use();
    cudaIpcMemHandle_t handle;
    if (bytes.size() != sizeof handle)
        throw std::invalid_argument(
            text("cuda: expected a handle of ", sizeof handle, " bytes, got ", bytes.size()));
    std::memcpy(&handle, bytes.data(), sizeof handle);
    void* memory = nullptr;
    check(cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess),
          "a peer's memory within reach over NVLink");
    return reinterpret_cast<uintptr_t>(memory);
}

void Device::close_memory(uintptr_t address) {
    use();
    check(cudaIpcCloseMemHandle(pointer(address)), "to let go of a peer's memory");
}

std::pair<uintptr_t, uintptr_t> Device::allocate_host(size_t num_bytes) {
    use();
    void *host = nullptr, *device = nullptr;
    check(cudaHostAlloc(&host, num_bytes, cudaHostAllocMapped), "mapped host memory");
    std::memset(host, 0, num_bytes);
    check(cudaHostGetDevicePointer(&device, host, 0), "the GPU's address of host memory");
    return {reinterpret_cast<uintptr_t>(host), reinterpret_cast<uintptr_t>(device)};
}

void Device::free_host(uintptr_t address) {
    use();
    check(cudaFreeHost(pointer(address)), "to free host memory");
}

void Device::launch(const Launch& launch, uintptr_t stream) {
    use();
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(launch.grid);
    config.blockDim = dim3(launch.block);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = static_cast<cudaStream_t>(pointer(stream));
    std::string params = launch.params;
    void* arguments[] = {params.data()};
    check(cudaLaunchKernelExC(&config, find_kernel(launch.kernel), arguments),
          launch.kernel.c_str());
}

void Device::synchronize(uintptr_t stream) {
    use();
    check(cudaStreamSynchronize(static_cast<cudaStream_t>(pointer(stream))),
          "the kernels to finish");
}

uint64_t Device::graph_id(uintptr_t stream) const {
    use();
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(pointer(stream)), &status, &id),
          "to know of the capture");
    return status == cudaStreamCaptureStatusNone ? 0 : id;
}

}  // namespace ep::cuda
