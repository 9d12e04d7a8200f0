#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "common/check.h"
#include "ops/log_mel/log_mel_cuda.h"
#include "ops/log_mel/log_mel_tiles.h"

namespace avser {
namespace {

namespace tiles = log_mel_tiles;

constexpr int kThreads = 128;

void check(cudaError_t status, const char* what) {
  AVSER_CHECK(status == cudaSuccess, backend, "log_mel: CUDA: ", what, " failed: ", cudaGetErrorString(status));
}

// One thread block per frame.
template <typename S, typename T>
__global__ void __launch_bounds__(kThreads) log_mel_kernel(const S* x, int64_t waveform_stride, int64_t frames,
                                                           tiles::Shape shape, tiles::Tables tables, T* out) {
  extern __shared__ double shared[];
  tiles::Complex* z = reinterpret_cast<tiles::Complex*>(shared);
  double* spectrum = shared + 2 * shape.half;
  const int64_t block = blockIdx.x;
  const int64_t frame = block % frames;
  x += block / frames * waveform_stride;

  for (int64_t i = threadIdx.x; i < shape.half; i += kThreads) tiles::load_pair(x, shape, frame, i, z);
  __syncthreads();
  const double* w = tables.twiddles;
  int64_t length = shape.half;
  for (; length >= 4; length /= 4) {
    for (int64_t i = threadIdx.x; i < shape.half / 4; i += kThreads) tiles::radix4(z, length, i, w);
    w += tiles::twiddles_of(length);
    __syncthreads();
  }
  if (length == 2) {
    for (int64_t i = threadIdx.x; i < shape.half / 2; i += kThreads) tiles::radix2(z, i);
    __syncthreads();
  }
  for (int64_t k = threadIdx.x; k <= shape.half / 2; k += kThreads) tiles::power(z, tables, shape.half, k, spectrum);
  __syncthreads();
  for (int64_t band = threadIdx.x; band < shape.mel_bands; band += kThreads) {
    out[block * shape.mel_bands + band] = static_cast<T>(tiles::band(spectrum, tables, band));
  }
}

// The tables of an option set on one device; kept until the process ends, since work queued with them may still run.
tiles::Tables tables_on(int device, const LogMelTables& host, cudaStream_t stream) {
  using Key = std::pair<int, decltype(host.options.key())>;
  static std::mutex guard;
  static auto* cache = new std::map<Key, tiles::Tables>;
  std::lock_guard<std::mutex> lock(guard);
  const Key key{device, host.options.key()};
  const auto found = cache->find(key);
  if (found != cache->end()) return found->second;

  std::vector<int32_t> starts;
  int32_t start = 0;
  for (int32_t size : host.band_size) {
    starts.push_back(start);
    start += size;
  }
  std::vector<char> bytes;
  std::vector<size_t> offsets;
  const auto append = [&](const auto& values) {
    offsets.push_back(bytes.size());
    const char* from = reinterpret_cast<const char*>(values.data());
    bytes.insert(bytes.end(), from, from + values.size() * sizeof(values[0]));
    bytes.resize((bytes.size() + 15) / 16 * 16);
  };
  append(host.twiddles);
  append(host.unpack);
  append(host.weights);
  append(host.position);
  append(host.band_bin);
  append(host.band_size);
  append(starts);

  char* device_bytes = nullptr;
  check(cudaMalloc(reinterpret_cast<void**>(&device_bytes), bytes.size()), "cudaMalloc of the tables");
  cudaError_t status = cudaMemcpyAsync(device_bytes, bytes.data(), bytes.size(), cudaMemcpyHostToDevice, stream);
  // Other streams will read the tables without waiting for this one.
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  if (status != cudaSuccess) cudaFree(device_bytes);
  check(status, "copying the tables");
  const auto doubles = [&](int i) { return reinterpret_cast<const double*>(device_bytes + offsets[i]); };
  const auto ints = [&](int i) { return reinterpret_cast<const int32_t*>(device_bytes + offsets[i]); };
  const tiles::Tables tables{doubles(0), doubles(1), doubles(2), ints(3), ints(4), ints(5), ints(6)};
  return cache->emplace(key, tables).first->second;
}

template <typename S, typename T>
void launch(const CudaWaveforms& waveforms, const tiles::Shape& shape, const tiles::Tables& tables, int64_t frames,
            void* out, cudaStream_t stream) {
  log_mel_kernel<S, T>
      <<<static_cast<unsigned>(waveforms.count * frames), kThreads, tiles::shared_bytes(shape.half), stream>>>(
          static_cast<const S*>(waveforms.data), waveforms.waveform_stride, frames, shape, tables,
          static_cast<T*>(out));
  check(cudaGetLastError(), "the launch");
}

}  // namespace

void log_mel_cuda(const CudaWaveforms& waveforms, const LogMelOptions& options, void* out, int device,
                  void* stream_handle) {
  const auto host = log_mel_tables(options);
  AVSER_CHECK(options.n_fft <= tiles::kMaxFft, backend, "log_mel: n_fft: expected at most ", tiles::kMaxFft,
              " on a CUDA device, got ", options.n_fft);
  // tables_on() keeps tables for ever; a factor drawn for every waveform would fill the device.
  AVSER_CHECK(options.vtlp == 1, backend, "log_mel: vtlp: expected 1 on a CUDA device, got ", options.vtlp);
  const int64_t frames = log_mel_frames(waveforms.samples, options);
  if (waveforms.count == 0) return;
  AVSER_CHECK(waveforms.count <= INT32_MAX / frames, input, "log_mel: waveform: expected at most ", INT32_MAX,
              " frames in a call on a CUDA device, got ", waveforms.count, " waveforms of ", frames);
  check(cudaSetDevice(device), "cudaSetDevice");
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const tiles::Tables tables = tables_on(device, *host, stream);
  const tiles::Shape shape{waveforms.samples, waveforms.sample_stride, options.frame_length, options.frame_step,
                           options.n_fft / 2, options.mel_bands,       options.preemphasis};
  switch (waveforms.type) {
    case SampleType::int16:
      launch<int16_t, float>(waveforms, shape, tables, frames, out, stream);
      break;
    case SampleType::float32:
      launch<float, float>(waveforms, shape, tables, frames, out, stream);
      break;
    case SampleType::float64:
      launch<double, double>(waveforms, shape, tables, frames, out, stream);
      break;
  }
}

}  // namespace avser
