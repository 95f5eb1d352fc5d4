#include "cuda/cross.h"
#include "cuda/plan_checks.h"

namespace ep::cuda {

Launch plan_cross_wait(const CrossWaitArgs& args) {
    constexpr const char* kOperation = "cross wait";
    require_range(kOperation, "the number of ranks", args.num_ranks, 1, kMaxRanks);
    require(args.epoch != 0, kOperation, "the number of the exchange", "at least 1", args.epoch);
    return {"ep_cross_wait_kernel", 1, kArriveThreads, 0,
            std::string(reinterpret_cast<const char*>(&args), sizeof args)};
}

}  // namespace ep::cuda
