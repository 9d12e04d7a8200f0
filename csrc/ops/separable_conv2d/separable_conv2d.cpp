#include "ops/separable_conv2d/separable_conv2d.h"

#include <algorithm>

#include "common/training.h"
#include "ops/gemm/gemm_training.h"

namespace avser {
namespace {

// The op with everything that its kernels read, packed.
struct Packed {
  PaddedBefore before;
  std::vector<float> taps;
  Buffer pointwise, pointwise_back;
  SeparableConv2d op;

  Packed(const SeparableArguments& a, bool backward)
      : before(a.mean, a.scale, a.shift, a.relu, a.x.channels, float_lanes(current_isa())) {
    const int64_t lanes = float_lanes(current_isa()), in = a.x.channels, out = a.out_channels;
    taps = transposed_floats(a.depthwise, a.x.precision, 9, in, round_up(in, lanes));
    op.x = a.x;
    op.before = before.before;
    op.out_channels = out;
    op.depthwise = {taps.data(), nullptr, nullptr};
    const auto pack = [&](const MatrixView& matrix, Buffer& memory) {
      memory = Buffer(packed_floats(matrix.n, matrix.k, lanes) * static_cast<int64_t>(sizeof(float)));
      AVSER_PICK(gemm_training_kernels).pack(matrix, 0, gemm_panels(matrix.n, lanes), memory.as<float>());
      return packed_weights(matrix.n, matrix.k, memory.as<float>());
    };
    if (backward) {
      op.pointwise_back = pack({a.pointwise, a.x.precision, in, out, 1, in}, pointwise_back);
    } else {
      op.pointwise = pack({a.pointwise, a.x.precision, out, in, in, 1}, pointwise);
    }
  }
};

}  // namespace

void separable_conv2d(const SeparableArguments& arguments, const MapView& y, float* y_mean, float* y_var,
                      Executor& executor) {
  const SeparableConv2dKernels& kernels = AVSER_PICK(separable_conv2d_kernels);
  const Packed packed(arguments, false);
  BatchMoments moments(y.n, round_up(y.channels, float_lanes(current_isa())));
  if (y.positions() > 0) {
    for_each_with_scratch(executor, y.n, kernels.scratch(packed.op),
                          [&](int64_t i, char* memory) { kernels.forward(packed.op, y, i, moments.of(i), memory); });
  }
  moments.finish(y.channels, y.positions(), y_mean, y_var);
}

void separable_conv2d_backward(const SeparableArguments& arguments, const ConvolutionGradients& out,
                               const SeparableResults& results, Executor& executor) {
  const SeparableConv2dKernels& kernels = AVSER_PICK(separable_conv2d_kernels);
  const Packed packed(arguments, true);
  const int64_t lanes = float_lanes(current_isa());
  const PaddedOutput gradient(out.grad, out.y, out.y_mean, out.grad_mean, out.grad_var, lanes);
  const int64_t in = round_up(arguments.x.channels, lanes), n = out.y.positions() > 0 ? out.y.n : 0;
  const Shares shares(n);
  const bool weights = results.pointwise != nullptr;
  // Per share: taps, scale and shift as doubles, then the pointwise gradient as floats.
  const int64_t small = 11 * in, large = weights ? arguments.out_channels * in : 0;
  std::vector<double> doubles(shares.count * small, 0.0);
  const Buffer matrices(shares.count * large * static_cast<int64_t>(sizeof(float)));
  float* const floats = matrices.as<float>();
  for_each_with_scratch(executor, shares.count, kernels.backward_scratch(packed.op), [&](int64_t share, char* memory) {
    double* mine = doubles.data() + share * small;
    float* matrix = floats + share * large;
    std::fill(matrix, matrix + large, 0.0f);
    const SeparableSums sums{mine, weights ? matrix : nullptr, mine + 9 * in, mine + 10 * in};
    for (int64_t i = shares.begin(share); i < shares.begin(share + 1); ++i) {
      kernels.backward(packed.op, gradient.gradient, results.dx, i, sums, memory);
    }
  });
  const auto total = [&](int64_t at) {
    double sum = 0.0;
    for (int64_t share = 0; share < shares.count; ++share) sum += doubles[share * small + at];
    return sum;
  };
  for (int64_t c = 0; c < arguments.x.channels; ++c) {
    if (results.depthwise != nullptr) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        store_value(total(tap * in + c), results.depthwise, arguments.x.precision, c * 9 + tap);
      }
    }
    if (results.scale != nullptr) {
      results.scale[c] = static_cast<float>(total(9 * in + c));
      results.shift[c] = static_cast<float>(total(10 * in + c));
    }
  }
  if (!weights) return;
  executor.parallel_for(arguments.out_channels, 16, [&](int64_t begin, int64_t end, int) {
    std::vector<double> sums(in);
    for (int64_t o = begin; o < end; ++o) {
      add_shares(floats + o * in, shares.count, large, in, sums.data());
      store_values(sums.data(), arguments.x.channels, results.pointwise, arguments.x.precision,
                   o * arguments.x.channels);
    }
  });
}

}  // namespace avser
