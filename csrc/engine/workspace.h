// Workspaces of concurrent calls: taken from the idle ones and returned to them, so that a steady load allocates
// nothing.
#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "common/fork_mutex.h"
#include "engine/buffer.h"

namespace avser {

class Workspaces {
 public:
  // With `poison` a workspace is filled with NaN before use, so that a test sees what reads memory that nothing wrote.
  explicit Workspaces(bool poison) : poison_(poison) {}

  // A workspace for one call.
  class Lease {
   public:
    Lease(Workspaces& owner, int64_t bytes) : owner_(owner) {
      {
        const std::lock_guard<ForkMutex> lock(owner_.mutex_);
        if (!owner_.idle_.empty()) {
          buffer_ = std::move(owner_.idle_.back());
          owner_.idle_.pop_back();
        }
      }
      if (buffer_ == nullptr || buffer_->size() < bytes) {
        buffer_.reset();  // before the larger one is allocated
        buffer_ = std::make_unique<Buffer>(bytes);
      }
      if (owner_.poison_) std::memset(buffer_->data(), 0xff, buffer_->size());
    }
    ~Lease() {
      const std::lock_guard<ForkMutex> lock(owner_.mutex_);
      owner_.idle_.push_back(std::move(buffer_));
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    char* data() const { return buffer_->data(); }

   private:
    Workspaces& owner_;
    std::unique_ptr<Buffer> buffer_;
  };

 private:
  const bool poison_;
  ForkMutex mutex_;
  std::vector<std::unique_ptr<Buffer>> idle_;
};

}  // namespace avser
