#pragma once
// NVSHMEM: memory of one size on every rank, and puts with a signal over the network. A process is
// in one world of ranks at most, for as long as it lives; that is NVSHMEM's state, not ours.
//
// NVSHMEM ends the process where something is missing that it needs, so every function first makes
// sure that it is there. Throws std::invalid_argument for arguments, std::runtime_error for the
// rest, with NVSHMEM's or CUDA's reason.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace ep::nvshmem {

constexpr size_t kUniqueIdBytes = 128;
constexpr size_t kPutAlignment = 16;

struct World {
    std::string unique_id;
    int rank;
    int num_ranks;
};

/// "3.4.5": of the library that is loaded.
std::string version();

/// What names a world; made by one of its ranks. Needs no GPU.
std::string unique_id();

/// Enter a world with the GPU `device`. Collective over its ranks. Entering the same world again
/// as the same rank does nothing.
void join(const std::string& unique_id, int rank, int num_ranks, int device);

/// The world this process is in.
std::optional<World> world();

/// Zeroed memory, the same size on all ranks. Collective. It stays until the process ends: giving
/// it back would be collective too.
uintptr_t allocate(size_t num_bytes);

/// Where kernels of this rank reach a peer's memory of the same allocation; 0 if they do not.
uintptr_t peer_address(uintptr_t address, int peer);

/// Launch a kernel of send.cu or post.cu.
void launch(
    const std::string& kernel, unsigned grid, unsigned block, std::string params, uintptr_t stream);

/// Copy to a peer's memory of the same allocation, then write its signal; see `Network` in
/// ep_megatron/backends/network.py. Behind earlier work of `stream`.
void put_signal(int peer,
                uintptr_t source,
                uintptr_t target,
                size_t num_bytes,
                uintptr_t signal,
                uint64_t value,
                uintptr_t stream);

}  // namespace ep::nvshmem
