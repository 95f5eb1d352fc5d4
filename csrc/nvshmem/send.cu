// What low-latency calls bring to far ranks: puts and signals, behind the kernels that laid out
// what is to be put (csrc/cuda/low_latency*.cu). Nothing here waits.
//
// A warp per (far rank, expert) puts its rows in one piece, a warp per far rank its post. Each put
// has a signal of its own, and the receiver waits for all that the post announces, so nothing is
// relied on but that a signal follows the data of its own put. A masked rank gets nothing: what was
// on its way there before stays as it was, since nobody else's rows are laid into its places.
#include "cuda/packed_protocol.h"
#include "cuda/packed_slots.cuh"
#include "nvshmem/network.cuh"

namespace ep::cuda {
namespace {

/// Tell a far rank whether it is masked, if it does not know; one thread per rank. Taken back, it
/// also hears that this rank is done with all calls it has missed meanwhile.
__device__ __forceinline__ void tell_mask(const PackedArgs& args, int peer) {
    const uint32_t masked = args.state->masked[peer];
    if (masked == args.state->told[peer]) return;
    args.state->told[peer] = masked;
    PackedControl& control = *args.control[args.rank];
    ep_signal(&control.masked_by[args.rank], masked, peer);
    if (masked != 0) return;
    for (uint32_t back = 0; back < 2; ++back) {
        const uint32_t epoch = args.epoch - back;
        ep_signal(&control.done[epoch % 2][args.rank], epoch, peer);
    }
}

/// Rows for expert `number` (dispatch), or of one of this rank's experts for the rank that has that
/// number among others' experts (combine): both are rank `number / L`'s.
__device__ __forceinline__ void send_rows(const PackedArgs& args, int number) {
    const int experts_per_rank = args.num_experts / args.num_ranks;
    const int peer = number / experts_per_rank, local = number % experts_per_rank;
    if (!is_far(args, peer) || args.state->masked[peer] != 0) return;
    uint64_t* signals = args.control[args.rank]->rows[args.epoch % 2];
    char* window = args.window[args.rank];
    char *source, *target;
    int64_t num_bytes;
    if (args.operation == kPackedDispatch) {
        const int count = min(count_of(args, number), args.max_tokens);
        const int pair = local * args.num_ranks + args.rank;
        const int64_t tag_bytes = (static_cast<int64_t>(count) * 4 + 15) / 16 * 16;
        source = block_at(args, window + args.outbox, number) - tag_bytes;
        target = block_at(args, window + args.slots, pair) - tag_bytes;
        num_bytes = count == 0 ? 0 : tag_bytes + static_cast<int64_t>(count) * args.slot_bytes;
        signals += pair;
    } else {
        const int64_t capacity = static_cast<int64_t>(args.num_ranks) * args.max_tokens;
        const int64_t range = args.layout_range[local * args.num_ranks + peer];
        const int64_t row_bytes = args.hidden * 2;
        const int64_t expert = args.rank * experts_per_rank + local;
        source = window + args.head.rows + (local * capacity + (range >> 32)) * row_bytes;
        target = window + args.inbox + expert * args.max_tokens * row_bytes;
        num_bytes = is_inside(args, range) ? (range & 0xffffffff) * row_bytes : 0;  // post says so
        signals += expert;
    }
    if (num_bytes != 0) ep_put_signal(target, source, num_bytes, signals, args.epoch, peer);
}

__device__ __forceinline__ void send_post(const PackedArgs& args, int peer) {
    if (!is_far(args, peer)) return;
    const bool is_masked = args.state->masked[peer] != 0;
    if (threadIdx.x % kWarpSize == 0) tell_mask(args, peer);
    if (is_masked) return;
    PackedControl& control = *args.control[args.rank];
    const uint32_t parity = args.epoch % 2;
    const int experts_per_rank = args.num_experts / args.num_ranks;
    const uint64_t num_bytes = sizeof(PackedHead) + (experts_per_rank * 8 + 15) / 16 * 16;
    ep_put_signal(reinterpret_cast<char*>(&control.posts[parity][args.rank]),
                  reinterpret_cast<const char*>(&control.outgoing[parity][peer]), num_bytes,
                  &control.sent[parity][args.rank], args.epoch, peer);
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

/// Behind finish: this rank is done with a call. Behind mask: who is masked. A thread per rank.
extern "C" __global__ void __launch_bounds__(kMaskThreads)
    ep_packed_tell_kernel(const __grid_constant__ PackedArgs args) {
    const int peer = threadIdx.x;
    if (peer >= args.num_ranks || !is_far(args, peer)) return;
    tell_mask(args, peer);
    if (args.state->finished == args.epoch && args.state->masked[peer] == 0)
        ep_signal(&args.control[args.rank]->done[args.epoch % 2][args.rank], args.epoch, peer);
}

}  // namespace ep::cuda
