#include "ops/strided_conv2d/strided_conv2d.h"

#include <cstring>

#include "common/training.h"
#include "ops/gemm/gemm_training.h"

namespace avser {
namespace {

// Every other position of every other row.
MapView halved_view(MapView view) {
  view.height = halved(view.height);
  view.width = halved(view.width);
  view.stride_h *= 2;
  view.stride_w *= 2;
  return view;
}

struct Packed {
  PaddedBefore before;
  std::vector<float> weight, bias, back;
  Buffer panels;
  StridedConv2d op;

  Packed(const StridedArguments& a, bool backward)
      : before(a.mean, a.scale, a.shift, a.relu, a.x.channels, float_lanes(current_isa())) {
    const int64_t lanes = float_lanes(current_isa()), in = a.x.channels, out = a.out_channels;
    const int64_t taps = a.kernel * a.kernel, padded = round_up(in, lanes);
    op.x = a.kernel == 1 ? halved_view(a.x) : a.x;
    op.before = before.before;
    op.kernel = a.kernel;
    op.step = a.kernel == 1 ? 1 : 2;
    op.out_channels = out;
    op.out_height = halved(a.x.height);
    op.out_width = halved(a.x.width);
    op.x_stride = in < lanes ? in : padded;  // a window of few channels would be mostly padding
    const std::vector<float> plain = padded_floats(a.weight, a.x.precision, out, in * taps, in * taps);
    const GemmTrainingKernels& kernels = AVSER_PICK(gemm_training_kernels);
    const Precision operands = op.few(lanes) ? Precision::float32 : kernels.operands(a.x.precision);
    const auto pack = [&](const MatrixView& matrix, const float* added) {
      panels = Buffer(packed_bytes(matrix.n, matrix.k, lanes, operands));
      kernels.pack(matrix, operands, 0, gemm_panels(matrix.n, lanes), panels.data());
      return packed_weights(matrix.n, matrix.k, operands, panels.data(), added);
    };
    const int64_t stride = backward ? padded : op.x_stride;
    weight.assign(out * taps * stride, 0.0f);
    for (int64_t o = 0; o < out; ++o) {
      for (int64_t c = 0; c < in; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          weight[(o * taps + tap) * stride + c] = plain[(o * in + c) * taps + tap];
        }
      }
    }
    if (backward) {
      op.weights_back = pack({weight.data(), Precision::float32, taps * padded, out, 1, taps * padded}, nullptr);
    } else {
      if (a.bias != nullptr) bias = padded_floats(a.bias, a.x.precision, 1, out, round_up(out, lanes));
      op.weights = pack({weight.data(), Precision::float32, out, taps * stride, taps * stride, 1},
                        a.bias == nullptr ? nullptr : bias.data());
    }
  }
};

}  // namespace

void strided_conv2d(const StridedArguments& arguments, const MapView& y, float* y_mean, float* y_var,
                    Executor& executor) {
  const Packed packed(arguments, false);
  convolve(AVSER_PICK(strided_conv2d_kernels), packed.op, y, float_lanes(current_isa()), y_mean, y_var, executor);
}

void strided_conv2d_backward(const StridedArguments& arguments, const ConvolutionGradients& out,
                             const StridedResults& results, Executor& executor) {
  const StridedConv2dKernels& kernels = AVSER_PICK(strided_conv2d_kernels);
  const Packed packed(arguments, true);
  const int64_t lanes = float_lanes(current_isa()), channels = arguments.out_channels;
  const PaddedOutput gradient(out.grad, out.y, out.y_mean, out.grad_mean, out.grad_var, lanes);
  const int64_t in = round_up(arguments.x.channels, lanes), padded_out = round_up(channels, lanes);
  const int64_t n = out.y.positions() > 0 ? out.y.n : 0;
  const bool weights = results.weight != nullptr;
  // A 1x1 kernel fills every other position of dx; the others are zeros.
  const bool sparse = results.dx.data != nullptr && arguments.kernel == 1;
  const MapView dx = sparse ? halved_view(results.dx) : results.dx;
  const int64_t image_bytes = results.dx.positions() * results.dx.channels * element_bytes(results.dx.precision);
  const int64_t segment = packed.op.segment(lanes), row = arguments.kernel * segment;
  const bool few = packed.op.few(lanes);
  const int64_t windows = arguments.kernel * arguments.kernel * arguments.x.channels;
  const int64_t large = !weights ? 0 : few ? windows * padded_out : channels * row;
  // Scale, shift and bias as doubles, the gradient of the weights as floats.
  BatchSums sums(n, 2 * in + padded_out, large);
  sums.run(executor, kernels.backward_scratch(packed.op), [&](int64_t i, double* small, float* matrix, char* memory) {
    const StridedSums into{weights ? matrix : nullptr, small + 2 * in, small, small + in};
    if (sparse) std::memset(results.dx.at(i, 0, 0), 0, image_bytes);
    kernels.backward(packed.op, gradient.gradient, dx, i, into, memory);
  });
  const std::vector<double> small = sums.of_doubles();
  const Precision precision = arguments.x.precision;
  for (int64_t c = 0; results.scale != nullptr && c < arguments.x.channels; ++c) {
    results.scale[c] = static_cast<float>(small[c]);
    results.shift[c] = static_cast<float>(small[in + c]);
  }
  if (!weights) return;
  for (int64_t o = 0; o < channels; ++o) store_value(small[2 * in + o], results.bias, precision, o);
  const int64_t kernel = arguments.kernel, taps = kernel * kernel, inputs = arguments.x.channels;
  executor.parallel_for(channels, few ? channels : 16, [&](int64_t begin, int64_t end, int) {
    const int64_t first = few ? 0 : begin * row, count = few ? large : (end - begin) * row;
    std::vector<double> weight(count);
    sums.of_floats(first, count, weight.data());
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t c = 0; c < inputs; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t at = few ? (tap * inputs + c) * padded_out + o
                                 : o * row + tap / kernel * segment + tap % kernel * packed.op.x_stride + c;
          store_value(weight[at - first], results.weight, precision, (o * inputs + c) * taps + tap);
        }
      }
    }
  });
}

}  // namespace avser
