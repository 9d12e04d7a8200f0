// What a GPU kernel may use of the machine, under two implementations: device_cuda.h is the real one; device_emulated.h
// runs the same source on a CPU, every thread of a block as a fiber, for tests (emulator.h).
//
// A kernel is written once against this layer and includes nothing of CUDA itself:
//   thread(), lane(), warp(), block(), blocks()      places, as int
//   sync(), cluster_sync(), shuffle_xor()
//   Shared<T>                                        a pointer into shared memory; checked where it is emulated
//   of_block()                                       the same place in another block's shared memory
//   copy16_async(), copy8_async() ..., copy_wait()   bytes from global into shared memory, behind the caller's back
//   copy_commit(), copy_wait_group()                 groups of such copies, waited for oldest first
//   ldmatrix(), mma_bf16(), mma_f16(), mma_tf32()    fragments of matrices, one call per warp
//   load_weights()                                   16 or 8 bytes that nobody writes while the kernel runs
//   fetch_add()                                      atomic, for all of the device
//   expect()                                         what must be so; looked at where it is emulated
//   max_nan(), exponential() ...                     arithmetic whose result is the same in any order of lanes
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include "gpu/device_cuda.h"
#else
#include "gpu/device_emulated.h"
#endif

namespace avser::gpu {

constexpr int kWarp = 32;

// Keeps NaN.
AVSER_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }
AVSER_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
AVSER_DEVICE int least(int a, int b) { return a < b ? a : b; }
AVSER_DEVICE int most(int a, int b) { return a > b ? a : b; }
AVSER_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Sum and largest value over the lanes of a warp, the same bits in each.
template <typename T>
AVSER_DEVICE T warp_sum(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += shuffle_xor(x, offset);
  return x;
}
AVSER_DEVICE float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = max_nan(x, shuffle_xor(x, offset));
  return x;
}

}  // namespace avser::gpu
