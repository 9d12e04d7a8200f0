// Tensors of a training step as kernels see them: borrowed memory of any layout, float32 or bf16.
#pragma once

#include <cstdint>

#include "common/layout.h"
#include "common/precision.h"

namespace avser {

// A map (n, channels, height, width) with strides in elements.
struct MapView {
  char* data = nullptr;
  Precision precision = Precision::float32;
  int64_t n = 0, channels = 0, height = 0, width = 0;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;

  int64_t positions() const { return height * width; }
  char* at(int64_t i, int64_t y, int64_t x) const {
    return data + (i * stride_n + y * stride_h + x * stride_w) * element_bytes(precision);
  }
};

// What a map's producer left to its consumer: (x - mean) scale + shift per channel, all null or none, then ReLU if
// asked. The arrays are padded with zeros to whole vectors.
struct Before {
  const float* mean = nullptr;
  const float* scale = nullptr;
  const float* shift = nullptr;
  bool relu = false;
};

// Gradients of what a convolution returned.
struct ConvolutionGradients {
  MapView grad;
  MapView y;
  const float* y_mean;  // (out,), like the next two
  const float* grad_mean;
  const float* grad_var;
};

// Gradients of a convolution's output y and of its mean and variance, as one gradient of y:
// grad + mean_term + var_term (y - y_mean).  The arrays are padded with zeros to whole vectors.
struct OutputGradient {
  MapView grad;
  MapView y;
  const float* y_mean;
  const float* mean_term;  // grad_mean / count
  const float* var_term;   // 2 grad_var / count
};

// Mean and sum of squared deviations of `count` values per channel; arrays of whole vectors.
struct Moments {
  double* mean;
  double* squares;
};

}  // namespace avser
