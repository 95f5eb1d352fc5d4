#include "transactions.h"

#include "handlers.h"
#include "races.h"
#include "store_buffers.h"

namespace ptx {
namespace {

constexpr u64 kMostPending = (1u << 20) - 1;

TransactionBarrier& find(
    Machine& machine, Warp& warp, int lane, const Instruction& instruction, u64 address) {
    const auto found = warp.cta->transaction_barriers.find(address);
    if (found == warp.cta->transaction_barriers.end())
        machine.fault(warp, lane, instruction,
                      "expected an mbarrier at shared address " + std::to_string(address) +
                          ", none has been initialised there");
    return found->second;
}

u64 address_of(Step& step, const Instruction& instruction, int lane) {
    const u64 address = u32(step.source(instruction, 0)[lane] + u64(instruction.offset));
    if (address % 8 != 0)
        step.machine.fault(step.warp, lane, instruction, "expected an mbarrier at a multiple of 8");
    if (!step.cta.shared->contains(address, 8))
        step.machine.fault(step.warp, lane, instruction, "out of bounds: mbarrier");
    return address;
}

void complete_phase(Machine& machine, TransactionBarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    ++barrier.phase;
    barrier.pending = barrier.expected;
    barrier.completed = barrier.arriving;
    barrier.arriving = {};
    machine.made_progress();
}

/// The init is a write that others must be ordered after: mbarriers count as accessed strongly.
void access(Step& step, const Instruction& instruction, int lane, u64 address, bool is_init) {
    if (Races* races = step.machine.races())
        races->access(races->agent_of(step.warp, lane), *step.cta.shared, address, 8, true,
                      is_init ? Order::kWeak : Order::kRelaxed, Scope::kCta, instruction.site);
}

Outcome wait(Step& step, const Instruction& instruction, bool by_parity) {
    const u64* phase = step.source(instruction, 1);
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) {
        const u64 address = address_of(step, instruction, lane);
        TransactionBarrier& barrier = find(step.machine, step.warp, lane, instruction, address);
        access(step, instruction, lane, address, false);
        // A parity names the phase that is current or the one before.
        const bool done =
            by_parity ? (barrier.phase & 1) != (phase[lane] & 1) : barrier.phase != phase[lane];
        d[lane] = done;
        if (done && step.machine.races() && instruction.order == Order::kAcquire &&
            barrier.completed)
            step.machine.races()->acquire(step.warp, lane, barrier.completed);
    });
    return Outcome::kAdvance;
}

}  // namespace

void complete_bytes(Machine& machine,
                    Warp& warp,
                    const Instruction& instruction,
                    u64 address,
                    u32 count,
                    const Knowledge& done) {
    TransactionBarrier& barrier = find(machine, warp, 0, instruction, address);
    barrier.bytes -= count;
    barrier.arriving.join(done);
    complete_phase(machine, barrier);
}

Outcome barrier_init(Step& step, const Instruction& instruction) {
    const u64* count = step.source(instruction, 1);
    for_lanes(step.active, [&](int lane) {
        const u64 address = address_of(step, instruction, lane);
        const u32 expected = u32(count[lane]);
        if (expected == 0 || expected > kMostPending)
            step.machine.fault(step.warp, lane, instruction,
                               "expected a count of 1 to 1048575, got " + std::to_string(expected));
        access(step, instruction, lane, address, true);
        step.cta.transaction_barriers[address] = {expected, expected, 0, 0, {}, {}};
        std::fill_n(step.cta.shared->written.get() + address, 8, u8(1));
    });
    return Outcome::kAdvance;
}

Outcome barrier_invalidate(Step& step, const Instruction& instruction) {
    for_lanes(step.active, [&](int lane) {
        const u64 address = address_of(step, instruction, lane);
        find(step.machine, step.warp, lane, instruction, address);
        access(step, instruction, lane, address, true);
        step.cta.transaction_barriers.erase(address);
    });
    return Outcome::kAdvance;
}

Outcome barrier_arrive(Step& step, const Instruction& instruction) {
    const u64* amount = step.source(instruction, 1);
    Races* races = step.machine.races();
    for_lanes(step.active, [&](int lane) {
        const u64 address = address_of(step, instruction, lane);
        TransactionBarrier& barrier = find(step.machine, step.warp, lane, instruction, address);
        access(step, instruction, lane, address, false);
        if (instruction.variant & kExpectOnly) barrier.bytes += i64(u32(amount[lane]));
        if (!(instruction.variant & kArriveOnly)) return;
        const u32 arrivals = instruction.variant == kArriveOnly ? u32(amount[lane]) : 1;
        if (arrivals == 0 || arrivals > barrier.pending)
            step.machine.fault(step.warp, lane, instruction,
                               "expected at most " + std::to_string(barrier.pending) +
                                   " arrivals in this phase, got " + std::to_string(arrivals));
        if (races && instruction.order == Order::kRelease)
            barrier.arriving.join(races->publish(step.warp, lane));
        if (step.machine.store_buffers())
            step.machine.store_buffers()->release(step.warp, 1u << lane, Scope::kCta);
        if (instruction.num_destinations > 0)
            step.destination(instruction, 0)[lane] = barrier.phase;
        barrier.pending -= arrivals;
        complete_phase(step.machine, barrier);
    });
    if (races) races->tick(step.warp);
    step.machine.made_progress();
    return Outcome::kAdvance;
}

Outcome barrier_try(Step& step, const Instruction& instruction) {
    return wait(step, instruction, true);
}
Outcome barrier_try_state(Step& step, const Instruction& instruction) {
    return wait(step, instruction, false);
}

}  // namespace ptx
