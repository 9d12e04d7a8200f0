#include "engine/cuda/program.h"

namespace avser::gpu {
namespace {

ProgramKernel kernel_of(GpuPrecision precision) {
  switch (precision) {
    case GpuPrecision::float32:
      return program_kernel_float32();
    case GpuPrecision::tf32:
      return program_kernel_tf32();
    case GpuPrecision::bf16:
      return program_kernel_bf16();
    case GpuPrecision::fp16:
      return program_kernel_fp16();
    case GpuPrecision::fp8:
      return program_kernel_fp8();
  }
  return nullptr;
}

}  // namespace

void launch_program(GpuPrecision precision, const Program& program, const Run& run, int begin, int end, bool cluster,
                    int teams, int shared_bytes, Stream stream) {
  launch(kernel_of(precision), kThreads, {teams * run.team, cluster ? run.team : 1, shared_bytes}, stream, program, run,
         begin, end);
}

}  // namespace avser::gpu
