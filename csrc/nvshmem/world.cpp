#include "nvshmem/world.h"

#include <cuda_runtime.h>
#include <nvshmem_host.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "core/errors.h"
#include "cuda/cross.h"
#include "cuda/packed_protocol.h"

// The host's stubs of the kernels in send.cu, post.cu and cross_put.cu, which nvcc makes.
namespace ep::cuda {
extern "C" void ep_packed_send_kernel(const PackedArgs);
extern "C" void ep_packed_tell_kernel(const PackedArgs);
extern "C" void ep_notify_send_kernel(const NotifyArgs);
extern "C" void ep_cross_put_kernel(const CrossPutArgs);
}  // namespace ep::cuda

namespace ep::nvshmem {
namespace {

struct Kernel {
    const char* name;
    const void* function;
    size_t num_bytes;  // of its parameters
};

const Kernel kKernels[] = {
    {"ep_packed_send_kernel", reinterpret_cast<const void*>(cuda::ep_packed_send_kernel),
     sizeof(cuda::PackedArgs)},
    {"ep_packed_tell_kernel", reinterpret_cast<const void*>(cuda::ep_packed_tell_kernel),
     sizeof(cuda::PackedArgs)},
    {"ep_notify_send_kernel", reinterpret_cast<const void*>(cuda::ep_notify_send_kernel),
     sizeof(cuda::NotifyArgs)},
    {"ep_cross_put_kernel", reinterpret_cast<const void*>(cuda::ep_cross_put_kernel),
     sizeof(cuda::CrossPutArgs)},
};

static_assert(sizeof(nvshmemx_uniqueid_t) == kUniqueIdBytes);

/// NVSHMEM's state, as far as it does not say it itself.
struct Joined {
    World world;
    int device;
};

std::optional<Joined>& current() {
    static std::optional<Joined> joined;
    return joined;
}

const char* name_of(int status) {
    switch (status) {
        case NVSHMEMX_ERROR_INVALID_VALUE:
            return "invalid value";
        case NVSHMEMX_ERROR_OUT_OF_MEMORY:
            return "out of memory";
        case NVSHMEMX_ERROR_NOT_SUPPORTED:
            return "not supported";
        case NVSHMEMX_ERROR_SYMMETRY:
            return "ranks that are not symmetric";
        case NVSHMEMX_ERROR_GPU_NOT_SELECTED:
            return "no GPU selected";
        case NVSHMEMX_ERROR_COLLECTIVE_LAUNCH_FAILED:
            return "a collective launch that failed";
        case NVSHMEMX_ERROR_INTERNAL:
            return "an error inside NVSHMEM; what it printed says more";
        default:
            return "an error that has no name";
    }
}

void check(int status, const char* operation, const char* what) {
    if (status != NVSHMEMX_SUCCESS)
        fail("nvshmem ", operation, ": expected ", what, ", got ", name_of(status), " (status ",
             status, "); NVSHMEM_DEBUG=INFO tells more");
}

void check(cudaError_t error, const char* operation, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // else the next call would report it again
    fail("nvshmem ", operation, ": expected ", what, ", got ", cudaGetErrorString(error));
}

void require(bool is_met,
             const char* operation,
             const char* what,
             const std::string& expected,
             const std::string& actual) {
    if (!is_met)
        throw std::invalid_argument(text("nvshmem ", operation, ": expected ", what, " to be ",
                                         expected, ", got ", actual));
}

void require_aligned(const char* operation, const char* what, uintptr_t value, size_t alignment) {
    require(value != 0 && value % alignment == 0, operation, what,
            text("a multiple of ", alignment, " above 0"), text(value));
}

/// The world this process is in; its GPU is the calling thread's current one from here on.
const World& joined(const char* operation) {
    if (!current()) fail("nvshmem ", operation, ": expected a world, got none; call join first");
    check(cudaSetDevice(current()->device), operation, "to use the GPU");
    return current()->world;
}

}  // namespace

std::string version() {
    int major = 0, minor = 0, patch = 0;
    nvshmemx_vendor_get_version_info(&major, &minor, &patch);
    return text(major, ".", minor, ".", patch);
}

std::string unique_id() {
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    check(nvshmemx_get_uniqueid(&id), "unique_id", "an address that other ranks reach");
    return std::string(reinterpret_cast<const char*>(&id), sizeof id);
}

void join(const std::string& unique_id, int rank, int num_ranks, int device) {
    constexpr const char* kJoin = "join";
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    const int known = id.version;
    require(unique_id.size() == sizeof id, kJoin, "the unique id", text(sizeof id, " bytes"),
            text(unique_id.size()));
    std::memcpy(&id, unique_id.data(), sizeof id);
    require(id.version == known, kJoin, "the unique id", text("of version ", known),
            text(id.version));
    require(num_ranks >= 1, kJoin, "the number of ranks", "at least 1", text(num_ranks));
    require(rank >= 0 && rank < num_ranks, kJoin, "rank", text("from 0 to ", num_ranks - 1),
            text(rank));
    if (current()) {
        const World& world = current()->world;
        const bool is_same = world.unique_id == unique_id && world.rank == rank;
        if (is_same && world.num_ranks == num_ranks) return;
        fail("nvshmem join: expected the world this process is in, as rank ", world.rank, " of ",
             world.num_ranks, ", got another; a process can be in one only");
    }
    int count = 0;
    check(cudaGetDeviceCount(&count), kJoin, "a CUDA driver and a GPU");
    require(device >= 0 && device < count, kJoin, "the device", text("from 0 to ", count - 1),
            text(device));
    check(cudaSetDevice(device), kJoin, "to use the GPU");
    check(cudaFree(nullptr), kJoin, "a context on the GPU");
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    check(nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &id, &attributes), kJoin, "a unique id");
    // What nvshmemx_init_attr calls, which would end the process where this returns a status. It
    // also readies this library's kernels.
    int provided = 0;
    const nvshmemi_version_t headers = {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION,
                                        NVSHMEM_VENDOR_PATCH_VERSION};
    check(nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, NVSHMEMX_INIT_WITH_UNIQUEID,
                               &attributes, headers),
          kJoin, "all ranks to meet");
    // Without a GPU that it can use, NVSHMEM only connects the hosts, and ends the process later.
    if (nvshmemx_init_status() < NVSHMEM_STATUS_IS_INITIALIZED)
        fail("nvshmem join: expected every GPU to be within reach, got status ",
             nvshmemx_init_status(), "; NVSHMEM_DEBUG=INFO tells more");
    current() = Joined{{unique_id, rank, num_ranks}, device};
}

std::optional<World> world() {
    if (!current()) return std::nullopt;
    return current()->world;
}

uintptr_t allocate(size_t num_bytes) {
    joined("allocate");
    require(num_bytes > 0, "allocate", "the bytes", "above 0", text(num_bytes));
    void* memory = nvshmem_calloc(1, num_bytes);
    if (memory == nullptr)
        fail("nvshmem allocate: expected room for ", num_bytes,
             " bytes on every rank, got none; raise NVSHMEM_SYMMETRIC_SIZE");
    return reinterpret_cast<uintptr_t>(memory);
}

uintptr_t peer_address(uintptr_t address, int peer) {
    const World& world = joined("peer_address");
    require(peer >= 0 && peer < world.num_ranks, "peer_address", "the peer",
            text("from 0 to ", world.num_ranks - 1), text(peer));
    return reinterpret_cast<uintptr_t>(nvshmem_ptr(reinterpret_cast<const void*>(address), peer));
}

void launch(const std::string& kernel,
            unsigned grid,
            unsigned block,
            std::string params,
            uintptr_t stream) {
    joined("launch");
    const auto* found = std::find_if(std::begin(kKernels), std::end(kKernels),
                                     [&](const Kernel& one) { return kernel == one.name; });
    require(found != std::end(kKernels), "launch", "the kernel", "one of those that put", kernel);
    require(params.size() == found->num_bytes, "launch", "the parameters",
            text(found->num_bytes, " bytes"), text(params.size()));
    void* arguments[] = {params.data()};
    check(cudaLaunchKernel(found->function, dim3(grid), dim3(block), arguments, 0,
                           reinterpret_cast<cudaStream_t>(stream)),
          "launch", kernel.c_str());
}

void put_signal(int peer,
                uintptr_t source,
                uintptr_t target,
                size_t num_bytes,
                uintptr_t signal,
                uint64_t value,
                uintptr_t stream) {
    constexpr const char* kPut = "put_signal";
    const World& world = joined(kPut);
    require(peer >= 0 && peer < world.num_ranks, kPut, "the peer",
            text("from 0 to ", world.num_ranks - 1), text(peer));
    require_aligned(kPut, "the source", source, kPutAlignment);
    require_aligned(kPut, "the target", target, kPutAlignment);
    require_aligned(kPut, "the bytes", num_bytes, kPutAlignment);
    require_aligned(kPut, "the signal", signal, sizeof(uint64_t));
    nvshmemx_putmem_signal_nbi_on_stream(
        reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), num_bytes,
        reinterpret_cast<uint64_t*>(signal), value, NVSHMEM_SIGNAL_SET, peer,
        reinterpret_cast<cudaStream_t>(stream));
    check(cudaGetLastError(), kPut, "the put to be launched");
}

}  // namespace ep::nvshmem
