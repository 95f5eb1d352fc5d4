// Low-latency rows. Dispatch pushes every token, cast if asked, into the fixed slots that this rank
// has at the experts' ranks; take packs what is in its own slots by expert, source and token.
// Combine reads rows where their expert's rank has them, or where a far rank's card has put them,
// and sums them, weighted. No kernel here waits or raises a flag: see low_latency_flags.cu.
//
// Slots are [local expert, source, place]: the place is the slot's index among those of its expert
// at the source, so no atomic hands them out and the order of rows does not depend on who is first.
#include "cuda/packed_protocol.h"
#include "cuda/packed_slots.cuh"
#include "cuda/push.cuh"

namespace ep::cuda {
namespace {

/// Lane k: the k-th slot of the token, and where its row goes; null where it goes nowhere.
__device__ __forceinline__ char* slot_of(const PackedArgs& args, int64_t token) {
    const int lane = threadIdx.x % kWarpSize;
    const int expert = lane < args.num_topk ? expert_of(args, token * args.num_topk + lane) : -1;
    const int place = place_of(args, token, expert);
    if (expert < 0 || place >= args.max_tokens) return nullptr;  // post says so
    const int experts_per_rank = args.num_experts / args.num_ranks;
    const int rank = expert / experts_per_rank;
    if (args.state->masked[rank] != 0) return nullptr;
    const int local = expert % experts_per_rank, pair = local * args.num_ranks + args.rank;
    char* block = is_far(args, rank)
                      ? block_at(args, outbox_of(args, rank), local)
                      : block_at(args, args.window[rank] + place_at(args, args.slots), pair);
    store_4(tag_of(block, place), static_cast<uint32_t>(token));
    return block + static_cast<int64_t>(place) * args.slot_bytes;
}

template <class Push>
__device__ __forceinline__ void push_tokens(const PackedArgs& args, Push push) {
    if (args.state->broken != 0) return;
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    for (int64_t token = warp; token < args.num_tokens; token += num_warps)
        push(args.x + token * args.hidden * 2, slot_of(args, token));
}

/// A token's rows: lane k holds the address and the weight of slot k's; null where unused, and
/// everywhere where ranks disagree, so that the sums of a graph are not those of a replay before.
struct Weighted {
    const char* row;
    float weight;
};

__device__ __forceinline__ Weighted weighted_row(const PackedArgs& args, int64_t token) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t slot = token * args.num_topk + lane;
    const int expert = lane < args.num_topk ? expert_of(args, slot) : -1;
    const int place = place_of(args, token, expert);
    if (expert < 0 || args.state->status != kPackedAgreed || args.state->begins[expert] < 0)
        return {nullptr, 0.0f};
    const int experts_per_rank = args.num_experts / args.num_ranks;
    const int rank = expert / experts_per_rank;
    const int64_t row_bytes = args.hidden * 2;
    if (is_far(args, rank)) {
        const int64_t row = static_cast<int64_t>(expert) * args.max_tokens + place;
        const char* inbox = args.window[args.rank] + place_at(args, args.inbox);
        return {inbox + row * row_bytes, args.weights[slot]};
    }
    const int64_t row =
        first_slot(args, expert % experts_per_rank, 0) + args.state->begins[expert] + place;
    return {args.window[rank] + args.state->rows[rank] + row * row_bytes, args.weights[slot]};
}

constexpr int kSumUnroll = 2;  // 16-byte pieces of a row that a lane sums at once

/// From zero, slot after slot; a product and a sum are rounded each. The next row is on its way
/// while one is added.
__device__ __forceinline__ void sum_weighted(const Weighted& mine, char* out, int num_bytes) {
    const unsigned used = __ballot_sync(kAllLanes, mine.row != nullptr);
    const int lane_at = threadIdx.x % kWarpSize * kLaneBytes;
    for (int step = 0; step < num_bytes; step += kSumUnroll * kStepBytes) {
        const int at = step + lane_at;
        Lanes<BFloat16> total[kSumUnroll];
#pragma unroll
        for (int i = 0; i < kSumUnroll; ++i) total[i].set(make_uint4(0, 0, 0, 0));
        uint4 next[kSumUnroll];
        if (used != 0) load_pieces(from_lane(mine.row, __ffs(used) - 1), at, num_bytes, next);
        for (unsigned left = used; left != 0; left &= left - 1) {
            const float weight = from_lane(mine.weight, __ffs(left) - 1);
            Lanes<BFloat16> row[kSumUnroll];
#pragma unroll
            for (int i = 0; i < kSumUnroll; ++i) row[i].set(next[i]);
            const unsigned behind = left & (left - 1);
            if (behind != 0)
                load_pieces(from_lane(mine.row, __ffs(behind) - 1), at, num_bytes, next);
#pragma unroll
            for (int i = 0; i < kSumUnroll; ++i)
#pragma unroll
                for (int j = 0; j < BFloat16::kLanes; ++j)
                    total[i].lane[j] =
                        __fadd_rn(total[i].lane[j], __fmul_rn(row[i].lane[j], weight));
        }
#pragma unroll
        for (int i = 0; i < kSumUnroll; ++i)
            if (at + i * kStepBytes < num_bytes)
                store_16(out + at + i * kStepBytes, total[i].round());
    }
}

}  // namespace

#define EP_ROW_KERNEL extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)

EP_ROW_KERNEL ep_packed_push_kernel(const __grid_constant__ PackedArgs args) {
    push_tokens(args, [&](const char* x, char* to) { push_row(x, to, args.x_bytes); });
}

EP_ROW_KERNEL ep_packed_push_cast_kernel(const __grid_constant__ PackedArgs args) {
    push_tokens(args, [&](const char* x, char* to) {
        push_cast_row<BFloat16>(x, to, to + args.x_bytes, args.hidden, args.recipe);
    });
}

/// What arrived in this rank's slots, packed by local expert, source and place.
EP_ROW_KERNEL ep_packed_take_kernel(const __grid_constant__ PackedArgs args) {
    const PackedState& state = *args.state;
    if (state.status != kPackedAgreed) return;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t capacity = static_cast<int64_t>(args.num_ranks) * args.max_tokens;
    char* blocks = args.window[args.rank] + place_at(args, args.slots);
    const int num_words = args.scale_bytes / 4;
    for_rows(
        args, [&](int pair) { return state.counts[pair]; },
        [&](int pair, int i) {
            const int64_t local = pair / args.num_ranks, row = state.begins[pair] + i;
            char* block = block_at(args, blocks, pair);
            const char* from = block + static_cast<int64_t>(i) * args.slot_bytes;
            copy_whole_row(from, args.out + (local * capacity + row) * args.x_bytes, args.x_bytes);
            if (lane == 0)
                args.out_tokens[local * capacity + row] =
                    *reinterpret_cast<const int32_t*>(tag_of(block, i));
#pragma unroll 1
            for (int word = lane; word < num_words; word += kWarpSize)
                store_4(args.out_scales + ((local * num_words + word) * capacity + row) * 4,
                        *reinterpret_cast<const uint32_t*>(from + args.x_bytes + word * 4));
        });
}

/// Rows of a combine, where they are not in the window yet, to the same places there; those of far
/// ranks to their outbox.
EP_ROW_KERNEL ep_packed_stage_kernel(const __grid_constant__ PackedArgs args) {
    if (args.state->broken != 0) return;
    const int64_t capacity = static_cast<int64_t>(args.num_ranks) * args.max_tokens;
    const int row_bytes = args.hidden * 2;
    char* window = args.window[args.rank] + args.head.rows;
    const bool is_there = args.x == window;
    for_rows(
        args,
        [&](int pair) {
            const int source = pair % args.num_ranks;
            if (is_far(args, source) ? args.state->masked[source] != 0 : is_there) return 0;
            const int64_t range = args.layout_range[pair];
            return is_inside(args, range) ? static_cast<int>(range) : 0;  // post says so
        },
        [&](int pair, int i) {
            const int local = pair / args.num_ranks, source = pair - local * args.num_ranks;
            const int64_t row = local * capacity + (args.layout_range[pair] >> 32) + i;
            char* to = window + row * row_bytes;
            if (is_far(args, source))
                to = outbox_of(args, source) +
                     (static_cast<int64_t>(local) * args.max_tokens + i) * row_bytes;
            copy_whole_row(args.x + row * row_bytes, to, row_bytes);
        });
}

EP_ROW_KERNEL ep_packed_sum_kernel(const __grid_constant__ PackedArgs args) {
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    const int row_bytes = args.hidden * 2;
    for (int64_t token = warp; token < args.num_tokens; token += num_warps)
        sum_weighted(weighted_row(args, token), args.out + token * row_bytes, row_bytes);
}

}  // namespace ep::cuda
