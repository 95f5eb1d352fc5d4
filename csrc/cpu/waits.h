#pragma once
// What waits on words in shared memory are made of: the futex, and epochs that only grow.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace ep {

constexpr long kLookAroundNanoseconds = 50'000'000;
constexpr int kPausesPerLook = 32;  // at the clock

inline void pause_core() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline long futex(const std::atomic<uint32_t>& word,
                  int operation,
                  uint32_t value,
                  timespec* timeout) {
    static_assert(sizeof(word) == sizeof(uint32_t));
    return syscall(SYS_futex, reinterpret_cast<const uint32_t*>(&word), operation, value, timeout,
                   nullptr, 0);
}

/// Sleep while the word holds `value`, at most until it is time to look around.
inline void sleep_on(const std::atomic<uint32_t>& word, uint32_t value) {
    timespec timeout{0, kLookAroundNanoseconds};
    futex(word, FUTEX_WAIT, value, &timeout);
}

inline void wake_all(const std::atomic<uint32_t>& word) {
    futex(word, FUTEX_WAKE, INT_MAX, nullptr);
}

inline bool is_reached(const std::atomic<uint32_t>& word, uint32_t epoch) {
    return static_cast<int32_t>(word.load(std::memory_order_acquire) - epoch) >= 0;
}

}  // namespace ep
