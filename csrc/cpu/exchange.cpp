#include "cpu/exchange.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>

#include "core/errors.h"
#include "cpu/exchange_detail.h"
#include "cpu/peer_segments.h"
#include "cpu/peers.h"

namespace ep {
namespace {

constexpr size_t kColumnAlignment = 4;  // as fp8.COLUMN_ALIGNMENT

void prefetch_row(const char* row, size_t num_bytes) {
    for (size_t at = 0; at < num_bytes; at += 64) __builtin_prefetch(row + at);
}

/// Copy the few bytes beside a row, of one of the usual sizes.
void copy_small(char* out, const char* value, size_t num_bytes) {
    if (num_bytes == 4)
        std::memcpy(out, value, 4);
    else
        std::memcpy(out, value, num_bytes);
}

/// One token's experts and weights as its destination sees them: the local ones, by local number.
/// No branch and no division per slot: there may be as many slots in all as rows have lines.
template <class Index, class Weight>
void push_columns(const DispatchArgs& args, size_t token, int rank, char* weights, char* idx) {
    const Routing& routing = args.routing;
    const auto num_topk = static_cast<size_t>(routing.num_topk);
    const Index* experts = static_cast<const Index*>(routing.topk_idx) + token * num_topk;
    const auto num_local = static_cast<Index>(routing.experts_per_rank());
    const Index first = static_cast<Index>(rank) * num_local;
    const auto local_of = [&](size_t slot) {
        const Index local = experts[slot] - first;
        return local >= 0 && local < num_local ? local : Index{-1};
    };
    if (args.row_bytes.idx != 0)
        for (size_t slot = 0; slot < num_topk; ++slot)
            reinterpret_cast<Index*>(idx)[slot] = local_of(slot);
    if (args.row_bytes.weights == 0) return;
    const Weight* given = reinterpret_cast<const Weight*>(args.weights) + token * num_topk;
    for (size_t slot = 0; slot < num_topk; ++slot)
        reinterpret_cast<Weight*>(weights)[slot] = local_of(slot) < 0 ? Weight{0} : given[slot];
}

using PushColumns = void (*)(const DispatchArgs&, size_t token, int rank, char*, char*);

PushColumns push_columns_of(const DispatchArgs& args) {
    const bool is_float = args.row_bytes.weights != sizeof(double);
    if (args.routing.is_int64)
        return is_float ? push_columns<int64_t, float> : push_columns<int64_t, double>;
    return is_float ? push_columns<int32_t, float> : push_columns<int32_t, double>;
}

SegmentHead head(int rank, int num_ranks) {
    return {kMagic, static_cast<uint32_t>(rank), static_cast<uint32_t>(num_ranks)};
}

}  // namespace

Sections::Sections(const RowBytes& row, int64_t num_rows, int num_topk, bool expand) {
    const auto rows = static_cast<size_t>(num_rows);
    const size_t columns = expand ? 1 : static_cast<size_t>(num_topk);
    num_scale_rows = row.scales_by_column ? round_up(rows, kColumnAlignment) : rows;
    num_scale_columns = row.scales_by_column ? row.scales / 4 : 0;
    strides =
        row.scales_by_column ? ScaleStrides{4, 4 * num_scale_rows} : ScaleStrides{row.scales, 4};
    scales = round_up(rows * row.x, 64);
    weights = scales + round_up(num_scale_rows * row.scales, 64);
    idx = weights + round_up(rows * row.weights * columns, 64);
    end = idx + (expand ? 0 : rows * row.idx * columns);
}

/// Where this rank's rows go at one destination.
struct Exchange::Target {
    char* rows;
    Sections sections;
};

Exchange::Exchange(
    std::string folder, std::string name, int rank, int num_ranks, ExchangeOptions options)
    : rank_(rank),
      folder_(std::move(folder)),
      options_(std::move(options)),
      workers_(options_.num_threads) {
    own_ =
        make_own_segment(folder_, name, head(rank, num_ranks), kControlBytes, options_.max_bytes);
    arena_ = std::make_shared<Arena>(own_, kControlBytes);
    segments_.resize(static_cast<size_t>(num_ranks));
    segments_[static_cast<size_t>(rank)] = own_;
}

void Exchange::attach(const std::vector<std::string>& names) {
    map_peer_segments(folder_, names, head(rank_, num_ranks()), kControlBytes, segments_);
    meeting_ = std::make_unique<Meeting>(rank_, segments_, options_.wait);
    statistics_ = std::make_unique<Statistics>(rank_, num_ranks());
}

void Exchange::begin(uint32_t operation, const std::vector<int64_t>& call) {
    meeting_->check_usable(operation);
    if (lent_ != nullptr) {
        // Taken back before anything new is allocated: what the arena needs must not depend on who
        // is faster. The others are reading already, and would be waited for in this call anyway.
        meeting_->wait_finished();
        lent_ = nullptr;
    }
    meeting_->begin(operation);
    Post& post = meeting_->own_post();
    std::fill(std::begin(post.call), std::end(post.call), 0);
    std::copy_n(call.begin(), std::min<size_t>(call.size(), kNumCallFields), post.call);
}

/// Post and wait for the others' posts; whether all agree.
bool Exchange::meet() {
    meeting_->own_post().committed = arena_->committed();
    meeting_->post();
    meeting_->wait_posted();
    return meeting_->is_agreed();
}

void Exchange::report_failure(uint32_t operation, const std::string& error) {
    const std::lock_guard lock(mutex_);
    begin(operation, {});
    Post& post = meeting_->own_post();
    write_error(post, kBadArguments, error);
    meet();
}

std::vector<Exchange::Report> Exchange::reports() const {
    std::vector<Report> reports;
    for (int rank = 0; rank < meeting_->num_ranks(); ++rank) {
        const Post& post = meeting_->post_of(rank);
        const uint32_t kind = post.error_kind;
        std::string error = kind == kNoError ? "" : text_of(post.error);
        if (kind != kNoError && error.empty()) error = "it gives no reason";
        reports.push_back({{std::begin(post.call), std::end(post.call)}, error, kind == kNoMemory});
    }
    return reports;
}

// -- dispatch -------------------------------------------------------------------------------------

Dispatched Exchange::dispatch(const DispatchArgs& args) {
    const std::lock_guard lock(mutex_);
    begin(args.operation, args.call);
    Post& post = meeting_->own_post();
    OwnCounts own;
    if (args.operation == kDispatch) {
        count(args, own);
    }
    std::shared_ptr<Block> block = args.block != nullptr ? args.block : arena_->allocate_largest();
    Offer offer{kNoPlace, 0, kNoPlace, 0};
    std::exception_ptr announcing;
    if (block != nullptr) {
        post.rows_offset = offer.rows_offset = block->offset();
        post.rows_bytes = offer.rows_bytes = block->num_bytes();
    }
    const Dispatched result = take_part(block, [&] {
        return meet() ? dispatch_agreed(args, own, offer, block, announcing) : Dispatched{};
    });
    if (announcing != nullptr) std::rethrow_exception(announcing);
    return result;
}

/// Count where this rank's rows go, and post that, or what is wrong with them.
void Exchange::count(const DispatchArgs& args, OwnCounts& own) {
    Post& post = meeting_->own_post();
    if (args.kept.memory == nullptr)
        return write_error(post, kNoMemory, "no memory for the handle");
    const int64_t wrong = own.count(args.routing, args.routes);
    own.write(post);
    args.kept.copy_idx(args.routing);
    if (wrong != kAllInRange)
        write_error(post, kBadArguments,
                    text("expected topk_idx to be in [0, ", args.routing.num_experts,
                         "), or -1 for an unused slot, got ", wrong));
}

Dispatched Exchange::dispatch_agreed(const DispatchArgs& args,
                                     const OwnCounts& own,
                                     const Offer& offer,
                                     std::shared_ptr<Block>& block,
                                     std::exception_ptr& announcing) {
    const Routing& routing = args.routing;
    PeerCounts counts(routing, rank_, own);
    Dispatched result = plan(args, counts);
    const std::vector<char*> rows = places(args, result.num_rows_per_rank, offer, block);
    std::vector<int64_t> starts;
    if (args.operation == kDispatch) starts = first_rows(routing, counts.totals(), rank_);
    const std::vector<int64_t> num_sent = rows_sent(args, own, result);
    std::vector<Target> targets;
    for (size_t rank = 0; rank < rows.size(); ++rank)
        targets.push_back({rows[rank], Sections(args.row_bytes, result.num_rows_per_rank[rank],
                                                routing.num_topk, routing.expand)});
    result.block = block;
    result.must_copy = arena_->num_bytes_in_use() > options_.max_view_bytes;
    try {
        if (args.on_planned) args.on_planned(result);
    } catch (...) {
        announcing = std::current_exception();
    }
    push(args, targets, starts);
    clear_padding(args, result);
    meeting_->finish();
    const double start = monotonic_seconds();
    meeting_->wait_finished();
    const size_t columns = routing.expand ? 1 : static_cast<size_t>(routing.num_topk);
    const RowBytes& bytes = args.row_bytes;
    statistics_->add(args.operation, meeting_->posting_times(), monotonic_seconds() - start,
                     num_sent, bytes.x + bytes.scales + columns * (bytes.weights + bytes.idx));
    return result;
}

/// How many rows go to each rank. Routes just made end where the counts say; a handle's may be
/// anything, and are checked.
std::vector<int64_t> Exchange::rows_sent(const DispatchArgs& args,
                                         const OwnCounts& own,
                                         const Dispatched& result) const {
    const Routing& routing = args.routing;
    if (args.operation == kDispatch) return own.num_rows(routing);
    const RouteTotals totals(args.routes, routing.num_tokens, routing.num_topk, num_ranks());
    for (size_t rank = 0; rank < totals.end_row.size(); ++rank)
        if (totals.end_row[rank] > result.num_rows_per_rank[rank])
            fail("the handle leads to row ", totals.end_row[rank] - 1, " of ",
                 result.num_rows_per_rank[rank], " on rank ", rank);
    return totals.num_rows;
}

/// What follows from all ranks' counts; for a cached dispatch, from its handle.
Dispatched Exchange::plan(const DispatchArgs& args, PeerCounts& counts) const {
    const Routing& routing = args.routing;
    Dispatched result;
    result.is_agreed = true;
    if (args.operation == kCachedDispatch) {
        result.num_rows_per_rank = args.num_rows_per_rank;
        result.valid_per_expert = args.valid_per_expert;
        return result;
    }
    result.kept = args.kept;
    for (int rank = 0; rank < routing.num_ranks; ++rank) counts.read(rank, meeting_->post_of(rank));
    const Totals totals = counts.totals();
    for (int rank = 0; rank < routing.num_ranks; ++rank) {
        const auto source = static_cast<size_t>(rank);
        result.num_rows_per_rank.push_back(totals.num_rows(routing, rank));
        result.num_tokens_per_rank.push_back(totals.per_rank[static_cast<size_t>(rank_)][rank]);
        result.num_recv_tokens_per_rank.push_back(totals.per_rank[source][rank_]);
    }
    for (int local = 0; local < routing.experts_per_rank(); ++local)
        result.valid_per_expert.push_back(
            totals.valid_rows(rank_ * routing.experts_per_rank() + local));
    return result;
}

/// Where every rank's rows start. Everybody knows from the posts which ranks offered too little and
/// waits for those to offer more; if one cannot, all throw.
std::vector<char*> Exchange::places(const DispatchArgs& args,
                                    const std::vector<int64_t>& num_rows,
                                    const Offer& own_offer,
                                    std::shared_ptr<Block>& block) {
    for (int64_t rows : num_rows)
        if (rows < 0 || rows > std::numeric_limits<int32_t>::max())
            throw AgreedFailure(text(kOperations[args.operation],
                                     ": expected at most 2147483647 rows on a rank, got ", rows));
    const auto num_bytes = [&](int rank) {
        return Sections(args.row_bytes, num_rows[static_cast<size_t>(rank)], args.routing.num_topk,
                        args.routing.expand)
            .end;
    };
    const auto is_enough = [&](int rank, const Offer& offer) {
        return offer.rows_offset != kNoPlace && num_bytes(rank) <= offer.rows_bytes;
    };
    Offer own = own_offer;
    if (is_enough(rank_, own)) {
        arena_->trim(*block, num_bytes(rank_));
    } else {
        block = nullptr;
        std::string error;
        try {
            block = arena_->allocate(num_bytes(rank_));
        } catch (const std::exception& exception) {
            error = exception.what();
        }
        own.rows_offset = block == nullptr ? kNoPlace : block->offset();
        meeting_->grant(own.rows_offset, arena_->committed(), error);
    }
    own.committed = arena_->committed();
    std::vector<char*> starts;
    std::string errors;
    for (int rank = 0; rank < meeting_->num_ranks(); ++rank) {
        Offer offer = rank == rank_ ? own : offer_of(meeting_->post_of(rank));
        if (rank != rank_ && !is_enough(rank, offer)) offer = offer_of(meeting_->granted_by(rank));
        if (offer.rows_offset == kNoPlace)
            errors += text(errors.empty() ? "" : "; ", "rank ", rank, ": ",
                           text_of(meeting_->granted_by(rank).error));
        else
            starts.push_back(checked_place(*segments_[static_cast<size_t>(rank)], rank,
                                           offer.rows_offset, num_bytes(rank), offer.committed,
                                           Arena::kAlignment));
    }
    if (errors.empty()) return starts;
    block = nullptr;
    throw AgreedFailure(text(kOperations[args.operation], ": expected room for all rows, got ",
                             errors, "; raise max_bytes or free memory in ", folder_));
}

/// Write every row to its destinations. `starts`: what a fresh dispatch's routes count from, added
/// to them on the way; empty where they say it all.
void Exchange::push(const DispatchArgs& args,
                    const std::vector<Target>& targets,
                    const std::vector<int64_t>& starts) {
    const Routing& routing = args.routing;
    const auto row_of = [&](size_t token, size_t at, int rank) {
        int32_t& row = args.routes.row[at];
        if (!starts.empty()) {
            const auto key = routing.expand
                                 ? routing.expert(token * static_cast<size_t>(routing.num_topk) +
                                                  static_cast<size_t>(args.routes.slot[at]))
                                 : rank;
            row += static_cast<int32_t>(starts[static_cast<size_t>(key)]);
        }
        return static_cast<size_t>(row);
    };
    const RowBytes& bytes = args.row_bytes;
    const auto num_topk = static_cast<size_t>(routing.num_topk);
    const int num_copies =
        routing.expand ? routing.num_topk : std::min(routing.num_topk, routing.num_ranks);
    const bool is_streaming = streams(static_cast<size_t>(routing.num_tokens) * bytes.x *
                                      static_cast<size_t>(num_copies));
    const RowKernels& kernels = row_kernels();
    const auto copy = is_streaming ? kernels.copy_streaming : kernels.copy;
    const bool has_columns = !routing.expand && bytes.weights + bytes.idx > 0;
    const PushColumns write_columns = push_columns_of(args);
    const size_t source_bytes = args.cast ? args.cast->row_bytes() : bytes.x;
    const auto push_range = [&](int64_t begin, int64_t end) {
        std::optional<CastRow> cast;
        if (args.cast) cast.emplace(*args.cast);
        for (auto token = static_cast<size_t>(begin); token < static_cast<size_t>(end); ++token) {
            const char* source = args.x + token * source_bytes;
            const char* scales = args.cast ? nullptr : args.scales + token * bytes.scales;
            if (token + 1 < static_cast<size_t>(end))
                prefetch_row(source + source_bytes, source_bytes);
            if (cast && args.routes.rank[token * num_topk] >= 0) {
                cast->read(kernels, source);
                source = cast->data();
                scales = cast->scales();
            }
            for (size_t at = token * num_topk; at < (token + 1) * num_topk; ++at) {
                const int rank = args.routes.rank[at];
                if (rank < 0) break;
                const Target& target = targets[static_cast<size_t>(rank)];
                const size_t row = row_of(token, at, rank);
                copy(target.rows + row * bytes.x, source, bytes.x);
                const Sections& sections = target.sections;
                if (bytes.scales != 0)
                    store_scales(target.rows + sections.scales + row * sections.strides.row,
                                 sections.strides.word, scales, bytes.scales);
                char* weights = target.rows + target.sections.weights;
                if (has_columns) {
                    write_columns(args, token, rank, weights + row * bytes.weights * num_topk,
                                  target.rows + sections.idx + row * bytes.idx * num_topk);
                } else if (bytes.weights != 0) {
                    const auto slot = static_cast<size_t>(args.routes.slot[at]);
                    copy_small(weights + row * bytes.weights,
                               args.weights + (token * num_topk + slot) * bytes.weights,
                               bytes.weights);
                }
            }
        }
        if (is_streaming) stream_fence();
    };
    workers_.run(routing.num_tokens, rows_per_thread(source_bytes), push_range);
}

void Exchange::clear_padding(const DispatchArgs& args, const Dispatched& result) {
    const RowBytes& bytes = args.row_bytes;
    const auto num_rows = static_cast<size_t>(result.num_rows_per_rank[static_cast<size_t>(rank_)]);
    const Sections sections(bytes, static_cast<int64_t>(num_rows), args.routing.num_topk,
                            args.routing.expand);
    char* start = result.block->data();
    const auto clear_columns = [&](size_t first, size_t end) {
        char* column = start + sections.scales;
        for (size_t i = 0; i < sections.num_scale_columns; ++i, column += sections.strides.word)
            std::memset(column + 4 * first, 0, 4 * (end - first));
    };
    clear_columns(num_rows, sections.num_scale_rows);
    if (!args.routing.expand || args.routing.alignment == 1) return;
    size_t row = 0;
    for (int64_t valid : result.valid_per_expert) {
        const size_t first = row + static_cast<size_t>(valid);
        row += round_up(static_cast<size_t>(valid), static_cast<size_t>(args.routing.alignment));
        std::memset(start + first * bytes.x, 0, (row - first) * bytes.x);
        if (bytes.scales_by_column)
            clear_columns(first, row);
        else
            std::memset(start + sections.scales + first * bytes.scales, 0,
                        (row - first) * bytes.scales);
        std::memset(start + sections.weights + first * bytes.weights, 0,
                    (row - first) * bytes.weights);
    }
}

void Exchange::widen(const Fp8Cast& cast,
                     char* out,
                     const char* data,
                     const char* scales,
                     ScaleStrides strides,
                     int64_t num_rows) {
    const std::lock_guard lock(mutex_);
    workers_.run(num_rows, rows_per_thread(cast.row_bytes()), [&](int64_t begin, int64_t end) {
        const auto first = static_cast<size_t>(begin);
        dequantize_rows(row_kernels(), cast, out + first * cast.row_bytes(),
                        data + first * cast.hidden, scales + first * strides.row, strides,
                        static_cast<size_t>(end) - first);
    });
}

std::shared_ptr<Block> Exchange::allocate(size_t num_bytes) {
    if (arena_->num_bytes_in_use() + num_bytes > options_.max_view_bytes) return nullptr;
    try {
        return arena_->allocate(num_bytes);
    } catch (const std::exception&) {
        return nullptr;  // ordinary memory will do
    }
}

std::vector<CallStatistics> Exchange::statistics() const {
    return statistics_ == nullptr ? std::vector<CallStatistics>{} : statistics_->copy();
}

void Exchange::close() {
    const std::lock_guard lock(mutex_);
    lent_ = nullptr;
    own_->unlink();
    if (meeting_ != nullptr) meeting_->leave();
}

}  // namespace ep
