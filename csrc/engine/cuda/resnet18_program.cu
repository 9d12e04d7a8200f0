#include "engine/cuda/resnet18_program.h"

namespace avser::gpu {
namespace {

ResNet18Kernel kernel_of(GpuPrecision precision) {
  switch (precision) {
    case GpuPrecision::float32:
      return resnet18_kernel_float32();
    case GpuPrecision::tf32:
      return resnet18_kernel_tf32();
    case GpuPrecision::bf16:
      return resnet18_kernel_bf16();
    default:
      return resnet18_kernel_fp16();
  }
}

}  // namespace

void launch_resnet18(GpuPrecision precision, const ResNet18Program& program, const Run& run, int begin, int end,
                     bool cluster, int teams, int shared_bytes, Stream stream) {
  launch(kernel_of(precision), kThreads, {teams * run.team, cluster ? run.team : 1, shared_bytes}, stream, program, run,
         begin, end);
}

}  // namespace avser::gpu
