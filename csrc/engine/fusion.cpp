#include "engine/fusion.h"

#include <algorithm>

#include "common/check.h"
#include "common/executor.h"

namespace avser {
namespace {

LstmBranch branch(Packer& packer, const std::string& name, int64_t width, int64_t hidden, int64_t classes) {
  const int64_t padded = round_up(hidden, packer.lanes());
  // Each gate starts on a vector.
  const auto gates = [&](const std::string& part, int64_t k) {
    const float* weight = packer.take(name + ".lstm.weight_" + part, {4 * hidden, k});
    const float* bias = packer.take(name + ".lstm.bias_" + part, {4 * hidden});
    Matrix matrix{4 * padded, k, std::vector<double>(4 * padded * k, 0.0), std::vector<double>(4 * padded, 0.0)};
    for (int64_t i = 0; i < 4 * hidden; ++i) {
      const int64_t row = i / hidden * padded + i % hidden;
      std::copy_n(weight + i * k, k, matrix.weight.begin() + row * k);
      matrix.bias[row] = bias[i];
    }
    return packer.pack(matrix, {Precision::float32});
  };
  LstmBranch out{};
  out.hidden = hidden;
  out.input = gates("ih_l0", width);
  out.recurrent = gates("hh_l0", hidden);
  out.out = packer.pack(packer.linear(name + ".out", classes, hidden), {Precision::float32});
  return out;
}

}  // namespace

Fusion::Fusion(int64_t features, int64_t classes, int64_t hidden, double feature_weight, const Tensors& tensors,
               bool poison)
    : features_(features),
      classes_(classes),
      feature_weight_(feature_weight),
      kernels_(AVSER_PICK(fusion_lstm_kernels)),
      workspaces_(poison) {
  for (const auto& [name, value] : {std::pair{"features", features}, {"classes", classes}, {"hidden", hidden}}) {
    AVSER_CHECK(value >= 1, config, "Fusion: ", name, ": expected at least 1, got ", value);
  }
  Packer packer("Fusion", tensors, float_lanes(current_isa()), memory_);
  feature_branch_ = branch(packer, "feature_branch", features, hidden, classes);
  score_branch_ = branch(packer, "score_branch", classes, hidden, classes);
  packer.finish();
}

void Fusion::forward(const float* features, const float* scores, int64_t batch, int64_t clips, float* fused, float* a,
                     float* b, Executor& executor) const {
  AVSER_CHECK(clips >= 1, input, "Fusion.forward: features: expected at least 1 clip, got 0");
  const int64_t floats =
      round_up(std::max(kernels_.scratch(feature_branch_, clips), kernels_.scratch(score_branch_, clips)), 16);
  const Workspaces::Lease lease(workspaces_, executor.threads() * floats * static_cast<int64_t>(sizeof(float)));
  executor.parallel_for(batch, 1, [&](int64_t begin, int64_t end, int worker) {
    float* scratch = reinterpret_cast<float*>(lease.data()) + worker * floats;
    for (int64_t i = begin; i < end; ++i) {
      float* from[] = {a + i * classes_, b + i * classes_};
      kernels_.run(feature_branch_, features + i * clips * features_, features_, clips, from[0], scratch);
      kernels_.run(score_branch_, scores + i * clips * classes_, classes_, clips, from[1], scratch);
      for (int64_t k = 0; k < classes_; ++k) {
        fused[i * classes_ + k] =
            static_cast<float>(feature_weight_ * from[0][k] + (1.0 - feature_weight_) * from[1][k]);
      }
    }
  });
}

}  // namespace avser
