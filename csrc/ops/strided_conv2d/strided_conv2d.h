// Convolution of stride 2, 3x3 with padding 1 or 1x1, of a training step, and its gradients; an image at a time.
#pragma once

#include "common/executor.h"
#include "common/isa.h"
#include "common/tensor_view.h"
#include "ops/gemm/gemm.h"

namespace avser {

// A 1x1 kernel sees every other position of every other row: `x` is the view of those, `step` is 1.
struct StridedConv2d {
  MapView x;
  Before before;
  int64_t kernel, step;
  int64_t out_channels, out_height, out_width;
  int64_t x_stride;          // of a position of the prepared input: channels, rounded up unless they are few
  GemmWeights weights;       // n = out, k = (ky, kx, x_stride)
  GemmWeights weights_back;  // n = (ky, kx, channels rounded up), k = out; in the backward

  // With few channels the gradient of the weights is made the other way round, a row of it per weight of a window.
  bool few(int64_t lanes) const { return x_stride < lanes; }
  // Floats of a row of the kernel's gradient.
  int64_t segment(int64_t lanes) const { return round_up(kernel * x_stride, lanes); }
};

// What an image adds to the gradients; `weight` null: not wanted.
struct StridedSums {
  float* weight;  // (out, kernel, segment), or for few channels (kernel, kernel, in, out rounded up)
  double* bias;   // (out rounded up)
  double* scale;  // (in rounded up)
  double* shift;
};

struct StridedConv2dKernels {
  int64_t (*scratch)(const StridedConv2d& op);
  void (*forward)(const StridedConv2d& op, const MapView& y, int64_t i, const Moments& moments, char* scratch);
  int64_t (*backward_scratch)(const StridedConv2d& op);
  // dx is the view that the op has of x; data null: not wanted.
  void (*backward)(const StridedConv2d& op, const OutputGradient& out, const MapView& dx, int64_t i,
                   const StridedSums& sums, char* scratch);
};
AVSER_DECLARE_PER_ISA(StridedConv2dKernels, strided_conv2d_kernels);

// ---- what callers use: arrays of plain tensors, contiguous, of the precision of x unless they are float

struct StridedArguments {
  MapView x;
  int64_t out_channels;
  int64_t kernel;
  const void* weight;  // (out, in, kernel, kernel)
  const void* bias;    // (out,), or null
  const float* mean;   // (in,), or null
  const float* scale;
  const float* shift;
  bool relu;
};

// Null: not wanted (dx by its data).
struct StridedResults {
  MapView dx;
  void* weight;
  void* bias;
  float* scale;
  float* shift;
};

void strided_conv2d(const StridedArguments& arguments, const MapView& y, float* y_mean, float* y_var,
                    Executor& executor);
void strided_conv2d_backward(const StridedArguments& arguments, const ConvolutionGradients& out,
                             const StridedResults& results, Executor& executor);

}  // namespace avser
