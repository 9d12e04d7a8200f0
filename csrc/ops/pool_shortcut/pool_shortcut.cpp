#include "ops/pool_shortcut/pool_shortcut.h"

#include "common/training.h"

namespace avser {
namespace {

struct Packed {
  PaddedBefore before, shortcut_before;
  PoolShortcut op;
  explicit Packed(const PoolShortcutArguments& a)
      : before(a.mean, a.scale, a.shift, false, a.x.channels, float_lanes(current_isa())),
        shortcut_before(a.shortcut_mean, a.shortcut_scale, a.shortcut_shift, false, a.x.channels,
                        float_lanes(current_isa())),
        op{a.x, a.shortcut, before.before, shortcut_before.before, a.dropout} {}
};

// Scratch of `images` images of x, `rows` rows of its channels and a row of y with two vectors beyond.
int64_t scratch_bytes(const PoolShortcutArguments& a, int64_t images, int64_t rows) {
  const int64_t lanes = float_lanes(current_isa()), stride = round_up(a.x.channels, lanes);
  const int64_t row = a.shortcut.width * a.x.channels + 2 * lanes;
  return (images * a.x.positions() * stride + rows * stride + row) * static_cast<int64_t>(sizeof(float));
}

}  // namespace

void pool_shortcut(const PoolShortcutArguments& arguments, const MapView& y, Executor& executor) {
  const PoolShortcutKernels& kernels = AVSER_PICK(pool_shortcut_kernels);
  const Packed packed(arguments);
  for_each_with_scratch(executor, y.n, scratch_bytes(arguments, 1, 0), [&](int64_t i, char* memory) {
    kernels.forward(packed.op, y, i, reinterpret_cast<float*>(memory));
  });
}

void pool_shortcut_backward(const PoolShortcutArguments& arguments, const MapView& grad,
                            const PoolShortcutResults& results, Executor& executor) {
  const PoolShortcutKernels& kernels = AVSER_PICK(pool_shortcut_kernels);
  const Packed packed(arguments);
  const int64_t channels = arguments.x.channels, stride = round_up(channels, float_lanes(current_isa()));
  BatchSums sums(arguments.x.n, 4 * stride, 0);
  sums.run(executor, scratch_bytes(arguments, 2, 4), [&](int64_t i, double* mine, float*, char* memory) {
    const PoolShortcutSums into{mine, mine + stride, mine + 2 * stride, mine + 3 * stride};
    kernels.backward(packed.op, grad, results.dx, results.dshortcut, i, into, reinterpret_cast<float*>(memory));
  });
  const std::vector<double> small = sums.of_doubles();
  float* const out[4] = {results.scale, results.shift, results.shortcut_scale, results.shortcut_shift};
  for (int64_t which = 0; which < 4; ++which) {
    for (int64_t c = 0; c < channels; ++c) {
      out[which][c] = static_cast<float>(small[which * stride + c]);
    }
  }
}

}  // namespace avser
