// End of a residual block in a training step: both paths normalised, max-pool, sum, dropout; and the gradients.
#pragma once

#include "common/dropout.h"
#include "common/executor.h"
#include "common/isa.h"
#include "common/tensor_view.h"

namespace avser {

struct PoolShortcut {
  MapView x;
  MapView shortcut;  // half the size, rounded up
  Before before;     // of x; without ReLU, as the next
  Before shortcut_before;
  Dropout dropout;
};

// Sums over positions for the gradients of the norms, (channels rounded up) each.
struct PoolShortcutSums {
  double *scale, *shift, *shortcut_scale, *shortcut_shift;
};

struct PoolShortcutKernels {
  // Image i; scratch holds an image of x, in the backward two and 4 sums, channels rounded up, and a row of y with two
  // vectors beyond.
  void (*forward)(const PoolShortcut& op, const MapView& y, int64_t i, float* scratch);
  void (*backward)(const PoolShortcut& op, const MapView& grad, const MapView& dx, const MapView& dshortcut, int64_t i,
                   const PoolShortcutSums& sums, float* scratch);
};
AVSER_DECLARE_PER_ISA(PoolShortcutKernels, pool_shortcut_kernels);

// ---- what callers use: vectors of `channels` floats

struct PoolShortcutArguments {
  MapView x;
  const float *mean, *scale, *shift;
  MapView shortcut;
  const float *shortcut_mean, *shortcut_scale, *shortcut_shift;
  Dropout dropout;
};

struct PoolShortcutResults {
  MapView dx;
  float *scale, *shift;
  MapView dshortcut;
  float *shortcut_scale, *shortcut_shift;
};

void pool_shortcut(const PoolShortcutArguments& arguments, const MapView& y, Executor& executor);
void pool_shortcut_backward(const PoolShortcutArguments& arguments, const MapView& grad,
                            const PoolShortcutResults& results, Executor& executor);

}  // namespace avser
