#include "cpu/workers.h"

#include <signal.h>

#include <algorithm>

namespace ep {

void Workers::start() {
    // Signals are the main thread's business, which may be Python's.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int thread = 1; thread < num_threads_; ++thread)
        threads_.emplace_back([this, thread] { work(thread); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Workers::~Workers() {
    {
        const std::lock_guard lock(mutex_);
        is_stopping_ = true;
    }
    begin_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Workers::run(int64_t count, int64_t grain, const Range& range) {
    const int num_threads = std::clamp(limit_.load(std::memory_order_relaxed), 1, num_threads_);
    const auto num_parts =
        static_cast<int>(std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, num_threads));
    if (num_parts == 1) {
        if (count > 0) range(0, count);
        return;
    }
    if (threads_.empty()) start();
    {
        const std::lock_guard lock(mutex_);
        range_ = &range;
        count_ = count;
        num_parts_ = num_parts;
        num_running_ = num_threads_ - 1;
        ++round_;
    }
    begin_.notify_all();
    range(0, count / num_parts);
    std::unique_lock lock(mutex_);
    end_.wait(lock, [&] { return num_running_ == 0; });
}

void Workers::work(int thread) {
    uint64_t last_round = 0;
    std::unique_lock lock(mutex_);
    while (true) {
        begin_.wait(lock, [&] { return is_stopping_ || round_ != last_round; });
        if (is_stopping_) return;
        last_round = round_;
        if (thread < num_parts_) {
            const int64_t begin = count_ * thread / num_parts_;
            const int64_t end = count_ * (thread + 1) / num_parts_;
            lock.unlock();
            (*range_)(begin, end);
            lock.lock();
        }
        if (--num_running_ == 0) end_.notify_one();
    }
}

}  // namespace ep
