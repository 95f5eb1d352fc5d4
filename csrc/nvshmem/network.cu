#include <nvshmem.h>
#include <nvshmemx.h>

#include "nvshmem/network.cuh"

extern "C" {

__device__ void ep_put_signal(char* target,
                              const char* source,
                              uint64_t num_bytes,
                              uint64_t* signal,
                              uint64_t value,
                              int peer) {
    nvshmemx_putmem_signal_nbi_warp(target, source, num_bytes, signal, value, NVSHMEM_SIGNAL_SET,
                                    peer);
}

__device__ void ep_signal(uint64_t* signal, uint64_t value, int peer) {
    __threadfence_system();
    nvshmemx_signal_op(signal, value, NVSHMEM_SIGNAL_SET, peer);
}

}  // extern "C"
