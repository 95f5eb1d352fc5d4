#pragma once
// A fixed number of threads that share one loop.
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace ep {

/// Runs loops on `num_threads` threads, the caller's included. Not reentrant. Threads start with
/// the first loop that is worth sharing, so a budget of one costs nothing.
class Workers {
 public:
    explicit Workers(int num_threads) : num_threads_(num_threads), limit_(num_threads) {}
    ~Workers();
    Workers(const Workers&) = delete;
    Workers& operator=(const Workers&) = delete;

    using Range = std::function<void(int64_t begin, int64_t end)>;
    /// Call `range` on equal parts of [0, count); returns when all have ended. `range` must not
    /// throw. Loops of fewer than `grain` iterations per thread use fewer threads.
    void run(int64_t count, int64_t grain, const Range& range);
    /// Use at most `num_threads` of the threads from the next loop on.
    void limit(int num_threads) { limit_.store(num_threads, std::memory_order_relaxed); }

 private:
    void work(int thread);
    void start();

    const int num_threads_;
    std::atomic<int> limit_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable begin_, end_;
    const Range* range_ = nullptr;
    int64_t count_ = 0;
    int num_parts_ = 0;
    int num_running_ = 0;
    uint64_t round_ = 0;
    bool is_stopping_ = false;
};

}  // namespace ep
