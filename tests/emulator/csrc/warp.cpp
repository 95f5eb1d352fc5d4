// Instructions in which the lanes of a warp take part together.
#include "handlers.h"
#include "machine.h"
#include "numbers.h"
#include "races.h"
#include "store_buffers.h"

namespace ptx {

bool lanes_are_here(Step& step, const Instruction& instruction, u32 mask) {
    if ((mask & step.active) != step.active)
        step.machine.fault(step.warp, std::countr_zero(step.active & ~mask), instruction,
                           "expected the lane to be in its own membermask");
    if (mask & ~step.warp.live)
        step.machine.fault(step.warp, step.first_lane(), instruction,
                           "expected the lanes of the membermask to be alive, lane " +
                               std::to_string(std::countr_zero(mask & ~step.warp.live)) +
                               " is not");
    if (mask == step.active) return true;
    step.warp.groups[step.group].wait = Wait::kLanes;
    return false;
}

namespace {

/// All lanes that execute must name the same lanes.
u32 common_mask(Step& step, const Instruction& instruction, int source) {
    const u64* masks = step.source(instruction, source);
    const u32 mask = u32(masks[step.first_lane()]);
    for_lanes(step.active, [&](int lane) {
        if (u32(masks[lane]) != mask)
            step.machine.fault(step.warp, lane, instruction,
                               "expected the same membermask in all lanes");
    });
    return mask;
}

}  // namespace

/// The lanes may come to different instructions, as long as all name the same mask.
Outcome sync_warp(Step& step, const Instruction& instruction) {
    const u32 mask = common_mask(step, instruction, 0);
    const auto& code = step.cta.launch->kernel->code;
    const auto waits_too = [&](const Group& group) {
        return group.wait == Wait::kLanes && group.barrier == mask &&
               code[group.pc].handler == sync_warp;
    };
    const u32 own = step.active;
    for (const Group& group : step.warp.groups)
        if (waits_too(group)) step.active |= group.mask;
    if (!lanes_are_here(step, instruction, mask)) {
        step.warp.groups[step.group].barrier = mask;
        step.active = own;
        return Outcome::kBlocked;
    }
    if (step.machine.races()) step.machine.races()->sync_warp(step);
    if (step.machine.store_buffers()) step.machine.store_buffers()->warp_barrier(step.warp, mask);
    step.active = own;
    for (Group& group : step.warp.groups) {
        if (!waits_too(group)) continue;
        group.wait = Wait::kNone;
        ++group.pc;
    }
    return Outcome::kAdvance;
}

Outcome shuffle(Step& step, const Instruction& instruction) {
    if (!lanes_are_here(step, instruction, common_mask(step, instruction, 3)))
        return Outcome::kBlocked;
    std::array<u64, kLanes> values;
    std::copy_n(step.source(instruction, 0), kLanes, values.begin());
    const u64 *b = step.source(instruction, 1), *c = step.source(instruction, 2);
    u64* d = step.destination(instruction, 0);
    u64* in_range = instruction.num_destinations > 1 ? step.destination(instruction, 1) : nullptr;
    const i32 source_row = instruction.sources[0];
    const auto& tracked = step.cta.launch->kernel->tracked;
    const bool follows = source_row >= 0 && tracked[size_t(source_row)];
    const u32 source_defined = follows ? step.warp.defined[size_t(source_row)] : kAllLanes;
    u32 defined = 0;
    for_lanes(step.active, [&](int lane) {
        const int distance = int(b[lane] & 31);
        const int clamp = int(c[lane] & 31), segments = int(c[lane] >> 8 & 31);
        const int highest = (lane & segments) | (clamp & ~segments), lowest = lane & segments;
        int from = lane;
        bool valid = false;
        switch (instruction.variant) {
            case kUp:
                from = lane - distance, valid = from >= highest;
                break;
            case kDown:
                from = lane + distance, valid = from <= highest;
                break;
            case kButterfly:
                from = lane ^ distance, valid = from <= highest;
                break;
            default:
                from = lowest | (distance & ~segments), valid = from <= highest;
                break;
        }
        if (!valid) from = lane;
        if (!(step.active >> from & 1))
            step.machine.fault(
                step.warp, lane, instruction,
                "expected lane " + std::to_string(from) + ", which is read, to take part");
        d[lane] = keep_bits(values[size_t(from)], 32);
        if (in_range) in_range[lane] = valid;
        defined |= (source_defined >> from & 1) << lane;
    });
    // The general bookkeeping marks results as defined; take back what came from undefined lanes.
    const i32 row = instruction.destinations[0];
    if (tracked[size_t(row)])
        step.warp.defined[size_t(row)] = (step.warp.defined[size_t(row)] & ~step.active) | defined;
    return Outcome::kAdvance;
}

Outcome vote(Step& step, const Instruction& instruction) {
    if (!lanes_are_here(step, instruction, common_mask(step, instruction, 1)))
        return Outcome::kBlocked;
    const u64* predicate = step.source(instruction, 0);
    u64* d = step.destination(instruction, 0);
    u32 ballot = 0;
    for_lanes(step.active, [&](int lane) { ballot |= u32(predicate[lane] != 0) << lane; });
    const u64 result = instruction.variant == kBallot ? ballot
                       : instruction.variant == kAll  ? ballot == step.active
                       : instruction.variant == kAny  ? ballot != 0
                                                      : ballot == step.active || ballot == 0;
    for_lanes(step.active, [&](int lane) { d[lane] = result; });
    return Outcome::kAdvance;
}

Outcome match_any(Step& step, const Instruction& instruction) {
    if (!lanes_are_here(step, instruction, common_mask(step, instruction, 1)))
        return Outcome::kBlocked;
    const u64* values = step.source(instruction, 0);
    std::array<u64, kLanes> result{};
    for_lanes(step.active, [&](int lane) {
        for_lanes(step.active, [&](int other) {
            if (keep_bits(values[lane] ^ values[other], instruction.element_bytes * 8) == 0)
                result[size_t(lane)] |= u64{1} << other;
        });
    });
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) { d[lane] = result[size_t(lane)]; });
    return Outcome::kAdvance;
}

Outcome match_all(Step& step, const Instruction& instruction) {
    if (!lanes_are_here(step, instruction, common_mask(step, instruction, 1)))
        return Outcome::kBlocked;
    const u64* values = step.source(instruction, 0);
    const u64 first = values[step.first_lane()];
    bool same = true;
    for_lanes(step.active, [&](int lane) {
        same &= keep_bits(values[lane] ^ first, instruction.element_bytes * 8) == 0;
    });
    u64* d = step.destination(instruction, 0);
    u64* p = instruction.num_destinations > 1 ? step.destination(instruction, 1) : nullptr;
    for_lanes(step.active, [&](int lane) {
        d[lane] = same ? step.active : 0;
        if (p) p[lane] = same;
    });
    return Outcome::kAdvance;
}

Outcome reduce(Step& step, const Instruction& instruction) {
    if (!lanes_are_here(step, instruction, common_mask(step, instruction, 1)))
        return Outcome::kBlocked;
    const u64* values = step.source(instruction, 0);
    u32 total = u32(values[step.first_lane()]);
    for_lanes(step.active & (step.active - 1), [&](int lane) {
        const u32 value = u32(values[lane]);
        switch (instruction.variant) {
            case kAdd:
                total += value;
                break;
            case kMinSigned:
                total = u32(std::min(i32(total), i32(value)));
                break;
            case kMaxSigned:
                total = u32(std::max(i32(total), i32(value)));
                break;
            case kMinUnsigned:
                total = std::min(total, value);
                break;
            case kMaxUnsigned:
                total = std::max(total, value);
                break;
            case kAnd:
                total &= value;
                break;
            case kOr:
                total |= value;
                break;
            default:
                total ^= value;
                break;
        }
    });
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) { d[lane] = total; });
    return Outcome::kAdvance;
}

/// PTX leaves the choice open; devices take the lowest lane of the mask.
Outcome elect(Step& step, const Instruction& instruction) {
    const u32 mask = common_mask(step, instruction, 0);
    if (!lanes_are_here(step, instruction, mask)) return Outcome::kBlocked;
    const int chosen = std::countr_zero(mask);
    u64* d = step.destination(instruction, 0);
    u64* p = instruction.num_destinations > 1 ? step.destination(instruction, 1) : nullptr;
    for_lanes(step.active, [&](int lane) {
        d[lane] = u64(chosen);
        if (p) p[lane] = lane == chosen;
    });
    return Outcome::kAdvance;
}

Outcome active_mask(Step& step, const Instruction& instruction) {
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) { d[lane] = step.active; });
    return Outcome::kAdvance;
}

}  // namespace ptx
