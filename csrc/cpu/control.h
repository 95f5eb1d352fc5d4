#pragma once
// The control part at the head of every segment: what ranks tell each other, and by which flags.
//
// Calls of a group are numbered 1, 2, 3 ... (an epoch). In each call a rank first writes its *post*
// (what it does, its counts, where its rows are) into its own segment and raises its `posted` flag
// in every peer's; when it has read and written all it has to in other segments, it raises its
// `finished` flag likewise. A rank posts call n+1 only after it has finished call n, and finishes n
// only after all have posted n. So posts need two places, taken in turn: whoever overwrites the
// post of call n with that of n+2 has seen every rank post n+1, that is, finish n.
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace ep {

constexpr uint64_t kMagic = 0x65705f6d65676131;
constexpr int kMaxRanks = 256;  // on one host
constexpr int kMaxExperts = 16384;
constexpr int kNumCallFields = 16;
constexpr int kErrorBytes = 512;
constexpr uint64_t kNoPlace = ~uint64_t{0};

/// What every segment begins with, so that a peer can tell what it is and whose.
struct SegmentHead {
    uint64_t magic;
    uint32_t rank;
    uint32_t num_ranks;
};

/// A word that one rank (the raiser) counts up and one rank (the owner of the segment) waits on.
/// Order: what the raiser wrote before raise() is seen by the owner after it saw the epoch
/// (release, acquire). Never reset: epochs only grow, and are compared by difference.
struct alignas(64) Flag {
    std::atomic<uint32_t> epoch;
    std::atomic<uint32_t> has_sleeper;  // the owner sleeps, or is about to
};

enum ErrorKind : uint32_t { kNoError, kBadArguments, kNoMemory };

/// One rank's word on one call. Written by its owner before it raises `posted`; see above for when
/// it may be overwritten.
struct alignas(64) Post {
    uint32_t epoch;
    uint32_t error_kind;  // ErrorKind
    int64_t call[kNumCallFields];
    char error[kErrorBytes];  // why this rank cannot take part; zero-terminated
    uint64_t rows_offset;     // dispatch: where rows may be written; combine: where they are
    uint64_t rows_bytes;      // dispatch: how many fit there
    uint64_t weights_offset;  // combine: where weights are
    uint64_t committed;       // bytes of the segment that are ready
    double posted_at;         // seconds of the host's monotonic clock
    int32_t num_tokens_per_rank[kMaxRanks];
    int32_t num_tokens_per_expert[kMaxExperts];
};

/// Where rows may be written after all, when what the post offered was too small. Written by its
/// owner between posted and finished of the same call; every rank that has to may wait on it.
struct alignas(64) Grant {
    std::atomic<uint32_t> epoch;
    std::atomic<uint32_t> num_sleepers;
    uint64_t rows_offset;  // kNoPlace: there is no memory, see error
    uint64_t committed;
    char error[kErrorBytes];
};

struct Control {
    SegmentHead head;
    std::atomic<uint32_t> epoch;        // the call this rank is in or has last made
    std::atomic<uint32_t> operation;    // of that call: index into kOperations
    std::atomic<uint32_t> gave_up;      // the call this rank left without finishing it, 0 if none
    char gave_up_because[kErrorBytes];  // written before gave_up
    Flag posted[kMaxRanks];             // by source rank
    Flag finished[kMaxRanks];
    Grant grant;
    Post posts[2];
};

constexpr const char* kOperations[] = {"dispatch", "cached dispatch", "combine"};
constexpr uint32_t kNumOperations = 3;
constexpr uint32_t kDispatch = 0, kCachedDispatch = 1, kCombine = 2;
constexpr size_t kControlBytes = (sizeof(Control) + 4095) / 4096 * 4096;

}  // namespace ep
