#include "cpu/plan.h"

#include <utility>

namespace ep {
namespace {

constexpr int kMaxTopk = 256;  // room for a slot's number beside its rank's

/// A division per slot is most of the time of planning; a look-up is not.
std::vector<int32_t> ranks_of_experts(const Routing& routing) {
    std::vector<int32_t> ranks(static_cast<size_t>(routing.num_experts));
    for (int expert = 0; expert < routing.num_experts; ++expert)
        ranks[static_cast<size_t>(expert)] = expert / routing.experts_per_rank();
    return ranks;
}

/// The ranks that one token goes to, found without a branch per slot: which rank comes next is as
/// hard to predict as a coin.
/// `kIsOneWord` says that there are at most 64 ranks; their bits then stay in a register.
template <bool kIsOneWord>
class Destinations {
 public:
    explicit Destinations(const Routing& routing)
        : rank_of_(ranks_of_experts(routing)),
          num_topk_(routing.num_topk),
          seen_(static_cast<size_t>(routing.num_ranks + 63) / 64),
          first_slot_(static_cast<size_t>(routing.num_ranks)) {}

    /// Call `visit(rank, first slot)` in ascending order of ranks for one token's experts, all in
    /// range.
    template <class Index, class Visit>
    void for_each(const Index* experts, const Visit& visit) {
        uint64_t one_word = 0;
        for (int slot = num_topk_ - 1; slot >= 0; --slot) {  // the first slot of a rank stays
            if (experts[slot] < 0) continue;
            const auto rank = static_cast<size_t>(rank_of_[static_cast<size_t>(experts[slot])]);
            (kIsOneWord ? one_word : seen_[rank / 64]) |= uint64_t{1} << rank % 64;
            first_slot_[rank] = slot;
        }
        if constexpr (kIsOneWord) return visit_word(one_word, 0, visit);
        for (size_t word = 0; word < seen_.size(); ++word)
            visit_word(std::exchange(seen_[word], 0), 64 * word, visit);
    }

 private:
    template <class Visit>
    void visit_word(uint64_t word, size_t first_rank, const Visit& visit) const {
        for (; word != 0; word &= word - 1) {
            const size_t rank = first_rank + static_cast<size_t>(__builtin_ctzll(word));
            visit(rank, first_slot_[rank]);
        }
    }

    std::vector<int32_t> rank_of_;
    int num_topk_;
    std::vector<uint64_t> seen_;
    std::vector<int32_t> first_slot_;
};

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

/// A row per token and rank.
template <bool kIsOneWord, class Index>
void address_tokens(const Routing& routing,
                    const Index* topk_idx,
                    std::vector<int64_t> next,
                    Routes routes) {
    Destinations<kIsOneWord> destinations(routing);
    for (int64_t token = 0; token < routing.num_tokens; ++token, topk_idx += routing.num_topk) {
        int route = 0;
        destinations.for_each(topk_idx, [&](size_t rank, int32_t slot) {
            routes.set(route++, static_cast<int32_t>(rank), next[rank]++, slot);
        });
        routes.end_token(route, routing.num_topk);
    }
}

/// A row per token and slot, a token's slots in ascending order by rank, then slot.
template <class Index>
void address_slots(const Routing& routing,
                   const Index* topk_idx,
                   std::vector<int64_t> next,
                   Routes routes) {
    const std::vector<int32_t> rank_of = ranks_of_experts(routing);
    // Rank and slot in one number, to move one array only.
    int32_t sorted[kMaxTopk];
    for (int64_t token = 0; token < routing.num_tokens; ++token, topk_idx += routing.num_topk) {
        int num_routes = 0;
        for (int slot = 0; slot < routing.num_topk; ++slot) {
            if (topk_idx[slot] < 0) continue;
            const int32_t rank = rank_of[static_cast<size_t>(topk_idx[slot])];
            const int32_t key = rank * kMaxTopk + slot;
            int place = num_routes++;
            for (; place > 0 && sorted[place - 1] > key; --place) sorted[place] = sorted[place - 1];
            sorted[place] = key;
        }
        for (int route = 0; route < num_routes; ++route) {
            const int32_t slot = sorted[route] % kMaxTopk;
            routes.set(route, sorted[route] / kMaxTopk, next[static_cast<size_t>(topk_idx[slot])]++,
                       slot);
        }
        routes.end_token(num_routes, routing.num_topk);
    }
}

/// Call `work` with the routing's topk_idx as what it points to.
template <class Work>
auto with_indices(const Routing& routing, const Work& work) {
    if (routing.is_int64) return work(static_cast<const int64_t*>(routing.topk_idx));
    return work(static_cast<const int32_t*>(routing.topk_idx));
}

}  // namespace

void Routes::set(int route, int32_t to_rank, int64_t to_row, int32_t from_slot) {
    rank[route] = to_rank;
    row[route] = static_cast<int32_t>(to_row);
    slot[route] = from_slot;
}

void Routes::end_token(int num_routes, int num_topk) {
    for (int route = num_routes; route < num_topk; ++route) set(route, -1, -1, -1);
    rank += num_topk;
    row += num_topk;
    slot += num_topk;
}

int64_t count_tokens(const Routing& routing, int32_t* per_rank, int32_t* per_expert) {
    return with_indices(routing, [&](const auto* topk_idx) {
        return count(routing, topk_idx, per_rank, per_expert);
    });
}

void make_routes(const Routing& routing, const Totals& totals, int source, Routes routes) {
    std::vector<int64_t> next = first_rows(routing, totals, source);
    with_indices(routing, [&](const auto* topk_idx) {
        if (routing.expand)
            address_slots(routing, topk_idx, std::move(next), routes);
        else if (routing.num_ranks <= 64)
            address_tokens<true>(routing, topk_idx, std::move(next), routes);
        else
            address_tokens<false>(routing, topk_idx, std::move(next), routes);
    });
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
