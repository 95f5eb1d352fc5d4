#pragma once
// What posts are: for the kernels that write them, and the one that has cards put them.
#include "cuda/protocol.h"

namespace ep::cuda {

/// Numbers come round from the largest to 2: two calls in a row are never both odd, or both even.
__device__ __forceinline__ uint32_t next_epoch(uint32_t epoch) {
    return epoch == 0xffffffffu ? 2 : epoch + 1;
}

/// Bytes of a post that travel, a multiple of 16.
__device__ __forceinline__ int num_post_bytes(const NotifyArgs& args) {
    const int num_bytes = args.has_counts
                              ? static_cast<int>(offsetof(Post, per_expert)) + args.num_experts * 4
                              : static_cast<int>(sizeof(PostHead));
    return (num_bytes + 15) / 16 * 16;
}

}  // namespace ep::cuda
