#pragma once
// How the ranks of one host meet: posts, flags, and waits that end with an answer or with a name.
#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/control.h"
#include "cpu/segment.h"

namespace ep {

/// Called every 50 ms of a wait, without the GIL; throws to end it (Ctrl-C).
using InterruptCheck = std::function<void()>;

struct WaitOptions {
    double timeout_seconds;
    double spin_seconds;  // before a wait yields or sleeps: where each rank has a core
    int num_yields;       // sched_yield() calls before it sleeps: where ranks outnumber cores
    InterruptCheck check_interrupt;
};

/// One rank's view of all segments' control parts. Not thread-safe: one call at a time.
class Meeting {
 public:
    Meeting(int rank, std::vector<std::shared_ptr<Segment>> segments, WaitOptions options);

    /// Throws if an earlier call broke down or this process is a fork.
    void check_usable(uint32_t operation) const;
    bool is_broken() const { return !broken_.empty(); }
    /// Begin the next call.
    void begin(uint32_t operation);

    /// This rank's post of the current call, to be filled in before post().
    Post& own_post() { return control(rank_).posts[epoch_ % 2]; }
    const Post& post_of(int rank) const { return control(rank).posts[epoch_ % 2]; }
    void post();
    void wait_posted();
    /// Whether no rank reports an error and all describe the same call.
    bool is_agreed() const;

    void grant(uint64_t rows_offset, uint64_t committed, const std::string& error);
    /// The grant of `rank` in the current call, waited for.
    const Grant& granted_by(int rank);

    void finish();
    void wait_finished();

    /// Leave the current call by an error, and tell the others why; no other call will go on.
    [[noreturn]] void break_down(const std::string& reason);
    /// Break down if a rank has given up in this call: what it had lent may have changed since.
    void check_all_stayed();
    /// When each rank came to the current call, in seconds.
    std::vector<double> posting_times() const;

    int num_ranks() const { return static_cast<int>(segments_.size()); }
    /// Let the others know that this rank will not come again.
    void leave();
    /// From another thread: the wait of the current call, or the next one, ends with an error.
    void interrupt() { is_interrupted_.store(true, std::memory_order_relaxed); }

 private:
    Control& control(int rank) const {
        return *reinterpret_cast<Control*>(segments_[rank]->base());
    }
    void raise_in_peers(Flag (Control::*flags)[kMaxRanks]);
    void wait_for(Flag (Control::*flags)[kMaxRanks], const char* phase);
    using IsMissing = std::function<bool(int rank)>;
    template <class Sleep>
    void wait(const std::atomic<uint32_t>& word,
              const char* phase,
              const IsMissing& is_missing,
              Sleep sleep);
    void look_around(const char* phase, const IsMissing& is_missing, double start);
    void give_up(const std::string& reason);
    std::string describe(int peer) const;
    std::string describe_leaving(int peer, uint32_t gave_up) const;
    std::string operation_name() const { return kOperations[operation_]; }

    const int rank_;
    const std::vector<std::shared_ptr<Segment>> segments_;
    const WaitOptions options_;
    const int process_;
    uint32_t epoch_ = 0;
    uint32_t operation_ = 0;
    std::string broken_;
    std::atomic<bool> is_interrupted_ = false;
};

}  // namespace ep
