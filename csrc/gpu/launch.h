// Starting a kernel; for the files that define kernels.
#pragma once

#include "gpu/device.h"
#include "gpu/runtime.h"

#if defined(__CUDACC__)
#include <cuda_runtime_api.h>

#include "common/check.h"
#endif

namespace avser::gpu {

struct LaunchShape {
  int blocks;
  int cluster;       // blocks that meet; 1: none
  int shared_bytes;  // dynamic
};

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t status, const char* what) {
  AVSER_CHECK(status == cudaSuccess, backend, "CUDA: ", what, " failed: ", cudaGetErrorString(status));
}

// Loads a kernel on the current device and lets it have the shared memory and the cluster size of `shape`; asks the
// driver at the first time alone, and whether or not somebody records a graph.
void allow(const void* kernel, const LaunchShape& shape);

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), int threads, const LaunchShape& shape, Stream stream,
            const Parameters&... parameters) {
  allow(reinterpret_cast<const void*>(kernel), shape);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, parameters...), "the launch");
}

#else

// Runs the kernel now, or when the graph that is being recorded is launched.
void launch_emulated(const EmulatedLaunch& launch, Stream stream, std::function<void()> kernel);

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), int threads, const LaunchShape& shape, Stream stream,
            const Parameters&... parameters) {
  launch_emulated({shape.blocks, threads, shape.cluster, shape.shared_bytes}, stream, [=] { kernel(parameters...); });
}

#endif

}  // namespace avser::gpu
