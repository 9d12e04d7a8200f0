// Aligned memory for weights and activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace avser {

// A block of bytes on a cache line, uninitialised.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes) : size_(bytes) {
    constexpr size_t kAlignment = 64;
    const size_t whole = (static_cast<size_t>(bytes) + kAlignment - 1) / kAlignment * kAlignment;
    data_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, whole > 0 ? whole : kAlignment)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  char* data() const { return data_.get(); }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> data_;
  int64_t size_ = 0;
};

}  // namespace avser
