#include "cuda/packed_launch.h"

#include <algorithm>

#include "cuda/plan_checks.h"

namespace ep::cuda {
namespace {

constexpr const char* kNames[] = {"begin", "push",   "stage", "post", "meet", "take",
                                  "sum",   "finish", "mask",  "send", "tell"};

void check_sizes(const char* operation, const PackedArgs& args) {
    require_range(operation, "num_experts", args.num_experts, args.num_ranks, kMaxExperts);
    require_multiple(operation, "num_experts", args.num_experts, args.num_ranks);
    require_range(operation, "the tokens of a rank", args.max_tokens, 1,
                  kMaxSlots / args.num_ranks);
    require_range(operation, "hidden", args.hidden, 128, kMaxHidden);
    require_multiple(operation, "hidden", args.hidden, 128);
    require_range(operation, "num_tokens", args.num_tokens, 0, args.max_tokens);
    require_range(operation, "the columns of topk_idx", args.num_topk, 1, kMaxTopk);
    require_range(operation, "the slots of topk_idx", args.num_tokens * args.num_topk, 0,
                  kMaxSlots);
    require_aligned(operation, "the address of x", args.x, 16);
    require_aligned(operation, "the address of the result", args.out, 16);
}

/// Two places, of calls of even and of odd number, for a block per expert.
void check_places(const char* operation,
                  const char* what,
                  const PackedArgs& args,
                  uint64_t first,
                  int64_t block_bytes) {
    const auto begin = static_cast<int64_t>(first);
    const auto place_bytes = static_cast<int64_t>(args.place_bytes);
    require_multiple(operation, text("where ", what, " are").c_str(), begin, 16);
    require_range(operation, text("the bytes of ", what).c_str(), args.num_experts * block_bytes, 0,
                  place_bytes);
    require_range(operation, text("where ", what, " end").c_str(), begin + 2 * place_bytes, 0,
                  static_cast<int64_t>(args.window_bytes));
}

/// A part for each rank, with a block for each of its experts.
void check_outbox(const char* operation, const PackedArgs& args, int64_t block_bytes) {
    const auto part_bytes = static_cast<int64_t>(args.part_bytes);
    check_places(operation, "outgoing rows", args, args.outbox, block_bytes);
    require_multiple(operation, "a rank's part of outgoing rows", part_bytes, 16);
    require_range(operation, "a rank's part of outgoing rows", part_bytes,
                  args.num_experts / args.num_ranks * block_bytes,
                  static_cast<int64_t>(args.place_bytes) / args.num_ranks);
}

/// Whether the rows of a dispatch are cast.
bool check_slots(const char* operation, const PackedArgs& args) {
    const bool is_cast = args.scale_bytes != 0;
    require(args.x_bytes == (is_cast ? 1 : 2) * args.hidden, operation, "the bytes of a row",
            text((is_cast ? 1 : 2) * args.hidden), args.x_bytes);
    require_multiple(operation, "the bytes of a row's scales", args.scale_bytes, 4);
    require(args.slot_bytes == (args.x_bytes + args.scale_bytes + 15) / 16 * 16, operation,
            "the bytes of a slot", text((args.x_bytes + args.scale_bytes + 15) / 16 * 16),
            args.slot_bytes);
    const int64_t block = (int64_t{4} * args.max_tokens + 15) / 16 * 16 +
                          static_cast<int64_t>(args.max_tokens) * args.slot_bytes;
    require(static_cast<int64_t>(args.block_bytes) == block, operation,
            "the bytes of a block of slots", text(block), args.block_bytes);
    check_places(operation, "slots", args, args.slots, block);
    check_outbox(operation, args, block);
    if (!is_cast) return false;
    const bool is_packed = args.recipe.scale_format == kPackedScales;
    require(args.recipe.lanes_per_block == 128 / kCastColumns, operation, "the columns of a block",
            "128", args.recipe.lanes_per_block * kCastColumns);
    require(args.scale_bytes == args.hidden / 128 * (is_packed ? 1 : 4), operation,
            "the bytes of a row's scales", text(args.hidden / 128 * (is_packed ? 1 : 4)),
            args.scale_bytes);
    return true;
}

void check_rows_inside(const char* operation, const PackedArgs& args) {
    const int64_t rows = static_cast<int64_t>(args.num_experts) * args.max_tokens;
    require_multiple(operation, "where rows are", static_cast<int64_t>(args.head.rows), 16);
    require_range(operation, "where rows end",
                  static_cast<int64_t>(args.head.rows) + rows * args.hidden * 2, 0,
                  static_cast<int64_t>(args.window_bytes));
}

unsigned blocks_for(int64_t num_rows, int num_sms) {
    const int64_t wanted = (num_rows + kRowWarps - 1) / kRowWarps;
    return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, num_sms));
}

}  // namespace

Launch plan_packed(PackedStep step, const PackedArgs& args, int num_sms) {
    const std::string name = text("low-latency ", kNames[static_cast<int>(step)]);
    const char* operation = name.c_str();
    require_range(operation, "the number of ranks", args.num_ranks, 1, kMaxRanks);
    require_range(operation, "rank", args.rank, 0, args.num_ranks - 1);
    require_range(operation, "the SMs", num_sms, 1, 1024);
    const bool is_of_a_call =
        step != PackedStep::kBegin && step != PackedStep::kMask && step != PackedStep::kTell;
    require_range(operation, "where the call's number is", args.call, is_of_a_call ? 0 : -1,
                  kCallsUnderWay - 1);
    require_range(operation, "the place of rows", args.rows_place, -1, kRowsPlaces - 1);
    require_multiple(operation, "the bytes of a place", static_cast<int64_t>(args.place_bytes), 16);
    require(step != PackedStep::kMask || args.mask_rank < args.num_ranks, operation,
            "the rank to mask", text("below ", args.num_ranks), args.mask_rank);
    const bool has_sizes = args.operation != kPackedNothing;
    std::string kernel = text("ep_packed_", kNames[static_cast<int>(step)], "_kernel");
    unsigned grid = 1, block = kMaskThreads;
    if (step == PackedStep::kPost || step == PackedStep::kMeet) {
        if (has_sizes) check_sizes(operation, args);
        block = kMeetThreads;
    } else if (step == PackedStep::kPush || step == PackedStep::kTake ||
               step == PackedStep::kStage || step == PackedStep::kSum) {
        check_sizes(operation, args);
        block = kRowWarps * kWarpSize;
        const bool is_by_token = step == PackedStep::kPush || step == PackedStep::kSum;
        grid = blocks_for(is_by_token ? args.num_tokens
                                      : static_cast<int64_t>(args.num_experts) * args.max_tokens,
                          num_sms);
        if (step == PackedStep::kStage) check_rows_inside(operation, args);
        const int64_t row_block = int64_t{2} * args.max_tokens * args.hidden;
        if (step == PackedStep::kStage) check_outbox(operation, args, row_block);
        if (step == PackedStep::kSum)
            check_places(operation, "incoming rows", args, args.inbox, row_block);
        if ((step == PackedStep::kPush || step == PackedStep::kTake) &&
            check_slots(operation, args) && step == PackedStep::kPush)
            kernel = "ep_packed_push_cast_kernel";
    } else if (step == PackedStep::kSend) {
        if (has_sizes) check_sizes(operation, args);
        if (args.operation == kPackedDispatch) check_slots(operation, args);
        if (args.operation == kPackedCombine) {
            check_rows_inside(operation, args);
            const int64_t row_block = int64_t{2} * args.max_tokens * args.hidden;
            check_outbox(operation, args, row_block);
            check_places(operation, "incoming rows", args, args.inbox, row_block);
        }
        block = kRowWarps * kWarpSize;
        grid = blocks_for(args.num_experts + args.num_ranks, num_sms);
    }
    return {std::move(kernel), grid, block, 0,
            std::string(reinterpret_cast<const char*>(&args), sizeof args)};
}

}  // namespace ep::cuda
