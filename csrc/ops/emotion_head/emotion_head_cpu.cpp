#include "common/operands.h"
#include "ops/emotion_head/emotion_head.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr float kPoolEpsilon = 1e-5f;  // under the square root of mean_std pooling

// Means and deviations, each padded; both side by side; and the padded logits.
int64_t scratch_floats(const EmotionHead& head) {
  return 2 * round_up(head.width(), kLanes) + round_up(head.features(), kLanes) + round_up(head.head.n, kLanes);
}

void classify(const EmotionHead& head, const float* x, int64_t tokens, const float* hidden, float* feature,
              float* logits, float* scratch) {
  const int64_t width = head.width(), stride = round_up(width, kLanes);
  float* means = scratch;
  float* deviations = means + stride;
  float* joined = deviations + stride;
  float* padded = joined + round_up(head.features(), kLanes);
  const vfloat count = broadcast(static_cast<float>(tokens));
  for (int64_t i = 0; i < stride; i += kLanes) {
    vfloat sum{};
    for (int64_t t = 0; t < tokens; ++t) sum += load(x + t * stride + i);
    const vfloat mean = sum / count;
    store(means + i, mean);
    if (!head.deviation) continue;
    vfloat squares{};
    for (int64_t t = 0; t < tokens; ++t) {
      const vfloat d = load(x + t * stride + i) - mean;
      squares = fma(d, d, squares);
    }
    const vfloat variance = squares / count + broadcast(kPoolEpsilon);
    for (int lane = 0; lane < kLanes; ++lane) deviations[i + lane] = __builtin_sqrtf(variance[lane]);
  }
  std::memcpy(joined, means, width * sizeof(float));
  if (head.deviation) std::memcpy(joined + width, deviations, width * sizeof(float));
  for (int64_t part = 0; part < head.pooled(); part += width) {
    for (int64_t row = 0; row < head.rows; ++row) {
      const float* from = joined + part + row * head.channels;
      for (int64_t c = 0; c < head.channels; ++c) feature[part + c * head.rows + row] = from[c];
    }
  }
  if (head.hidden > 0) {
    std::memcpy(joined + head.pooled(), hidden, head.hidden * sizeof(float));
    std::memcpy(feature + head.pooled(), hidden, head.hidden * sizeof(float));
  }
  const GemmRow row{joined, padded, nullptr};
  gemm_kernels().run(head.head, 0, gemm_panels(head.head.n, kLanes), one_segment(head.head), &row, 1, {});
  std::memcpy(logits, padded, head.head.n * sizeof(float));
}

}  // namespace

const EmotionHeadKernels& emotion_head_kernels() {
  static constexpr EmotionHeadKernels kernels{&scratch_floats, &classify};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
