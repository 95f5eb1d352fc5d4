#pragma once
// How ranks meet in low-latency calls: posts, flags and masks, with no barrier between two halves.
//
// Calls of a group are numbered 1, 2, 3 ... In its *sending half* a rank writes its post (what it
// does, where its rows are) and raises `sent` at every peer; it waits for nobody who takes part in
// the same call. In its *receiving half* it waits for `sent` of its peers, reads their rows where
// they are, and raises `done`. Posts and rows have two places, taken in turn: a rank writes those
// of call n only after every peer is done with call n-2. So two calls may be under way at a time,
// and their receiving halves may come in either order.
//
// A masked rank is neither waited for nor read from, by either side: who masks says so in the
// masked rank's memory *before* it overwrites anything that rank may still read. A reader looks
// there after it has read, and reads again without those who have masked it.
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/control.h"
#include "cpu/meeting.h"
#include "cpu/segment.h"

namespace ep {

constexpr uint64_t kPackedMagic = 0x65705f7061636b31;
constexpr int kNumPackedFields = 8;

/// One rank's word on one call. Written by its owner alone, between begin() and send().
struct alignas(64) PackedPost {
    std::atomic<uint32_t> epoch;
    uint32_t is_refusal;
    int64_t call[kNumPackedFields];
    char error[kErrorBytes];  // why this rank cannot take part; zero-terminated
    uint64_t rows_offset;     // of row 0, from the segment's start
    uint64_t row_stride;      // bytes
    uint64_t num_rows;
    uint64_t lists_offset;  // what says whose rows they are; see low_latency*.cpp
    uint64_t num_listed;
};

struct PackedControl {
    SegmentHead head;
    std::atomic<uint32_t> epoch;      // the call whose sending half began last
    std::atomic<uint32_t> operation;  // of that call: index into kPackedOperations
    std::atomic<uint32_t> gave_up;    // the call this rank left without finishing it, 0 if none
    Flag sent[kMaxRanks];             // by source rank
    Flag done[2][kMaxRanks];          // by call number modulo 2 and reading rank
    std::atomic<uint32_t> masked_by[kMaxRanks];
    PackedPost posts[2];
};

constexpr const char* kPackedOperations[] = {"low_latency_dispatch", "low_latency_combine",
                                             "clean_low_latency_buffer"};
constexpr uint32_t kNumPackedOperations = 3;
constexpr size_t kPackedControlBytes = (sizeof(PackedControl) + 4095) / 4096 * 4096;

/// One rank's view of all control parts. Not thread-safe: one half at a time.
class PackedMeeting {
 public:
    PackedMeeting(int rank,
                  std::vector<std::shared_ptr<Segment>> segments,
                  WaitOptions options,
                  bool enable_shrink);

    /// Begin a sending half and return the call's number; waits until nobody reads what it will
    /// overwrite. Throws std::invalid_argument if two calls lack their receiving half.
    uint32_t begin(uint32_t operation);
    /// This rank's post of that call, to be filled in before send().
    PackedPost& own_post(uint32_t epoch) { return control(rank_).posts[epoch % 2]; }
    const PackedPost& post_of(int rank, uint32_t epoch) const {
        return control(rank).posts[epoch % 2];
    }
    void send(uint32_t epoch);
    /// Wait for every peer's post; add the nanoseconds spent on each to `waited`.
    void wait_sent(uint32_t operation, uint32_t epoch, int64_t* waited);
    /// End a receiving half: nothing of the call's will be read any more.
    void finish(uint32_t epoch);

    bool is_masked(int rank) const {
        return masked_[static_cast<size_t>(rank)] ||
               control(rank_).masked_by[rank].load(std::memory_order_acquire) != 0;
    }
    void mask(int rank, bool is_masked);

    /// Give up for good: `reason` names who is to blame.
    [[noreturn]] void break_down(uint32_t epoch, const std::string& reason);
    /// Of the half that this rank is in.
    const char* operation_name() const { return kPackedOperations[operation_]; }
    void interrupt() { is_interrupted_.store(true, std::memory_order_relaxed); }
    int num_ranks() const { return static_cast<int>(segments_.size()); }

 private:
    enum class Phase { kSend, kReceive };
    struct Wait {
        uint32_t epoch;  // of the call
        uint32_t until;  // epoch to be reached
        Phase phase;
        double start;
    };

    PackedControl& control(int rank) const {
        return *reinterpret_cast<PackedControl*>(segments_[static_cast<size_t>(rank)]->base());
    }
    Flag& flag_of(const Wait& wait, int peer) const;
    void raise(Flag& flag, uint32_t epoch);
    bool wait_for(const Wait& wait, int peer);
    bool look_around(const Wait& wait, int peer);
    void lose(const Wait& wait, int peer, const std::string& reason);
    std::string describe(int peer) const;

    const int rank_;
    const std::vector<std::shared_ptr<Segment>> segments_;
    const WaitOptions options_;
    const bool enable_shrink_;
    const int process_;
    uint32_t epoch_ = 0;
    uint32_t operation_ = 0;
    bool is_pending_[2] = {false, false};
    std::vector<bool> masked_;
    std::string broken_;
    std::atomic<bool> is_interrupted_ = false;
};

}  // namespace ep
