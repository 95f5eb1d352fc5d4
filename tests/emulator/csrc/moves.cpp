// Moves between registers, address windows, clocks.
#include "handlers.h"
#include "machine.h"
#include "numbers.h"

namespace ptx {
namespace {

template <int kBits>
Outcome move(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) { d[lane] = keep_bits(a[lane], kBits); });
    return Outcome::kAdvance;
}

Outcome fill(Step& step, const Instruction& instruction, u64 value) {
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) { d[lane] = value; });
    return Outcome::kAdvance;
}

}  // namespace

Outcome move16(Step& step, const Instruction& instruction) { return move<16>(step, instruction); }
Outcome move32(Step& step, const Instruction& instruction) { return move<32>(step, instruction); }
Outcome move64(Step& step, const Instruction& instruction) { return move<64>(step, instruction); }

Outcome pack(Step& step, const Instruction& instruction) {
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) {
        u64 value = 0;
        for (int part = 0; part < instruction.num_sources; ++part)
            value |= keep_bits(step.source(instruction, part)[lane], instruction.variant)
                     << (part * instruction.variant);
        d[lane] = value;
    });
    return Outcome::kAdvance;
}

Outcome unpack(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    for_lanes(step.active, [&](int lane) {
        const u64 value = a[lane];
        for (int part = 0; part < instruction.num_destinations; ++part)
            step.destination(instruction, part)[lane] =
                keep_bits(value >> (part * instruction.variant), instruction.variant);
    });
    return Outcome::kAdvance;
}

Outcome read_cycles(Step& step, const Instruction& instruction) {
    return fill(step, instruction, keep_bits(step.machine.cycles(), instruction.variant));
}

Outcome read_time(Step& step, const Instruction& instruction) {
    const u64 now = step.machine.nanoseconds();
    step.machine.time_was_read();
    return fill(step, instruction,
                instruction.variant == 0   ? now
                : instruction.variant == 1 ? keep_bits(now, 32)
                                           : now >> 32);
}

Outcome add_window(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) { d[lane] = a[lane] + instruction.immediate; });
    return Outcome::kAdvance;
}

}  // namespace ptx
