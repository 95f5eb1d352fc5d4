#pragma once
// Counting and addressing: from topk_idx to the exact row of every token at its destinations.
// The same numbers as ep_megatron/layout.py, which is the reference.
#include <cstddef>
#include <cstdint>
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

constexpr int64_t kAllInRange = -1;
/// Add this rank's counts to zeroed [num_ranks] and [num_experts]. Returns kAllInRange, or the
/// first number that is no expert and not -1; the counts are then of no use.
int64_t count_tokens(const Routing& routing, int32_t* per_rank, int32_t* per_expert);

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

/// Fill `routes` for `source`, this rank.
void make_routes(const Routing& routing, const Totals& totals, int source, Routes routes);

}  // namespace ep
