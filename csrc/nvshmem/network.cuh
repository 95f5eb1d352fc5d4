#pragma once
// The network as kernels see it. Addresses are those of this rank's symmetric memory; a target or
// signal stands for the peer's memory of the same allocation. Defined in network.cu; kernels that
// call these are compiled as relocatable device code, so their PTX holds the calls and nothing of
// NVSHMEM.
#include <cstdint>

extern "C" {

/// Copy to a peer, and behind it write its signal. Returns at once; the source must not change
/// until the peer has seen the signal. What all lanes of the warp wrote before is in the copy. All
/// lanes take part.
/// @param num_bytes  a multiple of 16; addresses are, too.
__device__ void ep_put_signal(char* target,
                              const char* source,
                              uint64_t num_bytes,
                              uint64_t* signal,
                              uint64_t value,
                              int peer);

/// Write a peer's signal. What this thread has done, or seen done by earlier kernels, is done for
/// whoever sees it. In no order with other puts and signals.
__device__ void ep_signal(uint64_t* signal, uint64_t value, int peer);

}  // extern "C"
