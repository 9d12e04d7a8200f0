// What the training ops share beside their kernels: padded copies of small arrays, fixed shares of a batch, statistics.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/executor.h"
#include "common/tensor_view.h"
#include "engine/buffer.h"

namespace avser {

// `values` (count, rows of n) of a precision as float rows of `stride`, zeros beyond n.
std::vector<float> padded_floats(const void* values, Precision precision, int64_t rows, int64_t n, int64_t stride);
// The same with rows and columns exchanged: values (n, rows) become rows of n.
std::vector<float> transposed_floats(const void* values, Precision precision, int64_t rows, int64_t n, int64_t stride);
void store_value(double value, void* to, Precision precision, int64_t i);
void store_values(const double* values, int64_t n, void* to, Precision precision, int64_t first);
// sums[i] = the sum of values[i + row * stride] over the rows, in their order.
void add_rows(const float* values, int64_t rows, int64_t stride, int64_t n, double* sums);

// The batch norm that is still to be done, padded.
struct PaddedBefore {
  std::vector<float> mean, scale, shift;
  Before before;
  PaddedBefore(const float* mean_of, const float* scale_of, const float* shift_of, bool relu, int64_t channels,
               int64_t lanes);
  PaddedBefore(const PaddedBefore&) = delete;
};

// Runs body(item, memory) for each of `items` on the executor, with `bytes` of scratch for every worker.
template <typename Body>
void for_each_with_scratch(Executor& executor, int64_t items, int64_t bytes, const Body& body) {
  std::vector<Buffer> memory(executor.threads());
  executor.parallel_for(items, 1, [&](int64_t begin, int64_t end, int worker) {
    Buffer& mine = memory[worker];
    if (mine.size() < bytes) mine = Buffer(bytes);
    for (int64_t item = begin; item < end; ++item) body(item, mine.data());
  });
}

// Sums over a batch, doubles and floats.  They are made in shares whose number depends on nothing but the batch's size:
// those of a share one image after the other, and the shares are joined in their order, so that a gradient has the same
// bits for any number of threads.
class BatchSums {
 public:
  BatchSums(int64_t images, int64_t doubles, int64_t floats);
  // Runs add(image, doubles, floats, memory) for every image, with `bytes` of scratch for every worker; what it adds to
  // begins with zeros.
  template <typename Add>
  void run(Executor& executor, int64_t bytes, const Add& add) {
    for_each_with_scratch(executor, shares_, bytes, [&](int64_t share, char* memory) {
      double* doubles = doubles_.data() + share * double_count_;
      float* floats = floats_.as<float>() + share * float_count_;
      std::fill(floats, floats + float_count_, 0.0f);  // by the worker that fills them
      const int64_t end = images_ * (share + 1) / shares_;
      for (int64_t i = images_ * share / shares_; i < end; ++i) add(i, doubles, floats, memory);
    });
  }
  std::vector<double> of_doubles() const;
  // Sums [at, at + n) of the floats.
  void of_floats(int64_t at, int64_t n, double* sums) const;

 private:
  static constexpr int64_t kMostShares = 16;
  int64_t images_, shares_, double_count_, float_count_;
  std::vector<double> doubles_;
  Buffer floats_;
};

// Moments of every image, joined into mean and variance.
class BatchMoments {
 public:
  BatchMoments(int64_t images, int64_t stride);
  Moments of(int64_t image);
  // Of `channels` channels, `count` values an image.
  void finish(int64_t channels, int64_t count, float* mean, float* var) const;

 private:
  int64_t images_, stride_;
  std::vector<double> values_;
};

// The images of a convolution's output y one by one, with their statistics.
template <typename Kernels, typename Op>
void convolve(const Kernels& kernels, const Op& op, const MapView& y, int64_t lanes, float* y_mean, float* y_var,
              Executor& executor) {
  BatchMoments moments(y.n, round_up(y.channels, lanes));
  if (y.positions() > 0) {
    for_each_with_scratch(executor, y.n, kernels.scratch(op),
                          [&](int64_t i, char* memory) { kernels.forward(op, y, i, moments.of(i), memory); });
  }
  moments.finish(y.channels, y.positions(), y_mean, y_var);
}

// The terms of an OutputGradient that do not depend on the position, padded.
struct PaddedOutput {
  std::vector<float> y_mean, mean_term, var_term;
  OutputGradient gradient;
  PaddedOutput(const MapView& grad, const MapView& y, const float* mean, const float* grad_mean, const float* grad_var,
               int64_t lanes);
  PaddedOutput(const PaddedOutput&) = delete;
};

}  // namespace avser
