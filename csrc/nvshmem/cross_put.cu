// What crosses in a call that no host waits for: behind the kernels that laid it out, in front of
// those that wait for what others put (csrc/cuda/cross.cu). How much it is, notify has found on the
// device. A warp per part of a pile; the signal follows the data of its own put, and nothing else
// is relied on.
#include "cuda/cross.h"
#include "nvshmem/network.cuh"

namespace ep::cuda {

extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)
    ep_cross_put_kernel(const __grid_constant__ CrossPutArgs args) {
    if (args.state->is_agreed == 0) return;
    const int num_warps = static_cast<int>(gridDim.x) * kRowWarps;
    const int first = static_cast<int>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
#pragma unroll 1
    for (int i = first; i < kNumCrossParts * args.num_ranks; i += num_warps) {
        const int part = i / args.num_ranks;
        const int peer = (args.rank + 1 + i % args.num_ranks) % args.num_ranks;
        const CrossPile pile = args.piles[peer];
        const int64_t place_bytes = args.place_bytes[part];
        if (pile.count == 0 || place_bytes == 0) continue;
        ep_put_signal(args.inbox + args.starts[part] + pile.there * place_bytes,
                      args.outbox + args.starts[part] + pile.start * place_bytes,
                      (pile.count * place_bytes + 15) / 16 * 16,
                      &args.signals[part * args.num_ranks + args.rank], args.state->epoch, peer);
    }
}

}  // namespace ep::cuda
