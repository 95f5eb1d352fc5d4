#include "cuda/cross.h"
#include "cuda/plan_checks.h"

namespace ep::cuda {
namespace {

void check_nodes(const char* operation, int64_t num_tokens, int num_topk, int num_nodes) {
    require_range(operation, "the columns of topk_idx", num_topk, 1, kMaxTopk);
    require_range(operation, "the nodes", num_nodes, 1, kMaxTopk);
    require_range(operation, "the slots of topk_idx", num_tokens * num_topk, 0, kMaxSlots);
}

template <class Args>
Launch launch_tokens(const char* kernel, int num_sms, const Args& args) {
    return {kernel, num_row_blocks(args.num_tokens, num_sms), kRowWarps * kWarpSize, 0,
            std::string(reinterpret_cast<const char*>(&args), sizeof args)};
}

}  // namespace

Launch plan_cross_lay(const CrossLayArgs& args, int num_sms) {
    check_nodes("cross lay", args.num_tokens, args.num_topk, args.num_nodes);
    require_range("cross lay", "the experts of a rank", args.experts_per_rank, 1, kMaxExperts);
    return launch_tokens("ep_cross_lay_kernel", num_sms, args);
}

Launch plan_cross_weights(const CrossWeightsArgs& args, int num_sms) {
    check_nodes("cross weights", args.num_tokens, args.num_topk, args.num_nodes);
    require(args.weight_bytes == 4 || args.weight_bytes == 8, "cross weights",
            "the bytes of a weight", "4 or 8", args.weight_bytes);
    return launch_tokens("ep_cross_weights_kernel", num_sms, args);
}

Launch plan_cross_wait(const CrossWaitArgs& args) {
    constexpr const char* kOperation = "cross wait";
    require_range(kOperation, "the number of ranks", args.num_ranks, 1, kMaxRanks);
    require(args.epoch != 0, kOperation, "the number of the exchange", "at least 1", args.epoch);
    return {"ep_cross_wait_kernel", 1, kArriveThreads, 0,
            std::string(reinterpret_cast<const char*>(&args), sizeof args)};
}

Launch plan_cross_put(const CrossPutArgs& args) {
    require_range("cross put", "the number of ranks", args.num_ranks, 1, kMaxRanks);
    for (const int32_t place_bytes : args.place_bytes)
        require_multiple("cross put", "the bytes of a part of 16 places",
                         place_bytes * kPileAlignment, 16);
    return {"ep_cross_put_kernel",
            num_row_blocks(static_cast<int64_t>(args.num_ranks) * kNumCrossParts, kMaxRanks),
            kRowWarps * kWarpSize, 0,
            std::string(reinterpret_cast<const char*>(&args), sizeof args)};
}

Launch plan_cross_await(const CrossAwaitArgs& args) {
    require_range("cross await", "the number of ranks", args.num_ranks, 1, kMaxRanks);
    return {"ep_cross_await_kernel", 1, kArriveThreads, 0,
            std::string(reinterpret_cast<const char*>(&args), sizeof args)};
}

}  // namespace ep::cuda
