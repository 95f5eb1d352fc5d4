#pragma once
// What ranks tell each other in low-latency calls on GPUs. Read by host and device.
//
// The protocol is that of csrc/cpu/packed_meeting.h, with rows pushed instead of pulled in
// dispatch. Calls of a group are numbered 1, 2, 3 ... by their kernels, not by the host: so the
// same launches can be made again, by a graph. In its *sending half* a rank writes rows into the
// fixed slots that it has at every peer, then its post, and raises `sent` there; it waits for
// nobody who takes part in the same call. In its *receiving half* it waits for its peers' `sent`,
// takes what is in its slots (dispatch) or reads rows where the peers have them (combine), and
// raises `done`. Slots and posts have two places, taken in turn: a rank writes those of call n only
// after every peer is done with call n-2. So two calls may be under way, and their receiving halves
// may come in either order.
//
// A masked rank is neither waited for nor read from. Who masks says so in the masked rank's memory
// *before* it overwrites anything that rank may still read; a reader looks there after it has read,
// and reads again without those who have masked it.
//
// Ranks of other nodes are *far*: their memory is out of reach, `control` and `window` are null.
// What goes there is first laid into this rank's own memory, by the same kernels: rows into its
// *outbox*, posts into `outgoing`. Behind them csrc/nvshmem/send.cu puts both, each with a signal,
// and raises `done` and `masked_by` by signals. The memory that peers' cards write is the same that
// near peers' kernels write, but for the rows of a combine, which come into the *inbox* because
// this rank cannot read them where they are. Of the network one order is relied on: a signal is
// seen after the data of its own put.
#include <cstddef>
#include <cstdint>

#include "cuda/protocol.h"

namespace ep::cuda {

constexpr int kNumPackedFields = 8;
constexpr int kMeetThreads = 1024;  // one per expert: one block of post and meet
constexpr int kMaskThreads = 96;    // one per rank: one block of begin, finish and mask
// Calls that may be under way at once, each with a place for its number: two that the host makes,
// and two of a graph.
constexpr int kCallsUnderWay = 4;
constexpr int kRowsPlaces = 2;  // for rows of combines

/// Why a rank may not go on with a low-latency call.
enum PackedKind : uint32_t {
    kPackedTakesPart,
    kPackedBadArguments,  // `error` says which
    kPackedBadIndex,      // topk_idx holds `error_value` for token `error_at`
    kPackedTooMany,       // expert `error_at` is named `error_value` times
    kPackedBadRange,      // an entry of the handle's layout_range is `error_value`
};

/// One rank's word on one call, to one peer.
struct alignas(16) PackedHead {
    int64_t call[kNumPackedFields];
    uint32_t kind;         // PackedKind
    uint32_t operation;    // PackedOperation
    uint32_t num_numbers;  // the sender's experts per rank; 0 if it sends no rows
    int64_t error_value;
    int64_t error_at;
    uint64_t rows;  // combine: where its rows are, in bytes from the start of its window
    char error[kErrorBytes];
};

struct alignas(16) PackedPost {
    PackedHead head;
    // Dispatch: rows for each of the peer's local experts. Combine: for each of the sender's local
    // experts, the first of the peer's rows and their number. Also where the sender refuses the
    // call: its rows are under way, and a far rank must wait for them before it says that it is
    // done, else they could come into a later call's place.
    int32_t numbers[2 * kMaxExperts];
};

/// The part of a rank's memory that its peers' flag kernels, or their cards, write. Zeroed once.
/// Flags are written by one rank each (release, system scope, or the signal of a put), read by the
/// owner (acquire, system scope), and only grow; `masked_by` goes both ways. Flags of calls that
/// may be under way at once are apart, by call number modulo 2: what the network brings of the
/// later call may overtake what it brings of the earlier.
struct alignas(16) PackedControl {
    uint64_t sent[2][kMaxRanks];    // by source rank: its last call whose post is here
    uint64_t done[2][kMaxRanks];    // by reading rank
    uint64_t masked_by[kMaxRanks];  // whether that rank has masked the owner
    // Far ranks' last calls whose rows are here. Dispatch: by [local expert, source], combine: by
    // expert. Only where a post says that there are any.
    uint64_t rows[2][kMaxExperts];
    PackedPost posts[2][kMaxRanks];
    PackedPost outgoing[2][kMaxRanks];  // by far rank: the owner's post, to be put there
};

enum PackedStatus : uint32_t {
    kPackedAgreed = 1,
    kPackedDisagreed,
    kPackedOtherRouting,  // a combine whose topk_idx is not that of the dispatch
    kPackedTimedOut,
    kPackedAgain,  // a rank has masked this one: its rows must not be used
};

/// Mapped host memory: what a receiving half, or a mask, tells the host. Where no host waits there
/// is another, of the first call that failed: its ticket is 0 until then, and again when the host
/// has read it.
struct alignas(16) PackedReport {
    uint32_t ticket;     // written last (release, system scope): the rest is of this launch
    uint32_t status;     // PackedStatus
    uint32_t operation;  // PackedOperation of the receiving half
    uint32_t is_there[kMaxRanks];
    uint32_t late[kMaxRanks];
    uint32_t masked[kMaxRanks];
    uint32_t other_routing[kMaxRanks];
    uint64_t waited[kMaxRanks];  // nanoseconds
    PackedHead heads[kMaxRanks];
};

/// This rank's own device memory, written by its kernels one after the other.
struct alignas(16) PackedState {
    uint64_t num_calls;              // that begin has counted
    uint64_t calls[kCallsUnderWay];  // their numbers; see PackedArgs::call
    uint64_t readers[kRowsPlaces];   // the last call whose rows were in each place
    uint64_t finished[2];  // the last calls of which far ranks may know that they are done
    uint32_t masked[kMaxRanks];
    uint32_t told[kMaxRanks];  // of far ranks: what they have last been told of `masked`
    uint32_t late[kMaxRanks];  // who did not come, where that is an error
    uint32_t broken;           // whether ranks were late, where that is an error: for good
    uint32_t status;           // PackedStatus of the receiving half that meet has begun
    uint32_t is_heard;         // whether that reports to the host, or to `unheard`
    uint32_t is_there[kMaxRanks];
    uint64_t rows[kMaxRanks];     // combine: as the posts say
    int32_t begins[kMaxExperts];  // dispatch: [L, R] first row of a block; combine: [E], or -1
    int32_t counts[kMaxExperts];  // dispatch: [L, R] rows
    PackedReport unheard;  // of a call without a waiting host while an earlier failure is kept
};

/// Arguments of all low-latency kernels. T tokens, K slots, E experts, R ranks, L = E/R, C the most
/// tokens of a rank, H hidden. Each kernel reads what it needs; the rest is zero.
struct PackedArgs {
    PackedControl* control[kMaxRanks];  // null for far ranks
    char* window[kMaxRanks];            // rows of every rank; null for far ranks
    PackedState* state;
    PackedReport* report;
    uint64_t timeout_ns;
    uint64_t window_bytes;
    // In every window, for calls of even number; those of odd number are `place_bytes` further.
    uint64_t slots;   // [L, R] blocks
    uint64_t outbox;  // [R] parts of one size, of which those of far ranks are used: [L] blocks
    uint64_t inbox;   // combine: bfloat16 [E, C, H], rows of far ranks' experts
    uint64_t place_bytes;
    uint64_t part_bytes;   // of the outbox, for each rank
    uint64_t block_bytes;  // of C slots and their tags; see block_at in packed_slots.cuh
    int32_t rank;
    int32_t num_ranks;
    int32_t call;        // where `PackedState::calls` has its number; -1: the launch is of no call
    int32_t rows_place;  // begin: which place the rows of a combine are to be in, or -1
    uint32_t ticket;
    int32_t is_awaited;  // by the host; else there is a report of a failure alone
    int32_t masks_late;  // whether a late rank is masked; else it is an error
    int32_t operation;   // PackedOperation
    int32_t num_experts;
    int32_t max_tokens;  // C
    int32_t hidden;
    int32_t x_bytes;      // of a row as it travels
    int32_t scale_bytes;  // of its scales, a multiple of 4; 0 for none
    int32_t slot_bytes;   // both, rounded up to 16
    CastRecipe recipe;
    int32_t num_topk;
    int64_t num_tokens;  // T
    const void* topk_idx;
    int32_t is_int64;
    int32_t mask_rank;   // mask: whom, or -1 to ask only
    int32_t mask_value;  // mask: 0 or 1
    int32_t is_alone;    // finish: without meet, by a rank that does not take part
    const char* x;       // dispatch [T, H], combine [L, R * C, H] bfloat16
    const float* weights;
    // What dispatch brings; combine reads layout_range.
    char* out;              // [L, R * C, x_bytes]; combine: [T, H]
    char* out_scales;       // [L, scale_bytes / 4, R * C] words
    int32_t* out_tokens;    // [L, R * C]
    int32_t* out_count;     // [L]
    int64_t* layout_range;  // [L, R]
    PackedHead head;
};

enum PackedOperation : int32_t { kPackedDispatch, kPackedCombine, kPackedNothing };

}  // namespace ep::cuda
