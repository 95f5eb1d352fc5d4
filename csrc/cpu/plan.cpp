#include "cpu/plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace ep {
namespace {

constexpr int kMaxTopk = 256;  // room for a slot's number beside its rank's
constexpr size_t kLineBytes = 64;

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

/// What addressing goes by, and what it counts.
struct Addressing {
    std::vector<int64_t> next;  // the row that this rank's next token takes, by rank or expert
    std::vector<int32_t> tokens_per_rank;
    Routes routes;

    Addressing(const Routing& routing, Routes to)
        : next(static_cast<size_t>(routing.expand ? routing.num_experts : routing.num_ranks), 0),
          tokens_per_rank(static_cast<size_t>(routing.num_ranks), 0),
          routes(to) {}
};

/// A row per token and rank.
template <bool kIsOneWord>
class TokenAddresses {
 public:
    TokenAddresses(const Routing& routing, Addressing& addressing)
        : destinations_(routing), num_topk_(routing.num_topk), to_(addressing) {}

    template <class Index>
    void operator()(const Index* experts) {
        int route = 0;
        destinations_.for_each(experts, [&](size_t rank, int32_t slot) {
            to_.routes.set(route++, static_cast<int32_t>(rank), to_.next[rank]++, slot);
            ++to_.tokens_per_rank[rank];
        });
        to_.routes.end_token(route, num_topk_);
    }

 private:
    Destinations<kIsOneWord> destinations_;
    const int num_topk_;
    Addressing& to_;
};

/// A row per token and slot, a token's slots in ascending order by rank, then slot.
class SlotAddresses {
 public:
    SlotAddresses(const Routing& routing, Addressing& addressing)
        : rank_of_(ranks_of_experts(routing)), num_topk_(routing.num_topk), to_(addressing) {}

    template <class Index>
    void operator()(const Index* experts) {
        // Rank and slot in one number, to move one array only.
        int32_t sorted[kMaxTopk];
        int num_routes = 0;
        for (int slot = 0; slot < num_topk_; ++slot) {
            if (experts[slot] < 0) continue;
            const int32_t rank = rank_of_[static_cast<size_t>(experts[slot])];
            const int32_t key = rank * kMaxTopk + slot;
            int place = num_routes++;
            for (; place > 0 && sorted[place - 1] > key; --place) sorted[place] = sorted[place - 1];
            sorted[place] = key;
        }
        int32_t last_rank = -1;
        for (int route = 0; route < num_routes; ++route) {
            const int32_t slot = sorted[route] % kMaxTopk, rank = sorted[route] / kMaxTopk;
            to_.routes.set(route, rank, to_.next[static_cast<size_t>(experts[slot])]++, slot);
            to_.tokens_per_rank[static_cast<size_t>(rank)] += rank != last_rank;
            last_rank = rank;
        }
        to_.routes.end_token(num_routes, num_topk_);
    }

 private:
    const std::vector<int32_t> rank_of_;
    const int num_topk_;
    Addressing& to_;
};

/// Call `work` with what addresses a token.
template <class Work>
auto with_addresses(const Routing& routing, Addressing& addressing, const Work& work) {
    if (routing.expand) return work(SlotAddresses(routing, addressing));
    if (routing.num_ranks <= 64) return work(TokenAddresses<true>(routing, addressing));
    return work(TokenAddresses<false>(routing, addressing));
}

/// Call `work` with the routing's topk_idx as what it points to.
template <class Work>
auto with_indices(const Routing& routing, const Work& work) {
    if (routing.is_int64) return work(static_cast<const int64_t*>(routing.topk_idx));
    return work(static_cast<const int32_t*>(routing.topk_idx));
}

/// Check one token's experts and count them; kAllInRange, or what is no expert and not -1.
template <class Index>
int64_t count_experts(const Routing& routing, const Index* experts, int32_t* per_expert) {
    for (int slot = 0; slot < routing.num_topk; ++slot) {
        const int64_t expert = experts[slot];
        if (expert < -1 || expert >= routing.num_experts) return expert;
        if (expert >= 0) ++per_expert[expert];
    }
    return kAllInRange;
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

KeptRouting::KeptRouting(const Routing& routing)
    : idx_item_bytes(routing.expand     ? 0
                     : routing.is_int64 ? 8
                                        : 4),
      num_tokens(routing.num_tokens),
      num_topk(routing.num_topk) {
    const size_t num_slots = routing.num_slots();
    const auto whole_lines = [](size_t num_bytes) {
        return (num_bytes + kLineBytes - 1) / kLineBytes * kLineBytes;
    };
    const size_t routes_bytes = whole_lines(3 * num_slots * sizeof(int32_t));
    const size_t num_bytes = routes_bytes + whole_lines(num_slots * idx_item_bytes) + kLineBytes;
    memory = std::shared_ptr<void>(std::aligned_alloc(kLineBytes, num_bytes), std::free);
    if (memory == nullptr) return;
    routes = routes_in(static_cast<int32_t*>(memory.get()), num_slots);
    topk_idx = static_cast<char*>(memory.get()) + routes_bytes;
}

void KeptRouting::copy_idx(const Routing& routing) const {
    const size_t num_bytes = routing.num_slots() * idx_item_bytes;
    if (num_bytes > 0) std::memcpy(topk_idx, routing.topk_idx, num_bytes);
}

int64_t count_and_route(const Routing& routing,
                        int32_t* per_rank,
                        int32_t* per_expert,
                        Routes routes) {
    Addressing addressing(routing, routes);
    const int64_t wrong = with_addresses(routing, addressing, [&](auto address_token) {
        return with_indices(routing, [&](const auto* experts) {
            for (int64_t token = 0; token < routing.num_tokens; ++token) {
                const int64_t no_expert = count_experts(routing, experts, per_expert);
                if (no_expert != kAllInRange) return no_expert;
                address_token(experts);
                experts += routing.num_topk;
            }
            return kAllInRange;
        });
    });
    std::copy(addressing.tokens_per_rank.begin(), addressing.tokens_per_rank.end(), per_rank);
    return wrong;
}

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

void make_routes(const Routing& routing, const Totals& totals, int source, Routes routes) {
    Addressing addressing(routing, routes);
    addressing.next = first_rows(routing, totals, source);
    with_addresses(routing, addressing, [&](auto address_token) {
        with_indices(routing, [&](const auto* experts) {
            for (int64_t token = 0; token < routing.num_tokens;
                 ++token, experts += routing.num_topk)
                address_token(experts);
        });
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
