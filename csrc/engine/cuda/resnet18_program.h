// ResNet-18 as the stages that a GPU runs, and the kernel that runs them.
#pragma once

#include "engine/cuda/model.h"
#include "gpu/launch.h"
#include "ops/conv_stem/conv_stem_cuda.h"
#include "ops/emotion_head/emotion_head_cuda.h"

namespace avser::gpu {

// The stem; of each of 8 blocks two convolutions; of three of them the projection of the shortcut.
constexpr int kResNetConvolutions = 1 + 8 * 2 + 3;

struct ResNet18Program {
  ConvStage convolution[kResNetConvolutions];  // in the order in which they run
  PoolStage pool;                              // behind the first one
  EmotionHeadStage head;
  int64_t features_offset;  // floats (positions, 512) of a clip
  int64_t clip_floats;
  int64_t clip_bytes;  // of a clip's maps

  AVSER_HOST_DEVICE int steps() const { return kResNetConvolutions + 2; }
};

using ResNet18Kernel = void (*)(ResNet18Program, Run, int, int);
ResNet18Kernel resnet18_kernel_float32();
ResNet18Kernel resnet18_kernel_tf32();
ResNet18Kernel resnet18_kernel_bf16();
ResNet18Kernel resnet18_kernel_fp16();

// Steps [begin, end), by teams that meet after each, or, where it is one step, of any number of blocks.
void launch_resnet18(GpuPrecision precision, const ResNet18Program& program, const Run& run, int begin, int end,
                     bool cluster, int teams, int shared_bytes, Stream stream);

}  // namespace avser::gpu
