// A mutex that is open after a fork, whichever thread held it.
#pragma once

#include <mutex>

namespace avser {

// A fork takes every one of these first and opens them in both processes: otherwise a child would wait for ever for a
// thread that it does not have, or see what that thread was in the middle of.  Held for moments, and never two at once.
class ForkMutex {
 public:
  ForkMutex();
  ~ForkMutex();
  ForkMutex(const ForkMutex&) = delete;
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
};

}  // namespace avser
