#include "gpu/emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>

namespace avser::gpu {

thread_local EmulatedThread* current_thread = nullptr;

namespace {

std::atomic<FiberOrder> chosen_order{FiberOrder::forward};
std::atomic<uint32_t> chosen_seed{0};
std::atomic<int64_t> waited_groups{0};

constexpr size_t kStack = 256 << 10;

// ---- two contexts change places; the registers that a call keeps are on the stack of the one that waits ----
#if defined(__x86_64__)
extern "C" void avser_switch_context(void** save, void* load);
asm(R"(
.text
.globl avser_switch_context
.hidden avser_switch_context
.type avser_switch_context, @function
avser_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size avser_switch_context, .-avser_switch_context
)");

class Context {
 public:
  void start(char* stack, size_t bytes, void (*entry)()) {
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
    void** sp = reinterpret_cast<void**>(top);
    *--sp = nullptr;  // where `entry` would return to
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    sp_ = sp;
  }
  static void change(Context& from, Context& to) { avser_switch_context(&from.sp_, to.sp_); }

 private:
  void* sp_ = nullptr;
};
#else
class Context {
 public:
  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    makecontext(&context_, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context_, &to.context_); }

 private:
  ucontext_t context_;
};
#endif

// Stacks are kept from launch to launch: fresh pages cost more than the fibers.
class Stacks {
 public:
  ~Stacks() {
    for (char* stack : stacks_) munmap(stack, kStack);
  }
  char* operator[](size_t i) {
    while (stacks_.size() <= i) {
      void* made = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (made == MAP_FAILED) throw std::bad_alloc();
      stacks_.push_back(static_cast<char*>(made));
    }
    return stacks_[i];
  }

 private:
  std::vector<char*> stacks_;
};

class Scheduler {
 public:
  explicit Scheduler(const std::function<void()>& kernel)
      : kernel_(kernel), order_(chosen_order), random_(chosen_seed) {}

  void run(const EmulatedLaunch& launch, int first_block) {
    const int count = launch.cluster * launch.threads;
    std::vector<EmulatedBlock> blocks(launch.cluster);
    Meeting cluster;
    cluster.expect(count);
    std::vector<std::unique_ptr<char, void (*)(void*)>> memory;
    for (int b = 0; b < launch.cluster; ++b) {
      EmulatedBlock& block = blocks[b];
      block.index = first_block + b;
      block.meeting.expect(launch.threads);
      block.shared_bytes = launch.shared_bytes;
      const size_t bytes = (std::max<int64_t>(launch.shared_bytes, 1) + 127) / 128 * 128;
      memory.emplace_back(static_cast<char*>(std::aligned_alloc(128, bytes)), &std::free);
      block.shared = memory.back().get();
      std::memset(block.shared, 0xff, bytes);
      block.warps.resize(launch.threads / 32);
      for (EmulatedWarp& warp : block.warps) warp.meeting.expect(32);
    }
    static thread_local Stacks stacks;
    fibers_.assign(count, {});
    threads_.assign(count, {});
    ready_.clear();
    finished_ = 0;
    for (int i = 0; i < count; ++i) {
      EmulatedBlock& block = blocks[i / launch.threads];
      const int thread = i % launch.threads;
      threads_[i] = {thread, &block, &block.warps[thread / 32],     &cluster, &launch,
                     {},     0,      order_ == FiberOrder::backward};
      fibers_[i].start(stacks[i], kStack, &enter);
      ready_.push_back(i);
    }
    Scheduler* const outer = active_;
    EmulatedThread* const outer_thread = current_thread;
    active_ = this;
    while (!ready_.empty() && error_ == nullptr) {
      running_ = next();
      current_thread = &threads_[running_];
      Context::change(home_, fibers_[running_]);
    }
    active_ = outer;
    current_thread = outer_thread;
    if (error_ != nullptr) std::rethrow_exception(error_);
    if (finished_ < count) {
      throw std::runtime_error("emulated kernel: " + std::to_string(count - finished_) + " of " +
                               std::to_string(count) + " threads wait for others that never come");
    }
  }

  static Scheduler& active() { return *active_; }
  int running() const { return running_; }
  void wake(const std::vector<int>& fibers) { ready_.insert(ready_.end(), fibers.begin(), fibers.end()); }
  void leave() { Context::change(fibers_[running_], home_); }

 private:
  int next() {
    size_t at = 0;
    if (order_ == FiberOrder::backward) at = ready_.size() - 1;
    if (order_ == FiberOrder::shuffled) at = random_() % ready_.size();
    std::swap(ready_[at], order_ == FiberOrder::forward ? ready_.front() : ready_.back());
    const int fiber = order_ == FiberOrder::forward ? ready_.front() : ready_.back();
    order_ == FiberOrder::forward ? ready_.pop_front() : ready_.pop_back();
    return fiber;
  }

  static void enter() {
    Scheduler& own = *active_;
    try {
      own.kernel_();
      if (!current_thread->copies.empty()) {
        throw std::runtime_error("emulated kernel: thread " + std::to_string(current_thread->thread) + " of block " +
                                 std::to_string(current_thread->block->index) + " ends with copies under way");
      }
    } catch (...) {
      own.error_ = std::current_exception();
    }
    ++own.finished_;
    own.leave();
  }

  static thread_local Scheduler* active_;
  const std::function<void()>& kernel_;
  const FiberOrder order_;
  std::minstd_rand random_;
  Context home_;
  std::vector<Context> fibers_;
  std::vector<EmulatedThread> threads_;
  std::deque<int> ready_;
  int running_ = 0, finished_ = 0;
  std::exception_ptr error_;
};

thread_local Scheduler* Scheduler::active_ = nullptr;

}  // namespace

void Meeting::meet() {
  if (++arrived_ < expected_) {
    waiting_.push_back(Scheduler::active().running());
    Scheduler::active().leave();
    return;
  }
  arrived_ = 0;
  ++generation_;
  Scheduler::active().wake(waiting_);
  waiting_.clear();
}

void check_shared(const void* at, int64_t bytes, int64_t alignment) {
  const EmulatedBlock& block = *current_thread->block;
  const int64_t offset = static_cast<const char*>(at) - block.shared;
  if (offset < 0 || offset + bytes > block.shared_bytes || offset % alignment != 0) {
    throw std::runtime_error("emulated kernel: thread " + std::to_string(current_thread->thread) + " of block " +
                             std::to_string(block.index) + ": " + std::to_string(bytes) + " bytes at offset " +
                             std::to_string(offset) + " of " + std::to_string(block.shared_bytes) +
                             " bytes of shared memory");
  }
}

int64_t group_waits() { return waited_groups; }
void count_group_wait() { waited_groups.fetch_add(1, std::memory_order_relaxed); }

void set_fiber_order(FiberOrder order, uint32_t seed) {
  chosen_order = order;
  chosen_seed = seed;
}

void emulate(const EmulatedLaunch& launch, const std::function<void()>& kernel) {
  if (launch.threads % 32 != 0 || launch.blocks % launch.cluster != 0) {
    throw std::runtime_error("emulated kernel: expected whole warps and whole clusters");
  }
  for (int block = 0; block < launch.blocks; block += launch.cluster) Scheduler(kernel).run(launch, block);
}

}  // namespace avser::gpu
