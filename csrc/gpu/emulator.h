// Runs a GPU kernel on the CPU, for tests: every thread is a fiber, blocks of a cluster run together, clusters one
// after another.  Fibers change places only where threads meet (barriers, warp-wide instructions), in an order that the
// test chooses, so that a missing barrier shows as a wrong result under one of them.  Shared memory begins as NaN and
// every access through Shared<T> is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <vector>

namespace avser::gpu {

enum class FiberOrder { forward, backward, shuffled };

struct EmulatedLaunch {
  int blocks = 1;
  int threads = 32;
  int cluster = 1;
  int64_t shared_bytes = 0;
};

// Throws std::runtime_error: what a thread threw, or that threads wait for others that never come.
void emulate(const EmulatedLaunch& launch, const std::function<void()>& kernel);

// The order of all launches from now on, in any thread.
void set_fiber_order(FiberOrder order, uint32_t seed);

// How often threads have waited for a group of copies, ever: which way a kernel takes is not seen in its results.
int64_t group_waits();

// ---- for device_emulated.h ----

void count_group_wait();

// Threads that meet: the last one to come lets the others go on.
class Meeting {
 public:
  void expect(int count) { expected_ = count; }
  void meet();
  int generation() const { return generation_; }

 private:
  int expected_ = 0, arrived_ = 0, generation_ = 0;
  std::vector<int> waiting_;
};

struct EmulatedWarp {
  Meeting meeting;
  // What each lane brings to a warp-wide instruction; two of them, since a fast lane may already be at the next one.
  uint32_t brought[2][32][12];
  const char* rows[2][32];
};

struct EmulatedBlock {
  int index;
  Meeting meeting;
  char* shared;
  int64_t shared_bytes;
  std::vector<EmulatedWarp> warps;
};

struct EmulatedCopy {
  char* to;
  const char* from;  // null: zeros
  size_t bytes;
  int64_t group;
};

struct EmulatedThread {
  int thread;
  EmulatedBlock* block;
  EmulatedWarp* warp;
  Meeting* cluster;
  const EmulatedLaunch* launch;
  std::deque<EmulatedCopy> copies;
  int64_t copy_group;   // of the next copy
  bool copies_at_once;  // rather than when they are waited for: in the backward order
};

extern thread_local EmulatedThread* current_thread;

// Fails unless [at, at + bytes) lies in the current block's shared memory and is aligned.
void check_shared(const void* at, int64_t bytes, int64_t alignment);

}  // namespace avser::gpu
