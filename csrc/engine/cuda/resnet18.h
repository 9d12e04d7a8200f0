// The ResNet-18 audio-visual encoder (He et al. 2016) with its emotion classifier on a GPU.
#pragma once

#include "engine/cuda/model.h"
#include "engine/cuda/resnet18_program.h"
#include "engine/cuda/stages.h"
#include "engine/packer.h"

namespace avser::gpu {

class GpuResNet18 final : public GpuModel {
 public:
  // `tensors`: the state dict of avser_fast.nn.AVRE(body="resnet18"), which is copied; the domain classifier is not
  // needed.  Clips are (in_channels, height, width).
  GpuResNet18(int64_t in_channels, int64_t height, int64_t width, int64_t classes, const Tensors& tensors,
              const GpuOptions& options);
  Plan plan(int64_t clips) const override;

  std::vector<GpuStage> stages() const override {
    const std::vector<int64_t>& clip = clip_shape();
    return resnet18_stages(clip[0], clip[1], clip[2], classes(), options_.precision);
  }

 private:
  void launch(const Plan& plan, const Run& run, int begin, int end, Stream stream) const override;

  ResNet18Program program_{};
  int64_t clip_bytes_ = 0;
};

}  // namespace avser::gpu
