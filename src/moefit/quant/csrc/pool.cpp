#include "pool.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t MAX_NUMBER = (int64_t(1) << 31) - 1;   // items of a loop
constexpr auto ALONE = std::chrono::microseconds(20);   // without work, before a thread offers its core to others
constexpr auto SPIN = std::chrono::microseconds(1000);  // without work, before a thread sleeps

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
public:
    // `threads` besides the caller's, or as many as the system allows.
    void run(int64_t number, void (*body)(void *, int64_t), void *context, int64_t threads) {
        start(threads);
        body_ = body, context_ = context, number_ = number, helpers_.store(threads, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        uint64_t loop = (next_.load(std::memory_order_relaxed) >> 32) + 1;
        next_.store(loop << 32 | uint64_t(number), std::memory_order_seq_cst);  // opens the loop
        if (sleeping_.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        take_items(loop);
        while (done_.load(std::memory_order_acquire) < number) pause();
    }

private:
    // Threads are started when they are first needed.
    void start(int64_t threads) {
        try {
            for (; started_ < threads; started_++) std::thread(&Pool::work, this, started_).detach();
        } catch (const std::system_error &) {  // a limit of threads or memory
        }
    }

    // Take items of this loop until none is left. An item is taken by reducing the lower half of `next_`, which
    // fails if the loop has ended since; until then its description does not change.
    void take_items(uint64_t loop) {
        uint64_t at = next_.load(std::memory_order_acquire);
        while (at >> 32 == (loop & 0xffffffff)) {
            auto body = body_.load(std::memory_order_relaxed);
            void *context = context_.load(std::memory_order_relaxed);
            int64_t number = number_.load(std::memory_order_relaxed), left = at & 0xffffffff;
            if (!left) return;
            if (!next_.compare_exchange_weak(at, at - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            body(context, number - left);
            done_.fetch_add(1, std::memory_order_release);
            at = next_.load(std::memory_order_acquire);
        }
    }

    void work(int64_t number) {
        uint64_t seen = 0;
        auto idle = std::chrono::steady_clock::now();
        for (int64_t turn = 1;; turn++) {
            uint64_t loop = next_.load(std::memory_order_acquire) >> 32;
            if (loop != seen) {
                seen = loop;
                if (number < helpers_.load(std::memory_order_relaxed)) {
                    take_items(loop);
                    idle = std::chrono::steady_clock::now();
                    continue;
                }
            }
            pause();
            if (turn % 64) continue;
            auto waited = std::chrono::steady_clock::now() - idle;
            if (waited > SPIN) {
                sleep(number, seen);
                idle = std::chrono::steady_clock::now();
            } else if (waited > ALONE) {
                sched_yield();
            }
        }
    }

    // Until another loop than `seen` has been opened that wants this thread.
    void sleep(int64_t number, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] {
            bool opened = next_.load(std::memory_order_seq_cst) >> 32 != seen;
            return opened && number < helpers_.load(std::memory_order_relaxed);
        });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }

    int64_t started_ = 0;
    std::atomic<void (*)(void *, int64_t)> body_{nullptr};
    std::atomic<void *> context_{nullptr};
    std::atomic<int64_t> number_{0}, done_{0}, helpers_{0};
    std::atomic<uint64_t> next_{0};  // number of the loop, then of its items that are left
    std::atomic<int64_t> sleeping_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

std::atomic<bool> busy{false};  // whether a loop runs
Pool *pool = nullptr;           // never destroyed: its threads run until the process ends

// Only the calling thread survives a fork.
void after_fork() {
    busy = false;
    pool = nullptr;
}

}  // namespace

void run_items(int64_t number, void (*body)(void *, int64_t), void *context) {
    int64_t threads = std::min<int64_t>(omp_get_max_threads(), number) - 1;
    if (threads <= 0 || number > MAX_NUMBER || busy.exchange(true, std::memory_order_acquire)) {
        for (int64_t item = 0; item < number; item++) body(context, item);
        return;
    }
    if (!pool) {
        static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
        (void)registered;
        pool = new Pool;
    }
    pool->run(number, body, context, threads);
    busy.store(false, std::memory_order_release);
}
