// From a block of fixed size, where peers have put rows, to the caller's tensors: so the block can
// be used again by the next call, and the same launches by a graph. A row that has crossed once for
// several experts is read once and goes to all of its places. Launched behind ep_arrive_kernel.
#include "cuda/links.cuh"
#include "cuda/push.cuh"

namespace ep::cuda {
namespace {

/// Copy the first `num_there` bytes, and fill the rest; both a multiple of 4.
__device__ __forceinline__ void copy_and_fill(
    const char* from, char* to, int64_t num_there, int64_t num_bytes, uint32_t fill) {
    const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
#pragma unroll 1
    for (int64_t at = thread * 4; at < num_bytes; at += num_threads * 4)
        *reinterpret_cast<uint32_t*>(to + at) =
            at < num_there ? *reinterpret_cast<const uint32_t*>(from + at) : fill;
}

/// Lane k of a warp: the k-th place of what lies in `row`, or -1. Nothing lies in a row behind a
/// head: what belongs there comes with the head.
__device__ __forceinline__ int64_t place_of_lane(const TakeArgs& args, int64_t row) {
    const int64_t alone = threadIdx.x % kWarpSize == 0 ? row : -1;
    if (args.links == nullptr) return alone;
    const int head = args.links[row].head;
    if (head < 0) return alone;  // padding
    return head == row ? row_of_token(args.links, row) : -1;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)
    ep_take_kernel(const __grid_constant__ TakeArgs args) {
    const int64_t num_rows = args.state->is_agreed == 0 ? 0 : *args.num_rows;
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    for (int64_t row = warp; row < num_rows; row += num_warps) {
        const int64_t place = place_of_lane(args, row);
        if (__ballot_sync(kAllLanes, place >= 0) == 0) continue;
        push_row(args.from_x + row * args.row_bytes,
                 place < 0 ? nullptr : args.x + place * args.row_bytes, args.row_bytes);
        if (args.scale_bytes != 0)
            push_words(args.from_scales + row * args.scale_bytes,
                       place < 0 ? nullptr : args.scales + place * args.scale_bytes,
                       args.scale_bytes);
    }
    copy_and_fill(args.from_weights, args.weights, num_rows * args.weight_bytes,
                  args.capacity * args.weight_bytes, 0);
    copy_and_fill(args.from_idx, args.idx, num_rows * args.idx_bytes,
                  args.capacity * args.idx_bytes, 0xffffffffu);
    const int64_t link_bytes = args.links == nullptr ? 0 : sizeof(RowLink);
    copy_and_fill(reinterpret_cast<const char*>(args.links), reinterpret_cast<char*>(args.to_links),
                  num_rows * link_bytes, args.capacity * link_bytes, kNoRow);
}

}  // namespace ep::cuda
