#include <algorithm>

#include "core/errors.h"
#include "cpu/low_latency.h"

// Lists beside the rows of a combine: int64 [E/R, R, 2], the first row and the number of rows of
// each local expert and source rank.

namespace ep {
namespace {

constexpr int kMaxTopk = 128;

struct Places {
    int64_t begin, count;
};

/// From one row to the next, as they are sent; LogFMT rows are shorter than this, each by its own.
size_t stride_of(const PackedSizes& sizes) {
    const auto hidden = static_cast<size_t>(sizes.hidden);
    return sizes.use_logfmt ? max_logfmt_bytes(hidden) : 2 * hidden;
}

/// A token's rows, and what each is multiplied with.
struct Addends {
    const void* rows[kMaxTopk];
    float weights[kMaxTopk];
    int64_t slots[kMaxTopk];
    int count = 0;

    /// Write the sum, and to `num_bytes` by slot how long the rows were.
    void sum(char* out, const PackedSizes& sizes, int64_t* num_bytes) const {
        const RowKernels& kernels = row_kernels();
        const auto hidden = static_cast<size_t>(sizes.hidden);
        if (!sizes.use_logfmt) {
            kernels.weighted_sum(out, rows, weights, count, hidden);
            for (int i = 0; i < count; ++i) num_bytes[slots[i]] = 2 * sizes.hidden;
            return;
        }
        LogCursor next[kMaxTopk];
        for (int i = 0; i < count; ++i) {
            const char* row = static_cast<const char*>(rows[i]);
            next[i] = {row, row + logfmt_extreme_bytes(hidden)};
        }
        kernels.weighted_sum_logfmt(out, next, weights, count, hidden);
        for (int i = 0; i < count; ++i)
            num_bytes[slots[i]] = next[i].data - static_cast<const char*>(rows[i]);
    }
};

}  // namespace

uint32_t LowLatency::send_combine(const std::vector<int64_t>& call,
                                  const char* x,
                                  const int64_t* layout_range,
                                  const PackedTopk& topk,
                                  const PackedSizes& sizes,
                                  const std::shared_ptr<Block>& place) {
    const std::lock_guard lock(mutex_);
    const uint32_t epoch = begin(kCombineCall, call);
    check_range(epoch, topk, sizes.num_experts);
    const int64_t num_blocks = sizes.num_experts;  // E/R local experts x R sources
    const int64_t capacity = sizes.max_tokens * num_ranks();
    const auto hidden = static_cast<size_t>(sizes.hidden);
    const size_t x_bytes = 2 * hidden, stride = stride_of(sizes);
    auto* places = reinterpret_cast<Places*>(
        stage(lists_[epoch % 2], epoch, sizeof(Places) * static_cast<size_t>(num_blocks)));
    int64_t num_rows = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
        const int64_t begin = layout_range[block] >> 32, count = layout_range[block] & 0xffffffff;
        if (begin < 0 || count > sizes.max_tokens || begin + count > capacity)
            refuse(epoch, text("expected the handle's packed_recv_layout_range to be as dispatch "
                               "wrote it, got rows ",
                               begin, " to ", begin + count));
        const int64_t first = block / num_ranks() * capacity + begin;
        places[block] = {place == nullptr ? num_rows : first, count};
        num_rows += count;
    }
    if (place != nullptr) {
        rows_[epoch % 2] = place;
        num_rows = num_blocks / num_ranks() * capacity;
    } else {
        char* rows = stage(rows_[epoch % 2], epoch, stride * static_cast<size_t>(num_rows));
        const RowKernels& kernels = row_kernels();
        workers_.run(num_blocks, kBlocksPerThread, [&](int64_t begin, int64_t end) {
            for (int64_t block = begin; block < end; ++block) {
                const int64_t first = block / num_ranks() * capacity + (layout_range[block] >> 32);
                const char* from = x + static_cast<size_t>(first) * x_bytes;
                char* row = rows + static_cast<size_t>(places[block].begin) * stride;
                const auto count = static_cast<size_t>(places[block].count);
                if (!sizes.use_logfmt) {
                    std::memcpy(row, from, count * x_bytes);
                    continue;
                }
                for (size_t i = 0; i < count; ++i)
                    kernels.encode_logfmt(row + i * stride,
                                          row + i * stride + logfmt_extreme_bytes(hidden),
                                          from + i * x_bytes, hidden);
            }
        });
    }
    PackedPost& post = meeting_->own_post(epoch);
    post.rows_offset = rows_[epoch % 2]->offset();
    post.row_stride = stride;
    post.num_rows = static_cast<uint64_t>(num_rows);
    post.lists_offset = lists_[epoch % 2]->offset();
    meeting_->send(epoch);
    return epoch;
}

bool LowLatency::receive_combine(uint32_t epoch,
                                 const PackedTopk& topk,
                                 const float* weights,
                                 const PackedSizes& sizes,
                                 char* out,
                                 int64_t* waited,
                                 int64_t* num_bytes,
                                 std::vector<int>& other_routing) {
    const std::lock_guard lock(mutex_);
    if (!meet(kCombineCall, epoch, waited)) return false;
    const int64_t local = sizes.num_experts / num_ranks();
    const auto num_experts = static_cast<size_t>(sizes.num_experts);
    const size_t out_bytes = 2 * static_cast<size_t>(sizes.hidden), stride = stride_of(sizes);
    const auto num_slots = static_cast<size_t>(topk.num_slots());
    std::vector<int64_t> within(num_slots), slot_bytes(num_slots), counts(num_experts, 0);
    for (int64_t slot = 0; slot < topk.num_slots(); ++slot)
        if (const int64_t expert = topk.at(slot); expert >= 0 && expert < sizes.num_experts)
            within[static_cast<size_t>(slot)] = counts[static_cast<size_t>(expert)]++;
    std::vector<Source> from;
    do {
        from = sources(epoch, stride, sizeof(Places) * num_experts);
        other_routing.clear();
        std::vector<const char*> rows_of(num_experts, nullptr);
        for (const Source& source : from) {
            const auto* places = reinterpret_cast<const Places*>(source.lists);
            bool is_same = true;
            for (int64_t expert = 0; expert < local; ++expert) {
                const Places place = places[expert * num_ranks() + rank_];
                const auto global = static_cast<size_t>(source.rank * local + expert);
                is_same &= place.count == counts[global] && place.begin >= 0 &&
                           place.begin <= source.num_rows - place.count;
                rows_of[global] = source.rows + static_cast<size_t>(place.begin) * stride;
            }
            if (!is_same) other_routing.push_back(source.rank);
        }
        if (!other_routing.empty()) continue;
        std::fill(slot_bytes.begin(), slot_bytes.end(), 0);
        workers_.run(topk.num_tokens, kTokensPerThread, [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) {
                Addends addends;
                for (int64_t slot = token * topk.num_topk; slot < (token + 1) * topk.num_topk;
                     ++slot) {
                    const int64_t expert = topk.at(slot);
                    if (expert < 0 || expert >= sizes.num_experts) continue;
                    const char* rows = rows_of[static_cast<size_t>(expert)];
                    if (rows == nullptr) continue;  // of a masked rank
                    const auto place = static_cast<size_t>(within[static_cast<size_t>(slot)]);
                    addends.rows[addends.count] = rows + place * stride;
                    addends.slots[addends.count] = slot;
                    addends.weights[addends.count++] = weights[slot];
                }
                addends.sum(out + static_cast<size_t>(token) * out_bytes, sizes, slot_bytes.data());
            }
        });
    } while (is_any_masked(from));
    for (int64_t slot = 0; slot < topk.num_slots(); ++slot)
        if (const int64_t bytes = slot_bytes[static_cast<size_t>(slot)]; bytes > 0)
            num_bytes[topk.at(slot) / local] += bytes;
    meeting_->finish(epoch);
    return true;
}

}  // namespace ep
