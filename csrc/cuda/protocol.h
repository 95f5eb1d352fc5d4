#pragma once
// What ranks tell each other on GPUs, and what every kernel is called with. Read by host and
// device.
//
// The protocol is that of csrc/cpu/control.h. Calls are numbered 1, 2, 3 ... (an epoch), on the
// device: the same launches may be made again, by the host or by a graph. In a call every rank
// *posts* (what it does, its counts, where its rows are) into every peer's memory and raises its
// `posted` flag there; when its rows are written, or read, it raises `arrived` likewise. All
// kernels of a rank run on one stream, so it posts call n+1 after everything of call n, and a rank
// has finished call n only after all have posted n. Hence two places per post, taken in turn.
#include <cstddef>
#include <cstdint>

namespace ep::cuda {

// Limits, checked by the plans in launch.cpp.
constexpr int kMaxRanks = 72;        // one NVLink domain
constexpr int kMaxExperts = 1024;    // on all ranks together
constexpr int kMaxTopk = 32;         // a warp looks at a token's slots at once
constexpr int kMaxNodes = kMaxTopk;  // a token's nodes are looked at at once, too
constexpr int kMaxHidden = 16384;
constexpr int64_t kMaxSlots = 2147483647;  // addresses of rows are int32

constexpr int kWarpSize = 32;
constexpr int kScanWarps = 8;         // of a block of the count and route kernels
constexpr int kNotifyThreads = 1024;  // one per expert
constexpr int kArriveThreads = 96;    // one per rank
constexpr int kRowWarps = 16;         // of a block of the kernels that move rows
constexpr int kCastColumns = 16;      // that a lane casts; a block of 128 or 32 is 8 or 2 lanes
constexpr int kNumCallFields = 16;
constexpr int kMaxSlabs = 64;   // of a rank's shared memory
constexpr int kSlabShift = 48;  // a place is a slab's number and, below, an offset in it
constexpr uint64_t kNoPlace = ~uint64_t{0};
constexpr int kErrorBytes = 512;

/// Why a rank may not go on with a call.
enum PostKind : uint32_t {
    kTakesPart,
    kBadArguments,  // `error` says which
    kBadIndex,      // topk_idx holds `error_value`
    kNeedsRoom,     // the arena must grow by `rows_bytes` first; no error
};

/// One rank's word on one call.
struct alignas(16) PostHead {
    int64_t call[kNumCallFields];
    uint64_t rows_place;     // dispatch: where rows may be written; combine: where they are
    uint64_t rows_bytes;     // dispatch: how many fit there; combine: 1 if they are reduced
    uint64_t weights_place;  // combine: where weights are
    int64_t error_value;
    uint32_t kind;  // PostKind
    uint32_t unused[3];
    char error[kErrorBytes];
};

struct alignas(16) Post {
    PostHead head;
    int32_t per_rank[kMaxRanks];      // this rank's tokens by destination
    int32_t per_node[kMaxNodes];      // and by the node of that
    int32_t per_expert[kMaxExperts];  // this rank's slots by expert
};

/// The part of a rank's memory that its peers' notify and arrive kernels write. Zeroed once.
/// posted[s], arrived[s]: written by rank s alone (release, system scope), read by the owner
/// (acquire, system scope), never reset: epochs only grow and are compared by difference.
/// posts[n % 2][s]: written by rank s before it raises posted[s] to n.
/// A rank of another node is *far*: its card puts the post here, from its outgoing[n % 2], and then
/// n into far_posted[n % 2][s]. A word per place, as the put of n + 1 may come before that of n.
struct alignas(16) Control {
    uint32_t posted[kMaxRanks];
    uint32_t arrived[kMaxRanks];
    uint64_t far_posted[2][kMaxRanks];
    Post posts[2][kMaxRanks];
    Post outgoing[2];
};

/// Where every rank's shared memory is seen from this one: mapped host memory, to which the host
/// adds and in which it changes nothing.
struct Slabs {
    uint64_t starts[kMaxRanks][kMaxSlabs];
};

/// What notify leaves for the kernels of its call that come behind it: this rank's own device
/// memory, zeroed once.
struct alignas(16) CallState {
    uint32_t epoch;                 // of the call that was last begun; notify counts
    uint32_t is_agreed;             // else no row moves, and nobody arrives
    char* rows[kMaxRanks];          // where every rank's rows go or are, as its post says
    char* weights[kMaxRanks];       // combine: where its weights are
    uint8_t is_reduced[kMaxRanks];  // combine: whether its rows are sums
};

enum ReportStatus : uint32_t { kAgreed = 1, kDisagreed = 2, kTimedOut = 3, kTooManyRows = 4 };

/// What a dispatch into a fixed number of rows tells its caller on the device: so many int32, then
/// for each of this rank's L experts the rows rounded up to the alignment, the same before
/// rounding, and for each rank the tokens that came from there. All zero but the status if it
/// failed.
enum NumberIndex : int32_t { kStatusNumber, kRowsNumber, kExpertNumbers };

/// Mapped host memory: what notify tells the host. There are two: one of the call that the host
/// waits for, before it launches the next; and one of the first call that failed while no host was
/// waiting, until the host has read it and made its ticket 0.
struct alignas(16) Report {
    uint32_t ticket;  // of the host's wait; written last (release, system scope): the rest is of it
    uint32_t epoch;
    uint32_t status;           // ReportStatus
    uint32_t seen[kMaxRanks];  // last epoch that each rank has posted
    PostHead heads[kMaxRanks];
    int32_t per_rank[kMaxRanks * kMaxRanks];  // [source][destination], rows of num_ranks
    int32_t per_node[kMaxRanks * kMaxNodes];  // [source][node], rows of num_nodes
    int64_t per_expert[kMaxExperts];          // slots of all ranks
};

/// Mapped host memory: who waited for whom when rows did not arrive in time.
struct alignas(16) ArriveError {
    uint32_t epoch;  // of the call; 0: none. Written last (release, system scope)
    uint32_t unused;
    uint32_t seen[kMaxRanks];
};

/// Tokens that cross from one rank to a gateway, in memory between nodes of fixed size: places in
/// it, so many from `start`, and where the first is at the other rank. Starts are multiples of 16,
/// so each part of a pile is one of 16 bytes.
struct CrossPile {
    int32_t start, count, there;
};

/// Where all piles of one rank are in a dispatch that no host waits for, and on their way back in
/// its combines. Nothing crosses if it failed.
struct CrossPlan {
    CrossPile sent[kMaxRanks];  // by gateway
    CrossPile came[kMaxRanks];  // by source
    int32_t node_starts[kMaxNodes];
};

constexpr int kPileAlignment = 16;

/// Arguments of the count and route kernels. T tokens, K slots, E experts, R ranks, B blocks, N
/// nodes where ranks are on several, else 0.
struct ScanArgs {
    const void* topk_idx;  // [T, K] int32 or int64
    int64_t num_tokens;
    int32_t num_topk;
    int32_t topk_shift;  // 1 << topk_shift lanes look at one token
    int32_t is_int64;
    int32_t num_experts;
    int32_t num_ranks;
    int32_t experts_per_rank;
    int32_t expand;
    int32_t num_nodes;
    int32_t node;                // this rank's
    int32_t node_of[kMaxRanks];  // by rank
    int32_t unused;
    // [B, E + R + N]: count writes each block's counts, notify turns them into sums over the blocks
    // before, route reads those.
    int32_t* block_counts;
    uint32_t* block_bad;         // [B] first slot that holds no expert and not -1, or ~0
    const int32_t* key_starts;   // [E] (expand) or [R]: row of this rank's first token; by notify
    const CallState* state;      // by notify
    int32_t* routes;             // [3, T, K]: rank, row, slot; see DispatchHandle
    int32_t* by_node;            // [3, T, N], see cross.h
    const int32_t* node_starts;  // [N] first place of the tokens for a node, or null: all 0
};

struct NotifyArgs {
    Control* control[kMaxRanks];  // of every rank, null of far ones
    int32_t rank;
    int32_t num_ranks;
    int32_t posts;       // whether this launch posts; between both a card may be told to put
    int32_t meets;       // whether it waits for the others' posts, and reports
    int32_t has_far;     // whether some ranks are far
    int32_t num_nodes;   // of a fresh dispatch
    uint32_t ticket;     // for the report, at least 1
    int32_t is_awaited;  // by the host; else there is a report of a failure alone
    int32_t has_counts;  // a fresh dispatch; the rest of this part only then
    int32_t num_experts;
    int32_t experts_per_rank;
    int32_t expand;
    int32_t is_int64;
    int64_t alignment;
    int64_t num_blocks;  // B
    int32_t* block_counts;
    const uint32_t* block_bad;
    const void* topk_idx;
    int32_t* key_starts;
    int64_t capacity;  // rows of every rank in a dispatch that no host waits for
    int32_t* numbers;  // of such a dispatch, see NumberIndex
    // Of such a dispatch between nodes, else null: where tokens cross. Its ranks' nodes, their
    // numbers there, and how many are there.
    CrossPlan* piles;
    int32_t node_of[kMaxRanks];
    int32_t index_of[kMaxRanks];
    int32_t size_of[kMaxRanks];
    const CallState* gate;  // or null: of a meeting of more ranks; these agree only if those do
    CallState* state;
    const Slabs* slabs;
    Report* report;
    uint64_t timeout_ns;
    PostHead head;
};

struct ArriveArgs {
    Control* control[kMaxRanks];
    int32_t rank;
    int32_t num_ranks;
    const CallState* state;
    int32_t waits;  // else the flag is only raised
    uint64_t timeout_ns;
    ArriveError* error;
};

enum ScaleFormat : int32_t {
    kFloat32Scales,
    kPowerOfTwoScales,  // as float32
    kPackedScales,      // their exponents, a byte each
};

/// How rows become e4m3; see ep_megatron/fp8.py.
struct CastRecipe {
    int32_t lanes_per_block;  // that share a scale
    int32_t scale_format;     // ScaleFormat
    float min_amax;
};

constexpr uint32_t kNoRow = 0xffffffffu;

/// How the expert-major rows of one token on one rank hang together, in slot order. The first of
/// them, the head, is the one that crosses in dispatch and, where rows are reduced, in combine.
struct alignas(8) RowLink {
    int32_t head;  // the row itself if it is the head; -1 for padding
    int32_t next;  // the row behind it, -1 for none
};

struct DispatchArgs {
    const char* x;          // [T, row_bytes]
    const char* scales;     // [T, scale_bytes] beside rows quantised by the caller, or null
    const char* weights;    // [T, K] or null
    const void* topk_idx;   // [T, K]; only by rank, and where weights or indices travel
    const int32_t* routes;  // [3, T, K]
    int64_t route_plane;    // int32 from a route's rank to its row, and on to its slot: T * K, if x
                            // are all tokens of the routes
    const int32_t* valid;   // [L] rows of each local expert before padding; expand only
    const CrossPile* pile;  // or null: which of the tokens
    int64_t num_tokens;
    int64_t alignment;
    int32_t num_topk;
    int32_t row_bytes;      // of x as it is
    int32_t out_row_bytes;  // of x as it arrives
    int32_t scale_bytes;    // per row as it arrives, 0 for none
    int32_t weight_bytes;   // of one weight: 0, 4 or 8
    int32_t idx_bytes;      // of one index as it arrives: 0, 4 or 8
    int32_t link_bytes;     // of one link: 8 where a rank may have several rows of a token, else 0
    int32_t is_int64;       // topk_idx
    int32_t expand;
    int32_t experts_per_rank;
    int32_t rank;
    CastRecipe recipe;  // of rows that are cast
    // Where each rank's parts start: addresses, or where there is a state, offsets behind the
    // places that it holds; then all depends on whether ranks agree. Nothing goes to null.
    const CallState* state;
    char* to_x[kMaxRanks];
    char* to_scales[kMaxRanks];
    char* to_weights[kMaxRanks];
    char* to_idx[kMaxRanks];
    RowLink* to_links[kMaxRanks];
};

/// What the heads among this rank's received rows are copied by.
struct ExpandArgs {
    char* x;       // [N, row_bytes]
    char* scales;  // [N, scale_bytes]
    const RowLink* links;
    int64_t num_rows;
    int32_t row_bytes;
    int32_t scale_bytes;
};

/// What has come into a block of shared memory, of fixed size, goes on into tensors of as many
/// rows; null where a part is absent. A row that stands for others of its token goes to all of
/// them.
struct TakeArgs {
    const CallState* state;
    const int32_t* num_rows;  // that came; where ranks do not agree, none did
    int64_t capacity;
    const char* from_x;
    const char* from_scales;
    const char* from_weights;
    const char* from_idx;
    const RowLink* links;
    char* x;            // [capacity, row_bytes]; behind what came it keeps what it holds
    char* scales;       // [capacity, scale_bytes] likewise
    char* weights;      // [capacity, weight_bytes]; 0 behind what came
    char* idx;          // [capacity, idx_bytes]; -1 behind what came
    RowLink* to_links;  // [capacity]; none behind what came
    int32_t row_bytes;
    int32_t scale_bytes;
    int32_t weight_bytes;  // of a row's weights, a multiple of 4
    int32_t idx_bytes;     // likewise
};

struct StageArgs {
    const char* rows;  // num_row_bytes, a multiple of 16
    char* to_rows;
    const char* weights;  // num_weight_bytes, a multiple of 4
    char* to_weights;
    int64_t num_row_bytes;
    int64_t num_weight_bytes;
    const int32_t* num_rows;   // or null: only so many rows, and their weights, are there
    int32_t row_bytes;         // beside num_rows
    int32_t weight_row_bytes;  // likewise
};

/// Stage the sums of what belongs to one token instead of rows: into the head's place.
struct ReduceArgs {
    StageArgs stage;
    const RowLink* links;
    int64_t num_rows;
    int32_t row_bytes;
    int32_t unused;
};

struct CombineArgs {
    const CallState* state;  // or null: addresses are those below, and all ranks agree
    const int32_t* routes;   // [3, T, K]
    int64_t route_plane;     // as in DispatchArgs
    const CrossPile* pile;   // likewise
    int64_t num_tokens;
    int32_t num_topk;
    int32_t row_bytes;
    int32_t weight_bytes;  // 0, 4 or 8
    int32_t expand;
    const char* bias_0;  // [T, row_bytes] or null; bias_1 only beside bias_0
    const char* bias_1;
    char* out;          // [T, row_bytes]
    char* out_weights;  // [T, K]
    const char* from_x[kMaxRanks];
    const char* from_weights[kMaxRanks];
    uint8_t is_reduced[kMaxRanks];  // whether only a token's first row at that rank is to be read
};

struct CastArgs {
    const char* x;  // [T, hidden]
    char* data;     // [T, hidden] e4m3
    char* scales;   // [T, hidden / block] of the recipe's format
    int64_t num_tokens;
    int32_t hidden;
    CastRecipe recipe;
};

}  // namespace ep::cuda
