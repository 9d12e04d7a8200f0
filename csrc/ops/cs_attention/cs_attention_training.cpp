#include "ops/cs_attention/cs_attention_training.h"

#include "common/training.h"

namespace avser {
namespace {

struct Packed {
  std::vector<float> spatial, weight1, bias1, weight2, bias2;
  int64_t stride;
  TrainedAttention op;

  explicit Packed(const AttentionArguments& a) : stride(round_up(a.x.channels, float_lanes(current_isa()))) {
    const Precision precision = a.x.precision;
    const int64_t channels = a.x.channels;
    op.x = a.x;
    op.hidden = a.channel_weight1 == nullptr ? 0 : a.hidden;
    if (a.spatial_weight != nullptr) {
      spatial = padded_floats(a.spatial_weight, precision, 1, 18, 19);
      spatial[18] = padded_floats(a.spatial_bias, precision, 1, 1, 1)[0];
      op.spatial = spatial.data();
    }
    if (a.channel_weight1 != nullptr) {
      weight1 = padded_floats(a.channel_weight1, precision, a.hidden, channels, stride);
      bias1 = padded_floats(a.channel_bias1, precision, 1, a.hidden, a.hidden);
      weight2 = transposed_floats(a.channel_weight2, precision, a.hidden, channels, stride);
      bias2 = padded_floats(a.channel_bias2, precision, 1, channels, stride);
      op.weight1 = weight1.data(), op.bias1 = bias1.data(), op.weight2 = weight2.data(), op.bias2 = bias2.data();
    }
  }
};

}  // namespace

void trained_attention(const AttentionArguments& arguments, const MapView& y, Executor& executor) {
  const AttentionTrainingKernels& kernels = AVSER_PICK(attention_training_kernels);
  const Packed packed(arguments);
  if (y.positions() == 0) return;
  for_each_with_scratch(executor, y.n, kernels.scratch(packed.op),
                        [&](int64_t i, char* memory) { kernels.forward(packed.op, y, i, memory); });
}

void trained_attention_backward(const AttentionArguments& arguments, const MapView& grad,
                                const AttentionResults& results, Executor& executor) {
  const AttentionTrainingKernels& kernels = AVSER_PICK(attention_training_kernels);
  const Packed packed(arguments);
  const int64_t channels = arguments.x.channels, stride = packed.stride, hidden = packed.op.hidden;
  const int64_t matrix = hidden * stride, large = 2 * matrix + hidden + stride;
  BatchSums sums(arguments.x.positions() > 0 ? arguments.x.n : 0, 19, large);
  sums.run(executor, kernels.scratch(packed.op), [&](int64_t i, double* spatial, float* mine, char* memory) {
    const AttentionSums into{spatial, mine, mine + 2 * matrix + stride, mine + matrix, mine + 2 * matrix};
    kernels.backward(packed.op, grad, results.dx, i, into, memory);
  });
  const std::vector<double> small = sums.of_doubles();
  const Precision precision = arguments.x.precision;
  std::vector<double> total(large);
  sums.of_floats(0, large, total.data());
  if (packed.op.spatial != nullptr) {
    for (int64_t tap = 0; tap < 19; ++tap) {
      const double sum = small[tap];
      tap < 18 ? store_value(sum, results.spatial_weight, precision, tap)
               : store_value(sum, results.spatial_bias, precision, 0);
    }
  }
  for (int64_t j = 0; j < hidden; ++j) {
    store_value(total[2 * matrix + stride + j], results.channel_bias1, precision, j);
    for (int64_t c = 0; c < channels; ++c) {
      store_value(total[j * stride + c], results.channel_weight1, precision, j * channels + c);
      store_value(total[matrix + j * stride + c], results.channel_weight2, precision, c * hidden + j);
    }
  }
  for (int64_t c = 0; hidden > 0 && c < channels; ++c) {
    store_value(total[2 * matrix + c], results.channel_bias2, precision, c);
  }
}

}  // namespace avser
