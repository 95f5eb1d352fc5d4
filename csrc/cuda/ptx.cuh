#pragma once
// Every instruction with a meaning for memory order, and every conversion, by name and contract.
// No other file holds inline PTX. Barriers are CUDA's own: __syncthreads orders a block's accesses,
// __syncwarp those of a warp's lanes; a shuffle orders nothing.
#include <cstdint>

namespace ep::cuda {

/// Raise a flag that another GPU or the host waits on. Everything that this thread has written or
/// read, and what it has seen of others through a barrier or the end of an earlier kernel, is
/// visible to whoever reads the new value by load_acquire_system. One writer per word.
__device__ __forceinline__ void store_release_system(uint32_t* flag, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

/// Look at a flag that another GPU raises by store_release_system. What this thread does later, and
/// after a barrier its whole block, sees all that the writer did before it raised the flag.
__device__ __forceinline__ uint32_t load_acquire_system(const uint32_t* flag) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

/// The same for a flag that the network may raise as well, and whose readers see no difference.
__device__ __forceinline__ void store_release_system(uint64_t* flag, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

/// Look at a signal that a network card writes behind the data of its put, or a peer's kernel as it
/// would a flag. What this thread does later, and after a barrier its block, sees that data.
__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* signal) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(signal) : "memory");
    return value;
}

/// Nanoseconds of a clock that all blocks share. No order with anything.
__device__ __forceinline__ uint64_t now_nanoseconds() {
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

/// End the kernel with an error that every later call of the CUDA runtime reports.
__device__ __forceinline__ void trap() { asm volatile("trap;" ::: "memory"); }

/// Wait until a flag reaches `epoch`; returns the last value seen, which is behind `epoch` if
/// `timeout_ns` went by first. Acquires as load_acquire_system does.
__device__ __forceinline__ uint32_t wait_for_epoch(const uint32_t* flag,
                                                   uint32_t epoch,
                                                   uint64_t timeout_ns) {
    uint32_t seen = load_acquire_system(flag);
    if (static_cast<int32_t>(seen - epoch) >= 0) return seen;
    const uint64_t start = now_nanoseconds();
    do {
        seen = load_acquire_system(flag);
    } while (static_cast<int32_t>(seen - epoch) < 0 && now_nanoseconds() - start < timeout_ns);
    return seen;
}

/// Wait until a signal reaches `value`; returns whether it did before `timeout_ns` went by.
/// Acquires as load_acquire_system does.
__device__ __forceinline__ bool wait_for_signal(const uint64_t* signal,
                                                uint64_t value,
                                                uint64_t timeout_ns) {
    const uint64_t start = now_nanoseconds();
    do {
        if (load_acquire_system(signal) >= value) return true;
    } while (now_nanoseconds() - start < timeout_ns);
    return false;
}

/// Two float32 to e4m3, nearest even; beyond 448 becomes 448, NaN 0x7f. `low` in the low byte.
__device__ __forceinline__ uint32_t to_e4m3x2(float low, float high) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

/// Two float32 to bfloat16, nearest even. `low` in the low half. NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t to_bfloat16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/// Two float32 to float16, nearest even. `low` in the low half. NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t to_float16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/// The float16 in the low half of `bits`, exactly.
__device__ __forceinline__ float from_float16(uint32_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
    return value;
}

}  // namespace ep::cuda
