#pragma once
// What crosses to other nodes beside rows, what a rank waits for from there, and how weights come
// back. Rows cross the network by puts that its card does, each followed by a signal; kernels only
// read and write their own rank's memory.
//
// T tokens, K top-k, N nodes. A token goes to each node that has one of its experts, there to its
// *gateway*, a rank that puts it at its addresses. `by_node`, [3, T, N] int32, says where a token
// goes, as routes do: the nodes, ascending, then -1; its place among this rank's tokens for that
// node (at its own node, its number); and which of its slots those are, a bit each.
#include "cuda/launch.h"
#include "cuda/protocol.h"

namespace ep::cuda {

/// What a rank lays beside its leaving rows, or for its own node. Null where a part is absent.
struct CrossLayArgs {
    const int32_t* by_node;
    const int32_t* routes;  // [3, T, K] between all ranks
    const void* topk_idx;   // [T, K]
    const char* weights;    // [T, K]
    int64_t num_tokens;
    int32_t num_topk;
    int32_t num_nodes;
    int32_t node;  // this rank's: it gets an entry for each token, wherever that goes
    int32_t is_int64;
    int32_t weight_bytes;  // of one weight: 4 or 8
    int32_t experts_per_rank;
    // By node; n tokens go there.
    int32_t* to_routes[kMaxRanks];  // [3, n, K] between its ranks, as they are numbered there
    int32_t* to_idx[kMaxRanks];     // [n, K] among its experts, or -1
    char* to_weights[kMaxRanks];    // [n, K]
    int32_t num_to[kMaxRanks];      // n
    // By rank.
    int32_t node_of[kMaxRanks];
    int32_t index_of[kMaxRanks];  // its number in its node
};

/// What a token's rank makes of the weights that each node has summed.
struct CrossWeightsArgs {
    const int32_t* by_node;
    char* out;  // [T, K]
    int64_t num_tokens;
    int32_t num_topk;
    int32_t num_nodes;
    int32_t weight_bytes;  // of one weight: 4 or 8
    int32_t expand;        // a slot's weight comes from one node; else they are added
    const char* from_weights[kMaxRanks];  // by node: [n, K]
};

/// signals[s] is written by the network alone, after what rank s has put here: the one order of
/// RDMA that is relied on. Each put of an exchange has signals of its own, so that any put may
/// overtake any other.
struct CrossWaitArgs {
    const uint64_t* signals;       // by source rank; numbers of exchanges, which only grow
    uint64_t expected[kMaxRanks];  // 0: nothing comes from that rank
    int32_t num_ranks;
    uint32_t epoch;  // of the exchange, as the error names it
    uint64_t timeout_ns;
    ArriveError* error;
};

/// Parts of memory between nodes of fixed size: an area each, of as many places.
enum CrossPart : int32_t {
    kCrossRows,
    kCrossScales,
    kCrossWeights,
    kCrossRoutes,  // three planes
    kCrossIdx = kCrossRoutes + 3,
    kNumCrossParts
};

/// What a rank's card puts in a call that no host waits for: each part of each pile, with a signal
/// of its own, which is the number of the call.
struct CrossPutArgs {
    const CallState* state;  // of the meeting of all ranks
    const CrossPile* piles;  // [R] by receiver
    char* outbox;
    char* inbox;                          // stands for the receiver's
    uint64_t* signals;                    // [kNumCrossParts, R], by source; likewise
    uint64_t starts[kNumCrossParts];      // of areas
    int32_t place_bytes[kNumCrossParts];  // 0 where a part is absent
    int32_t rank;
    int32_t num_ranks;
    int32_t unused;
};

struct CrossAwaitArgs {
    const CallState* state;   // of the meeting of all ranks
    const CrossPile* piles;   // [R] by source
    const uint64_t* signals;  // as above
    uint32_t parts;           // to wait for, a bit each
    int32_t source;           // or -1: all
    int32_t num_ranks;
    int32_t unused;
    uint64_t timeout_ns;
    ArriveError* error;
};

Launch plan_cross_lay(const CrossLayArgs& args, int num_sms);
Launch plan_cross_weights(const CrossWeightsArgs& args, int num_sms);
Launch plan_cross_wait(const CrossWaitArgs& args);
/// Of csrc/nvshmem/cross_put.cu.
Launch plan_cross_put(const CrossPutArgs& args);
Launch plan_cross_await(const CrossAwaitArgs& args);

}  // namespace ep::cuda
