#include "cpu/statistics.h"

#include <time.h>

#include <algorithm>

namespace ep {

double monotonic_seconds() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

Statistics::Statistics(int rank, int num_ranks)
    : rank_(static_cast<size_t>(rank)), calls_(kNumOperations) {
    for (CallStatistics& call : calls_) call.peers.resize(static_cast<size_t>(num_ranks));
}

void Statistics::add(uint32_t operation,
                     const std::vector<double>& times,
                     double seconds_finishing,
                     const std::vector<int64_t>& num_rows,
                     size_t row_bytes) {
    std::vector<double> sorted = times;
    const auto median = sorted.begin() + static_cast<ptrdiff_t>((sorted.size() - 1) / 2);
    std::nth_element(sorted.begin(), median, sorted.end());
    const auto last =
        static_cast<size_t>(std::max_element(times.begin(), times.end()) - times.begin());
    const std::lock_guard lock(mutex_);
    CallStatistics& call = calls_[operation];
    ++call.num_calls;
    call.seconds_waiting += times[last] - times[rank_];
    call.seconds_finishing += seconds_finishing;
    ++call.peers[last].num_last;
    call.peers[last].seconds_behind += times[last] - *median;
    for (size_t peer = 0; peer < times.size(); ++peer) {
        call.peers[peer].seconds_waited += std::max(0.0, times[peer] - times[rank_]);
        call.peers[peer].num_bytes += num_rows[peer] * static_cast<int64_t>(row_bytes);
    }
}

std::vector<CallStatistics> Statistics::copy() const {
    const std::lock_guard lock(mutex_);
    return calls_;
}

}  // namespace ep
