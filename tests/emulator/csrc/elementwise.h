#pragma once
// Handlers that apply one function lane by lane.
#include "forms.h"
#include "numbers.h"
#include "step.h"

namespace ptx {

template <class A, auto kFunction>
Outcome apply1(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) { d[lane] = to_bits(kFunction(from_bits<A>(a[lane]))); });
    return Outcome::kAdvance;
}

template <class A, class B, auto kFunction>
Outcome apply2(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    const u64* b = step.source(instruction, 1);
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) {
        d[lane] = to_bits(kFunction(from_bits<A>(a[lane]), from_bits<B>(b[lane])));
    });
    return Outcome::kAdvance;
}

template <class A, class B, class C, auto kFunction>
Outcome apply3(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    const u64* b = step.source(instruction, 1);
    const u64* c = step.source(instruction, 2);
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) {
        d[lane] =
            to_bits(kFunction(from_bits<A>(a[lane]), from_bits<B>(b[lane]), from_bits<C>(c[lane])));
    });
    return Outcome::kAdvance;
}

template <class A, auto kFunction>
Outcome apply4(Step& step, const Instruction& instruction) {
    const u64* a = step.source(instruction, 0);
    const u64* b = step.source(instruction, 1);
    const u64* c = step.source(instruction, 2);
    const u64* e = step.source(instruction, 3);
    u64* d = step.destination(instruction, 0);
    for_lanes(step.active, [&](int lane) {
        d[lane] = to_bits(kFunction(from_bits<A>(a[lane]), from_bits<A>(b[lane]),
                                    from_bits<u32>(c[lane]), from_bits<u32>(e[lane])));
    });
    return Outcome::kAdvance;
}

}  // namespace ptx
