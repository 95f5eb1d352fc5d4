#pragma once
// What peers say, read once and checked before it is used.
//
// Every rank may write anything into any segment at any time. So a number from another rank is
// copied out of shared memory first, then checked, and only the copy is used; what cannot be true
// ends the group with an error that names the rank, before a byte moves by it.
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/control.h"
#include "cpu/plan.h"
#include "cpu/segment.h"

namespace ep {

/// Where a rank says that rows are, or may be written.
struct Offer {
    uint64_t rows_offset;
    uint64_t rows_bytes;
    uint64_t weights_offset;
    uint64_t committed;
};

Offer offer_of(const Post& post);
Offer offer_of(const Grant& grant);

/// The text that a rank left, as valid UTF-8 whatever the bytes are.
std::string text_of(const char (&bytes)[kErrorBytes]);

/// `num_bytes` at `offset` of the segment of `rank`, faulted in. Throws where the rank's arena has
/// no such bytes.
char* checked_place(Segment& segment,
                    int rank,
                    uint64_t offset,
                    size_t num_bytes,
                    uint64_t committed,
                    size_t alignment);

/// This rank's counts, in memory of its own; empty for a cached dispatch.
struct OwnCounts {
    std::vector<int32_t> per_rank, per_expert;
    /// Fills `routes` too; see count_and_route().
    int64_t count(const Routing& routing, Routes routes);
    void write(Post& post) const;
    /// Rows to each rank.
    std::vector<int64_t> num_rows(const Routing& routing) const;
};

/// Copies of all ranks' counts. Throws where counts contradict themselves.
class PeerCounts {
 public:
    PeerCounts(const Routing& routing, int own_rank, const OwnCounts& own);
    void read(int rank, const Post& post);
    Totals totals() const;

 private:
    const Routing& routing_;
    const int own_rank_;
    const OwnCounts& own_;
    std::vector<std::vector<int32_t>> per_rank_, per_expert_;
};

/// How many of this rank's routes lead to each rank, and behind which row there the last ends.
/// Throws where a route leads nowhere.
struct RouteTotals {
    RouteTotals(const Routes& routes, int64_t num_tokens, int num_topk, int num_ranks);
    std::vector<int64_t> num_rows;
    std::vector<int64_t> end_row;
};

}  // namespace ep
