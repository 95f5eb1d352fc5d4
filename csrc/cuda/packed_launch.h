#pragma once
// From a half of a low-latency call to its launches; see launch.h.
#include "cuda/launch.h"
#include "cuda/packed_protocol.h"

namespace ep::cuda {

/// The kernels of low_latency.cu and low_latency_flags.cu, and of csrc/nvshmem/send.cu.
enum class PackedStep : int {
    kBegin,
    kPush,
    kStage,
    kPost,
    kMeet,
    kTake,
    kSum,
    kFinish,
    kMask,
    kSend,
    kTell
};

/// Throws std::invalid_argument where `args` cannot be. @param num_sms  most blocks.
Launch plan_packed(PackedStep step, const PackedArgs& args, int num_sms);

}  // namespace ep::cuda
