#include "common/executor.h"

#include <unistd.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "common/check.h"

namespace avser {
namespace {

constexpr int kMaxThreads = 1024;
// Longer than the serial gap between two stages of a network and, mostly, between two calls from Python; a worker that
// sleeps wakes too late to help with a call of a fifth of a millisecond.
constexpr auto kSpin = std::chrono::microseconds(200);

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One loop: pieces are taken from `next` until it passes `items`.  It lives on its caller's stack; a worker must not
// touch it after it has lowered `active`.
struct Job {
  LoopBody body;
  int64_t items;
  int64_t piece;
  std::atomic<int> active;  // workers that have, or may still pick up, a share
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  Job(LoopBody b, int64_t n, int64_t p, int helpers) : body(b), items(n), piece(p), active(helpers) {}

  void work(int worker) {
    for (;;) {
      const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= items) return;
      try {
        body(begin, std::min(items, begin + piece), worker);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next.store(items, std::memory_order_relaxed);
      }
    }
  }
};

// A scheduler may wake a worker on the CPU of its waker, who does not give it up, and a call of a few milliseconds is
// over before one of them is moved.  While this lives, a thread may run where the caller may but for the caller's own
// CPU.
class ElsewhereWhileWaking {
 public:
#if defined(__linux__)
  explicit ElsewhereWhileWaking(pid_t thread) : thread_(thread) {
    const int here = sched_getcpu();
    if (thread == 0 || here < 0 || sched_getaffinity(0, sizeof allowed_, &allowed_) != 0) return;
    cpu_set_t others = allowed_;
    CPU_CLR(here, &others);
    moved_ = CPU_COUNT(&others) > 0 && sched_setaffinity(thread, sizeof others, &others) == 0;
  }
  ~ElsewhereWhileWaking() {
    if (moved_) sched_setaffinity(thread_, sizeof allowed_, &allowed_);
  }

 private:
  const pid_t thread_;
  cpu_set_t allowed_;
  bool moved_ = false;
#else
  explicit ElsewhereWhileWaking(pid_t) {}
#endif
};

class Worker {
 public:
  explicit Worker(int index) : index_(index) {
    std::thread([this] { live(); }).detach();
  }

  void offer(Job* job) {
    slot_.store(job, std::memory_order_seq_cst);
    if (sleeping_.load(std::memory_order_seq_cst)) {
      const ElsewhereWhileWaking elsewhere(thread_.load(std::memory_order_acquire));
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }  // it is either before its last look at the slot or asleep
      wake_.notify_one();
    }
  }
  // True when the worker had not picked the job up yet and now never will.
  bool take_back() { return slot_.exchange(nullptr, std::memory_order_acq_rel) != nullptr; }

 private:
  void live() {
#if defined(__linux__)
    thread_.store(static_cast<pid_t>(syscall(SYS_gettid)), std::memory_order_release);
#endif
    for (;;) {
      const auto deadline = std::chrono::steady_clock::now() + kSpin;
      for (int spins = 1; slot_.load(std::memory_order_relaxed) == nullptr; ++spins) {
        pause_cpu();
        if (spins % 64 == 0 && std::chrono::steady_clock::now() > deadline) {
          std::unique_lock<std::mutex> lock(mutex_);
          sleeping_.store(true, std::memory_order_seq_cst);
          wake_.wait(lock, [&] { return slot_.load(std::memory_order_seq_cst) != nullptr; });
          sleeping_.store(false, std::memory_order_relaxed);
        }
      }
      Job* job = slot_.exchange(nullptr, std::memory_order_acq_rel);
      if (job == nullptr) continue;
      job->work(index_);
      job->active.fetch_sub(1, std::memory_order_release);
    }
  }

  alignas(64) std::atomic<Job*> slot_{nullptr};
  std::atomic<bool> sleeping_{false};
  std::atomic<pid_t> thread_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  int index_;
};

class Pool {
 public:
  // False when another loop holds the pool.
  bool run(LoopBody body, int64_t items, int64_t piece, int workers) {
    std::unique_lock<std::mutex> hold(callers_, std::try_to_lock);
    if (!hold.owns_lock()) return false;
    const int helpers = workers - 1;
    while (static_cast<int>(workers_.size()) < helpers) {
      workers_.push_back(std::make_unique<Worker>(static_cast<int>(workers_.size()) + 1));
    }
    Job job(body, items, piece, helpers);
    for (int i = 0; i < helpers; ++i) workers_[i]->offer(&job);
    job.work(0);
    for (int i = 0; i < helpers; ++i) {
      if (workers_[i]->take_back()) job.active.fetch_sub(1, std::memory_order_relaxed);
    }
    for (int spins = 0; job.active.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < 4096) {
        pause_cpu();
      } else {
        std::this_thread::yield();
      }
    }
    if (job.failed.load()) std::rethrow_exception(job.error);
    return true;
  }

 private:
  std::mutex callers_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

// Threads do not survive a fork: a child gets a pool of its own and leaves the parent's alone.  Pools are never
// deleted, their sleeping workers end with the process.
Pool& pool() {
  static std::atomic<Pool*> instance{nullptr};
  static std::atomic<pid_t> owner{0};
  const pid_t me = getpid();
  if (owner.load(std::memory_order_acquire) != me) {
    static std::atomic<pid_t> maker{0};
    pid_t before = maker.load();
    if (before != me && maker.compare_exchange_strong(before, me)) {
      instance.store(new Pool);
      owner.store(me, std::memory_order_release);
    } else {
      while (owner.load(std::memory_order_acquire) != me) std::this_thread::yield();
    }
  }
  return *instance.load();
}

// The caller's own nested loops run serially; those of a worker do because the pool is held.
thread_local bool inside_loop = false;

struct InsideLoop {
  InsideLoop() { inside_loop = true; }
  ~InsideLoop() { inside_loop = false; }
};

}  // namespace

PoolExecutor::PoolExecutor(int threads) : threads_(threads) {
  AVSER_CHECK(threads >= 1 && threads <= kMaxThreads, config, "threads: expected 1..", kMaxThreads, ", got ", threads);
}

void PoolExecutor::parallel_for(int64_t items, int64_t piece, LoopBody body) {
  if (items <= 0) return;
  piece = std::max<int64_t>(piece, 1);
  const int64_t pieces = (items + piece - 1) / piece;
  const int workers = static_cast<int>(std::min<int64_t>(threads_, pieces));
  if (workers > 1 && !inside_loop) {
    InsideLoop mark;
    if (pool().run(body, items, piece, workers)) return;
  }
  body(0, items, 0);
}

}  // namespace avser
