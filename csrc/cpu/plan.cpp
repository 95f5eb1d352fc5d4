#include "cpu/plan.h"

#include <utility>

namespace ep {
namespace {

template <class Index>
void count(const Routing& routing, const Index* topk_idx, int32_t* per_rank, int32_t* per_expert) {
    const int experts_per_rank = routing.experts_per_rank();
    std::vector<int64_t> last_token(static_cast<size_t>(routing.num_ranks), -1);
    for (int64_t token = 0; token < routing.num_tokens; ++token) {
        for (int slot = 0; slot < routing.num_topk; ++slot) {
            const auto expert = static_cast<int>(topk_idx[token * routing.num_topk + slot]);
            if (expert < 0) continue;
            ++per_expert[expert];
            int64_t& last = last_token[static_cast<size_t>(expert / experts_per_rank)];
            if (last != token) ++per_rank[expert / experts_per_rank];
            last = token;
        }
    }
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
    const int experts_per_rank = routing.experts_per_rank();
    for (int64_t token = 0; token < routing.num_tokens; ++token) {
        const int64_t first = token * routing.num_topk;
        int32_t* ranks = routes.rank + first;
        int32_t* rows = routes.row + first;
        int32_t* slots = routes.slot + first;
        int num_routes = 0;
        for (int slot = 0; slot < routing.num_topk; ++slot) {
            const auto expert = static_cast<int>(topk_idx[first + slot]);
            if (expert < 0) continue;
            const int rank = expert / experts_per_rank;
            // Insert behind the routes to the same or an earlier rank.
            int place = num_routes;
            while (place > 0 && ranks[place - 1] > rank) --place;
            if (!routing.expand && place > 0 && ranks[place - 1] == rank) continue;
            for (int move = num_routes; move > place; --move) {
                ranks[move] = ranks[move - 1];
                rows[move] = rows[move - 1];
                slots[move] = slots[move - 1];
            }
            const auto key = static_cast<size_t>(routing.expand ? expert : rank);
            ranks[place] = rank;
            rows[place] = static_cast<int32_t>(next[key]++);
            slots[place] = slot;
            ++num_routes;
        }
        for (; num_routes < routing.num_topk; ++num_routes)
            ranks[num_routes] = rows[num_routes] = slots[num_routes] = -1;
    }
}

}  // namespace

void count_tokens(const Routing& routing, int32_t* per_rank, int32_t* per_expert) {
    if (routing.is_int64)
        count(routing, static_cast<const int64_t*>(routing.topk_idx), per_rank, per_expert);
    else
        count(routing, static_cast<const int32_t*>(routing.topk_idx), per_rank, per_expert);
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
