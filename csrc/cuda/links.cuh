#pragma once
// The rows of one token on one rank, expert-major: see RowLink in protocol.h.
#include "cuda/protocol.h"

namespace ep::cuda {

/// Lane k of a warp: the k-th row of the token that `head` is the first row of, or -1.
__device__ __forceinline__ int row_of_token(const RowLink* links, int64_t head) {
    const int lane = threadIdx.x % kWarpSize;
    int row = static_cast<int>(head), mine = -1;
    for (int k = 0; row >= 0; ++k) {
        if (lane == k) mine = row;
        row = links[row].next;
    }
    return mine;
}

}  // namespace ep::cuda
