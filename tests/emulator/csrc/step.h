#pragma once
// What a handler sees of the machine while it executes one instruction for a group of lanes.
#include <bit>

#include "ptx.h"

namespace ptx {

class Machine;
struct Warp;
struct Cta;

struct Step {
    Machine& machine;
    Warp& warp;
    Cta& cta;
    u64* registers;
    const std::array<u64, kLanes>* constants;
    u32 active = 0;    // the lanes that execute
    size_t group = 0;  // index of their group in the warp

    const u64* source(const Instruction& instruction, int number) const {
        const i32 row = instruction.sources[number];
        return row >= 0 ? registers + size_t(row) * kLanes : constants[~row].data();
    }
    u64* destination(const Instruction& instruction, int number) const {
        return registers + size_t(instruction.destinations[number]) * kLanes;
    }
    int first_lane() const { return std::countr_zero(active); }
};

template <class Function>
inline void for_lanes(u32 mask, Function&& function) {
    if (mask == kAllLanes) {
        for (int lane = 0; lane < kLanes; ++lane) function(lane);
    } else {
        for (; mask; mask &= mask - 1) function(std::countr_zero(mask));
    }
}

}  // namespace ptx
