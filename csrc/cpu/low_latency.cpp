#include "cpu/low_latency.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <utility>

#include "core/errors.h"
#include "cpu/peer_segments.h"
#include "cpu/peers.h"

// Lists beside the rows of a dispatch: int32 [E + 1], where each expert's tokens begin, then the
// tokens (rows) of all experts.

namespace ep {
namespace {

size_t round_up(size_t count, size_t alignment) {
    return (count + alignment - 1) / alignment * alignment;
}

size_t bytes_of_row(const PackedSizes& sizes, const std::optional<Fp8Cast>& cast) {
    const auto hidden = static_cast<size_t>(sizes.hidden);
    return cast ? hidden + cast->scale_bytes() : 2 * hidden;
}

SegmentHead head(int rank, int num_ranks) {
    return {kPackedMagic, static_cast<uint32_t>(rank), static_cast<uint32_t>(num_ranks)};
}

}  // namespace

LowLatency::LowLatency(
    std::string folder, std::string name, int rank, int num_ranks, Options options)
    : rank_(rank),
      folder_(std::move(folder)),
      options_(std::move(options)),
      workers_(options_.num_threads) {
    own_ = make_own_segment(folder_, name, head(rank, num_ranks), kPackedControlBytes,
                            options_.max_bytes);
    arena_ = std::make_shared<Arena>(own_, kPackedControlBytes);
    segments_.resize(static_cast<size_t>(num_ranks));
    segments_[static_cast<size_t>(rank)] = own_;
}

void LowLatency::attach(const std::vector<std::string>& names) {
    map_peer_segments(folder_, names, head(rank_, num_ranks()), kPackedControlBytes, segments_);
    meeting_ =
        std::make_unique<PackedMeeting>(rank_, segments_, options_.wait, options_.enable_shrink);
}

uint32_t LowLatency::begin(uint32_t operation, const std::vector<int64_t>& call) {
    const uint32_t epoch = meeting_->begin(operation);
    PackedPost& post = meeting_->own_post(epoch);
    std::fill(std::begin(post.call), std::end(post.call), 0);
    std::copy_n(call.begin(), std::min<size_t>(call.size(), kNumPackedFields), post.call);
    return epoch;
}

/// Memory that peers may read; the last but one call's is used again.
char* LowLatency::stage(std::shared_ptr<Block>& block, uint32_t epoch, size_t num_bytes) {
    if (block == nullptr || block.use_count() > 1 || block->num_bytes() < num_bytes) {
        block = nullptr;
        try {
            block = arena_->allocate(num_bytes);
        } catch (const std::exception& error) {
            refuse(epoch, text("no room for its rows: ", error.what()));
        }
    }
    return block->data();
}

/// Tell the peers why this rank cannot take part in the call it has begun, and throw it.
void LowLatency::refuse(uint32_t epoch, const std::string& error) {
    PackedPost& post = meeting_->own_post(epoch);
    post.is_refusal = 1;
    std::strncpy(post.error, error.c_str(), kErrorBytes - 1);
    post.error[kErrorBytes - 1] = 0;
    meeting_->send(epoch);
    meeting_->finish(epoch);
    throw std::invalid_argument(text(meeting_->operation_name(), ": ", error));
}

void LowLatency::report_failure(uint32_t operation, const std::string& error) {
    const std::lock_guard lock(mutex_);
    const uint32_t epoch = begin(operation, {});
    try {
        refuse(epoch, error);
    } catch (const std::invalid_argument&) {
        return;  // the caller has an error of its own to throw
    }
}

void LowLatency::check_range(uint32_t epoch, const PackedTopk& topk, int64_t num_experts) {
    for (int64_t slot = 0; slot < topk.num_slots(); ++slot)
        if (const int64_t expert = topk.at(slot); expert < -1 || expert >= num_experts)
            refuse(epoch, text("expected topk_idx to be in [-1, ", num_experts, "), got ", expert,
                               " for token ", slot / topk.num_topk));
}

uint32_t LowLatency::send_dispatch(const std::vector<int64_t>& call,
                                   const char* x,
                                   const PackedTopk& topk,
                                   const PackedSizes& sizes,
                                   const std::optional<Fp8Cast>& cast) {
    const std::lock_guard lock(mutex_);
    const uint32_t epoch = begin(kDispatchCall, call);
    check_range(epoch, topk, sizes.num_experts);
    const auto num_experts = static_cast<size_t>(sizes.num_experts);
    const auto num_slots = static_cast<size_t>(topk.num_slots());
    char* lists = stage(lists_[epoch % 2], epoch, sizeof(int32_t) * (num_experts + 1 + num_slots));
    auto* starts = reinterpret_cast<int32_t*>(lists);
    int32_t* tokens = starts + num_experts + 1;
    std::fill_n(starts, num_experts + 1, 0);
    for (int64_t slot = 0; slot < topk.num_slots(); ++slot)
        if (const int64_t expert = topk.at(slot); expert >= 0) ++starts[expert + 1];
    for (size_t expert = 0; expert < num_experts; ++expert) {
        if (starts[expert + 1] > sizes.max_tokens)
            refuse(epoch, text("expected expert ", expert, " to be named at most ",
                               sizes.max_tokens, " times, got ", starts[expert + 1]));
        starts[expert + 1] += starts[expert];
    }
    std::vector<int32_t> next(starts, starts + num_experts);
    for (int64_t slot = 0; slot < topk.num_slots(); ++slot)
        if (const int64_t expert = topk.at(slot); expert >= 0)
            tokens[next[static_cast<size_t>(expert)]++] =
                static_cast<int32_t>(slot / topk.num_topk);
    const size_t stride = round_up(bytes_of_row(sizes, cast), 64);
    const size_t x_bytes = 2 * static_cast<size_t>(sizes.hidden);
    char* rows = stage(rows_[epoch % 2], epoch, stride * static_cast<size_t>(topk.num_tokens));
    const RowKernels& kernels = row_kernels();
    workers_.run(topk.num_tokens, kTokensPerThread, [&](int64_t begin, int64_t end) {
        for (auto token = static_cast<size_t>(begin); token < static_cast<size_t>(end); ++token) {
            char* row = rows + token * stride;
            if (cast)
                kernels.quantize(cast->dtype, cast->format, row, row + cast->hidden,
                                 x + token * x_bytes, cast->hidden);
            else
                kernels.copy(row, x + token * x_bytes, x_bytes);
        }
    });
    PackedPost& post = meeting_->own_post(epoch);
    post.rows_offset = rows_[epoch % 2]->offset();
    post.row_stride = stride;
    post.num_rows = static_cast<uint64_t>(topk.num_tokens);
    post.lists_offset = lists_[epoch % 2]->offset();
    post.num_listed = static_cast<uint64_t>(starts[num_experts]);
    meeting_->send(epoch);
    return epoch;
}

uint32_t LowLatency::send_nothing(uint32_t operation, const std::vector<int64_t>& call) {
    const std::lock_guard lock(mutex_);
    const uint32_t epoch = begin(operation, call);
    meeting_->send(epoch);
    return epoch;
}

/// Wait for the posts of a call; whether all ranks that are not masked agree. Their words are in
/// reports_ then.
bool LowLatency::meet(uint32_t operation, uint32_t epoch, int64_t* waited) {
    meeting_->wait_sent(operation, epoch, waited);
    reports_.clear();
    for (int rank = 0; rank < num_ranks(); ++rank) {
        if (rank != rank_ && meeting_->is_masked(rank)) continue;
        const PackedPost& post = meeting_->post_of(rank, epoch);
        Report report{rank, {std::begin(post.call), std::end(post.call)}, ""};
        if (post.is_refusal != 0) report.error = text_of(post.error);
        if (rank != rank_ && meeting_->is_masked(rank)) continue;  // it may have been torn
        reports_.push_back(std::move(report));
    }
    for (const Report& report : reports_)
        if (!report.error.empty() || report.call != reports_[0].call) {
            meeting_->finish(epoch);
            return false;
        }
    return true;
}

std::vector<LowLatency::Source> LowLatency::sources(uint32_t epoch,
                                                    size_t row_bytes,
                                                    size_t lists_bytes) {
    std::vector<Source> sources;
    for (const Report& report : reports_) {
        const int rank = report.rank;
        if (rank != rank_ && meeting_->is_masked(rank)) continue;
        const PackedPost& post = meeting_->post_of(rank, epoch);
        const Segment& segment = *segments_[static_cast<size_t>(rank)];
        const uint64_t limit = segment.num_bytes();
        const uint64_t stride = post.row_stride, num_rows = post.num_rows;
        const uint64_t num_listed = post.num_listed;
        const uint64_t rows = post.rows_offset, lists = post.lists_offset;
        // Products cannot overflow: every factor is below the segment's size, checked first.
        const bool is_inside = rows <= limit && lists <= limit && stride >= row_bytes &&
                               stride <= limit && num_rows <= (limit - rows) / stride &&
                               num_listed <= limit / sizeof(int32_t) &&
                               lists_bytes + sizeof(int32_t) * num_listed <= limit - lists;
        if (!is_inside) {
            if (meeting_->is_masked(rank)) continue;  // overwritten while it was read
            meeting_->break_down(epoch, text("rank ", rank, " points outside of its memory"));
        }
        sources.push_back({rank, segment.base() + rows, stride, static_cast<int64_t>(num_rows),
                           segment.base() + lists, static_cast<int64_t>(num_listed)});
    }
    return sources;
}

/// Whether what was just read may have been overwritten meanwhile.
bool LowLatency::is_any_masked(const std::vector<Source>& sources) const {
    std::atomic_thread_fence(std::memory_order_acquire);
    return std::any_of(sources.begin(), sources.end(), [&](const Source& source) {
        return source.rank != rank_ && meeting_->is_masked(source.rank);
    });
}

bool LowLatency::receive_dispatch(uint32_t epoch,
                                  const PackedSizes& sizes,
                                  const std::optional<Fp8Cast>& cast,
                                  const PackedOut& out) {
    const std::lock_guard lock(mutex_);
    if (!meet(kDispatchCall, epoch, out.waited)) return false;
    const size_t lists_bytes = sizeof(int32_t) * (static_cast<size_t>(sizes.num_experts) + 1);
    std::vector<Source> from;
    do {
        from = sources(epoch, bytes_of_row(sizes, cast), lists_bytes);
        if (const int rank = take_rows(from, sizes, cast, out);
            rank >= 0 && (rank == rank_ || !meeting_->is_masked(rank)))
            meeting_->break_down(epoch, text("rank ", rank, " lists tokens that it did not send"));
    } while (is_any_masked(from));
    meeting_->finish(epoch);
    return true;
}

/// Returns a rank that lists what cannot be, or -1: what was taken is of no use then.
int LowLatency::take_rows(const std::vector<Source>& from,
                          const PackedSizes& sizes,
                          const std::optional<Fp8Cast>& cast,
                          const PackedOut& out) {
    struct Part {
        const Source* source;
        const int32_t* tokens;
        int64_t count, row;
    };
    const int64_t local = sizes.num_experts / num_ranks();
    const int64_t capacity = sizes.max_tokens * num_ranks();
    std::vector<Part> parts;
    std::atomic<int> wrong = -1;
    std::fill_n(out.layout_range, local * num_ranks(), 0);
    for (int64_t expert = 0; expert < local; ++expert) {
        int64_t begin = 0;
        for (const Source& source : from) {
            const auto* starts =
                reinterpret_cast<const int32_t*>(source.lists) + rank_ * local + expert;
            const int64_t first = starts[0], end = starts[1];
            if (first < 0 || end < first || end > source.num_listed ||
                end - first > sizes.max_tokens) {
                wrong = source.rank;
                continue;
            }
            const auto* tokens =
                reinterpret_cast<const int32_t*>(source.lists) + sizes.num_experts + 1 + first;
            out.layout_range[expert * num_ranks() + source.rank] = begin << 32 | (end - first);
            parts.push_back({&source, tokens, end - first, expert * capacity + begin});
            begin += end - first;
        }
        out.count[expert] = static_cast<int32_t>(begin);
    }
    const RowKernels& kernels = row_kernels();
    const auto hidden = static_cast<size_t>(sizes.hidden);
    const size_t x_bytes = cast ? hidden : 2 * hidden;
    const size_t scale_bytes = cast ? cast->scale_bytes() : 0;
    const auto column = 4 * static_cast<size_t>(capacity);
    workers_.run(static_cast<int64_t>(parts.size()), kBlocksPerThread, [&](int64_t b, int64_t e) {
        for (int64_t at = b; at < e; ++at) {
            const Part& part = parts[static_cast<size_t>(at)];
            for (int64_t i = 0; i < part.count; ++i) {
                const int32_t token = part.tokens[i];
                const int64_t row = part.row + i;
                out.src_info[row] = token;
                if (token < 0 || token >= part.source->num_rows) {
                    wrong = part.source->rank;
                    continue;
                }
                const char* sent =
                    part.source->rows + static_cast<size_t>(token) * part.source->row_stride;
                kernels.copy(out.x + static_cast<size_t>(row) * x_bytes, sent, x_bytes);
                if (scale_bytes == 0) continue;
                const auto expert = static_cast<size_t>(row / capacity);
                char* scales = out.scales + expert * (scale_bytes / 4) * column +
                               4 * static_cast<size_t>(row % capacity);
                store_scales(scales, column, sent + x_bytes, scale_bytes);
            }
        }
    });
    return wrong;
}

bool LowLatency::receive_nothing(uint32_t operation, uint32_t epoch) {
    const std::lock_guard lock(mutex_);
    std::vector<int64_t> waited(segments_.size(), 0);
    if (!meet(operation, epoch, waited.data())) return false;
    meeting_->finish(epoch);
    return true;
}

void LowLatency::mask(int rank, bool is_masked) {
    const std::lock_guard lock(mutex_);
    meeting_->mask(rank, is_masked);
}

std::vector<int> LowLatency::masks() {
    const std::lock_guard lock(mutex_);
    std::vector<int> masks;
    for (int rank = 0; rank < num_ranks(); ++rank)
        masks.push_back(rank != rank_ && meeting_->is_masked(rank) ? 1 : 0);
    return masks;
}

void LowLatency::close() {
    const std::lock_guard lock(mutex_);
    own_->unlink();
    own_->close_file();
}

}  // namespace ep
