#include "cpu/peers.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/errors.h"

namespace ep {
namespace {

/// Length of the valid UTF-8 sequence at `at`, 0 if there is none within `size` bytes.
size_t sequence_length(const unsigned char* at, size_t size) {
    const unsigned char first = at[0];
    const size_t length = first < 0x80                    ? 1
                          : first >= 0xc2 && first < 0xe0 ? 2
                          : first >= 0xe0 && first < 0xf0 ? 3
                          : first >= 0xf0 && first < 0xf5 ? 4
                                                          : 0;
    if (length == 0 || length > size) return 0;
    for (size_t i = 1; i < length; ++i)
        if ((at[i] & 0xc0) != 0x80) return 0;
    // Too long for what they say, surrogates, and beyond the last code point.
    if ((first == 0xe0 && at[1] < 0xa0) || (first == 0xed && at[1] > 0x9f) ||
        (first == 0xf0 && at[1] < 0x90) || (first == 0xf4 && at[1] > 0x8f))
        return 0;
    return length;
}

}  // namespace

Offer offer_of(const Post& post) {
    return {post.rows_offset, post.rows_bytes, post.weights_offset, post.committed};
}

Offer offer_of(const Grant& grant) { return {grant.rows_offset, 0, kNoPlace, grant.committed}; }

std::string text_of(const char (&bytes)[kErrorBytes]) {
    char copy[kErrorBytes];
    std::memcpy(copy, bytes, kErrorBytes);
    const size_t size = strnlen(copy, kErrorBytes);
    std::string valid;
    for (size_t at = 0; at < size;) {
        const auto* byte = reinterpret_cast<const unsigned char*>(copy) + at;
        const size_t length = sequence_length(byte, size - at);
        if (length == 0)
            valid += '?';
        else
            valid.append(copy + at, length);
        at += std::max<size_t>(length, 1);
    }
    return valid;
}

char* checked_place(Segment& segment,
                    int rank,
                    uint64_t offset,
                    size_t num_bytes,
                    uint64_t committed,
                    size_t alignment) {
    if (committed > segment.num_bytes() || offset < kControlBytes || offset > committed ||
        num_bytes > committed - offset || offset % alignment != 0)
        fail("rank ", rank, " names ", num_bytes, " bytes at ", offset,
             ", and its arena has bytes ", kControlBytes, " to ", committed, " of ",
             segment.num_bytes(), " at a multiple of ", alignment);
    if (!segment.is_owner()) segment.populate(committed);
    return segment.base() + offset;
}

int64_t OwnCounts::count(const Routing& routing, Routes routes) {
    per_rank.assign(static_cast<size_t>(routing.num_ranks), 0);
    per_expert.assign(static_cast<size_t>(routing.num_experts), 0);
    return count_and_route(routing, per_rank.data(), per_expert.data(), routes);
}

void OwnCounts::write(Post& post) const {
    std::copy(per_rank.begin(), per_rank.end(), post.num_tokens_per_rank);
    std::copy(per_expert.begin(), per_expert.end(), post.num_tokens_per_expert);
}

std::vector<int64_t> OwnCounts::num_rows(const Routing& routing) const {
    if (!routing.expand) return {per_rank.begin(), per_rank.end()};
    std::vector<int64_t> rows;
    for (auto expert = per_expert.begin(); expert != per_expert.end();
         expert += routing.experts_per_rank())
        rows.push_back(std::accumulate(expert, expert + routing.experts_per_rank(), int64_t{0}));
    return rows;
}

PeerCounts::PeerCounts(const Routing& routing, int own_rank, const OwnCounts& own)
    : routing_(routing),
      own_rank_(own_rank),
      own_(own),
      per_rank_(static_cast<size_t>(routing.num_ranks)),
      per_expert_(static_cast<size_t>(routing.num_ranks)) {}

void PeerCounts::read(int rank, const Post& post) {
    if (rank == own_rank_) return;  // what lies in the segment could have been changed by now
    auto& tokens = per_rank_[static_cast<size_t>(rank)];
    auto& rows = per_expert_[static_cast<size_t>(rank)];
    tokens.assign(post.num_tokens_per_rank, post.num_tokens_per_rank + routing_.num_ranks);
    rows.assign(post.num_tokens_per_expert, post.num_tokens_per_expert + routing_.num_experts);
    auto expert = rows.begin();
    for (int destination = 0; destination < routing_.num_ranks; ++destination) {
        const int64_t num_tokens = tokens[static_cast<size_t>(destination)];
        int64_t num_rows = 0;
        bool is_valid = num_tokens >= 0;
        for (int local = 0; local < routing_.experts_per_rank(); ++local, ++expert) {
            is_valid &= *expert >= 0;
            num_rows += *expert;
        }
        if (!is_valid || num_rows < num_tokens || num_rows > num_tokens * routing_.num_topk)
            fail("rank ", rank, " counts ", num_tokens, " tokens and ", num_rows,
                 " rows (of at most ", routing_.num_topk, " per token) for rank ", destination);
    }
}

Totals PeerCounts::totals() const {
    Totals totals;
    for (int rank = 0; rank < routing_.num_ranks; ++rank) {
        const auto at = static_cast<size_t>(rank);
        const bool is_own = rank == own_rank_;
        totals.per_rank.push_back((is_own ? own_.per_rank : per_rank_[at]).data());
        totals.per_expert.push_back((is_own ? own_.per_expert : per_expert_[at]).data());
    }
    return totals;
}

RouteTotals::RouteTotals(const Routes& routes, int64_t num_tokens, int num_topk, int num_ranks)
    : num_rows(static_cast<size_t>(num_ranks), 0), end_row(static_cast<size_t>(num_ranks), 0) {
    const int32_t* rank = routes.rank;
    const int32_t* row = routes.row;
    for (int64_t token = 0; token < num_tokens; ++token, rank += num_topk, row += num_topk) {
        for (int slot = 0; slot < num_topk && rank[slot] >= 0; ++slot) {
            if (rank[slot] >= num_ranks || row[slot] < 0)
                fail("the handle leads to row ", row[slot], " of rank ", rank[slot], " of ",
                     num_ranks);
            const auto to = static_cast<size_t>(rank[slot]);
            ++num_rows[to];
            end_row[to] = std::max<int64_t>(end_row[to], int64_t{row[slot]} + 1);
        }
    }
}

}  // namespace ep
