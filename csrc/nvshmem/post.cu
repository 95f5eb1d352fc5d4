// What a rank posts in a call, to those of other nodes: between the two halves of notify
// (csrc/cuda/notify.cu), of which the first has laid the post out and the second waits for theirs.
// A warp per far rank; the signal follows the data of its own put, and nothing else is relied on.
#include "cuda/posts.cuh"
#include "nvshmem/network.cuh"

namespace ep::cuda {

extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)
    ep_notify_send_kernel(const __grid_constant__ NotifyArgs args) {
    const uint32_t epoch = next_epoch(args.state->epoch);
    Control& own = *args.control[args.rank];
    const int num_warps = static_cast<int>(gridDim.x) * kRowWarps;
    const int first = static_cast<int>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
#pragma unroll 1
    for (int peer = first; peer < args.num_ranks; peer += num_warps) {
        if (args.control[peer] != nullptr) continue;
        ep_put_signal(reinterpret_cast<char*>(&own.posts[epoch % 2][args.rank]),
                      reinterpret_cast<const char*>(&own.outgoing[epoch % 2]), num_post_bytes(args),
                      &own.far_posted[epoch % 2][args.rank], epoch, peer);
    }
}

}  // namespace ep::cuda
