#pragma once
// Dispatch and combine between the ranks of one host: every row goes straight to its address.
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cpu/arena.h"
#include "cpu/fp8_rows.h"
#include "cpu/meeting.h"
#include "cpu/peers.h"
#include "cpu/plan.h"
#include "cpu/rows.h"
#include "cpu/statistics.h"
#include "cpu/workers.h"

namespace ep {

struct ExchangeOptions {
    size_t max_bytes;        // of shared memory for rows
    size_t max_view_bytes;   // beyond it received rows are to be copied out
    size_t streaming_bytes;  // writes of as many bytes by all ranks use non-temporal stores
    int num_threads;
    WaitOptions wait;
};

/// Sizes of what belongs to one row; 0 where a part is absent.
struct RowBytes {
    size_t x;
    size_t scales;
    size_t weights;  // of one weight
    size_t idx;      // of one expert index
    bool scales_by_column = false;
};

/// Where the parts of `num_rows` received rows lie in a block.
struct Sections {
    Sections(const RowBytes& row, int64_t num_rows, int num_topk, bool expand);
    size_t scales, weights, idx, end;
    ScaleStrides strides;      // of the scales
    size_t num_scale_columns;  // by column only, where each column is padded to
    size_t num_scale_rows;     // this many words
};

struct Dispatched;

struct DispatchArgs {
    uint32_t operation;  // dispatch or cached dispatch
    std::vector<int64_t> call;
    Routing routing;                         // cached: without topk_idx
    KeptRouting kept;                        // not cached: filled
    Routes routes;                           // of `kept`, or of a handle
    std::vector<int64_t> num_rows_per_rank;  // cached only
    std::vector<int64_t> valid_per_expert;   // cached only, of this rank's experts
    RowBytes row_bytes;                      // as they travel
    std::optional<Fp8Cast> cast;             // x is cast on its way; its scales are made, not given
    const char* x;
    const char* scales;
    const char* weights;           // [T, K]
    std::shared_ptr<Block> block;  // where rows shall arrive; null: in the arena's largest part
    /// Called once every size is known, before a row moves, from the calling thread. May throw: the
    /// rows move all the same, as the other ranks count on it, and then dispatch throws.
    std::function<void(const Dispatched&)> on_planned;
};

struct Dispatched {
    bool is_agreed = false;
    std::shared_ptr<Block> block;  // its parts lie as Sections says
    bool must_copy = false;        // too many bytes are in views already
    KeptRouting kept;              // of a dispatch that was not cached
    std::vector<int64_t> num_rows_per_rank;
    std::vector<int64_t> num_tokens_per_rank;       // this rank's, by destination
    std::vector<int64_t> num_recv_tokens_per_rank;  // by source
    std::vector<int64_t> valid_per_expert;          // of this rank's experts
};

struct CombineArgs {
    std::vector<int64_t> call;
    Routes routes;
    std::vector<int64_t> num_rows_per_rank;  // that each rank brings
    int64_t num_tokens;
    int num_topk;
    bool expand;
    int64_t num_rows;  // of x
    DType dtype;
    size_t hidden;
    size_t weight_bytes;  // 0, 4 or 8
    const char* x;
    const char* weights;
    const char* bias_0;
    const char* bias_1;
    char* out;          // [T, hidden]
    char* out_weights;  // [T, K]
};

/// One rank's end. Calls are collective and come in the same order on all ranks; they are
/// serialised, release nothing of Python, and throw as Meeting does.
class Exchange {
 public:
    struct Report {
        std::vector<int64_t> call;
        std::string error;  // "" if the rank reports none
        bool is_out_of_memory;
    };

    Exchange(std::string folder, std::string name, int rank, int num_ranks, ExchangeOptions);
    /// Map the peers' segments, `names` by rank. The name of this rank's stays until unlink().
    void attach(const std::vector<std::string>& names);
    void unlink() { own_->unlink(); }
    /// Make `num_bytes` of the arena ready.
    void reserve(size_t num_bytes) { arena_->reserve(num_bytes); }

    Dispatched dispatch(const DispatchArgs& args);
    /// Whether the ranks agreed; if not, nothing was written.
    bool combine(const CombineArgs& args);
    /// Widen received rows. Local.
    void widen(const Fp8Cast& cast,
               char* out,
               const char* data,
               const char* scales,
               ScaleStrides strides,
               int64_t num_rows);
    /// Take part in a call only to say why this rank cannot.
    void report_failure(uint32_t operation, const std::string& error);
    /// What each rank said of the last call: its description, and its error.
    std::vector<Report> reports() const;

    /// Memory for a tensor of this rank's own, warm where fresh memory would have to be faulted in
    /// page by page; null when views hold as much as they may.
    std::shared_ptr<Block> allocate(size_t num_bytes);

    /// Make a call that waits in another thread give up; nothing else may follow but close().
    void interrupt() {
        if (meeting_ != nullptr) meeting_->interrupt();
    }
    /// Move rows on at most as many threads, within `options.num_threads`.
    void limit_threads(int num_threads) { workers_.limit(num_threads); }
    /// Copies of what was counted, one per operation; any thread may ask, at any time.
    std::vector<CallStatistics> statistics() const;

    void close();
    int num_ranks() const { return static_cast<int>(segments_.size()); }
    /// Whether a call broke down: no other will go on.
    bool is_broken() const { return meeting_ != nullptr && meeting_->is_broken(); }
    size_t committed() const { return arena_->committed(); }
    size_t num_bytes_in_use() const { return arena_->num_bytes_in_use(); }

 private:
    struct Target;
    struct Staged;
    /// The ranks share the last-level cache, so what counts is what all of them write, about as
    /// much as this one each.
    bool streams(size_t num_bytes) const {
        return num_bytes * segments_.size() >= options_.streaming_bytes;
    }
    void begin(uint32_t operation, const std::vector<int64_t>& call);
    bool meet();
    template <class Call>
    auto take_part(const std::shared_ptr<Block>& block, const Call& call);
    void count(const DispatchArgs& args, OwnCounts& own);
    Dispatched dispatch_agreed(const DispatchArgs& args,
                               const OwnCounts& own,
                               const Offer& offer,
                               std::shared_ptr<Block>& block,
                               std::exception_ptr& announcing);
    Dispatched plan(const DispatchArgs& args, PeerCounts& counts) const;
    std::vector<int64_t> rows_sent(const DispatchArgs& args,
                                   const OwnCounts& own,
                                   const Dispatched& result) const;
    std::vector<char*> places(const DispatchArgs& args,
                              const std::vector<int64_t>& num_rows,
                              const Offer& own_offer,
                              std::shared_ptr<Block>& block);
    void push(const DispatchArgs& args,
              const std::vector<Target>& targets,
              const std::vector<int64_t>& starts);
    void clear_padding(const DispatchArgs& args, const Dispatched& result);
    Staged stage(const CombineArgs& args);
    std::vector<int64_t> pull(const CombineArgs& args);
    template <class Weight>
    void pull_weights(const CombineArgs& args, const std::vector<const char*>& peers);

    const int rank_;
    const std::string folder_;
    const ExchangeOptions options_;
    std::shared_ptr<Segment> own_;
    std::shared_ptr<Arena> arena_;
    std::vector<std::shared_ptr<Segment>> segments_;
    std::unique_ptr<Meeting> meeting_;
    std::unique_ptr<Statistics> statistics_;
    std::shared_ptr<Block> lent_;     // peers may read it until they have finished the last call
    std::shared_ptr<Block> retired_;  // of a call that broke down: late ranks may still write there
    Workers workers_;
    std::mutex mutex_;
};

}  // namespace ep
