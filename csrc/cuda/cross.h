#pragma once
// What a rank waits for from other nodes. Rows cross the network by puts that its card does, each
// followed by a signal; kernels only wait for signals, in their own rank's memory.
#include "cuda/launch.h"
#include "cuda/protocol.h"

namespace ep::cuda {

/// signals[s] is written by the network alone, after the rows that rank s has put here: the one
/// order of RDMA that is relied on. Two sets of signals are used in turn, so that a put of the next
/// exchange may overtake one of this.
struct CrossWaitArgs {
    const uint64_t* signals;       // by source rank; numbers of exchanges, which only grow
    uint64_t expected[kMaxRanks];  // 0: nothing comes from that rank
    int32_t num_ranks;
    uint32_t epoch;  // of the exchange, as the error names it
    uint64_t timeout_ns;
    ArriveError* error;
};

Launch plan_cross_wait(const CrossWaitArgs& args);

}  // namespace ep::cuda
