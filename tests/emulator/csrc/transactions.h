#pragma once
// mbarriers: barriers in shared memory that count arrivals and bytes.
#include "machine.h"

namespace ptx {

/// A copy has moved bytes that a barrier waits for.
void complete_bytes(Machine& machine,
                    Warp& warp,
                    const Instruction& instruction,
                    u64 address,
                    u32 count,
                    const Knowledge& done);

}  // namespace ptx
