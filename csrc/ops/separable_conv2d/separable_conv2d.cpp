#include "ops/separable_conv2d/separable_conv2d.h"

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
    const GemmTrainingKernels& kernels = AVSER_PICK(gemm_training_kernels);
    const Precision operands = kernels.operands(a.x.precision);
    const auto pack = [&](const MatrixView& matrix, Buffer& memory) {
      memory = Buffer(packed_bytes(matrix.n, matrix.k, lanes, operands));
      kernels.pack(matrix, operands, 0, gemm_panels(matrix.n, lanes), memory.data());
      return packed_weights(matrix.n, matrix.k, operands, memory.data());
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
  const Packed packed(arguments, false);
  convolve(AVSER_PICK(separable_conv2d_kernels), packed.op, y, float_lanes(current_isa()), y_mean, y_var, executor);
}

void separable_conv2d_backward(const SeparableArguments& arguments, const ConvolutionGradients& out,
                               const SeparableResults& results, Executor& executor) {
  const SeparableConv2dKernels& kernels = AVSER_PICK(separable_conv2d_kernels);
  const Packed packed(arguments, true);
  const int64_t lanes = float_lanes(current_isa());
  const PaddedOutput gradient(out.grad, out.y, out.y_mean, out.grad_mean, out.grad_var, lanes);
  const int64_t in = round_up(arguments.x.channels, lanes), n = out.y.positions() > 0 ? out.y.n : 0;
  const bool weights = results.pointwise != nullptr;
  // Taps, scale and shift as doubles, the pointwise gradient as floats.
  BatchSums sums(n, 11 * in, weights ? arguments.out_channels * in : 0);
  sums.run(executor, kernels.backward_scratch(packed.op), [&](int64_t i, double* small, float* matrix, char* memory) {
    const SeparableSums into{small, weights ? matrix : nullptr, small + 9 * in, small + 10 * in};
    kernels.backward(packed.op, gradient.gradient, results.dx, i, into, memory);
  });
  const std::vector<double> small = sums.of_doubles();
  for (int64_t c = 0; c < arguments.x.channels; ++c) {
    if (results.depthwise != nullptr) {
      for (int64_t tap = 0; tap < 9; ++tap) {
        store_value(small[tap * in + c], results.depthwise, arguments.x.precision, c * 9 + tap);
      }
    }
    if (results.scale != nullptr) {
      results.scale[c] = static_cast<float>(small[9 * in + c]);
      results.shift[c] = static_cast<float>(small[10 * in + c]);
    }
  }
  if (!weights) return;
  executor.parallel_for(arguments.out_channels, 16, [&](int64_t begin, int64_t end, int) {
    std::vector<double> row(in);
    for (int64_t o = begin; o < end; ++o) {
      sums.of_floats(o * in, in, row.data());
      store_values(row.data(), arguments.x.channels, results.pointwise, arguments.x.precision,
                   o * arguments.x.channels);
    }
  });
}

}  // namespace avser
