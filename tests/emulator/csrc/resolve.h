#pragma once
// From an address in a register to bytes of a region, with every check on the way.
#include "machine.h"

namespace ptx {

/// Where the lanes of one instruction access memory. Neighbouring lanes mostly hit one region.
class Resolver {
 public:
    Resolver(Step& step, const Instruction& instruction, u32 num_bytes)
        : step_(step), instruction_(instruction), num_bytes_(num_bytes) {}

    enum class Kind { kRegion, kLocal, kParameter };
    /// Find the place; `offset` counts from the region's start.
    Kind resolve(int lane, u64 address) {
        if (address % num_bytes_ != 0) misaligned(lane, address);
        Space space = instruction_.space;
        if (space == Space::kGeneric) {
            space = Space::kGlobal;
            if (address - kSharedWindow < kWindowSize)
                space = Space::kShared, address -= kSharedWindow;
            else if (address - kLocalWindow < kWindowSize)
                space = Space::kLocal, address -= kLocalWindow;
            else if (address - kParamWindow < kWindowSize)
                space = Space::kParam, address -= kParamWindow;
        }
        if (space == Space::kLocal || space == Space::kParam) {
            offset = address;
            return space == Space::kLocal ? Kind::kLocal : Kind::kParameter;
        }
        if (space == Space::kShared) {
            region = step_.cta.shared.get();
            address = u32(address);  // shared addresses are 32 bits wide
        } else if (!region || region->is_shared || !region->contains(address, num_bytes_)) {
            region = step_.machine.memory().find(address);
        }
        if (!region || !region->contains(address, num_bytes_)) out_of_bounds(lane, address);
        if (region->rank != step_.cta.launch->rank && !region->symmetric) not_mapped(lane);
        offset = address - region->address;
        return Kind::kRegion;
    }
    bool is_peer() const { return region->rank != step_.cta.launch->rank; }

    Region* region = nullptr;
    u64 offset = 0;

 private:
    [[noreturn]] void misaligned(int lane, u64 address) const;
    [[noreturn]] void out_of_bounds(int lane, u64 address) const;
    [[noreturn]] void not_mapped(int lane) const;

    Step& step_;
    const Instruction& instruction_;
    const u32 num_bytes_;
};

}  // namespace ptx
