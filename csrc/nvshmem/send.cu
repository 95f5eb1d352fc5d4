// What low-latency calls bring to far ranks: puts and signals, behind the kernels that laid out
// what is to be put (csrc/cuda/low_latency*.cu). Nothing here waits.
//
// A warp per (far rank, expert) puts its rows in one piece, a warp per far rank its post. Each put
// has a signal of its own, and the receiver waits for all that the post announces, so nothing is
// relied on but that a signal follows the data of its own put. A masked rank gets nothing; what was
// on its way there before stays as it was, since nobody else's rows are laid into its places: a
// wait for the network could be one for a machine that is gone.
#include "cuda/packed_protocol.h"
#include "cuda/packed_slots.cuh"
#include "nvshmem/network.cuh"

namespace ep::cuda {
namespace {

/// Rows for expert `number` (dispatch), or of one of this rank's experts for the rank that has that
/// number among others' experts (combine): both are rank `number / L`'s.
__device__ __forceinline__ void send_rows(const PackedArgs& args, int number) {
    const int experts_per_rank = args.num_experts / args.num_ranks;
    const int peer = number / experts_per_rank, local = number % experts_per_rank;
    if (!is_far(args, peer) || args.state->masked[peer] != 0) return;
    const uint64_t call = number_of(args);
    uint64_t* signals = args.control[args.rank]->rows[call % 2];
    char *window = args.window[args.rank], *outbox = outbox_of(args, peer);
    char *source, *target;
    int64_t num_bytes;
    if (args.operation == kPackedDispatch) {
        const int count = min(count_of(args, number), args.max_tokens);
        const int pair = local * args.num_ranks + args.rank;
        const int64_t tag_bytes = (static_cast<int64_t>(count) * 4 + 15) / 16 * 16;
        source = block_at(args, outbox, local) - tag_bytes;
        target = block_at(args, window + place_at(args, args.slots), pair) - tag_bytes;
        num_bytes = count == 0 ? 0 : tag_bytes + static_cast<int64_t>(count) * args.slot_bytes;
        signals += pair;
    } else {
        const int64_t range = args.layout_range[local * args.num_ranks + peer];
        const int64_t row_bytes = args.hidden * 2, block_bytes = args.max_tokens * row_bytes;
        const int64_t expert = args.rank * experts_per_rank + local;
        source = outbox + local * block_bytes;
        target = window + place_at(args, args.inbox) + expert * block_bytes;
        num_bytes = is_inside(args, range) ? (range & 0xffffffff) * row_bytes : 0;  // post says so
        signals += expert;
    }
    if (num_bytes != 0) ep_put_signal(target, source, num_bytes, signals, call, peer);
}

__device__ __forceinline__ void send_post(const PackedArgs& args, int peer) {
    if (!is_far(args, peer) || args.state->masked[peer] != 0) return;
    PackedControl& control = *args.control[args.rank];
    const uint64_t number = number_of(args), parity = number % 2;
    const int experts_per_rank = args.num_experts / args.num_ranks;
    const uint64_t num_bytes = sizeof(PackedHead) + (experts_per_rank * 8 + 15) / 16 * 16;
    ep_put_signal(reinterpret_cast<char*>(&control.posts[parity][args.rank]),
                  reinterpret_cast<const char*>(&control.outgoing[parity][peer]), num_bytes,
                  &control.sent[parity][args.rank], number, peer);
}

}  // namespace

/// Behind post, which has laid out the posts of this call, and push or stage.
extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)
    ep_packed_send_kernel(const __grid_constant__ PackedArgs args) {
    if (args.state->broken != 0) return;
    const int num_warps = static_cast<int>(gridDim.x) * kRowWarps;
    const int first = static_cast<int>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    const int num_rows = args.operation == kPackedNothing ? 0 : args.num_experts;
#pragma unroll 1
    for (int i = first; i < num_rows + args.num_ranks; i += num_warps) {
        if (i < num_rows)
            send_rows(args, i);
        else
            send_post(args, i - num_rows);
    }
}

/// Behind finish: this rank is done with a call. Behind either this or mask: who is masked; and
/// to a rank that is taken back, which calls are done that it was not told of. A thread per rank.
extern "C" __global__ void __launch_bounds__(kMaskThreads)
    ep_packed_tell_kernel(const __grid_constant__ PackedArgs args) {
    const int peer = threadIdx.x;
    if (peer >= args.num_ranks || !is_far(args, peer)) return;
    PackedControl& control = *args.control[args.rank];
    PackedState& state = *args.state;
    const uint32_t masked = state.masked[peer];
    const bool is_news = masked != state.told[peer];
    if (is_news) {
        state.told[peer] = masked;
        ep_signal(&control.masked_by[args.rank], masked, peer);
    }
    if (masked != 0) return;
#pragma unroll 1
    for (uint32_t parity = 0; parity < 2; ++parity) {
        const uint64_t finished = state.finished[parity];
        if (is_news || (args.call >= 0 && finished == number_of(args)))
            ep_signal(&control.done[parity][args.rank], finished, peer);
    }
}

}  // namespace ep::cuda
