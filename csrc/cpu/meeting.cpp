#include "cpu/meeting.h"

#include <sched.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "core/errors.h"
#include "cpu/peers.h"
#include "cpu/statistics.h"
#include "cpu/waits.h"

namespace ep {

Meeting::Meeting(int rank, std::vector<std::shared_ptr<Segment>> segments, WaitOptions options)
    : rank_(rank),
      segments_(std::move(segments)),
      options_(std::move(options)),
      process_(getpid()) {}

void Meeting::check_usable(uint32_t operation) const {
    if (!broken_.empty())
        fail(kOperations[operation], ": expected a working Buffer, got one that broke down (",
             broken_, "); make a new Buffer");
    if (getpid() != process_)
        fail(kOperations[operation], ": expected the process that made the Buffer (", process_,
             "), got a fork of it (", getpid(), "); make a Buffer in this process");
}

void Meeting::begin(uint32_t operation) {
    operation_ = operation;
    ++epoch_;
    Control& own = control(rank_);
    own.operation.store(operation, std::memory_order_relaxed);
    own.epoch.store(epoch_, std::memory_order_relaxed);
    Post& post = own_post();
    post.epoch = epoch_;
    post.error_kind = kNoError;
    post.error[0] = 0;
    post.rows_offset = post.weights_offset = kNoPlace;
    post.rows_bytes = post.committed = 0;
}

void Meeting::raise_in_peers(Flag (Control::*flags)[kMaxRanks]) {
    for (int step = 1; step < num_ranks(); ++step) {
        // Each rank starts with its neighbour, so that no rank is everybody's last.
        Flag& flag = (control((rank_ + step) % num_ranks()).*flags)[rank_];
        flag.epoch.store(epoch_, std::memory_order_release);
        // Either the sleeper sees the epoch before it sleeps, or this load sees the sleeper.
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (flag.has_sleeper.load(std::memory_order_relaxed) != 0) wake_all(flag.epoch);
    }
}

void Meeting::post() {
    own_post().posted_at = monotonic_seconds();
    raise_in_peers(&Control::posted);
}

void Meeting::finish() { raise_in_peers(&Control::finished); }
void Meeting::wait_posted() { wait_for(&Control::posted, "to begin"); }
void Meeting::wait_finished() { wait_for(&Control::finished, "to finish"); }

void Meeting::wait_for(Flag (Control::*flags)[kMaxRanks], const char* phase) {
    const Flag* own_flags = control(rank_).*flags;
    const IsMissing is_missing = [&](int rank) {
        return rank != rank_ && !is_reached(own_flags[rank].epoch, epoch_);
    };
    for (int step = 1; step < num_ranks(); ++step) {
        Flag& flag = (control(rank_).*flags)[(rank_ + step) % num_ranks()];
        wait(flag.epoch, phase, is_missing, [&](uint32_t seen) {
            flag.has_sleeper.store(1, std::memory_order_relaxed);
            std::atomic_thread_fence(std::memory_order_seq_cst);
            if (!is_reached(flag.epoch, epoch_)) sleep_on(flag.epoch, seen);
            flag.has_sleeper.store(0, std::memory_order_relaxed);
        });
    }
}

template <class Sleep>
void Meeting::wait(const std::atomic<uint32_t>& word,
                   const char* phase,
                   const IsMissing& is_missing,
                   Sleep sleep) {
    if (is_reached(word, epoch_)) return;
    const double start = monotonic_seconds();
    while (monotonic_seconds() - start < options_.spin_seconds) {
        for (int spin = 0; spin < kPausesPerLook; ++spin) {
            if (is_reached(word, epoch_)) return;
            pause_core();
        }
    }
    for (int yield = 0; yield < options_.num_yields; ++yield) {
        if (is_reached(word, epoch_)) return;
        sched_yield();
    }
    double last_look = start;
    while (!is_reached(word, epoch_)) {
        const uint32_t seen = word.load(std::memory_order_relaxed);
        if (!is_reached(word, epoch_)) sleep(seen);
        if (monotonic_seconds() - last_look > 0.9e-9 * kLookAroundNanoseconds) {
            look_around(phase, is_missing, start);
            last_look = monotonic_seconds();
        }
    }
}

void Meeting::look_around(const char* phase, const IsMissing& is_missing, double start) {
    try {
        options_.check_interrupt();
    } catch (...) {
        give_up(text("interrupted in ", operation_name(), ", call ", epoch_));
        throw;
    }
    if (is_interrupted_.load(std::memory_order_relaxed))
        break_down(text("rank ", rank_, " was interrupted, or its process ends"));
    std::string late;
    for (int peer = 0; peer < num_ranks(); ++peer) {
        const uint32_t gave_up = control(peer).gave_up.load(std::memory_order_acquire);
        const bool is_gone = !segments_[peer]->is_owner_alive();
        // Asked last: a rank that did its part and then ended is no reason to stop.
        if (!is_missing(peer)) continue;
        if (gave_up != 0) break_down(describe_leaving(peer, gave_up));
        if (is_gone)
            break_down(text("rank ", peer, " is gone: its process ended or closed its Buffer (",
                            describe(peer), ")"));
        late += text(late.empty() ? "" : ", ", "rank ", peer, " (", describe(peer), ")");
    }
    if (late.empty() || monotonic_seconds() - start < options_.timeout_seconds) return;
    break_down(
        text("rank ", rank_, " waited ", options_.timeout_seconds, " s for ", late, " ", phase));
}

void Meeting::break_down(const std::string& reason) {
    give_up(reason);
    fail(operation_name(), ": expected all ", num_ranks(), " ranks in call ", epoch_,
         ", got: ", reason, "; make a new Buffer once all ranks are back");
}

void Meeting::give_up(const std::string& reason) {
    broken_ = reason;
    Control& own = control(rank_);
    std::strncpy(own.gave_up_because, reason.c_str(), kErrorBytes - 1);
    own.gave_up.store(epoch_, std::memory_order_release);
}

void Meeting::check_all_stayed() {
    // Orders the reads of the rows before these, as in a sequence lock.
    std::atomic_thread_fence(std::memory_order_acquire);
    for (int peer = 0; peer < num_ranks(); ++peer) {
        const uint32_t gave_up = control(peer).gave_up.load(std::memory_order_acquire);
        // In a later call it has seen this rank finish this one, or had nothing to lend.
        if (gave_up != 0 && static_cast<int32_t>(gave_up - epoch_) <= 0)
            break_down(describe_leaving(peer, gave_up));
    }
}

std::vector<double> Meeting::posting_times() const {
    std::vector<double> times;
    for (int rank = 0; rank < num_ranks(); ++rank) times.push_back(post_of(rank).posted_at);
    return times;
}

std::string Meeting::describe_leaving(int peer, uint32_t gave_up) const {
    return text("rank ", peer, " gave up in call ", gave_up, " (", describe(peer),
                "): ", text_of(control(peer).gave_up_because));
}

std::string Meeting::describe(int peer) const {
    const uint32_t epoch = control(peer).epoch.load(std::memory_order_relaxed);
    const uint32_t operation = control(peer).operation.load(std::memory_order_relaxed);
    if (epoch == 0) return "has made no call yet";
    return text("last call ", epoch, ", ",
                operation < kNumOperations ? kOperations[operation] : "?");
}

bool Meeting::is_agreed() const {
    for (int rank = 0; rank < num_ranks(); ++rank) {
        const Post& post = post_of(rank);
        if (post.error_kind != kNoError) return false;
        if (std::memcmp(post.call, post_of(0).call, sizeof(post.call)) != 0) return false;
    }
    return true;
}

void Meeting::grant(uint64_t rows_offset, uint64_t committed, const std::string& error) {
    Grant& grant = control(rank_).grant;
    grant.rows_offset = rows_offset;
    grant.committed = committed;
    std::strncpy(grant.error, error.c_str(), kErrorBytes - 1);
    grant.epoch.store(epoch_, std::memory_order_release);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    if (grant.num_sleepers.load(std::memory_order_relaxed) != 0) wake_all(grant.epoch);
}

const Grant& Meeting::granted_by(int rank) {
    Grant& grant = control(rank).grant;
    const IsMissing is_missing = [&](int peer) {
        return peer == rank && !is_reached(grant.epoch, epoch_);
    };
    wait(grant.epoch, "to allocate memory", is_missing, [&](uint32_t seen) {
        grant.num_sleepers.fetch_add(1, std::memory_order_relaxed);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (!is_reached(grant.epoch, epoch_)) sleep_on(grant.epoch, seen);
        grant.num_sleepers.fetch_sub(1, std::memory_order_relaxed);
    });
    return grant;
}

void Meeting::leave() {
    if (broken_.empty()) broken_ = "it was destroyed";
    segments_[rank_]->close_file();
}

}  // namespace ep
