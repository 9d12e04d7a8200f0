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

int64_t image_bytes(const PoolShortcutArguments& a) {
  const int64_t stride = round_up(a.x.channels, float_lanes(current_isa()));
  return a.x.positions() * stride * static_cast<int64_t>(sizeof(float));
}

}  // namespace

void pool_shortcut(const PoolShortcutArguments& arguments, const MapView& y, Executor& executor) {
  const PoolShortcutKernels& kernels = AVSER_PICK(pool_shortcut_kernels);
  const Packed packed(arguments);
  for_each_with_scratch(executor, y.n, image_bytes(arguments), [&](int64_t i, char* memory) {
    kernels.forward(packed.op, y, i, reinterpret_cast<float*>(memory));
  });
}

void pool_shortcut_backward(const PoolShortcutArguments& arguments, const MapView& grad,
                            const PoolShortcutResults& results, Executor& executor) {
  const PoolShortcutKernels& kernels = AVSER_PICK(pool_shortcut_kernels);
  const Packed packed(arguments);
  const int64_t channels = arguments.x.channels, stride = round_up(channels, float_lanes(current_isa()));
  const Shares shares(arguments.x.n);
  std::vector<double> sums(shares.count * 4 * stride, 0.0);
  const int64_t bytes = 2 * image_bytes(arguments) + 4 * stride * static_cast<int64_t>(sizeof(float));
  for_each_with_scratch(executor, shares.count, bytes, [&](int64_t share, char* memory) {
    double* mine = sums.data() + share * 4 * stride;
    const PoolShortcutSums into{mine, mine + stride, mine + 2 * stride, mine + 3 * stride};
    for (int64_t i = shares.begin(share); i < shares.begin(share + 1); ++i) {
      kernels.backward(packed.op, grad, results.dx, results.dshortcut, i, into, reinterpret_cast<float*>(memory));
    }
  });
  float* const out[4] = {results.scale, results.shift, results.shortcut_scale, results.shortcut_shift};
  for (int64_t which = 0; which < 4; ++which) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0.0;
      for (int64_t share = 0; share < shares.count; ++share) sum += sums[(share * 4 + which) * stride + c];
      out[which][c] = static_cast<float>(sum);
    }
  }
}

}  // namespace avser
