// Depthwise 3x3 and pointwise convolution of a training step, and its gradients.
//
// An image at a time: the input is normalised and rectified on the way in, the depthwise output lives in a band of
// scratch (again in the backward), the statistics of the output are taken while it is close.
#pragma once

#include "common/executor.h"
#include "common/isa.h"
#include "common/tensor_view.h"
#include "ops/dsc_block/dsc_block.h"
#include "ops/gemm/gemm.h"

namespace avser {

struct SeparableConv2d {
  MapView x;
  Before before;
  int64_t out_channels;
  Depthwise depthwise;         // (9, in rounded up)
  GemmWeights pointwise;       // n = out, k = in
  GemmWeights pointwise_back;  // n = in, k = out; in the backward
};

// What an image adds to the gradients of the weights; arrays are padded like those of the op.  `pointwise` null: not
// wanted.
struct SeparableSums {
  double* depthwise;  // (9, in rounded up)
  float* pointwise;   // (out, in rounded up)
  double* scale;
  double* shift;
};

struct SeparableConv2dKernels {
  int64_t (*scratch)(const SeparableConv2d& op);
  // Image i of y, and the moments of it.
  void (*forward)(const SeparableConv2d& op, const MapView& y, int64_t i, const Moments& moments, char* scratch);
  int64_t (*backward_scratch)(const SeparableConv2d& op);
  // Image i of dx (data null: not wanted), and its share of the sums.
  void (*backward)(const SeparableConv2d& op, const OutputGradient& out, const MapView& dx, int64_t i,
                   const SeparableSums& sums, char* scratch);
};
AVSER_DECLARE_PER_ISA(SeparableConv2dKernels, separable_conv2d_kernels);

// ---- what callers use: arrays of plain tensors, contiguous, of the precision of x unless they are float

struct SeparableArguments {
  MapView x;
  int64_t out_channels;
  const void* depthwise;  // (in, 9)
  const void* pointwise;  // (out, in)
  const float* mean;      // (in,), or null
  const float* scale;
  const float* shift;
  bool relu;
};

// Null: not wanted (dx by its data).
struct SeparableResults {
  MapView dx;
  void* depthwise;
  void* pointwise;
  float* scale;
  float* shift;
};

void separable_conv2d(const SeparableArguments& arguments, const MapView& y, float* y_mean, float* y_var,
                      Executor& executor);
void separable_conv2d_backward(const SeparableArguments& arguments, const ConvolutionGradients& out,
                               const SeparableResults& results, Executor& executor);

}  // namespace avser
