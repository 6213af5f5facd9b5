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

constexpr int64_t MAX_NUMBER = (int64_t(1) << 31) - 1;  // items of a loop
constexpr int64_t MAX_UNITS = (int64_t(1) << 16) - 1;   // units of a share
constexpr int64_t MAX_SHARES = 256;                     // threads that have a share of their own; others only help
constexpr auto ALONE = std::chrono::microseconds(20);   // without work, before a thread offers its core to others
constexpr auto SPIN = std::chrono::microseconds(1000);  // without work, before a thread sleeps

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One thread's consecutive units of a loop that nobody has taken yet: the loop's number in the upper half, then the
// first unit and the one past the last. On a cache line of its own.
struct alignas(64) Share {
    std::atomic<uint64_t> left{0};
};

inline uint64_t share_of(uint64_t loop, uint64_t first, uint64_t last) { return loop << 32 | first << 16 | last; }

// Items are divided into a share for each thread. A thread takes its own from the front, one unit after the other,
// so that it reads consecutive memory, as processors expect; then what others have left, from the back.
class Pool {
public:
    // `threads` besides the caller's, or as many as the system allows.
    void run(int64_t number, void (*body)(void *, int64_t), void *context, int64_t threads) {
        start(threads);
        body_ = body, context_ = context, number_ = number;
        helpers_.store(threads, std::memory_order_relaxed);
        int64_t shares = std::min(threads + 1, MAX_SHARES), unit = (number + shares * MAX_UNITS - 1) / (shares * MAX_UNITS);
        int64_t units = (number + unit - 1) / unit;
        unit_ = unit, shares_ = shares, units_ = units;
        done_.store(0, std::memory_order_relaxed);
        uint64_t loop = (loop_.load(std::memory_order_relaxed) + 1) & 0xffffffff;
        for (int64_t s = 0; s < shares; s++)
            shares_of_[s].left.store(share_of(loop, 0, first_of(s + 1) - first_of(s)), std::memory_order_release);
        loop_.store(loop, std::memory_order_seq_cst);  // opens the loop
        if (sleeping_.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        take_items(loop, 0);
        while (done_.load(std::memory_order_acquire) < units) pause();
    }

private:
    // Threads are started when they are first needed.
    void start(int64_t threads) {
        try {
            for (; started_ < threads; started_++) std::thread(&Pool::work, this, started_).detach();
        } catch (const std::system_error &) {  // a limit of threads or memory
        }
    }

    int64_t first_of(int64_t share) const { return units_ * share / shares_; }

    // Take units of this loop until none is left.
    void take_items(uint64_t loop, int64_t own) {
        int64_t shares = shares_;
        for (int64_t turn = 0; turn < shares; turn++) {
            int64_t share = (own + turn) % shares;
            while (take(loop, share, turn == 0)) {}
        }
    }

    // Take a unit of a share and compute it. A unit is taken by exchanging what is left, which fails if the loop has
    // ended since; until then its description does not change.
    bool take(uint64_t loop, int64_t share, bool front) {
        uint64_t at = shares_of_[share].left.load(std::memory_order_acquire);
        for (;;) {
            uint64_t first = at >> 16 & 0xffff, last = at & 0xffff;
            if (at >> 32 != loop || first == last) return false;
            auto body = body_.load(std::memory_order_relaxed);
            void *context = context_.load(std::memory_order_relaxed);
            int64_t number = number_, unit = unit_, taken = first_of(share) + (front ? first : last - 1);
            uint64_t left = front ? share_of(loop, first + 1, last) : share_of(loop, first, last - 1);
            if (!shares_of_[share].left.compare_exchange_weak(at, left, std::memory_order_acq_rel, std::memory_order_acquire))
                continue;
            for (int64_t i = taken * unit; i < std::min((taken + 1) * unit, number); i++) body(context, i);
            done_.fetch_add(1, std::memory_order_release);
            return true;
        }
    }

    void work(int64_t number) {
        uint64_t seen = 0;
        auto idle = std::chrono::steady_clock::now();
        for (int64_t turn = 1;; turn++) {
            uint64_t loop = loop_.load(std::memory_order_acquire);
            if (loop != seen) {
                seen = loop;
                if (number < helpers_.load(std::memory_order_relaxed)) {
                    take_items(loop, number + 1);
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
            return loop_.load(std::memory_order_seq_cst) != seen && number < helpers_.load(std::memory_order_relaxed);
        });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }

    // Of the loop; others may read them while the next loop is described, hence atomic.
    std::atomic<void (*)(void *, int64_t)> body_{nullptr};
    std::atomic<void *> context_{nullptr};
    std::atomic<int64_t> number_{0}, unit_{1}, units_{0}, shares_{1}, helpers_{0};
    Share shares_of_[MAX_SHARES];
    alignas(64) std::atomic<uint64_t> loop_{0};
    alignas(64) std::atomic<int64_t> done_{0};  // units
    int64_t started_ = 0;
    std::atomic<int64_t> sleeping_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

thread_local int64_t threads_of_loops = 0;  // of this thread's loops; 0: as many as OpenMP would use
std::atomic<bool> busy{false};  // whether a loop runs
Pool *pool = nullptr;           // never destroyed: its threads run until the process ends

// Only the calling thread survives a fork.
void after_fork() {
    busy = false;
    pool = nullptr;
}

}  // namespace

void run_items(int64_t number, void (*body)(void *, int64_t), void *context) {
    int64_t most = threads_of_loops ? threads_of_loops : omp_get_max_threads(), threads = std::min(most, number) - 1;
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

static int (*mkl_threads_here)(int) = nullptr;

extern "C" {

// MKL's function that sets the calling thread's number of threads and returns the one before; null: there is no MKL.
void moefit_use_mkl(int (*set)(int)) { mkl_threads_here = set; }

// Keep the loops of OpenMP and MKL that the calling thread begins, which are torch's, on one thread, and use as many as
// OpenMP had for loops of this pool; `begin` 0 ends that. OpenMP's threads spin for milliseconds after a loop, on the
// cores that this pool's threads need. (torch.set_num_threads would start threads of another pool, which spin too.)
void moefit_one_thread(int64_t begin) {
    static thread_local int before = 0;  // of MKL
    if (begin && !threads_of_loops && omp_get_max_threads() > 1) {
        threads_of_loops = omp_get_max_threads();
        omp_set_num_threads(1);
        if (mkl_threads_here) before = mkl_threads_here(1);
    } else if (!begin && threads_of_loops) {
        omp_set_num_threads(threads_of_loops);
        threads_of_loops = 0;
        if (mkl_threads_here) mkl_threads_here(before);
    }
}
}
