// Who uses which of a model's memory.
#pragma once

#include <algorithm>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "common/layout.h"
#include "gpu/runtime.h"

namespace avser::gpu {

// Memory of calls that wait for their results: each takes one, and the last few that were given back are kept.
template <typename Memory>
class IdlePool {
 public:
  // One that `fits`, the last given back first; null: none.
  template <typename Fits>
  std::unique_ptr<Memory> take(const Fits& fits) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(idle_.rbegin(), idle_.rend(), [&](const auto& memory) { return fits(*memory); });
    if (found == idle_.rend()) return nullptr;
    std::unique_ptr<Memory> memory = std::move(*found);
    idle_.erase(std::next(found).base());
    return memory;
  }
  void give_back(std::unique_ptr<Memory> memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(memory));
    if (idle_.size() > kMostIdle) idle_.erase(idle_.begin());
  }

 private:
  static constexpr size_t kMostIdle = 8;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Memory>> idle_;
};

// Memory of calls that are queued on a caller's stream and not waited for.  What a stream queues runs in order, so that
// its calls of one size share one; those of the last few sizes are kept.  A graph that somebody records may run at any
// time: each call of it gets one of its own, for as long as the pool lives.
template <typename Memory>
class StreamPool {
 public:
  // use(memory) with one for calls of so many `slots` that `fits`, or that `make` makes; one thread at a time.
  template <typename Fits, typename Make, typename Use>
  void with(Stream stream, int64_t slots, const Fits& fits, const Make& make, const Use& use) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (is_capturing(stream)) {
      const WhileRecording allowed;
      recorded_.push_back(make());
      return use(*recorded_.back());
    }
    // The stream's own, last used first.
    std::list<Queued>& own = queued_[stream];
    const auto found = std::find_if(own.begin(), own.end(), [&](const Queued& one) { return one.slots == slots; });
    if (found != own.end()) own.splice(own.begin(), own, found);
    if (found == own.end() || !fits(*found->memory)) {
      if (found != own.end() || own.size() == kMostQueued) {
        synchronize(stream);
        own.erase(found != own.end() ? found : std::prev(own.end()));
      }
      own.push_front({slots, make()});
    }
    use(*own.front().memory);
  }

 private:
  static constexpr size_t kMostQueued = 8;
  struct Queued {
    int64_t slots;
    std::unique_ptr<Memory> memory;
  };
  std::mutex mutex_;
  std::map<Stream, std::list<Queued>> queued_;
  std::vector<std::unique_ptr<Memory>> recorded_;
};

// Lays arrays side by side: place() once with no base to learn the bytes, once with the memory.
class Layout {
 public:
  explicit Layout(char* base) : base_(base) {}
  template <typename T>
  T* place(int64_t count) {
    T* const here = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return here;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* const base_;
  int64_t bytes_ = 0;
};

}  // namespace avser::gpu
