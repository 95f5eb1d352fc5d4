#pragma once
// Low-latency dispatch and combine between the ranks of one host. Rows stay where they were written
// until whoever needs them takes them: a sending half writes a token once, however many experts it
// goes to, and a receiving half reads rows from the peers straight into their place.
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cpu/arena.h"
#include "cpu/fp8_rows.h"
#include "cpu/packed_meeting.h"
#include "cpu/rows.h"
#include "cpu/workers.h"

namespace ep {

/// Token slots `[num_tokens, num_topk]`, -1 where unused.
struct PackedTopk {
    const void* idx;
    bool is_int64;
    int64_t num_tokens;
    int num_topk;

    int64_t at(int64_t slot) const {
        return is_int64 ? static_cast<const int64_t*>(idx)[slot]
                        : static_cast<const int32_t*>(idx)[slot];
    }
    int64_t num_slots() const { return num_tokens * num_topk; }
};

/// What the ranks agree on, in the order of the first fields of a call; see packed.py.
struct PackedSizes {
    int64_t max_tokens;  // of a rank
    int64_t hidden;
    int64_t num_experts;
    bool use_logfmt;  // rows of a combine
};

/// Where a dispatch puts rows: `[E/R, R * max_tokens, ...]`.
struct PackedOut {
    char* x;
    char* scales;  // by column, or null
    int32_t* count;
    int32_t* src_info;
    int64_t* layout_range;  // [E/R, R]
    int64_t* waited;        // [R] nanoseconds, added to
};

/// One rank's end. Sending halves come in the same order on all ranks; calls are serialised.
class LowLatency {
 public:
    struct Report {
        int rank;
        std::vector<int64_t> call;
        std::string error;
    };
    struct Options {
        size_t max_bytes;
        int num_threads;
        bool enable_shrink;
        WaitOptions wait;
    };

    LowLatency(std::string folder, std::string name, int rank, int num_ranks, Options options);
    void attach(const std::vector<std::string>& names);
    void unlink() { own_->unlink(); }
    void close();

    /// Sending halves; each returns its call's number. Bad values are reported to the peers, then
    /// thrown as std::invalid_argument.
    uint32_t send_dispatch(const std::vector<int64_t>& call,
                           const char* x,
                           const PackedTopk& topk,
                           const PackedSizes& sizes,
                           const std::optional<Fp8Cast>& cast);
    /// @param layout_range  [E/R, R] as the dispatch wrote it.
    /// @param place         where x lies if peers may read it there, else null.
    uint32_t send_combine(const std::vector<int64_t>& call,
                          const char* x,
                          const int64_t* layout_range,
                          const PackedTopk& topk,
                          const PackedSizes& sizes,
                          const std::shared_ptr<Block>& place);
    uint32_t send_nothing(uint32_t operation, const std::vector<int64_t>& call);
    /// Both halves of a call in which this rank only says why it cannot take part.
    void report_failure(uint32_t operation, const std::string& error);

    /// Receiving halves; false if the ranks do not agree: see reports(), nothing was written.
    bool receive_dispatch(uint32_t epoch,
                          const PackedSizes& sizes,
                          const std::optional<Fp8Cast>& cast,
                          const PackedOut& out);
    /// Also returns the ranks whose rows are not those that `topk` names; nothing was written then.
    /// @param num_bytes  [R], the bytes of rows that were read from each rank are added.
    bool receive_combine(uint32_t epoch,
                         const PackedTopk& topk,
                         const float* weights,
                         const PackedSizes& sizes,
                         char* out,
                         int64_t* waited,
                         int64_t* num_bytes,
                         std::vector<int>& other_routing);
    bool receive_nothing(uint32_t operation, uint32_t epoch);
    /// What each rank that is not masked said of the call that was received last.
    const std::vector<Report>& reports() const { return reports_; }

    std::shared_ptr<Block> allocate(size_t num_bytes) { return arena_->allocate(num_bytes); }
    void mask(int rank, bool is_masked);
    std::vector<int> masks();
    void interrupt() {
        if (meeting_ != nullptr) meeting_->interrupt();
    }
    /// Move rows on at most as many threads, within `options.num_threads`.
    void limit_threads(int num_threads) { workers_.limit(num_threads); }
    int num_ranks() const { return static_cast<int>(segments_.size()); }
    size_t committed() const { return arena_->committed(); }

 private:
    /// What a rank that is not masked has sent, within the bounds of its segment.
    struct Source {
        int rank;
        const char* rows;
        size_t row_stride;
        int64_t num_rows;
        const char* lists;
        int64_t num_listed;
    };

    static constexpr int64_t kTokensPerThread = 32;  // fewer are not worth a second thread
    static constexpr int64_t kBlocksPerThread = 4;
    static constexpr uint32_t kDispatchCall = 0, kCombineCall = 1;

    uint32_t begin(uint32_t operation, const std::vector<int64_t>& call);
    char* stage(std::shared_ptr<Block>& block, uint32_t epoch, size_t num_bytes);
    [[noreturn]] void refuse(uint32_t epoch, const std::string& error);
    void check_range(uint32_t epoch, const PackedTopk& topk, int64_t num_experts);
    bool meet(uint32_t operation, uint32_t epoch, int64_t* waited);
    bool is_any_masked(const std::vector<Source>& sources) const;
    std::vector<Source> sources(uint32_t epoch, size_t row_bytes, size_t lists_bytes);
    int take_rows(const std::vector<Source>& sources,
                  const PackedSizes& sizes,
                  const std::optional<Fp8Cast>& cast,
                  const PackedOut& out);

    const int rank_;
    const std::string folder_;
    const Options options_;
    std::shared_ptr<Segment> own_;
    std::shared_ptr<Arena> arena_;
    std::vector<std::shared_ptr<Segment>> segments_;
    std::unique_ptr<PackedMeeting> meeting_;
    std::shared_ptr<Block> rows_[2], lists_[2];  // of the calls that peers may still read
    std::vector<Report> reports_;
    Workers workers_;
    std::mutex mutex_;
};

}  // namespace ep
