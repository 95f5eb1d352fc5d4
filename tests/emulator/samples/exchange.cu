// Rows through a ring in the receiver's memory, with a bug planted in every kernel but the first.
//
// Warp w < R sends this rank's rows to rank w; warp R + w receives from rank w. A window holds, for
// each source, kSlots rows; then one tail flag per source (rows sent so far, written by the sender)
// and one head flag per destination (rows freed so far, written by the receiver).
#include <cstdint>

enum Bug {
    kNone,
    kNoSyncBeforeRelease,   // other lanes' stores are not ordered before lane 0's release
    kRelaxedFlag,           // the flag orders nothing
    kRelaxedPoll,           // the reader does not acquire
    kFreedTooEarly,         // the slot is freed before the other lanes have read it
    kReleaseWithinGpu,      // the release does not reach the other rank
    kShuffleForSync,        // a shuffle after lane 0's acquire orders nothing
    kWrongSlot,             // writes one row behind the ring
    kNeverFreed,            // the sender waits for a flag that nobody writes
    kWaitsForDeadLane,      // a lane that has left is waited for
};

constexpr int kSlots = 2;

struct Windows {
    uint4* rows[8];
    int* flags[8];
};

__device__ __forceinline__ void store_release(int* flag, int value) {
    asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void store_release_gpu(int* flag, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ void store_relaxed(int* flag, int value) {
    asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ int load_acquire(const int* flag) {
    int value;
    asm volatile("ld.acquire.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
__device__ __forceinline__ int load_relaxed(const int* flag) {
    int value;
    asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

template <int kBug>
__device__ __forceinline__ void send(const Windows& windows, int rank, int to, int num_ranks,
                                     int num_rows, int vectors, const uint4* input) {
    const int lane = threadIdx.x % 32;
    for (int row = 0; row < num_rows; ++row) {
        if (lane == 0) {
            while (row - load_acquire(windows.flags[rank] + num_ranks + to) >= kSlots) {
            }
        }
        __syncwarp();
        const int slot = kBug == kWrongSlot ? row % kSlots + num_ranks * kSlots : row % kSlots;
        uint4* place = windows.rows[to] + (int64_t(rank) * kSlots + slot) * vectors;
        for (int i = lane; i < vectors; i += 32) place[i] = input[int64_t(row) * vectors + i];
        if (kBug != kNoSyncBeforeRelease) __syncwarp();
        if (lane == 0) {
            int* tail = windows.flags[to] + rank;
            if (kBug == kRelaxedFlag) store_relaxed(tail, row + 1);
            else if (kBug == kReleaseWithinGpu) store_release_gpu(tail, row + 1);
            else store_release(tail, row + 1);
        }
    }
}

template <int kBug>
__device__ __forceinline__ void receive(const Windows& windows, int rank, int from, int num_ranks,
                                        int num_rows, int vectors, uint4* output) {
    const int lane = threadIdx.x % 32;
    for (int row = 0; row < num_rows; ++row) {
        int sent = 0;
        if (lane == 0) {
            const int* tail = windows.flags[rank] + from;
            do sent = kBug == kRelaxedPoll ? load_relaxed(tail) : load_acquire(tail);
            while (sent <= row);
        }
        if (kBug == kShuffleForSync) sent = __shfl_sync(0xffffffff, sent, 0);
        else __syncwarp();
        if (kBug == kShuffleForSync && sent <= row) return;
        const uint4* place = windows.rows[rank] + (int64_t(from) * kSlots + row % kSlots) * vectors;
        uint4* target = output + (int64_t(from) * num_rows + row) * vectors;
        for (int i = lane; i < vectors; i += 32) target[i] = place[i];
        if (kBug != kFreedTooEarly) __syncwarp();
        if (kBug == kWaitsForDeadLane && lane == 31) return;
        if (lane == 0 && kBug != kNeverFreed)
            store_release(windows.flags[from] + num_ranks + rank, row + 1);
    }
}

template <int kBug>
__device__ __forceinline__ void exchange(const Windows& windows, int rank, int num_ranks,
                                         int num_rows, int vectors, const uint4* input,
                                         uint4* output) {
    const int warp = threadIdx.x / 32;
    if (warp < num_ranks) send<kBug>(windows, rank, warp, num_ranks, num_rows, vectors, input);
    else receive<kBug>(windows, rank, warp - num_ranks, num_ranks, num_rows, vectors, output);
}

#define KERNEL(name, bug)                                                                        \
    extern "C" __global__ void name(const __grid_constant__ Windows windows, int rank,          \
                                    int num_ranks, int num_rows, int vectors,                   \
                                    const uint4* input, uint4* output) {                        \
        exchange<bug>(windows, rank, num_ranks, num_rows, vectors, input, output);              \
    }

KERNEL(exchange, kNone)
KERNEL(no_sync_before_release, kNoSyncBeforeRelease)
KERNEL(relaxed_flag, kRelaxedFlag)
KERNEL(relaxed_poll, kRelaxedPoll)
KERNEL(freed_too_early, kFreedTooEarly)
KERNEL(release_within_gpu, kReleaseWithinGpu)
KERNEL(shuffle_for_sync, kShuffleForSync)
KERNEL(wrong_slot, kWrongSlot)
KERNEL(never_freed, kNeverFreed)
KERNEL(waits_for_dead_lane, kWaitsForDeadLane)
