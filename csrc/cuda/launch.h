#pragma once
// From what is to be done to what is to be launched: which kernel, how many blocks, which bytes as
// its parameters. Pure functions, so that a launch can be looked at, and run elsewhere than on a
// GPU. Each checks its arguments and throws std::invalid_argument.
#include <string>

#include "cuda/protocol.h"

namespace ep::cuda {

/// One kernel launch. The kernel takes one struct by value: `params`, byte for byte.
struct Launch {
    std::string kernel;
    unsigned grid;
    unsigned block;
    size_t shared_bytes;  // dynamic
    std::string params;
};

/// What a row holds, for the kernels that compute with it.
enum class DType : int { kBFloat16, kFloat16, kFloat32, kFloat64 };

/// How many blocks count and route take. Both must take the same, for the same `num_sms`.
unsigned num_scan_blocks(int64_t num_tokens, int num_sms);

/// How many blocks take rows, or tokens, a warp each in turn.
unsigned num_row_blocks(int64_t num_rows, int num_sms);

/// `topk_shift` is filled in.
Launch plan_count(ScanArgs args, int num_sms);
Launch plan_route(ScanArgs args, int num_sms);
Launch plan_notify(const NotifyArgs& args);
/// Of csrc/nvshmem/post.cu.
Launch plan_notify_send(const NotifyArgs& args);
Launch plan_arrive(const ArriveArgs& args);
/// Rows as they are.
Launch plan_dispatch(const DispatchArgs& args, int num_sms);
/// Rows of `dtype` cast to e4m3 on the way; not from float64.
Launch plan_dispatch_cast(const DispatchArgs& args, DType dtype, int num_sms);
Launch plan_expand(const ExpandArgs& args, int num_sms);
Launch plan_take(const TakeArgs& args, int num_sms);
Launch plan_stage(const StageArgs& args, int num_sms);
Launch plan_reduce(const ReduceArgs& args, DType dtype, int num_sms);
Launch plan_combine(const CombineArgs& args, DType dtype, int num_sms);
Launch plan_cast(const CastArgs& args, DType dtype, int num_sms);

}  // namespace ep::cuda
