#include "cpu/plan.h"

#include <utility>

namespace ep {
namespace {

/// A division per slot is most of the time of planning; a look-up is not.
std::vector<int32_t> ranks_of_experts(const Routing& routing) {
    std::vector<int32_t> ranks(static_cast<size_t>(routing.num_experts));
    for (int expert = 0; expert < routing.num_experts; ++expert)
        ranks[static_cast<size_t>(expert)] = expert / routing.experts_per_rank();
    return ranks;
}

template <class Index>
int64_t count(const Routing& routing,
              const Index* topk_idx,
              int32_t* per_rank,
              int32_t* per_expert) {
    const std::vector<int32_t> rank_of = ranks_of_experts(routing);
    std::vector<int64_t> last_token(static_cast<size_t>(routing.num_ranks), -1);
    for (int64_t token = 0; token < routing.num_tokens; ++token) {
        for (int slot = 0; slot < routing.num_topk; ++slot, ++topk_idx) {
            const int64_t expert = *topk_idx;
            if (expert < -1 || expert >= routing.num_experts) return expert;
            if (expert < 0) continue;
            ++per_expert[expert];
            const auto rank = static_cast<size_t>(rank_of[static_cast<size_t>(expert)]);
            per_rank[rank] += last_token[rank] != token;
            last_token[rank] = token;
        }
    }
    return kAllInRange;
}

/// The row that the next token of `source` takes: per expert (expand) or per destination rank.
std::vector<int64_t> first_rows(const Routing& routing, const Totals& totals, int source) {
    const int num_keys = routing.expand ? routing.num_experts : routing.num_ranks;
    std::vector<int64_t> rows(static_cast<size_t>(num_keys), 0);
    const auto& counts = routing.expand ? totals.per_expert : totals.per_rank;
    int64_t start = 0;  // of the expert's block on its rank
    for (int key = 0; key < num_keys; ++key) {
        if (routing.expand && key % routing.experts_per_rank() == 0) start = 0;
        int64_t& row = rows[static_cast<size_t>(key)];
        row = start;
        for (int rank = 0; rank < source; ++rank) row += counts[static_cast<size_t>(rank)][key];
        if (routing.expand) start += totals.block_rows(routing, key);
    }
    return rows;
}

template <class Index>
void address(const Routing& routing,
             const Index* topk_idx,
             std::vector<int64_t> next,
             Routes routes) {
    const std::vector<int32_t> rank_of = ranks_of_experts(routing);
    std::vector<int64_t> last_token(static_cast<size_t>(routing.num_ranks), -1);
    // A token's slots, ascending by rank, then slot: both in one number, to move one array only.
    constexpr int kSlotBits = 8;
    int32_t sorted[1 << kSlotBits];
    for (int64_t token = 0; token < routing.num_tokens; ++token) {
        int num_routes = 0;
        for (int slot = 0; slot < routing.num_topk; ++slot) {
            if (topk_idx[slot] < 0) continue;
            const int32_t rank = rank_of[static_cast<size_t>(topk_idx[slot])];
            int64_t& last = last_token[static_cast<size_t>(rank)];
            if (!routing.expand && std::exchange(last, token) == token) continue;
            const int32_t key = rank << kSlotBits | slot;
            int place = num_routes++;
            for (; place > 0 && sorted[place - 1] > key; --place) sorted[place] = sorted[place - 1];
            sorted[place] = key;
        }
        for (int route = 0; route < num_routes; ++route) {
            const int32_t rank = sorted[route] >> kSlotBits;
            const int32_t slot = sorted[route] & ((1 << kSlotBits) - 1);
            const auto key = static_cast<size_t>(routing.expand ? topk_idx[slot] : rank);
            routes.rank[route] = rank;
            routes.row[route] = static_cast<int32_t>(next[key]++);
            routes.slot[route] = slot;
        }
        for (int route = num_routes; route < routing.num_topk; ++route)
            routes.rank[route] = routes.row[route] = routes.slot[route] = -1;
        topk_idx += routing.num_topk;
        routes.rank += routing.num_topk;
        routes.row += routing.num_topk;
        routes.slot += routing.num_topk;
    }
}

}  // namespace

int64_t count_tokens(const Routing& routing, int32_t* per_rank, int32_t* per_expert) {
    if (routing.is_int64)
        return count(routing, static_cast<const int64_t*>(routing.topk_idx), per_rank, per_expert);
    return count(routing, static_cast<const int32_t*>(routing.topk_idx), per_rank, per_expert);
}

void make_routes(const Routing& routing, const Totals& totals, int source, Routes routes) {
    std::vector<int64_t> next = first_rows(routing, totals, source);
    if (routing.is_int64)
        address(routing, static_cast<const int64_t*>(routing.topk_idx), std::move(next), routes);
    else
        address(routing, static_cast<const int32_t*>(routing.topk_idx), std::move(next), routes);
}

int64_t Totals::valid_rows(int expert) const {
    int64_t rows = 0;
    for (const int32_t* counts : per_expert) rows += counts[expert];
    return rows;
}

int64_t Totals::block_rows(const Routing& routing, int expert) const {
    return (valid_rows(expert) + routing.alignment - 1) / routing.alignment * routing.alignment;
}

int64_t Totals::num_rows(const Routing& routing, int destination) const {
    int64_t rows = 0;
    if (!routing.expand) {
        for (const int32_t* counts : per_rank) rows += counts[destination];
        return rows;
    }
    const int first = destination * routing.experts_per_rank();
    for (int local = 0; local < routing.experts_per_rank(); ++local)
        rows += block_rows(routing, first + local);
    return rows;
}

}  // namespace ep
