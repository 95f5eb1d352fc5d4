// Waiting for rows of other nodes: one block, a thread per rank. Nobody on the host waits for this
// kernel, so when rows do not come it says whose, and traps: what reads them must not go on.
#include "cuda/cross.h"
#include "cuda/ptx.cuh"

namespace ep::cuda {

extern "C" __global__ void __launch_bounds__(kArriveThreads)
    ep_cross_wait_kernel(const __grid_constant__ CrossWaitArgs args) {
    const int rank = threadIdx.x;
    bool is_there = true;
    if (rank < args.num_ranks && args.expected[rank] != 0)
        is_there = wait_for_signal(&args.signals[rank], args.expected[rank], args.timeout_ns);
    if (__syncthreads_and(is_there)) return;
    if (rank < args.num_ranks) args.error->seen[rank] = is_there ? args.epoch : args.epoch - 1;
    __syncthreads();
    if (rank == 0) {
        store_release_system(&args.error->epoch, args.epoch);
        trap();
    }
}

}  // namespace ep::cuda
