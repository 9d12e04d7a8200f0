// Aligned memory for weights and activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace avser {

// A block of floats on a cache line, uninitialised.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t floats) : size_(floats) {
    constexpr size_t kAlignment = 64;
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + kAlignment - 1) / kAlignment * kAlignment;
    data_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, bytes > 0 ? bytes : kAlignment)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  float* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

}  // namespace avser
