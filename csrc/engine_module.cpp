// avser_fast._engine: the kernels and the whole-model Engine on NumPy arrays, without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "build_config.h"
#include "common/check.h"
#include "common/executor.h"
#include "common/isa.h"
#include "common/translate.h"
#include "engine/bind.h"
#if AVSER_CUDA_COMPILED
#include "engine/cuda/bind.h"
#endif
#include "model/bind.h"
#include "ops/frame_clips/frame_clips.h"
#include "ops/log_mel/add_deltas.h"
#include "ops/log_mel/log_mel.h"
#include "ops/normalize/normalize.h"
#include "ops/resample/resample.h"
#include "ops/roofline/roofline.h"
#include "recordings/bind.h"

namespace py = pybind11;

namespace avser {
namespace {

std::string describe(const py::array& a) {
  std::string shape;
  for (py::ssize_t i = 0; i < a.ndim(); ++i) shape += cat(i ? ", " : "", a.shape(i));
  return cat(std::string(py::str(a.dtype())), " of shape (", shape, a.ndim() == 1 ? ",)" : ")");
}

template <typename T>
bool holds(const py::array& a) {
  return py::dtype::of<T>().equal(a.dtype());
}

// The kernels read whole elements at their natural address; a NumPy view of packed records need not offer that.
py::array readable(const py::array& a) {
  bool ok = reinterpret_cast<uintptr_t>(a.data()) % static_cast<uintptr_t>(a.itemsize()) == 0;
  for (py::ssize_t i = 0; i < a.ndim(); ++i) ok = ok && a.strides(i) % a.itemsize() == 0;
  return ok ? a : py::array(a.attr("copy")());
}

template <typename T>
py::array_t<T> contiguous(const py::array& a) {
  return py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(a);
}

template <typename T>
py::array log_mel_as(const Waveform& waveform, const LogMelOptions& options, int threads) {
  const int64_t frames = log_mel_frames(waveform.samples, options);
  py::array_t<T> out({frames, options.mel_bands});
  T* to = out.mutable_data();
  PoolExecutor executor(threads);
  py::gil_scoped_release release;
  log_mel(waveform, options, to, executor);
  return out;
}

py::array log_mel_array(const py::array& given, int64_t sampling_rate, int64_t mel_bands, int64_t frame_length,
                        int64_t frame_step, int64_t n_fft, double preemphasis, double low_hz, double high_hz,
                        const std::string& dtype, int threads, double vtlp, double vtlp_high_hz) {
  AVSER_CHECK(given.ndim() == 1 && (holds<int16_t>(given) || holds<float>(given) || holds<double>(given)), input,
              "log_mel: waveform: expected a 1-D array of int16, float32 or float64, got ", describe(given));
  AVSER_CHECK(given.shape(0) >= 1, input, "log_mel: waveform: expected at least 1 sample, got 0");
  AVSER_CHECK(dtype == "float32" || dtype == "float64", config, "log_mel: dtype: expected float32 or float64, got '",
              dtype, "'");
  const LogMelOptions options{sampling_rate, mel_bands, frame_length, frame_step, n_fft,
                              preemphasis,   low_hz,    high_hz,      vtlp,       vtlp_high_hz};
  check_log_mel(options);
  const py::array a = readable(given);
  const SampleType type = holds<int16_t>(a) ? SampleType::int16
                          : holds<float>(a) ? SampleType::float32
                                            : SampleType::float64;
  const Waveform waveform{a.data(), type, a.shape(0), a.strides(0) / a.itemsize()};
  return dtype == "float32" ? log_mel_as<float>(waveform, options, threads)
                            : log_mel_as<double>(waveform, options, threads);
}

template <typename T>
py::array add_deltas_as(const py::array& given, int64_t channels, int64_t window) {
  const py::array_t<T> a = contiguous<T>(given);
  const int64_t frames = a.shape(0), bands = a.shape(1);
  AVSER_CHECK(channels >= 1 && channels <= 3, config, "add_deltas: channels: expected 1, 2 or 3, got ", channels);
  py::array_t<T> out({channels, frames, bands});
  T* to = out.mutable_data();
  SerialExecutor executor;
  py::gil_scoped_release release;
  add_deltas(a.data(), frames, bands, channels, window, to, executor);
  return out;
}

py::array add_deltas_array(const py::array& features, int64_t channels, int64_t window) {
  AVSER_CHECK(features.ndim() == 2 && (holds<float>(features) || holds<double>(features)), input,
              "add_deltas: features: expected a (frames, bands) array of float32 or float64, got ", describe(features));
  return holds<float>(features) ? add_deltas_as<float>(features, channels, window)
                                : add_deltas_as<double>(features, channels, window);
}

py::array normalize_array(const py::array& features, const std::string& rule, const std::vector<double>& mean,
                          const std::vector<double>& std, const std::optional<int64_t>& channels) {
  AVSER_CHECK(features.ndim() == 3 && holds<float>(features), input,
              "normalize: features: expected a (planes, frames, bands) array of float32, got ", describe(features));
  const Normalization normalization{normalize_rule(rule), mean, std};
  const int64_t normalised = channels.value_or(features.shape(0));
  AVSER_CHECK(normalised >= 0 && normalised <= features.shape(0), config, "normalize: channels: expected 0..",
              features.shape(0), ", got ", normalised);
  py::array_t<float, py::array::c_style> out(py::array(features.attr("copy")("C")));
  float* values = out.mutable_data();
  const py::gil_scoped_release release;
  normalize(values, normalised, out.shape(1), out.shape(2), normalization);
  return out;
}

ClipTable table_of(int64_t frames, const std::optional<int64_t>& clips, int64_t clip_frames, const std::string& rule) {
  // A caller's own -1 must not pass for None.
  AVSER_CHECK(!clips || *clips >= 1, config, "clip_table: clips: expected at least 1 (or None with rule even), got ",
              *clips);
  return clip_table(frames, clips.value_or(kNoClipLimit), clip_frames, rule);
}

py::array clip_table_array(int64_t frames, const std::optional<int64_t>& clips, int64_t clip_frames,
                           const std::string& rule) {
  const ClipTable table = table_of(frames, clips, clip_frames, rule);
  py::array_t<int64_t> out({table.clips, table.clip_frames});
  std::copy(table.frame.begin(), table.frame.end(), out.mutable_data());
  return out;
}

py::tuple frame_clips_array(const py::array& features, const std::optional<int64_t>& clips, int64_t clip_frames,
                            const std::string& rule) {
  AVSER_CHECK(features.ndim() == 3 && (holds<float>(features) || holds<double>(features)), input,
              "frame_clips: features: expected a (channels, frames, bands) array of float32 or float64, got ",
              describe(features));
  const py::array a =
      holds<float>(features) ? py::array(contiguous<float>(features)) : py::array(contiguous<double>(features));
  const int64_t channels = a.shape(0), frames = a.shape(1), bands = a.shape(2);
  const ClipTable table = table_of(frames, clips, clip_frames, rule);
  py::array out(a.dtype(), {table.clips, channels, clip_frames, bands});
  void* to = out.mutable_data();
  {
    SerialExecutor executor;
    py::gil_scoped_release release;
    frame_clips(a.data(), channels, frames, bands * a.itemsize(), table, to, executor);
  }
  py::array_t<bool> valid(table.clips);
  std::copy(table.valid.begin(), table.valid.end(), valid.mutable_data());
  return py::make_tuple(out, valid);
}

py::array resample_array(const py::array& given, int64_t from_rate, int64_t to_rate) {
  AVSER_CHECK(given.ndim() == 1 && holds<float>(given), input,
              "resample: waveform: expected a 1-D array of float32, got ", describe(given));
  const py::array a = readable(given);
  const int64_t samples = a.shape(0), stride = a.strides(0) / a.itemsize();
  py::array_t<float> out(resampled_length(samples, from_rate, to_rate));
  float* to = out.mutable_data();
  SerialExecutor executor;
  py::gil_scoped_release release;
  resample(static_cast<const float*>(a.data()), samples, stride, from_rate, to_rate, to, executor);
  return out;
}

py::array log_array(const py::array_t<double, py::array::c_style>& given) {
  const LogMelKernels& kernels = AVSER_PICK(log_mel_kernels);
  const int64_t n = given.size(), whole = (n + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
  std::vector<double> x(static_cast<size_t>(whole), 1.0), y(static_cast<size_t>(whole));
  std::copy(given.data(), given.data() + n, x.begin());
  kernels.log(x.data(), y.data(), whole);
  py::array_t<double> out(n);
  std::copy(y.begin(), y.begin() + n, out.mutable_data());
  return out;
}

std::vector<std::string> names(const std::vector<Isa>& isas) {
  std::vector<std::string> out;
  for (Isa isa : isas) out.emplace_back(isa_name(isa));
  return out;
}

py::dict build_info() {
  py::dict info;
  info["version"] = AVSER_VERSION;
  info["compiler"] = AVSER_COMPILER;
  info["build_type"] = AVSER_BUILD_TYPE;
  info["isas"] = names(compiled_isas());
  info["cuda"] = AVSER_CUDA_COMPILED != 0;
  info["cuda_archs"] = AVSER_CUDA_ARCHS;
  info["nvcc"] = AVSER_NVCC_VERSION;
  info["cuda_reason"] = AVSER_CUDA_REASON;
  info["torch"] = AVSER_TORCH_BUILD;
  info["pybind11"] = cat(PYBIND11_VERSION_MAJOR, ".", PYBIND11_VERSION_MINOR, ".", PYBIND11_VERSION_MICRO);
  info["python"] = PY_VERSION;
  return info;
}

double peak_of(const std::string& precision, double seconds, int threads) {
  const Precision chosen = precision_named(precision, "measure_peak: precision");
  PoolExecutor executor(threads);
  const py::gil_scoped_release release;
  return measure_peak(chosen, seconds, executor);
}

double read_rate_of(int64_t bytes, double seconds, int threads) {
  PoolExecutor executor(threads);
  const py::gil_scoped_release release;
  return measure_read(bytes, seconds, executor);
}

void bind_front_end(py::module_& m) {
  py::register_local_exception_translator(&translate);
  const LogMelOptions o;
  m.def("build_info", &build_info);
  m.def("supported_isas", [] { return names(supported_isas()); });
  m.def("cpu_isa", [] { return isa_name(current_isa()); });
  m.def("log_mel", &log_mel_array, py::arg("waveform"), py::kw_only(), py::arg("sampling_rate") = o.sampling_rate,
        py::arg("mel_bands") = o.mel_bands, py::arg("frame_length") = o.frame_length,
        py::arg("frame_step") = o.frame_step, py::arg("n_fft") = o.n_fft, py::arg("preemphasis") = o.preemphasis,
        py::arg("low_hz") = o.low_hz, py::arg("high_hz") = o.high_hz, py::arg("dtype") = "float32",
        py::arg("threads") = 1, py::arg("vtlp") = o.vtlp, py::arg("vtlp_high_hz") = o.vtlp_high_hz);
  m.def("add_deltas", &add_deltas_array, py::arg("features"), py::arg("channels"), py::arg("window") = 2);
  m.def("normalize", &normalize_array, py::arg("features"), py::arg("rule"), py::arg("mean") = std::vector<double>(),
        py::arg("std") = std::vector<double>(), py::arg("channels") = py::none());
  m.def("clip_table", &clip_table_array, py::arg("frames"), py::arg("clips"), py::arg("clip_frames"), py::arg("rule"));
  m.def("frame_clips", &frame_clips_array, py::arg("features"), py::arg("clips"), py::arg("clip_frames"),
        py::arg("rule"));
  m.def("resample", &resample_array, py::arg("waveform"), py::arg("from_rate"), py::arg("to_rate"));
  m.def("measure_peak", &peak_of, py::arg("precision"), py::arg("seconds") = 0.2, py::arg("threads") = 1);
  m.def("measure_read", &read_rate_of, py::arg("bytes"), py::arg("seconds") = 0.2, py::arg("threads") = 1);
  m.def("_log", &log_array, py::arg("x"));
}

}  // namespace
}  // namespace avser

PYBIND11_MODULE(_engine, m) {
  m.doc() = "The kernels and the whole-model Engine on NumPy arrays; needs no torch.";
  avser::bind_front_end(m);
  avser::bind_engine(m);
  avser::bind_model(m);
  avser::bind_recordings(m);
#if AVSER_CUDA_COMPILED
  avser::gpu::bind_gpu_engine(m);
#endif
}
