#include <cstring>

#include "engine/gemm.h"
#include "engine/vector_math.h"
#include "ops/emotion_head/emotion_head.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr float kPoolEpsilon = 1e-5f;  // under the square root of mean_std pooling

int64_t features(const EmotionHead& head) { return head.deviation ? 2 * head.width : head.width; }

// A feature of means and deviations, each padded, and the padded logits.
int64_t scratch_floats(const EmotionHead& head) {
  return 2 * round_up(head.width, kFloatLanes) + round_up(features(head), kFloatLanes) +
         round_up(head.head.n, kFloatLanes);
}

void classify(const EmotionHead& head, const float* x, int64_t tokens, float* feature, float* logits, float* scratch) {
  const int64_t stride = round_up(head.width, kFloatLanes);
  float* means = scratch;
  float* deviations = means + stride;
  float* padded = deviations + stride;
  const vfloat count = broadcast(static_cast<float>(tokens));
  for (int64_t i = 0; i < stride; i += kFloatLanes) {
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
    for (int lane = 0; lane < kFloatLanes; ++lane) deviations[i + lane] = __builtin_sqrtf(variance[lane]);
  }
  std::memcpy(feature, means, head.width * sizeof(float));
  if (head.deviation) std::memcpy(feature + head.width, deviations, head.width * sizeof(float));
  gemm(head.head, feature, 0, 1, {padded, 0});
  std::memcpy(logits, padded, head.head.n * sizeof(float));
}

}  // namespace

const EmotionHeadKernels& emotion_head_kernels() {
  static const EmotionHeadKernels kernels{kFloatLanes, &scratch_floats, &classify};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
