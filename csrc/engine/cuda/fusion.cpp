#include "engine/cuda/fusion.h"

#include <algorithm>
#include <string>

#include "common/check.h"
#include "engine/cuda/pool.h"
#include "engine/cuda/weights.h"

namespace avser::gpu {
namespace {

// Rows of a launch; more of them are several.
constexpr int64_t kMostRows = 1 << 16;

LstmStage branch(Packer& packer, GpuUploader& upload, const std::string& name, int64_t width, int64_t hidden,
                 int64_t classes) {
  const auto gates = [&](const std::string& part, int64_t k) {
    const float* weight = packer.take(name + ".lstm.weight_" + part, {4 * hidden, k});
    return Matrix{4 * hidden, k, {weight, weight + 4 * hidden * k}, std::vector<double>(4 * hidden, 0.0)};
  };
  Matrix input = gates("ih_l0", width);
  const Matrix recurrent = gates("hh_l0", hidden), out = packer.linear(name + ".out", classes, hidden);
  for (const char* part : {".lstm.bias_ih_l0", ".lstm.bias_hh_l0"}) {
    const float* bias = packer.take(name + part, {4 * hidden});
    for (int64_t i = 0; i < 4 * hidden; ++i) input.bias[i] += bias[i];
  }
  LstmStage stage{};
  stage.width = static_cast<int>(width);
  stage.hidden = static_cast<int>(hidden);
  stage.classes = static_cast<int>(classes);
  stage.input = upload.upload(input, Format::float32);
  stage.recurrent = upload.upload(recurrent, Format::float32);
  stage.out_weight = upload.upload(std::vector<float>(out.weight.begin(), out.weight.end()));
  stage.out_bias = upload.upload(std::vector<float>(out.bias.begin(), out.bias.end()));
  return stage;
}

}  // namespace

GpuFusion::GpuFusion(int64_t features, int64_t classes, int64_t hidden, double feature_weight, const Tensors& tensors,
                     int device)
    : features_(features), classes_(classes), feature_weight_(feature_weight), device_(device) {
  for (const auto& [name, value] : {std::pair{"features", features}, {"classes", classes}, {"hidden", hidden}}) {
    AVSER_CHECK(value >= 1, config, "Fusion: ", name, ": expected at least 1, got ", value);
  }
  const int count = device_count();
  AVSER_CHECK(device >= 0 && device < count, backend, "CUDA: expected a GPU from 0 to ", count - 1, ", got ", device);
  const OnDevice guard(device);
  std::vector<Buffer> unused;
  Packer packer("Fusion", tensors, 8, unused);
  GpuUploader upload(weights_);
  branches_[0] = branch(packer, upload, "feature_branch", features, hidden, classes);
  branches_[1] = branch(packer, upload, "score_branch", classes, hidden, classes);
  packer.finish();
  const DeviceInfo info = device_info(device);
  for (const LstmStage& stage : branches_) {
    const int bytes = std::max(lstm_input_shared(stage), lstm_steps_shared(stage));
    AVSER_CHECK(bytes <= info.shared_bytes, backend, "CUDA: fusion: ", bytes, " bytes of shared memory are needed, ",
                info.name, " has ", info.shared_bytes);
  }
  stream_ = make_stream();
}

void GpuFusion::forward(const float* features, const float* scores, int64_t batch, int64_t clips, float* fused,
                        float* a, float* b) const {
  AVSER_CHECK(clips >= 1, input, "Fusion.forward: features: expected at least 1 clip, got 0");
  const OnDevice guard(device_);
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t together = std::max<int64_t>(1, kMostRows / clips);
  for (int64_t first = 0; first < batch; first += together) {
    const int64_t count = std::min(together, batch - first), rows = count * clips;
    const float* const inputs[] = {features + first * clips * features_, scores + first * clips * classes_};
    float* const outputs[] = {a + first * classes_, b + first * classes_};
    struct Places {
      float *x, *gates, *logits;
      int64_t bytes;
    };
    const auto place = [&](char* base) {
      Layout memory(base);
      float* const x = memory.place<float>(rows * std::max(features_, classes_));
      float* const gates = memory.place<float>(rows * branches_[0].gates());
      float* const logits = memory.place<float>(count * classes_);
      return Places{x, gates, logits, memory.bytes()};
    };
    const int64_t bytes = place(nullptr).bytes;
    if (bytes_ < bytes) {
      memory_.reset();
      memory_ = allocate_device(bytes);
      bytes_ = bytes;
    }
    const Places at = place(memory_.get());
    const Stream stream = stream_.get();
    for (int i = 0; i < 2; ++i) {
      copy_to_device(at.x, inputs[i], rows * branches_[i].width * 4, stream);
      launch_lstm(branches_[i], at.x, static_cast<int>(count), static_cast<int>(clips), at.gates, at.logits, stream);
      copy_from_device(outputs[i], at.logits, count * classes_ * 4, stream);
    }
    synchronize(stream);
  }
  for (int64_t i = 0; i < batch * classes_; ++i) {
    fused[i] = static_cast<float>(feature_weight_ * a[i] + (1.0 - feature_weight_) * b[i]);
  }
}

}  // namespace avser::gpu
