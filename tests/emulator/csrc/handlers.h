#pragma once
// The handlers of everything that is more than lane-by-lane computing, by the file they live in.
#include "step.h"

namespace ptx {

// moves.cpp
Outcome move16(Step&, const Instruction&);
Outcome move32(Step&, const Instruction&);
Outcome move64(Step&, const Instruction&);
Outcome pack(Step&, const Instruction&);    // variant: bits of a part
Outcome unpack(Step&, const Instruction&);  // variant: bits of a part
Outcome read_cycles(Step&, const Instruction&);
Outcome read_time(Step&, const Instruction&);
Outcome add_window(Step&, const Instruction&);  // immediate: what to add (cvta)

// control.cpp
Outcome branch(Step&, const Instruction&);
Outcome branch_indexed(Step&, const Instruction&);  // immediate: which table
Outcome leave(Step&, const Instruction&);
Outcome trap(Step&, const Instruction&);
Outcome sleep(Step&, const Instruction&);
Outcome nothing(Step&, const Instruction&);
Outcome call(Step&, const Instruction&);  // immediate: index into Module::externs
enum BarrierVariant : u8 { kSync, kArrive, kCountTrue, kAllTrue, kAnyTrue, kUnaligned = 16 };
Outcome barrier(Step&, const Instruction&);  // sources: number, threads or 0, predicate

// warp.cpp
Outcome sync_warp(Step&, const Instruction&);
enum ShuffleVariant : u8 { kIndex, kUp, kDown, kButterfly };
Outcome shuffle(Step&, const Instruction&);
enum VoteVariant : u8 { kBallot, kAll, kAny, kUniform };
Outcome vote(Step&, const Instruction&);
Outcome match_any(Step&, const Instruction&);
Outcome match_all(Step&, const Instruction&);
enum ReduceVariant : u8 {
    kAdd,
    kMinSigned,
    kMaxSigned,
    kMinUnsigned,
    kMaxUnsigned,
    kAnd,
    kOr,
    kXor
};
Outcome reduce(Step&, const Instruction&);
Outcome elect(Step&, const Instruction&);
Outcome active_mask(Step&, const Instruction&);
/// Whether all lanes of the mask are here. If not, the group waits; a mask that can never be
/// fulfilled is a fault.
bool lanes_are_here(Step&, const Instruction&, u32 mask);

// access.cpp
Outcome load(Step&, const Instruction&);
Outcome store(Step&, const Instruction&);
Outcome load_parameter(Step&, const Instruction&);
enum AtomicVariant : u8 {
    kExchange,
    kCompareSwap,
    kAtomicAdd,
    kAtomicAddFloat,
    kAtomicAddDouble,
    kAtomicMinSigned,
    kAtomicMaxSigned,
    kAtomicMinUnsigned,
    kAtomicMaxUnsigned,
    kAtomicAnd,
    kAtomicOr,
    kAtomicXor,
    kIncrement,
    kDecrement,
    kAtomicAddHalves,
    kAtomicAddBrains
};
Outcome atomic(Step&, const Instruction&);  // sources: address, value, [second value]
Outcome fence(Step&, const Instruction&);
Outcome proxy_fence(Step&, const Instruction&);

// transactions.cpp
Outcome barrier_init(Step&, const Instruction&);
Outcome barrier_invalidate(Step&, const Instruction&);
enum ArriveVariant : u8 { kArriveOnly = 1, kExpectOnly = 2, kArriveAndExpect = 3 };
Outcome barrier_arrive(Step&, const Instruction&);     // sources: address, count or bytes
Outcome barrier_try(Step&, const Instruction&);        // sources: address, parity
Outcome barrier_try_state(Step&, const Instruction&);  // sources: address, state

// bulk.cpp
Outcome bulk_load(Step&, const Instruction&);   // sources: shared, global, bytes, barrier
Outcome bulk_store(Step&, const Instruction&);  // sources: global, shared, bytes
Outcome bulk_commit(Step&, const Instruction&);
Outcome bulk_wait(Step&, const Instruction&);  // variant 1: only until sources have been read

}  // namespace ptx
