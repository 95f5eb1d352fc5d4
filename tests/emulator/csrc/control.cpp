// Branches, ends, barriers of a CTA, calls of intrinsics.
#include "handlers.h"
#include "machine.h"
#include "races.h"
#include "store_buffers.h"

namespace ptx {

Outcome branch(Step& step, const Instruction& instruction) {
    Group& group = step.warp.groups[step.group];
    if (step.active == group.mask) {
        group.pc = u32(instruction.target);
    } else {
        group.pc += 1;
        group.mask &= ~step.active;
        step.warp.groups.push_back({u32(instruction.target), step.active});
    }
    return Outcome::kJumped;
}

Outcome branch_indexed(Step& step, const Instruction& instruction) {
    const auto& table = step.cta.launch->kernel->branch_tables[instruction.immediate];
    const u64* index = step.source(instruction, 0);
    std::map<i32, u32> lanes_by_target;
    for_lanes(step.active, [&](int lane) {
        if (u32(index[lane]) >= table.size())
            step.machine.fault(step.warp, lane, instruction,
                               "expected an index below " + std::to_string(table.size()) +
                                   ", got " + std::to_string(u32(index[lane])));
        lanes_by_target[table[u32(index[lane])]] |= 1u << lane;
    });
    step.warp.groups.erase(step.warp.groups.begin() + i64(step.group));
    for (const auto& [target, lanes] : lanes_by_target)
        step.warp.groups.push_back({u32(target), lanes});
    return Outcome::kJumped;
}

Outcome leave(Step& step, const Instruction&) {
    step.warp.live &= ~step.active;
    step.warp.groups.erase(step.warp.groups.begin() + i64(step.group));
    // Groups that wait for lanes look again: what they wait for may never come now.
    for (Group& group : step.warp.groups)
        if (group.wait == Wait::kLanes) group.wait = Wait::kNone;
    step.machine.made_progress();
    return Outcome::kJumped;
}

Outcome trap(Step& step, const Instruction& instruction) {
    Kernel& kernel = *step.cta.launch->kernel;  // counted here, for it does not return
    ++kernel.reached[size_t(&instruction - kernel.code.data())];
    step.machine.fault(step.warp, step.first_lane(), instruction, "trap");
}

Outcome sleep(Step& step, const Instruction& instruction) {
    // Time is shared by all: a sleeper lets it pass a little faster for everybody.
    step.machine.skip_nanoseconds(u32(step.source(instruction, 0)[step.first_lane()]) / 64);
    return Outcome::kAdvance;
}

Outcome nothing(Step&, const Instruction&) { return Outcome::kAdvance; }

Outcome call(Step& step, const Instruction& instruction) {
    const std::string& name = step.cta.launch->module->externs[instruction.immediate];
    Call arguments{step.cta.launch->rank, step.active, {}, {}};
    for (int i = 0; i < instruction.num_sources; ++i) {
        arguments.arguments.emplace_back();
        std::copy_n(step.source(instruction, i), kLanes, arguments.arguments.back().begin());
    }
    // What it starts, a card or the like, comes after what the lanes have done: a release.
    Knowledge knowledge;
    if (step.machine.races()) knowledge = step.machine.races()->publish(step.warp, step.active);
    if (step.machine.store_buffers())
        step.machine.store_buffers()->release(step.warp, step.active, Scope::kSys);
    step.machine.call_intrinsic(name, arguments, knowledge);
    if (step.machine.races()) step.machine.races()->tick(step.warp);
    if (instruction.num_destinations > 0) {
        u64* d = step.destination(instruction, 0);
        for_lanes(step.active, [&](int lane) { d[lane] = arguments.result[size_t(lane)]; });
    }
    return Outcome::kAdvance;
}

namespace {

/// One warp arrives. Complains about numbers that cannot be right.
void arrive(Step& step, const Instruction& instruction, u32 number, u32 threads) {
    Barrier& state = step.cta.barriers[number];
    const auto misuse = [&](const std::string& what) {
        step.machine.report(
            "barrier", std::to_string(instruction.site) + what,
            what + " at " + step.machine.where(step.warp, step.first_lane(), instruction));
    };
    const std::string name = "barrier " + std::to_string(number);
    if (threads % kLanes != 0)
        misuse(name + ": expected a thread count that is a multiple of 32, got " +
               std::to_string(threads));
    if (state.arrived > 0 && state.expected != threads)
        misuse(name + ": expected " + std::to_string(state.expected) +
               " threads like the warps before, got " + std::to_string(threads));
    if (!state.warps.insert(step.warp.index).second && !(instruction.variant & kUnaligned))
        misuse(name + ": a warp arrives twice before the barrier is complete");
    state.expected = threads;
    state.arrived +=
        instruction.variant & kUnaligned ? u32(std::popcount(step.active)) : u32(kLanes);
    const u32 limit = threads ? threads : u32(step.cta.warps.size()) * kLanes;
    if (state.arrived > limit)
        misuse(name + ": expected at most " + std::to_string(limit) + " threads, got " +
               std::to_string(state.arrived));
    if (step.machine.races()) step.machine.races()->arrive(step, state.arriving);
    if (step.machine.store_buffers())
        step.machine.store_buffers()->cta_barrier(step.warp, step.active);
}

}  // namespace

Outcome barrier(Step& step, const Instruction& instruction) {
    Group* group = &step.warp.groups[step.group];
    const int first = step.first_lane();
    const u32 number = u32(step.source(instruction, 0)[first]);
    const u32 threads = u32(step.source(instruction, 1)[first]);
    if (number >= 16)
        step.machine.fault(step.warp, first, instruction,
                           "expected a barrier below 16, got " + std::to_string(number));
    Barrier& state = step.cta.barriers[number];
    const u8 kind = instruction.variant & (kUnaligned - 1);
    if (group->wait == Wait::kBarrier) {  // woken: the barrier is complete
        group->wait = Wait::kNone;
        if (step.machine.races()) step.machine.races()->acquire(step, state.completed);
        if (kind >= kCountTrue) {
            u64* d = step.destination(instruction, 0);
            const u64 result = kind == kCountTrue ? state.result_count
                               : kind == kAllTrue ? state.result_count == state.result_voters
                                                  : state.result_count != 0;
            for_lanes(step.active, [&](int lane) { d[lane] = result; });
        }
        return Outcome::kAdvance;
    }
    // The aligned kind is executed by a whole warp: wait for the lanes that are still elsewhere.
    if (!(instruction.variant & kUnaligned) && step.active != step.warp.live) {
        group->wait = Wait::kLanes;
        return Outcome::kBlocked;
    }
    arrive(step, instruction, number, threads);
    if (kind >= kCountTrue) {
        const u64* predicate = step.source(instruction, 2);
        for_lanes(step.active, [&](int lane) { state.votes += predicate[lane] != 0; });
        state.voters += u32(std::popcount(step.active));
    }
    if (kind != kArrive) {
        group->wait = Wait::kBarrier;
        group->barrier = number;
        group->generation = state.generation;
    }
    step.machine.check_barrier(step.cta, number);
    return kind == kArrive ? Outcome::kAdvance : Outcome::kBlocked;
}

void Machine::check_barrier(Cta& cta, u32 number) {
    Barrier& state = cta.barriers[number];
    const u32 needed = state.expected ? state.expected : cta.live_warps * kLanes;
    if (state.arrived == 0 || state.arrived < needed) return;
    ++state.generation;
    state.arrived = state.expected = 0;
    state.warps.clear();
    state.result_count = state.votes, state.result_voters = state.voters;
    state.votes = state.voters = 0;
    state.completed = state.arriving;
    state.arriving = {};
    made_progress();
    for (const auto& warp : cta.warps)
        for (const Group& group : warp->groups)
            if (group.wait == Wait::kBarrier && group.barrier == number) wake(*warp);
}

}  // namespace ptx
