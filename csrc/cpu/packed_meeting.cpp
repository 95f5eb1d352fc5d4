#include "cpu/packed_meeting.h"

#include <sched.h>
#include <unistd.h>

#include <stdexcept>
#include <utility>

#include "core/errors.h"
#include "cpu/statistics.h"
#include "cpu/waits.h"

namespace ep {

PackedMeeting::PackedMeeting(int rank,
                             std::vector<std::shared_ptr<Segment>> segments,
                             WaitOptions options,
                             bool enable_shrink)
    : rank_(rank),
      segments_(std::move(segments)),
      options_(std::move(options)),
      enable_shrink_(enable_shrink),
      process_(getpid()),
      masked_(segments_.size(), false) {}

uint32_t PackedMeeting::begin(uint32_t operation) {
    operation_ = operation;
    const char* name = operation_name();
    if (!broken_.empty())
        fail(name, ": expected a working Buffer, got one that broke down (", broken_,
             "); make a new Buffer");
    if (getpid() != process_)
        fail(name, ": expected the process that made the Buffer (", process_,
             "), got a fork of it (", getpid(), "); make a Buffer in this process");
    const uint32_t epoch = epoch_ + 1;
    if (is_pending_[epoch % 2])
        throw std::invalid_argument(
            text(name,
                 ": expected at most two calls whose hook has not run, got a third; call the "
                 "hook of the oldest first"));
    const Wait wait{epoch, epoch - 2, Phase::kSend, monotonic_seconds()};
    for (int step = 1; epoch > 2 && step < num_ranks(); ++step)
        wait_for(wait, (rank_ + step) % num_ranks());
    epoch_ = epoch;
    is_pending_[epoch % 2] = true;
    PackedControl& own = control(rank_);
    own.operation.store(operation, std::memory_order_relaxed);
    own.epoch.store(epoch, std::memory_order_relaxed);
    PackedPost& post = own_post(epoch);
    post.epoch.store(epoch, std::memory_order_relaxed);
    post.is_refusal = 0;
    post.error[0] = 0;
    post.rows_offset = post.row_stride = post.num_rows = 0;
    post.lists_offset = post.num_listed = 0;
    return epoch;
}

void PackedMeeting::raise(Flag& flag, uint32_t epoch) {
    flag.epoch.store(epoch, std::memory_order_release);
    // Either the sleeper sees the epoch before it sleeps, or this load sees the sleeper.
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (flag.has_sleeper.load(std::memory_order_relaxed) != 0) wake_all(flag.epoch);
}

void PackedMeeting::send(uint32_t epoch) {
    // Each rank starts with its neighbour, so that no rank is everybody's last. Masked ranks are
    // told too: they find out in whose memory to look no longer.
    for (int step = 1; step < num_ranks(); ++step)
        raise(control((rank_ + step) % num_ranks()).sent[rank_], epoch);
}

void PackedMeeting::finish(uint32_t epoch) {
    for (int step = 1; step < num_ranks(); ++step)
        raise(control((rank_ + step) % num_ranks()).done[epoch % 2][rank_], epoch);
    is_pending_[epoch % 2] = false;
}

void PackedMeeting::wait_sent(uint32_t operation, uint32_t epoch, int64_t* waited) {
    operation_ = operation;
    const Wait wait{epoch, epoch, Phase::kReceive, monotonic_seconds()};
    for (int step = 1; step < num_ranks(); ++step) {
        const int peer = (rank_ + step) % num_ranks();
        const double start = monotonic_seconds();
        if (wait_for(wait, peer)) {
            const uint32_t found = post_of(peer, epoch).epoch.load(std::memory_order_relaxed);
            if (found != epoch && !is_masked(peer))
                lose(wait, peer,
                     text("rank ", peer, " is in call ", found,
                          ": a rank that missed calls needs a new Buffer"));
        }
        waited[peer] += static_cast<int64_t>(1e9 * (monotonic_seconds() - start));
    }
}

Flag& PackedMeeting::flag_of(const Wait& wait, int peer) const {
    PackedControl& own = control(rank_);
    return wait.phase == Phase::kReceive ? own.sent[peer] : own.done[wait.epoch % 2][peer];
}

/// Whether the epoch was reached; if not, the peer is masked.
bool PackedMeeting::wait_for(const Wait& wait, int peer) {
    if (is_masked(peer)) return false;
    Flag& flag = flag_of(wait, peer);
    if (is_reached(flag.epoch, wait.until)) return true;
    const double start = monotonic_seconds();
    while (monotonic_seconds() - start < options_.spin_seconds) {
        for (int spin = 0; spin < kPausesPerLook; ++spin) {
            if (is_reached(flag.epoch, wait.until)) return true;
            pause_core();
        }
    }
    for (int yield = 0; yield < options_.num_yields; ++yield) {
        if (is_reached(flag.epoch, wait.until)) return true;
        sched_yield();
    }
    double last_look = start;
    while (!is_reached(flag.epoch, wait.until)) {
        const uint32_t seen = flag.epoch.load(std::memory_order_relaxed);
        flag.has_sleeper.store(1, std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (!is_reached(flag.epoch, wait.until)) sleep_on(flag.epoch, seen);
        flag.has_sleeper.store(0, std::memory_order_relaxed);
        if (monotonic_seconds() - last_look > 0.9e-9 * kLookAroundNanoseconds) {
            if (!look_around(wait, peer)) return false;
            last_look = monotonic_seconds();
        }
    }
    return true;
}

/// Whether it is worth waiting on for `peer`; if not, it is masked now.
bool PackedMeeting::look_around(const Wait& wait, int peer) {
    try {
        options_.check_interrupt();
    } catch (...) {
        control(rank_).gave_up.store(wait.epoch, std::memory_order_release);
        broken_ = text("interrupted in ", operation_name(), ", low-latency call ", wait.epoch);
        throw;
    }
    if (is_interrupted_.load(std::memory_order_relaxed))
        break_down(wait.epoch, text("rank ", rank_, " was interrupted, or its process ends"));
    const bool is_late = monotonic_seconds() - wait.start >= options_.timeout_seconds;
    std::string late;
    for (int other = 0; other < num_ranks(); ++other) {
        if (other == rank_ || is_masked(other)) continue;
        const uint32_t gave_up = control(other).gave_up.load(std::memory_order_acquire);
        const bool is_gone = !segments_[static_cast<size_t>(other)]->is_owner_alive();
        // Asked last: a rank that did its part and then ended is no reason to stop.
        if (is_reached(flag_of(wait, other).epoch, wait.until)) continue;
        if (gave_up != 0)
            lose(wait, other,
                 text("rank ", other, " gave up in low-latency call ", gave_up, " (",
                      describe(other), ")"));
        else if (is_gone)
            lose(wait, other,
                 text("rank ", other, " is gone: its process ended or closed its Buffer (",
                      describe(other), ")"));
        else if (is_late && enable_shrink_)
            mask(other, true);
        else if (is_late)
            late += text(late.empty() ? "" : ", ", "rank ", other, " (", describe(other), ")");
    }
    if (!late.empty())
        break_down(wait.epoch,
                   text("rank ", rank_, " waited ", options_.timeout_seconds, " s for ", late,
                        wait.phase == Phase::kSend
                            ? text(" to receive call ", wait.until, ", maybe by its hook")
                            : std::string(" to send")));
    return !is_masked(peer);
}

void PackedMeeting::lose(const Wait& wait, int peer, const std::string& reason) {
    if (!enable_shrink_) break_down(wait.epoch, reason);
    mask(peer, true);
}

void PackedMeeting::mask(int rank, bool is_masked) {
    masked_[static_cast<size_t>(rank)] = is_masked;
    if (rank == rank_) return;
    control(rank).masked_by[rank_].store(is_masked ? 1 : 0, std::memory_order_seq_cst);
    if (!is_masked) control(rank_).masked_by[rank].store(0, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);  // before what is overwritten next
}

void PackedMeeting::break_down(uint32_t epoch, const std::string& reason) {
    control(rank_).gave_up.store(epoch, std::memory_order_release);
    broken_ = reason;
    fail(operation_name(), ": expected all ", num_ranks(), " ranks in low-latency call ", epoch,
         ", got: ", reason, "; make a new Buffer once all ranks are back");
}

std::string PackedMeeting::describe(int peer) const {
    const uint32_t epoch = control(peer).epoch.load(std::memory_order_relaxed);
    const uint32_t operation = control(peer).operation.load(std::memory_order_relaxed);
    if (epoch == 0) return "has made no low-latency call yet";
    return text("last low-latency call ", epoch, ", ",
                operation < kNumPackedOperations ? kPackedOperations[operation] : "?");
}

}  // namespace ep
