#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "gpu/launch.h"
#include "gpu/runtime.h"

namespace avser::gpu {
namespace {

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }

void copy(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind, Stream stream) {
  if (bytes == 0) return;
  check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, native(stream)), "cudaMemcpyAsync");
}

}  // namespace

int device_count() {
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  AVSER_CHECK(driver != 0, backend, "CUDA: expected an NVIDIA driver, found none on this machine");
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  AVSER_CHECK(status == cudaSuccess && count > 0, backend, "CUDA: expected a GPU that can be used, found none: ",
              cudaGetErrorString(status == cudaSuccess ? cudaErrorNoDevice : status));
  return count;
}

DeviceInfo device_info(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  DeviceInfo info;
  info.name = properties.name;
  info.major = properties.major;
  info.minor = properties.minor;
  info.multiprocessors = properties.multiProcessorCount;
  info.shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  info.clusters = properties.major >= 9;
  return info;
}

OnDevice::OnDevice(int device) {
  check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
  if (device != before_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
}
OnDevice::~OnDevice() { cudaSetDevice(before_); }

void FreeDevice::operator()(char* at) const {
  const WhileRecording allowed;
  cudaFree(at);
}
void FreePinned::operator()(char* at) const {
  const WhileRecording allowed;
  cudaFreeHost(at);
}

DeviceMemory allocate_device(int64_t bytes) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const WhileRecording allowed;
  void* at = nullptr;
  const cudaError_t status = cudaMalloc(&at, static_cast<size_t>(bytes));
  AVSER_CHECK(status == cudaSuccess, backend, "CUDA: ", bytes, " bytes of memory on GPU ", device,
              " cannot be had: ", cudaGetErrorString(status));
  return DeviceMemory(static_cast<char*>(at), FreeDevice{device});
}
PinnedMemory allocate_pinned(int64_t bytes) {
  const WhileRecording allowed;
  void* at = nullptr;
  check_cuda(cudaMallocHost(&at, static_cast<size_t>(bytes)), "cudaMallocHost");
  return PinnedMemory(static_cast<char*>(at));
}

void FreeStream::operator()(void* stream) const { cudaStreamDestroy(native(stream)); }
OwnedStream make_stream() {
  cudaStream_t stream;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  return OwnedStream(stream);
}
void synchronize(Stream stream) { check_cuda(cudaStreamSynchronize(native(stream)), "the work on the GPU"); }
bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status;
  check_cuda(cudaStreamIsCapturing(native(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

WhileRecording::WhileRecording() {
  auto mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  mode_ = static_cast<int>(mode);
}
WhileRecording::~WhileRecording() {
  auto mode = static_cast<cudaStreamCaptureMode>(mode_);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

void allow(const void* kernel, const LaunchShape& shape) {
  static std::mutex guard;
  struct Allowed {
    int shared_bytes, cluster;
    bool for_clusters;  // compiled for a device that has them
  };
  static auto* allowed = new std::map<std::pair<int, const void*>, Allowed>;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(guard);
  const auto [place, fresh] = allowed->try_emplace({device, kernel}, Allowed{});
  Allowed& known = place->second;
  if (!fresh && shape.shared_bytes <= known.shared_bytes && shape.cluster <= known.cluster) return;
  const WhileRecording loading;  // which takes memory
  if (fresh) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel");
    known.for_clusters = attributes.ptxVersion >= 90;
  }
  AVSER_CHECK(shape.cluster == 1 || known.for_clusters, backend,
              "CUDA: expected kernels that were compiled for compute capability 9.0 or newer, as this GPU's is, got a "
              "build for older ones (TORCH_CUDA_ARCH_LIST)");
  if (shape.shared_bytes > known.shared_bytes) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes),
               "cudaFuncSetAttribute of the shared memory");
    known.shared_bytes = shape.shared_bytes;
  }
  constexpr int kPortableCluster = 8;
  if (shape.cluster > kPortableCluster && known.cluster <= kPortableCluster) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               "cudaFuncSetAttribute of the cluster size");
  }
  known.cluster = std::max(known.cluster, shape.cluster);
}

void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream) {
  copy(to, from, bytes, cudaMemcpyHostToDevice, stream);
}
void copy_from_device(void* to, const void* from, int64_t bytes, Stream stream) {
  copy(to, from, bytes, cudaMemcpyDeviceToHost, stream);
}
void fill(void* at, int value, int64_t bytes, Stream stream) {
  check_cuda(cudaMemsetAsync(at, value, static_cast<size_t>(bytes), native(stream)), "cudaMemsetAsync");
}

void FreeGraph::operator()(void* graph) const { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)); }
void begin_capture(Stream stream) {
  // Thread-local: other threads may allocate meanwhile.
  check_cuda(cudaStreamBeginCapture(native(stream), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
}
Graph end_capture(Stream stream) {
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamEndCapture(native(stream), &graph), "cudaStreamEndCapture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(status, "cudaGraphInstantiate");
  return Graph(executable);
}
void launch_graph(const Graph& graph, Stream stream) {
  check_cuda(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph.get()), native(stream)), "cudaGraphLaunch");
}

bool is_emulated() { return false; }

}  // namespace avser::gpu
