// Combine: peers' rows are read where they are, and summed; see exchange.h.
#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>

#include "core/errors.h"
#include "cpu/exchange_detail.h"
#include "cpu/peers.h"

namespace ep {
namespace {

constexpr int kMaxTopk = 128;

/// What the threads of a loop over tokens say of the rows they took.
class PulledRows {
 public:
    explicit PulledRows(size_t num_ranks) : num_rows_(num_ranks, 0) {}

    void add(const std::vector<int64_t>& num_rows) {
        const std::lock_guard lock(mutex_);
        for (size_t rank = 0; rank < num_rows.size(); ++rank) num_rows_[rank] += num_rows[rank];
    }

    void fail_at(int64_t rank, int64_t row) {
        const std::lock_guard lock(mutex_);
        error_ = text("the handle leads to row ", row, " of rank ", rank, " of ", num_rows_.size());
    }

    /// By rank. Throws where a route led nowhere.
    const std::vector<int64_t>& totals() const {
        if (!error_.empty()) fail(error_);
        return num_rows_;
    }

 private:
    std::mutex mutex_;
    std::vector<int64_t> num_rows_;
    std::string error_;
};

}  // namespace

/// What peers read in a combine.
struct Exchange::Staged {
    std::shared_ptr<Block> block;  // null when x lies in the arena and there are no weights
    uint64_t rows_offset;
    uint64_t weights_offset;
    bool is_borrowed;  // x itself: the caller may change it as soon as the call returns
};

bool Exchange::combine(const CombineArgs& args) {
    const std::lock_guard lock(mutex_);
    begin(kCombine, args.call);
    Post& post = meeting_->own_post();
    Staged staged{};
    try {
        staged = stage(args);
    } catch (const std::exception& exception) {
        write_error(post, kNoMemory, exception.what());
    }
    post.rows_offset = staged.rows_offset;
    post.weights_offset = staged.weights_offset;
    return take_part(staged.block, [&] {
        if (!meet()) return false;
        const std::vector<int64_t> num_rows = pull(args);
        // A rank that left this call by an error may have put other rows where ours were.
        meeting_->check_all_stayed();
        meeting_->finish();
        lent_ = staged.block;
        const double start = monotonic_seconds();
        if (staged.is_borrowed) meeting_->wait_finished();
        const size_t columns = args.expand ? 1 : static_cast<size_t>(args.num_topk);
        statistics_->add(kCombine, meeting_->posting_times(), monotonic_seconds() - start, num_rows,
                         args.hidden * item_size(args.dtype) + columns * args.weight_bytes);
        return true;
    });
}

/// Put what peers will read into the arena; rows that are there already stay where they are.
Exchange::Staged Exchange::stage(const CombineArgs& args) {
    const size_t row_bytes = args.hidden * item_size(args.dtype);
    const auto num_rows = static_cast<size_t>(args.num_rows);
    const size_t columns = args.expand ? 1 : static_cast<size_t>(args.num_topk);
    const size_t weight_bytes = num_rows * args.weight_bytes * columns;
    Staged staged{nullptr, kNoPlace, kNoPlace, false};
    staged.is_borrowed = num_rows > 0 && arena_->contains(args.x);
    const size_t copied = staged.is_borrowed ? 0 : round_up(num_rows * row_bytes, 64);
    if (copied + weight_bytes > 0) staged.block = arena_->allocate(copied + weight_bytes);
    if (staged.is_borrowed) {
        staged.rows_offset = arena_->offset_of(args.x);
    } else if (copied > 0) {
        staged.rows_offset = staged.block->offset();
        const bool is_streaming = streams(copied);
        const RowKernels& kernels = row_kernels();
        const auto copy = is_streaming ? kernels.copy_streaming : kernels.copy;
        workers_.run(args.num_rows, rows_per_thread(row_bytes), [&](int64_t begin, int64_t end) {
            copy(staged.block->data() + static_cast<size_t>(begin) * row_bytes,
                 args.x + static_cast<size_t>(begin) * row_bytes,
                 static_cast<size_t>(end - begin) * row_bytes);
            if (is_streaming) stream_fence();
        });
    }
    if (weight_bytes > 0) {
        staged.weights_offset = staged.block->offset() + copied;
        std::memcpy(staged.block->data() + copied, args.weights, weight_bytes);
    }
    return staged;
}

/// Returns how many rows came from each rank.
std::vector<int64_t> Exchange::pull(const CombineArgs& args) {
    const size_t row_bytes = args.hidden * item_size(args.dtype);
    const auto num_topk = static_cast<size_t>(args.num_topk);
    const bool is_streaming = streams(static_cast<size_t>(args.num_tokens) * row_bytes);
    std::vector<const char*> rows, weights;
    for (int rank = 0; rank < meeting_->num_ranks(); ++rank) {
        const Offer offer = offer_of(meeting_->post_of(rank));
        const int64_t num_rows = args.num_rows_per_rank[static_cast<size_t>(rank)];
        if (num_rows < 0 || num_rows > std::numeric_limits<int32_t>::max())
            fail("the handle counts ", num_rows, " rows on rank ", rank);
        const auto place = [&](uint64_t offset, size_t num_bytes, size_t alignment) {
            if (num_bytes == 0) return static_cast<const char*>(nullptr);  // nothing comes from it
            return static_cast<const char*>(checked_place(*segments_[static_cast<size_t>(rank)],
                                                          rank, offset, num_bytes, offer.committed,
                                                          alignment));
        };
        const size_t num_weights = static_cast<size_t>(num_rows) * (args.expand ? 1 : num_topk);
        rows.push_back(place(offer.rows_offset, static_cast<size_t>(num_rows) * row_bytes, 1));
        weights.push_back(place(offer.weights_offset, num_weights * args.weight_bytes, 8));
    }
    const RowKernels& kernels = row_kernels();
    PulledRows pulled(rows.size());
    workers_.run(args.num_tokens, rows_per_thread(row_bytes), [&](int64_t begin, int64_t end) {
        const void* addends[kMaxTopk];
        int group_ends[kMaxTopk];
        std::vector<int64_t> num_pulled(rows.size(), 0);
        for (auto token = static_cast<size_t>(begin); token < static_cast<size_t>(end); ++token) {
            const int32_t* ranks = args.routes.rank + token * num_topk;
            const int32_t* places = args.routes.row + token * num_topk;
            int num_rows = 0, num_groups = 0;
            for (; num_rows < args.num_topk && ranks[num_rows] >= 0; ++num_rows) {
                const auto rank = static_cast<size_t>(ranks[num_rows]);
                const int64_t row = places[num_rows];
                // A handle is the caller's, and may hold anything.
                if (rank >= rows.size() || row < 0 || row >= args.num_rows_per_rank[rank])
                    return pulled.fail_at(ranks[num_rows], row);
                ++num_pulled[rank];
                if (num_rows > 0 && ranks[num_rows] != ranks[num_rows - 1])
                    group_ends[num_groups++] = num_rows;
                addends[num_rows] = rows[rank] + static_cast<size_t>(row) * row_bytes;
            }
            if (num_rows > 0) group_ends[num_groups++] = num_rows;
            const auto bias = [&](const char* bias) -> const void* {
                return bias == nullptr ? nullptr : bias + token * row_bytes;
            };
            kernels.reduce(args.dtype, args.out + token * row_bytes, addends, group_ends,
                           num_groups, bias(args.bias_0), bias(args.bias_1), args.hidden,
                           is_streaming);
        }
        if (is_streaming) stream_fence();
        pulled.add(num_pulled);
    });
    const std::vector<int64_t> num_pulled = pulled.totals();
    if (args.weight_bytes == 4) pull_weights<float>(args, weights);
    if (args.weight_bytes == 8) pull_weights<double>(args, weights);
    return num_pulled;
}

template <class Weight>
void Exchange::pull_weights(const CombineArgs& args, const std::vector<const char*>& peers) {
    const auto num_topk = static_cast<size_t>(args.num_topk);
    auto* out = reinterpret_cast<Weight*>(args.out_weights);
    std::fill_n(out, static_cast<size_t>(args.num_tokens) * num_topk, Weight{0});
    for (size_t token = 0; token < static_cast<size_t>(args.num_tokens); ++token) {
        Weight* sums = out + token * num_topk;
        for (size_t at = token * num_topk; at < (token + 1) * num_topk; ++at) {
            const int rank = args.routes.rank[at];
            if (rank < 0) break;
            const auto* from = reinterpret_cast<const Weight*>(peers[static_cast<size_t>(rank)]);
            const auto row = static_cast<size_t>(args.routes.row[at]);
            if (args.expand) {
                sums[args.routes.slot[at]] = from[row];
                continue;
            }
            // The first addend replaces the zero: -0.0 must survive.
            const bool is_first = at == token * num_topk;
            for (size_t slot = 0; slot < num_topk; ++slot) {
                const Weight value = from[row * num_topk + slot];
                sums[slot] = is_first ? value : sums[slot] + value;
            }
        }
    }
}

}  // namespace ep
