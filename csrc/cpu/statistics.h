#pragma once
// What a rank counts about its peers, call by call: who came last, and how many bytes went where.
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cpu/control.h"

namespace ep {

double monotonic_seconds();

/// One peer, over all calls of one operation. All ranks of a group count the same in `num_last`
/// and `seconds_behind`; the others are this rank's view.
struct PeerStatistics {
    int64_t num_last = 0;       // calls to which it came last
    double seconds_behind = 0;  // in these: how long after the median rank
    double seconds_waited = 0;  // from this rank's coming to its own, where that was later
    int64_t num_bytes = 0;      // dispatch: sent to it; combine: read from it
};

struct CallStatistics {
    int64_t num_calls = 0;
    double seconds_waiting = 0;    // for the last rank to come
    double seconds_finishing = 0;  // for the last rank to finish, after this one
    std::vector<PeerStatistics> peers;
};

/// Counts of one rank; a few dozen nanoseconds a call. Written by one thread, read by any.
class Statistics {
 public:
    Statistics(int rank, int num_ranks);
    /// Add a call to which every rank came at `times` (seconds).
    void add(uint32_t operation,
             const std::vector<double>& times,
             double seconds_finishing,
             const std::vector<int64_t>& num_rows,
             size_t row_bytes);
    std::vector<CallStatistics> copy() const;

 private:
    const size_t rank_;
    mutable std::mutex mutex_;
    std::vector<CallStatistics> calls_;
};

}  // namespace ep
