#include "cuda/launch.h"

#include <algorithm>

#include "cuda/plan_checks.h"

namespace ep::cuda {
namespace {

constexpr int64_t kTokensPerScanWarp = 8;  // fewer are not worth another block
constexpr int kMaxItemBytes = 8;
constexpr int64_t kStageBytesPerBlock = 64 * 1024;

constexpr const char* kNames[] = {"bfloat16", "float16", "float32", "float64"};

int item_bytes(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

void check_ranks(const char* operation, int num_ranks, int rank) {
    require_range(operation, "the number of ranks", num_ranks, 1, kMaxRanks);
    require_range(operation, "rank", rank, 0, num_ranks - 1);
}

void check_tokens(const char* operation, int64_t num_tokens, int num_topk) {
    require_range(operation, "the columns of topk_idx", num_topk, 1, kMaxTopk);
    require_range(operation, "the slots of topk_idx", num_tokens * num_topk, 0, kMaxSlots);
}

/// `plane`: int32 from one number of a route to the next.
void check_routes(const char* operation, int64_t num_tokens, int num_topk, int64_t plane) {
    check_tokens(operation, num_tokens, num_topk);
    require_range(operation, "the plane of the routes", plane, num_tokens * num_topk, kMaxSlots);
}

void check_row(const char* operation, int row_bytes, int item_bytes) {
    require_multiple(operation, "the bytes of a row", row_bytes, 16);
    require_range(operation, "hidden", row_bytes / item_bytes, 1, kMaxHidden);
}

template <class Args>
Launch launch(std::string kernel, unsigned grid, int block, size_t shared_bytes, const Args& args) {
    return {std::move(kernel), grid, static_cast<unsigned>(block), shared_bytes,
            std::string(reinterpret_cast<const char*>(&args), sizeof args)};
}

template <class Args>
Launch launch_rows(std::string kernel, unsigned grid, const Args& args) {
    return launch(std::move(kernel), grid, kRowWarps * kWarpSize, 0, args);
}

Launch plan_scan(
    const char* operation, const char* kernel, ScanArgs args, int num_keys, int num_sms) {
    check_tokens(operation, args.num_tokens, args.num_topk);
    check_ranks(operation, args.num_ranks, 0);
    require_range(operation, "num_experts", args.num_experts, 1, kMaxExperts);
    require_multiple(operation, "num_experts", args.num_experts, args.num_ranks);
    require_range(operation, "the nodes", args.num_nodes, 0, kMaxNodes);
    require_range(operation, "the SMs", num_sms, 1, 1024);
    args.experts_per_rank = args.num_experts / args.num_ranks;
    args.topk_shift = 0;
    while (1 << args.topk_shift < args.num_topk) ++args.topk_shift;
    return launch(kernel, num_scan_blocks(args.num_tokens, num_sms), kScanWarps * kWarpSize,
                  sizeof(int32_t) * kScanWarps * static_cast<size_t>(num_keys), args);
}

void check_dispatch(const DispatchArgs& args) {
    constexpr const char* kOperation = "dispatch";
    check_routes(kOperation, args.num_tokens, args.num_topk, args.route_plane);
    require_range(kOperation, "rank", args.rank, 0, kMaxRanks - 1);
    require_multiple(kOperation, "the bytes of a row's scales", args.scale_bytes, 4);
    require(args.weight_bytes == 0 || args.weight_bytes == 4 || args.weight_bytes == 8, kOperation,
            "the bytes of a weight", "0, 4 or 8", args.weight_bytes);
    require(args.idx_bytes == 0 || args.idx_bytes == 4 || args.idx_bytes == 8, kOperation,
            "the bytes of an index", "0, 4 or 8", args.idx_bytes);
    require(args.link_bytes == 0 || args.link_bytes == sizeof(RowLink), kOperation,
            "the bytes of a link", "0 or 8", args.link_bytes);
    require(args.link_bytes != 0 || !args.expand || args.num_topk == 1, kOperation,
            "the bytes of a link by expert", "8", args.link_bytes);
    require_range(kOperation, "expert_alignment", args.alignment, 1, 1 << 20);
    require_range(kOperation, "the experts of a rank", args.experts_per_rank, 1, kMaxExperts);
    require_aligned(kOperation, "the address of x", args.x, 16);
    for (const char* row : args.to_x)
        require_aligned(kOperation, "the address of received rows", row, 16);
}

void check_stage(const char* operation, const StageArgs& args) {
    require_multiple(operation, "the bytes of the rows", args.num_row_bytes, 16);
    require_multiple(operation, "the bytes of the weights", args.num_weight_bytes, 4);
    require_aligned(operation, "the address of the rows", args.rows, 16);
    require_aligned(operation, "where the rows go", args.to_rows, 16);
}

/// Returns the bytes of a row's scales.
int64_t check_recipe(const char* operation, const CastRecipe& recipe, int hidden) {
    require(recipe.lanes_per_block == 8 || recipe.lanes_per_block == 2, operation,
            "the columns of a block", "128 or 32", recipe.lanes_per_block * kCastColumns);
    require_range(operation, "the format of scales", recipe.scale_format, kFloat32Scales,
                  kPackedScales);
    const bool is_packed = recipe.scale_format == kPackedScales;
    const int block = recipe.lanes_per_block * kCastColumns;
    require_multiple(operation, "hidden of rows to cast", hidden, is_packed ? 4 * block : block);
    return hidden / block * (is_packed ? 1 : 4);
}

}  // namespace

unsigned num_scan_blocks(int64_t num_tokens, int num_sms) {
    const int64_t wanted = num_tokens / (kTokensPerScanWarp * kScanWarps);
    return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, num_sms));
}

unsigned num_row_blocks(int64_t num_rows, int num_sms) {
    const int64_t wanted = (num_rows + kRowWarps - 1) / kRowWarps;
    return static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, num_sms));
}

Launch plan_count(ScanArgs args, int num_sms) {
    const int num_keys = args.num_experts + args.num_ranks + args.num_nodes;
    return plan_scan("count", "ep_count_kernel", args, num_keys, num_sms);
}

Launch plan_route(ScanArgs args, int num_sms) {
    return plan_scan("route", "ep_route_kernel", args,
                     (args.expand ? args.num_experts : args.num_ranks) + args.num_nodes, num_sms);
}

Launch plan_notify(const NotifyArgs& args) {
    check_ranks("notify", args.num_ranks, args.rank);
    require(args.ticket != 0, "notify", "the number of the host's wait", "at least 1", args.ticket);
    require(args.numbers == nullptr || args.has_counts, "notify", "the numbers",
            "those of a fresh dispatch", args.has_counts);
    if (args.has_counts) {
        require_range("notify", "num_experts", args.num_experts, 1, kMaxExperts);
        require_range("notify", "expert_alignment", args.alignment, 1, 1 << 20);
        require_range("notify", "the blocks of the count", args.num_blocks, 1, 1024);
        require(args.experts_per_rank == args.num_experts / args.num_ranks, "notify",
                "the experts of a rank", text(args.num_experts / args.num_ranks),
                args.experts_per_rank);
    }
    return launch("ep_notify_kernel", 1, kNotifyThreads, 0, args);
}

Launch plan_notify_send(const NotifyArgs& args) {
    check_ranks("notify", args.num_ranks, args.rank);
    return launch_rows("ep_notify_send_kernel", num_row_blocks(args.num_ranks, kMaxRanks), args);
}

Launch plan_arrive(const ArriveArgs& args) {
    check_ranks("arrive", args.num_ranks, args.rank);
    return launch("ep_arrive_kernel", 1, kArriveThreads, 0, args);
}

Launch plan_dispatch(const DispatchArgs& args, int num_sms) {
    check_dispatch(args);
    check_row("dispatch", args.row_bytes, kMaxItemBytes);  // of whatever dtype
    require(args.out_row_bytes == args.row_bytes, "dispatch", "the bytes of a received row",
            text(args.row_bytes), args.out_row_bytes);
    return launch_rows("ep_dispatch_kernel", num_row_blocks(args.num_tokens, num_sms), args);
}

Launch plan_dispatch_cast(const DispatchArgs& args, DType dtype, int num_sms) {
    check_dispatch(args);
    require(dtype != DType::kFloat64, "dispatch", "the dtype of rows to cast",
            "bfloat16, float16 or float32", 64);
    check_row("dispatch", args.row_bytes, item_bytes(dtype));
    const int hidden = args.row_bytes / item_bytes(dtype);
    require(args.out_row_bytes == hidden, "dispatch", "the bytes of a received row", text(hidden),
            args.out_row_bytes);
    const int64_t scale_bytes = check_recipe("dispatch", args.recipe, hidden);
    require(args.scale_bytes == scale_bytes, "dispatch", "the bytes of a row's scales",
            text(scale_bytes), args.scale_bytes);
    return launch_rows(text("ep_dispatch_cast_", kNames[static_cast<int>(dtype)], "_kernel"),
                       num_row_blocks(args.num_tokens, num_sms), args);
}

Launch plan_expand(const ExpandArgs& args, int num_sms) {
    check_row("expand", args.row_bytes, kMaxItemBytes);  // of whatever dtype
    require_multiple("expand", "the bytes of a row's scales", args.scale_bytes, 4);
    require_range("expand", "the rows", args.num_rows, 0, kMaxSlots);
    require_aligned("expand", "the address of the rows", args.x, 16);
    require_aligned("expand", "the address of the links", args.links, 8);
    return launch_rows("ep_expand_kernel", num_row_blocks(args.num_rows, num_sms), args);
}

Launch plan_take(const TakeArgs& args, int num_sms) {
    check_row("take", args.row_bytes, kMaxItemBytes);  // of whatever dtype
    require_multiple("take", "the bytes of a row's scales", args.scale_bytes, 4);
    require_multiple("take", "the bytes of a row's weights", args.weight_bytes, 4);
    require_multiple("take", "the bytes of a row's indices", args.idx_bytes, 4);
    require_range("take", "the rows", args.capacity, 1, kMaxSlots);
    require_aligned("take", "where the rows go", args.x, 16);
    require_aligned("take", "the address of the links", args.links, 8);
    return launch_rows("ep_take_kernel", num_row_blocks(args.capacity, num_sms), args);
}

Launch plan_stage(const StageArgs& args, int num_sms) {
    check_stage("stage", args);
    const int64_t num_bytes = args.num_row_bytes + args.num_weight_bytes;
    const int64_t wanted = (num_bytes + kStageBytesPerBlock - 1) / kStageBytesPerBlock;
    return launch_rows("ep_stage_kernel",
                       static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, num_sms)), args);
}

Launch plan_reduce(const ReduceArgs& args, DType dtype, int num_sms) {
    check_stage("reduce", args.stage);
    check_row("reduce", args.row_bytes, item_bytes(dtype));
    require_range("reduce", "the rows", args.num_rows, 0, kMaxSlots);
    require(args.stage.num_row_bytes == args.num_rows * args.row_bytes, "reduce",
            "the bytes of the rows", text(args.num_rows * args.row_bytes),
            args.stage.num_row_bytes);
    require_aligned("reduce", "the address of the links", args.links, 8);
    return launch_rows(text("ep_reduce_", kNames[static_cast<int>(dtype)], "_kernel"),
                       num_row_blocks(args.num_rows, num_sms), args);
}

Launch plan_combine(const CombineArgs& args, DType dtype, int num_sms) {
    check_routes("combine", args.num_tokens, args.num_topk, args.route_plane);
    check_row("combine", args.row_bytes, item_bytes(dtype));
    require(args.bias_0 != nullptr || args.bias_1 == nullptr, "combine", "bias_1",
            "null beside no bias_0", 1);
    require_aligned("combine", "the address of the sums", args.out, 16);
    require_aligned("combine", "the address of a bias", args.bias_0, 16);
    require_aligned("combine", "the address of a bias", args.bias_1, 16);
    for (const char* rows : args.from_x)
        require_aligned("combine", "the address of rows", rows, 16);
    return launch_rows(text("ep_combine_", kNames[static_cast<int>(dtype)], "_kernel"),
                       num_row_blocks(args.num_tokens, num_sms), args);
}

Launch plan_cast(const CastArgs& args, DType dtype, int num_sms) {
    require(dtype != DType::kFloat64, "cast", "the dtype", "bfloat16, float16 or float32", 64);
    require_range("cast", "hidden", args.hidden, 1, kMaxHidden);
    check_recipe("cast", args.recipe, args.hidden);
    require_aligned("cast", "the address of x", args.x, 16);
    require_aligned("cast", "the address of data", args.data, 16);
    return launch_rows(text("ep_cast_", kNames[static_cast<int>(dtype)], "_kernel"),
                       num_row_blocks(args.num_tokens, num_sms), args);
}

}  // namespace ep::cuda
