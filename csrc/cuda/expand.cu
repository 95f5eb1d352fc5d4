// Rows that have crossed once, to all of their places on this rank: each first row of a token is
// read once and copied to those behind it. Launched after ep_arrive_kernel: all rows are there.
// Weights have come to every row by themselves, and padding has been cleared by this rank.
#include "cuda/links.cuh"
#include "cuda/push.cuh"

namespace ep::cuda {

extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)
    ep_expand_kernel(const __grid_constant__ ExpandArgs args) {
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    for (int64_t row = warp; row < args.num_rows; row += num_warps) {
        const RowLink link = args.links[row];
        if (link.head != row || link.next < 0) continue;
        const int64_t copy = row_of_token(args.links, row);
        const bool is_target = copy >= 0 && copy != row;
        push_row(args.x + row * args.row_bytes,
                 is_target ? args.x + copy * args.row_bytes : nullptr, args.row_bytes);
        if (args.scale_bytes != 0)
            push_words(args.scales + row * args.scale_bytes,
                       is_target ? args.scales + copy * args.scale_bytes : nullptr,
                       args.scale_bytes);
    }
}

}  // namespace ep::cuda
