// Global memory to shared memory and on to a peer by bulk copies, changed on the way; the same with
// a bug planted in every kernel but the first. Two warps: the first thread copies, all change.
#include <cstdint>

enum Bug {
    kNone,
    kNoWait,           // reads shared memory before the copy has come
    kNoProxyFence,     // the copy out may not see what was stored
    kNoReadWait,       // the next copy in overwrites what the last copy out still reads
    kNoBarrier,        // the copy out begins before all threads have stored
    kReadWaitAtEnd,    // the kernel's flag says done while bytes are still under way
    kTooFewBytes,      // the barrier waits for fewer bytes than the copy brings
};

template <int kBug>
__device__ __forceinline__ void stage(const uint32_t* input, uint32_t* output, int* flag,
                                      int num_bytes, int chunks) {
    extern __shared__ __align__(128) uint32_t buffer[];
    __shared__ __align__(8) uint64_t arrived;
    const uint32_t barrier = uint32_t(__cvta_generic_to_shared(&arrived));
    const uint32_t place = uint32_t(__cvta_generic_to_shared(buffer));
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int64_t first = int64_t(chunk) * num_bytes / 4;
        if (threadIdx.x == 0) {
            const int expected = kBug == kTooFewBytes ? num_bytes - 16 : num_bytes;
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                         "r"(expected)
                         : "memory");
            asm volatile(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
                "[%3];" ::"r"(place),
                "l"(input + first), "r"(num_bytes), "r"(barrier)
                : "memory");
        }
        if (kBug != kNoWait)
            asm volatile(
                "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;"
                " @!done bra again; }" ::"r"(barrier),
                "r"(chunk & 1)
                : "memory");
        for (int i = threadIdx.x; i < num_bytes / 4; i += blockDim.x) buffer[i] ^= 0x01010101;
        if (kBug != kNoProxyFence) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        if (kBug != kNoBarrier) __syncthreads();
        if (threadIdx.x == 0) {
            asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                             output + first),
                         "r"(place), "r"(num_bytes)
                         : "memory");
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
            if (kBug != kNoReadWait)
                asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        if (kBug == kReadWaitAtEnd) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        else asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        asm volatile("st.release.sys.global.s32 [%0], 1;" ::"l"(flag) : "memory");
    }
}

#define KERNEL(name, bug)                                                                       \
    extern "C" __global__ void name(const uint32_t* input, uint32_t* output, int* flag,         \
                                    int num_bytes, int chunks) {                                \
        stage<bug>(input, output, flag, num_bytes, chunks);                                     \
    }

KERNEL(stage_rows, kNone)
KERNEL(no_wait, kNoWait)
KERNEL(no_proxy_fence, kNoProxyFence)
KERNEL(no_read_wait, kNoReadWait)
KERNEL(no_barrier, kNoBarrier)
KERNEL(read_wait_at_end, kReadWaitAtEnd)
KERNEL(too_few_bytes, kTooFewBytes)

// The other rank: waits for the flag, then reads.
extern "C" __global__ void check_rows(const int* flag, const uint32_t* rows, uint32_t* copy,
                                      int count) {
    if (threadIdx.x == 0) {
        int value;
        do asm volatile("ld.acquire.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
        while (value == 0);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) copy[i] = rows[i];
}
