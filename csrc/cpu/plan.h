#pragma once
// Counting and addressing: from topk_idx to the exact row of every token at its destinations.
// The same numbers as ep_megatron/layout.py, which is the reference.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace ep {

/// One rank's routing. T tokens, K slots each; expert e lives on rank e / (num_experts /
/// num_ranks).
struct Routing {
    const void* topk_idx;  // [T, K], int64 or int32, in [-1, num_experts); null where not needed
    bool is_int64;
    int64_t num_tokens;
    int num_topk;
    int num_experts;
    int num_ranks;
    bool expand;
    int64_t alignment;

    int experts_per_rank() const { return num_experts / num_ranks; }
    size_t num_slots() const {
        return static_cast<size_t>(num_tokens) * static_cast<size_t>(num_topk);
    }
    int64_t expert(size_t at) const {
        return is_int64 ? static_cast<const int64_t*>(topk_idx)[at]
                        : static_cast<const int32_t*>(topk_idx)[at];
    }
};

/// `[T, K]` each: destination rank, row there and slot, in ascending (rank, slot) order, then -1.
struct Routes {
    int32_t* rank;
    int32_t* row;
    int32_t* slot;

    /// Of the current token, the one that all three point to.
    void set(int route, int32_t to_rank, int64_t to_row, int32_t from_slot);
    /// Mark the rest of its routes as unused and go on to the next token.
    void end_token(int num_routes, int num_topk);
};

/// Routes that lie one after the other, as a handle has them.
inline Routes routes_in(int32_t* memory, size_t num_slots) {
    return {memory, memory + num_slots, memory + 2 * num_slots};
}

/// What outlives a fresh dispatch in its handle: the routes, and without `expand` a copy of
/// topk_idx, since the caller may write to it. One piece of memory, null where there was none to be
/// had.
struct KeptRouting {
    KeptRouting() = default;
    explicit KeptRouting(const Routing& routing);
    void copy_idx(const Routing& routing) const;

    std::shared_ptr<void> memory;
    Routes routes{};
    void* topk_idx = nullptr;
    size_t idx_item_bytes = 0;  // 0: no copy
    int64_t num_tokens = 0;
    int num_topk = 0;
};

constexpr int64_t kAllInRange = -1;
/// Write this rank's counts to [num_ranks] and add them to zeroed [num_experts], and fill `routes`
/// with rows counted from the first of this rank's at each destination (`expand`: of its part of
/// the expert's block), as nobody knows yet where that is. Returns kAllInRange, or the first number
/// that is no expert and not -1; the results are then of no use.
int64_t count_and_route(const Routing& routing,
                        int32_t* per_rank,
                        int32_t* per_expert,
                        Routes routes);

/// All ranks' counts, and what follows from them.
struct Totals {
    std::vector<const int32_t*> per_rank;    // [source][destination]
    std::vector<const int32_t*> per_expert;  // [source][expert]

    /// Rows that `destination` receives, padding included.
    int64_t num_rows(const Routing& routing, int destination) const;
    /// Rows of the block of `expert`, padding included; `valid` without.
    int64_t block_rows(const Routing& routing, int expert) const;
    int64_t valid_rows(int expert) const;
};

/// Where the rows of `source` start: by destination rank, with `expand` by expert.
std::vector<int64_t> first_rows(const Routing& routing, const Totals& totals, int source);

/// Fill `routes` of `source`, whose counts are among the totals.
void make_routes(const Routing& routing, const Totals& totals, int source, Routes routes);

}  // namespace ep
