// The kernel of ResNet-18; each precision is a translation unit of its own, so that they compile side by side.
#pragma once

#include "engine/cuda/finish.h"
#include "engine/cuda/resnet18_program.h"

namespace avser::gpu {

template <typename Op>
AVSER_DEVICE void run_resnet18(const ResNet18Program& program, const Run& run, const Batch& batch, int step,
                               char* memory, int first, int clips, const Team& team) {
  const MapWork work{team, false};
  if (step == 0) {
    return first_convolution<Op>(program.convolution[0], run.clips + first * program.clip_floats, memory, clips, work);
  }
  if (step == 1) return max_pool<Op>(program.pool, memory, clips, team);
  if (step < program.steps() - 1) return convolution<Op>(program.convolution[step - 1], memory, clips, work);
  const GpuMap& last = program.convolution[kResNetConvolutions - 1].y;
  finish_clips(program.head, run, batch, first, clips, team, last.height * last.width, last.stride, nullptr,
               [&](int slot) {
                 return reinterpret_cast<const float*>(memory + slot * program.clip_bytes + program.features_offset);
               });
}

template <typename Op>
AVSER_KERNEL void AVSER_LAUNCH_BOUNDS(kThreads, 1)
    resnet18_kernel(AVSER_GRID_CONSTANT const ResNet18Program program, AVSER_GRID_CONSTANT const Run run, int begin,
                    int end) {
  for_each_group(run, program.clip_bytes * run.group,
                 [&](const Batch& batch, const Team& team, char* memory, int first, int clips) {
                   for (int step = begin; step < end; ++step) {
                     run_resnet18<Op>(program, run, batch, step, memory, first, clips, team);
                     cluster_sync();
                   }
                 });
}

}  // namespace avser::gpu

#define AVSER_DEFINE_RESNET18(precision, Op)                             \
  avser::gpu::ResNet18Kernel avser::gpu::resnet18_kernel_##precision() { \
    return &avser::gpu::resnet18_kernel<avser::gpu::Op>;                 \
  }
