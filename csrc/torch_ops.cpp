// avser_fast._torch_ops: importing it gives torch.ops.avser_fast.* their compiled implementations.  Schemas, fake
// kernels and derivatives are in avser_fast/ops/schemas.py.  The only file with torch headers, and of those the stable
// ones alone: the module runs with every torch from 2.11 on.
//
// pybind11 comes first: torch carries a copy of its headers, which a stable-ABI build may not include.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "build_config.h"
#include "common/check.h"
#include "common/executor.h"
#include "common/isa.h"
#include "ops/cs_attention/cs_attention_training.h"
#include "ops/emotion_head/emotion_head_training.h"
#include "ops/frame_clips/frame_clips.h"
#include "ops/log_mel/add_deltas.h"
#include "ops/log_mel/log_mel.h"
#include "ops/pool_shortcut/pool_shortcut.h"
#include "ops/resample/resample.h"
#include "ops/separable_conv2d/separable_conv2d.h"
#include "ops/strided_conv2d/strided_conv2d.h"
#include "ops/temporal_attention/temporal_attention_training.h"
#if AVSER_CUDA_COMPILED
#include "ops/log_mel/log_mel_gpu.h"
#endif

namespace avser {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Torch's own pool.
class TorchExecutor final : public Executor {
 public:
  int threads() const override { return static_cast<int>(torch::stable::get_num_threads()); }
  // Torch hands out equal shares beforehand.  Whoever is done with his own helps with the others': a worker keeps to
  // the items that it had in the loop before, whose memory is close to it, and none waits while there is work.
  void parallel_for(int64_t items, int64_t piece, LoopBody body) override {
    if (items <= 0) return;
    const int64_t pieces = (items + piece - 1) / piece, shares = std::min<int64_t>(threads(), pieces);
    const auto begin_of = [&](int64_t share) { return pieces * share / shares; };
    std::vector<std::atomic<int64_t>> next(shares);
    for (int64_t share = 0; share < shares; ++share) next[share] = begin_of(share);
    std::mutex guard;
    std::exception_ptr error;  // an exception may not cross torch's C interface
    torch::stable::parallel_for(0, shares, 1, [&](int64_t own, int64_t) {
      try {
        uint32_t worker = 0;
        AVSER_CHECK(torch_get_thread_idx(&worker) == AOTI_TORCH_SUCCESS, backend, "torch does not number its threads");
        for (int64_t i = 0; i < shares; ++i) {
          const int64_t share = (own + i) % shares, end = begin_of(share + 1);
          for (int64_t at; (at = next[share].fetch_add(1, std::memory_order_relaxed)) < end;) {
            body(at * piece, std::min(items, (at + 1) * piece), static_cast<int>(worker));
          }
        }
      } catch (...) {
        std::lock_guard<std::mutex> lock(guard);
        if (!error) error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  }
};

std::vector<int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// (..., tail) with everything before the last `tail` dimensions as one.
Tensor flat(const Tensor& t, size_t tail) {
  const std::vector<int64_t> sizes = sizes_of(t);
  std::vector<int64_t> shape{1};
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i + tail < sizes.size()) {
      shape[0] *= sizes[i];
    } else {
      shape.push_back(sizes[i]);
    }
  }
  return torch::stable::reshape(t, shape);
}

SampleType sample_type(const Tensor& waveform) {
  switch (waveform.scalar_type()) {
    case ScalarType::Short:
      return SampleType::int16;
    case ScalarType::Float:
      return SampleType::float32;
    case ScalarType::Double:
      return SampleType::float64;
    default:
      fail(ErrorKind::input, "log_mel: waveform: expected int16, float32 or float64, got dtype number ",
           static_cast<int>(waveform.scalar_type()));
  }
}

// What the CPU and the CUDA kernel share: the waveforms as (count, samples) and the output they fill.
struct LogMelCall {
  LogMelOptions options;
  SampleType type;
  int64_t samples, frames;
  Tensor waveforms, out;

  LogMelCall(const Tensor& waveform, const LogMelOptions& o)
      : options(o),
        type(sample_type(waveform)),
        samples(check(waveform)),
        frames(log_mel_frames(samples, o)),
        waveforms(flat(waveform, 1)),
        out(make_out(waveform)) {}

 private:
  int64_t check(const Tensor& waveform) const {
    check_log_mel(options);
    AVSER_CHECK(waveform.dim() >= 1, input, "log_mel: waveform: expected (..., samples), got a scalar");
    return waveform.size(waveform.dim() - 1);
  }
  Tensor make_out(const Tensor& waveform) const {
    std::vector<int64_t> shape = sizes_of(waveform);
    shape.back() = frames;
    shape.push_back(options.mel_bands);
    return torch::stable::new_empty(waveform, shape,
                                    type == SampleType::float64 ? ScalarType::Double : ScalarType::Float);
  }
};

Tensor log_mel_cpu(const Tensor& waveform, int64_t sampling_rate, int64_t mel_bands, int64_t frame_length,
                   int64_t frame_step, int64_t n_fft, double preemphasis, double low_hz, double high_hz) {
  LogMelCall call(waveform, {sampling_rate, mel_bands, frame_length, frame_step, n_fft, preemphasis, low_hz, high_hz});
  TorchExecutor executor;
  const char* from = static_cast<const char*>(call.waveforms.const_data_ptr());
  const int64_t row = call.frames * mel_bands;
  for (int64_t i = 0; i < call.waveforms.size(0); ++i) {
    const int64_t offset = i * call.waveforms.stride(0) * static_cast<int64_t>(call.waveforms.element_size());
    const Waveform one{from + offset, call.type, call.samples, call.waveforms.stride(1)};
    if (call.type == SampleType::float64) {
      log_mel(one, call.options, static_cast<double*>(call.out.mutable_data_ptr()) + i * row, executor);
    } else {
      log_mel(one, call.options, static_cast<float*>(call.out.mutable_data_ptr()) + i * row, executor);
    }
  }
  return call.out;
}

template <typename T>
void add_deltas_rows(const Tensor& flat_features, int64_t channels, int64_t window, Tensor& out) {
  TorchExecutor executor;
  const int64_t frames = flat_features.size(1), bands = flat_features.size(2);
  const T* from = static_cast<const T*>(flat_features.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < flat_features.size(0); ++i) {
    add_deltas(from + i * frames * bands, frames, bands, channels, window, to + i * channels * frames * bands,
               executor);
  }
}

Tensor add_deltas_cpu(const Tensor& features, int64_t channels, int64_t window) {
  AVSER_CHECK(features.dim() >= 2, input, "add_deltas: features: expected (..., frames, bands), got ", features.dim(),
              " dimension(s)");
  const ScalarType type = features.scalar_type();
  AVSER_CHECK(type == ScalarType::Float || type == ScalarType::Double, input,
              "add_deltas: features: expected float32 or float64, got dtype number ", static_cast<int>(type));
  AVSER_CHECK(channels >= 1 && channels <= 3, config, "add_deltas: channels: expected 1, 2 or 3, got ", channels);
  AVSER_CHECK(window >= 1, config, "add_deltas: window: expected at least 1, got ", window);
  std::vector<int64_t> shape = sizes_of(features);
  shape.insert(shape.end() - 2, channels);
  Tensor out = torch::stable::new_empty(features, shape);
  const Tensor rows = torch::stable::contiguous(flat(features, 2));
  if (type == ScalarType::Float) {
    add_deltas_rows<float>(rows, channels, window, out);
  } else {
    add_deltas_rows<double>(rows, channels, window, out);
  }
  return out;
}

std::tuple<Tensor, Tensor> frame_clips_cpu(const Tensor& features, std::optional<int64_t> clips, int64_t clip_frames,
                                           const std::string& rule) {
  AVSER_CHECK(features.dim() == 3, input, "frame_clips: features: expected (channels, frames, bands), got ",
              features.dim(), " dimension(s)");
  AVSER_CHECK(!clips || *clips >= 1, config, "frame_clips: clips: expected at least 1 (or None with rule even), got ",
              *clips);
  const ClipTable table = clip_table(features.size(1), clips.value_or(kNoClipLimit), clip_frames, rule);
  const Tensor from = torch::stable::contiguous(features);
  const int64_t channels = from.size(0), bands = from.size(2);
  Tensor out = torch::stable::new_empty(features, {table.clips, channels, clip_frames, bands});
  Tensor valid = torch::stable::new_empty(features, {table.clips}, ScalarType::Bool);
  TorchExecutor executor;
  frame_clips(from.const_data_ptr(), channels, from.size(1), bands * static_cast<int64_t>(from.element_size()), table,
              out.mutable_data_ptr(), executor);
  std::copy(table.valid.begin(), table.valid.end(), static_cast<bool*>(valid.mutable_data_ptr()));
  return {out, valid};
}

template <typename T>
void resample_rows(const Tensor& waveforms, int64_t from_rate, int64_t to_rate, Tensor& out, int64_t length) {
  TorchExecutor executor;
  const T* from = static_cast<const T*>(waveforms.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < waveforms.size(0); ++i) {
    resample(from + i * waveforms.stride(0), waveforms.size(1), waveforms.stride(1), from_rate, to_rate,
             to + i * length, executor);
  }
}

Tensor resample_cpu(const Tensor& waveform, int64_t from_rate, int64_t to_rate) {
  AVSER_CHECK(waveform.dim() >= 1, input, "resample: waveform: expected (..., samples), got a scalar");
  const ScalarType type = waveform.scalar_type();
  AVSER_CHECK(type == ScalarType::Float || type == ScalarType::Double, input,
              "resample: waveform: expected float32 or float64, got dtype number ", static_cast<int>(type));
  std::vector<int64_t> shape = sizes_of(waveform);
  const int64_t length = resampled_length(shape.back(), from_rate, to_rate);
  shape.back() = length;
  Tensor out = torch::stable::new_empty(waveform, shape);
  const Tensor rows = flat(waveform, 1);
  if (type == ScalarType::Float) {
    resample_rows<float>(rows, from_rate, to_rate, out, length);
  } else {
    resample_rows<double>(rows, from_rate, to_rate, out, length);
  }
  return out;
}

#if AVSER_CUDA_COMPILED
// The stream that torch is using on the device.  The function lives in torch's CUDA library, which a CPU-only torch
// does not have: it is looked up among the loaded libraries rather than linked.
void* current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  AVSER_CHECK(get != nullptr, backend, "log_mel: CUDA: this torch offers no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  AVSER_CHECK(get(device, &stream) == AOTI_TORCH_SUCCESS, backend, "log_mel: CUDA: torch has no stream on device ",
              device);
  return stream;
}

// The tables of an option set on a device; kept until the process ends, since work queued with them may still run.
const gpu::GpuLogMel& gpu_log_mel(int device, const LogMelOptions& options) {
  using Key = std::pair<int, decltype(options.key())>;
  static std::mutex guard;
  static auto* cache = new std::map<Key, std::unique_ptr<const gpu::GpuLogMel>>;
  const std::lock_guard<std::mutex> lock(guard);
  std::unique_ptr<const gpu::GpuLogMel>& found = (*cache)[{device, options.key()}];
  if (found == nullptr) found = std::make_unique<const gpu::GpuLogMel>(options);
  return *found;
}

Tensor log_mel_on_cuda(const Tensor& waveform, int64_t sampling_rate, int64_t mel_bands, int64_t frame_length,
                       int64_t frame_step, int64_t n_fft, double preemphasis, double low_hz, double high_hz) {
  const int device = waveform.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  LogMelCall call(waveform, {sampling_rate, mel_bands, frame_length, frame_step, n_fft, preemphasis, low_hz, high_hz});
  const gpu::OnDevice current(device);
  const gpu::GpuLogMel& kernel = gpu_log_mel(device, call.options);
  const int64_t count = call.waveforms.size(0), frames = count * call.frames;
  if (count == 0) return call.out;
  AVSER_CHECK(frames <= INT32_MAX && call.samples <= INT32_MAX, input, "log_mel: waveform: expected at most ",
              INT32_MAX, " samples and frames in a call on a CUDA device, got ", count, " waveforms of ", call.samples);
  gpu::Recordings recordings{};
  recordings.samples = call.waveforms.const_data_ptr();
  recordings.type = call.type;
  recordings.sample_stride = call.waveforms.stride(1);
  recordings.given_totals = {static_cast<int>(count), static_cast<int>(frames), 0};
  recordings.given.samples = static_cast<int>(call.samples);
  recordings.given.frames = static_cast<int>(call.frames);
  recordings.recording_stride = call.waveforms.stride(0);
  kernel.queue(recordings, frames, call.out.mutable_data_ptr(), nullptr, current_stream(device));
  return call.out;
}
#endif

}  // namespace
}  // namespace avser

#include "torch_ops_network.h"

namespace avser {

STABLE_TORCH_LIBRARY_IMPL(avser_fast, CPU, m) {
  m.impl("log_mel", TORCH_BOX(&log_mel_cpu));
  m.impl("add_deltas", TORCH_BOX(&add_deltas_cpu));
  m.impl("frame_clips", TORCH_BOX(&frame_clips_cpu));
  m.impl("resample", TORCH_BOX(&resample_cpu));
  m.impl("separable_conv2d", TORCH_BOX(&separable_conv2d_cpu));
  m.impl("separable_conv2d_backward", TORCH_BOX(&separable_conv2d_backward_cpu));
  m.impl("strided_conv2d", TORCH_BOX(&strided_conv2d_cpu));
  m.impl("strided_conv2d_backward", TORCH_BOX(&strided_conv2d_backward_cpu));
  m.impl("pool_shortcut", TORCH_BOX(&pool_shortcut_cpu));
  m.impl("pool_shortcut_backward", TORCH_BOX(&pool_shortcut_backward_cpu));
  m.impl("cs_attention", TORCH_BOX(&cs_attention_cpu));
  m.impl("cs_attention_backward", TORCH_BOX(&cs_attention_backward_cpu));
  m.impl("temporal_attention", TORCH_BOX(&temporal_attention_cpu));
  m.impl("temporal_attention_backward", TORCH_BOX(&temporal_attention_backward_cpu));
  m.impl("emotion_head", TORCH_BOX(&emotion_head_cpu));
  m.impl("emotion_head_backward", TORCH_BOX(&emotion_head_backward_cpu));
  m.impl("clip_cross_entropy", TORCH_BOX(&clip_cross_entropy_cpu));
  m.impl("clip_cross_entropy_backward", TORCH_BOX(&clip_cross_entropy_backward_cpu));
}

#if AVSER_CUDA_COMPILED
STABLE_TORCH_LIBRARY_IMPL(avser_fast, CUDA, m) { m.impl("log_mel", TORCH_BOX(&log_mel_on_cuda)); }
#endif

}  // namespace avser

PYBIND11_MODULE(_torch_ops, m) {
  m.doc() = "Registers the compiled implementations of torch.ops.avser_fast; avser_fast.ops imports it.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["version"] = AVSER_VERSION;
    info["built_with_torch"] = AVSER_TORCH_BUILD;
    info["stable_abi"] = "2.11";
    info["cuda"] = AVSER_CUDA_COMPILED != 0;
    info["cuda_archs"] = AVSER_CUDA_ARCHS;
    return info;
  });
  m.def("cpu_isa", [] { return avser::isa_name(avser::current_isa()); });
}
