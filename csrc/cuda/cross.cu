// Between nodes: what travels beside rows is laid out, rows are waited for, weights come together.
// Rows themselves are laid out, forwarded and summed by the kernels of dispatch and combine.
#include "cuda/cross.h"
#include "cuda/ptx.cuh"
#include "cuda/rows.cuh"

namespace ep::cuda {
namespace {

/// What lane k knows of a token's k-th route and slot, as their nodes see them; -1 where there is
/// none.
struct Crossing {
    int route_node, index, row, slot;
    int expert_node, expert;
};

__device__ __forceinline__ Crossing look(const CrossLayArgs& args, int64_t at) {
    Crossing found{-1, -1, -1, -1, -1, -1};
    const int64_t plane = args.num_tokens * args.num_topk;
    if (static_cast<int>(threadIdx.x % kWarpSize) >= args.num_topk) return found;
    const int rank = args.routes == nullptr ? -1 : args.routes[at];
    if (rank >= 0) {
        found.route_node = args.node_of[rank];
        found.index = args.index_of[rank];
        found.row = args.routes[plane + at];
        found.slot = args.routes[2 * plane + at];
    }
    int expert = -1;
    if (args.topk_idx != nullptr)
        expert = args.is_int64 ? static_cast<int>(static_cast<const int64_t*>(args.topk_idx)[at])
                               : static_cast<const int32_t*>(args.topk_idx)[at];
    if (expert >= 0) {
        const int owner = expert / args.experts_per_rank;
        found.expert_node = args.node_of[owner];
        found.expert =
            args.index_of[owner] * args.experts_per_rank + expert % args.experts_per_rank;
    }
    return found;
}

/// Lay out what a node is told of a token: the routes that lead there, the used ones first.
__device__ __forceinline__ void lay(const CrossLayArgs& args,
                                    const Crossing& mine,
                                    int node,
                                    int64_t place) {
    const int lane = threadIdx.x % kWarpSize;
    const bool is_there = mine.route_node == node;
    const unsigned there = __ballot_sync(kAllLanes, is_there), before = (1u << lane) - 1;
    const int64_t first = place * args.num_topk;
    const bool is_slot = lane < args.num_topk;
    if (is_slot && args.routes != nullptr) {
        const int64_t plane = static_cast<int64_t>(args.num_to[node]) * args.num_topk;
        const int column =
            is_there ? __popc(there & before) : __popc(there) + __popc(~there & before);
        int32_t* route = args.to_routes[node] + first + column;
        store_global(route, is_there ? mine.index : -1);
        store_global(route + plane, is_there ? mine.row : -1);
        store_global(route + 2 * plane, is_there ? mine.slot : -1);
    }
    if (is_slot && args.topk_idx != nullptr)
        store_global(args.to_idx[node] + first + lane, mine.expert_node == node ? mine.expert : -1);
}

/// Lane k: the weight of a token's k-th slot.
__device__ __forceinline__ void lay_weight(const CrossLayArgs& args,
                                           int node,
                                           int64_t place,
                                           int64_t token) {
    const int lane = threadIdx.x % kWarpSize;
    if (args.weights == nullptr || lane >= args.num_topk) return;
    const char* from = args.weights + (token * args.num_topk + lane) * args.weight_bytes;
    char* to = args.to_weights[node] + (place * args.num_topk + lane) * args.weight_bytes;
    store_4(to, *reinterpret_cast<const uint32_t*>(from));
    if (args.weight_bytes == 8) store_4(to + 4, *reinterpret_cast<const uint32_t*>(from + 4));
}

/// Lane k: the k-th slot's weight of a token.
template <class Weight>
__device__ __forceinline__ void sum_weights(const CrossWeightsArgs& args, int64_t token) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t plane = args.num_tokens * args.num_nodes, first = token * args.num_nodes;
    Weight total{0};
    for (int i = 0; i < args.num_nodes; ++i) {
        const int node = args.by_node[first + i];
        if (node < 0) break;
        const int64_t row = args.by_node[plane + first + i];
        const auto slots = static_cast<uint32_t>(args.by_node[2 * plane + first + i]);
        const Weight value = load_global(reinterpret_cast<const Weight*>(args.from_weights[node]) +
                                         row * args.num_topk + lane);
        if (!args.expand)
            total = i == 0 ? value : total + value;  // -0.0 must survive
        else if (slots >> lane & 1)
            total = value;
    }
    reinterpret_cast<Weight*>(args.out)[token * args.num_topk + lane] = total;
}

/// Say whose rows did not come, and trap: what reads them must not go on.
__device__ __forceinline__ void give_up(ArriveError* error,
                                        int num_ranks,
                                        uint32_t epoch,
                                        bool is_there) {
    const int rank = threadIdx.x;
    if (rank < num_ranks) error->seen[rank] = is_there ? epoch : epoch - 1;
    __syncthreads();
    if (rank == 0) {
        store_release_system(&error->epoch, epoch);
        trap();
    }
}

/// Wait until a signal is the number of this call. A later one can not be there, and numbers come
/// round.
__device__ __forceinline__ bool wait_for_call(const uint64_t* signal,
                                              uint64_t number,
                                              uint64_t timeout_ns) {
    const uint64_t start = now_nanoseconds();
    do {
        if (load_acquire_system(signal) == number) return true;
    } while (now_nanoseconds() - start < timeout_ns);
    return false;
}

}  // namespace

/// A warp takes a token.
extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)
    ep_cross_lay_kernel(const __grid_constant__ CrossLayArgs args) {
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    const int lane = threadIdx.x % kWarpSize;
    for (int64_t token = warp; token < args.num_tokens; token += num_warps) {
        const Crossing mine = look(args, token * args.num_topk + lane);
        // Lane i: the i-th node that the token goes to; this node is first, whatever it gets.
        const int64_t at = token * args.num_nodes + lane;
        int node = -1, place = 0;
        if (lane < args.num_nodes) {
            node = args.by_node[at];
            place = args.by_node[args.num_tokens * args.num_nodes + at];
        }
        lay(args, mine, args.node, token);
        for (unsigned left = __ballot_sync(kAllLanes, node >= 0 && node != args.node); left != 0;
             left &= left - 1) {
            const int from = __ffs(left) - 1;
            const int far = from_lane(node, from), there = from_lane(place, from);
            lay(args, mine, far, there);
            lay_weight(args, far, there, token);
        }
    }
}

/// A warp takes a token; behind the kernel that waits for the weights.
extern "C" __global__ void __launch_bounds__(kRowWarps* kWarpSize)
    ep_cross_weights_kernel(const __grid_constant__ CrossWeightsArgs args) {
    const int64_t num_warps = static_cast<int64_t>(gridDim.x) * kRowWarps;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarpSize;
    if (static_cast<int>(threadIdx.x % kWarpSize) >= args.num_topk) return;
    for (int64_t token = warp; token < args.num_tokens; token += num_warps) {
        if (args.weight_bytes == 8)
            sum_weights<double>(args, token);
        else
            sum_weights<float>(args, token);
    }
}

/// One block, a thread per rank. Nobody on the host waits for this kernel, so when rows do not come
/// it says whose, and traps: what reads them must not go on.
extern "C" __global__ void __launch_bounds__(kArriveThreads)
    ep_cross_wait_kernel(const __grid_constant__ CrossWaitArgs args) {
    const int rank = threadIdx.x;
    bool is_there = true;
    if (rank < args.num_ranks && args.expected[rank] != 0)
        is_there = wait_for_signal(&args.signals[rank], args.expected[rank], args.timeout_ns);
    if (__syncthreads_and(is_there)) return;
    give_up(args.error, args.num_ranks, args.epoch, is_there);
}

/// Likewise in a call that no host waits for: for what is in the piles, and its number.
extern "C" __global__ void __launch_bounds__(kArriveThreads)
    ep_cross_await_kernel(const __grid_constant__ CrossAwaitArgs args) {
    const int rank = threadIdx.x;
    if (args.state->is_agreed == 0) return;
    const uint32_t epoch = args.state->epoch;
    bool is_there = true;
    if (rank < args.num_ranks && args.piles[rank].count != 0 &&
        (args.source < 0 || args.source == rank)) {
#pragma unroll 1
        for (uint32_t left = args.parts; left != 0 && is_there; left &= left - 1)
            is_there = wait_for_call(&args.signals[(__ffs(left) - 1) * args.num_ranks + rank],
                                     epoch, args.timeout_ns);
    }
    if (__syncthreads_and(is_there)) return;
    give_up(args.error, args.num_ranks, epoch, is_there);
}

}  // namespace ep::cuda
