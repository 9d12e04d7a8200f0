#include "engine/cuda/bind.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "engine/arrays.h"
#include "engine/cuda/fusion.h"
#include "engine/cuda/mdscm.h"
#include "engine/cuda/resnet18.h"
#include "engine/cuda/speech.h"

namespace avser::gpu {
namespace {

std::shared_ptr<GpuMdscm> make_engine(const std::string& spec_json, const py::dict& tensors,
                                      const std::string& precision, int device, int team, int group, bool staged,
                                      bool through_memory, bool direct_weights, bool poison) {
  const Network network = read_network(spec_json);
  std::vector<FloatArray> arrays;
  const Tensors views = view_all(tensors, "GpuEngine: ", arrays);
  const GpuOptions options{gpu_precision_named(precision, "GpuEngine: precision"),
                           device,
                           {team, group, staged, through_memory, direct_weights},
                           poison};
  const py::gil_scoped_release release;
  return std::make_shared<GpuMdscm>(network, views, options);
}

std::shared_ptr<GpuResNet18> make_resnet18(const py::dict& tensors, int64_t in_channels, int64_t height, int64_t width,
                                           int64_t classes, const std::string& precision, int device, int team,
                                           int group, bool staged, bool poison) {
  std::vector<FloatArray> arrays;
  const Tensors views = view_all(tensors, "GpuResNet18: ", arrays);
  const GpuOptions options{
      gpu_precision_named(precision, "GpuResNet18: precision"), device, {team, group, staged, true, true}, poison};
  const py::gil_scoped_release release;
  return std::make_shared<GpuResNet18>(in_channels, height, width, classes, views, options);
}

py::tuple forward(const GpuModel& model, const py::object& clips, const py::object& valid) {
  const std::vector<int64_t>& shape = model.clip_shape();
  const FloatArray x = real_array(clips, "forward: clips", ErrorKind::input);
  const bool fits = x.ndim() == 5 && std::equal(shape.begin(), shape.end(), x.shape() + 2);
  AVSER_CHECK(fits, input, "forward: clips: expected shape (B, L, ", shape[0], ", ", shape[1], ", ", shape[2],
              "), got ", shape_text(x));
  const py::ssize_t batch = x.shape(0), count = x.shape(1), classes = model.classes();
  const VoteArray votes = votes_array("forward", valid, batch, count);
  py::array_t<float> probabilities({batch, classes}), logits({batch, count, classes});
  py::array_t<float> features({batch, count, static_cast<py::ssize_t>(model.features())});
  float* const out[] = {probabilities.mutable_data(), features.mutable_data(), logits.mutable_data()};
  const bool* voting = valid.is_none() ? nullptr : votes.data();
  {
    const py::gil_scoped_release release;
    model.forward(x.data(), voting, batch, count, out[0], out[1], out[2]);
  }
  return py::make_tuple(probabilities, features, logits);
}

py::dict schedule(const GpuModel& model, int64_t batch, int64_t count) {
  AVSER_CHECK(batch >= 1 && count >= 1, input, "schedule: expected at least 1 clip, got ", batch, " x ", count);
  const GpuModel::Plan plan = model.plan(batch * count);
  py::dict out;
  out["team"] = plan.schedule.team;
  out["group"] = plan.schedule.group;
  out["staged"] = plan.schedule.staged;
  out["through_memory"] = plan.schedule.through_memory;
  out["direct_weights"] = plan.schedule.direct_weights;
  out["teams"] = plan.teams;
  out["shared_bytes"] = plan.shared_bytes;
  return out;
}

void forward_on_device(const GpuModel& model, uintptr_t clips, uintptr_t valid, int64_t batch, int64_t count,
                       uintptr_t probabilities, uintptr_t features, uintptr_t logits, uintptr_t stream) {
  const py::gil_scoped_release release;
  model.forward_on_device(reinterpret_cast<const float*>(clips), reinterpret_cast<const uint8_t*>(valid), batch, count,
                          reinterpret_cast<float*>(probabilities), reinterpret_cast<float*>(features),
                          reinterpret_cast<float*>(logits), reinterpret_cast<Stream>(stream));
}

void run_steps(const GpuModel& model, uintptr_t clips, int64_t batch, int64_t count, uintptr_t probabilities,
               uintptr_t features, uintptr_t logits, int begin, int end, uintptr_t stream) {
  const py::gil_scoped_release release;
  model.run_steps(reinterpret_cast<const float*>(clips), batch, count, reinterpret_cast<float*>(probabilities),
                  reinterpret_cast<float*>(features), reinterpret_cast<float*>(logits), begin, end,
                  reinterpret_cast<Stream>(stream));
}

py::list stages(const GpuModel& model) {
  py::list out;
  for (const GpuStage& stage : model.stages()) {
    out.append(py::dict(py::arg("name") = stage.name, py::arg("flops") = stage.flops,
                        py::arg("weight_bytes") = stage.weight_bytes, py::arg("read_bytes") = stage.read_bytes,
                        py::arg("write_bytes") = stage.write_bytes));
  }
  return out;
}

std::unique_ptr<GpuSpeech> make_speech(const std::vector<std::shared_ptr<GpuModel>>& networks, int device,
                                       int64_t sampling_rate, int64_t mel_bands, int64_t frame_length,
                                       int64_t frame_step, int64_t n_fft, double preemphasis, double low_hz,
                                       double high_hz, int64_t channels, int64_t delta_window,
                                       const std::string& normalization, const std::vector<double>& mean,
                                       const std::vector<double>& std, const std::string& rule,
                                       const std::optional<int64_t>& clips, int64_t clip_frames, bool voice) {
  FrontEnd front_end;
  front_end.log_mel = {sampling_rate, mel_bands, frame_length, frame_step, n_fft, preemphasis, low_hz, high_hz};
  front_end.channels = channels;
  front_end.delta_window = delta_window;
  front_end.normalization = {normalize_rule(normalization), mean, std};
  front_end.voice = voice;
  const ClipRule clip_rule{rule, clips.value_or(kNoClipLimit), clip_frames};
  const py::gil_scoped_release release;
  return std::make_unique<GpuSpeech>(front_end, clip_rule, GpuSpeech::Networks(networks.begin(), networks.end()),
                                     device);
}

// Recordings of a call, and how many clips vote.
struct GivenRecordings {
  GivenRecordings(const std::string& what, const GpuSpeech& speech, const py::list& given) {
    for (const py::handle& one : given) {
      arrays.push_back(real_array(one, what, ErrorKind::input));
      const FloatArray& own = arrays.back();
      AVSER_CHECK(own.ndim() == 1 && own.size() > 0, input, what,
                  ": expected 1-D arrays of at least one sample, got shape ", shape_text(own));
      samples.push_back({own.data(), own.size()});
      clips += speech.clips_of(own.size());
    }
  }
  std::vector<FloatArray> arrays;
  std::vector<Samples> samples;
  int64_t clips = 0;
};

py::list forward_speech(const GpuSpeech& speech, const py::list& recordings) {
  const GivenRecordings given("forward: recordings", speech, recordings);
  py::list out;
  std::vector<Scores> scores;
  for (const auto& network : speech.networks()) {
    py::array_t<float> features({given.clips, network->features()}), logits({given.clips, network->classes()});
    scores.push_back({features.mutable_data(), logits.mutable_data(), nullptr});
    out.append(py::make_tuple(features, logits));
  }
  const py::gil_scoped_release release;
  speech.forward(given.samples, scores);
  return out;
}

py::array_t<float> speech_clips(const GpuSpeech& speech, const py::list& recordings) {
  const GivenRecordings given("clips: recordings", speech, recordings);
  const std::vector<int64_t> shape = speech.clip_shape();
  py::array_t<float> out({given.clips, shape[0], shape[1], shape[2]});
  float* const to = out.mutable_data();
  const py::gil_scoped_release release;
  speech.clips(given.samples, to);
  return out;
}

void forward_speech_on_device(const GpuSpeech& speech, uintptr_t samples, const std::string& dtype, int64_t batch,
                              int64_t count, int64_t stride,
                              const std::vector<std::tuple<uintptr_t, uintptr_t, uintptr_t>>& outputs,
                              uintptr_t stream) {
  AVSER_CHECK(dtype == "int16" || dtype == "float32", input,
              "forward_on_device: samples: expected int16 or float32, got ", dtype);
  AVSER_CHECK(outputs.size() == speech.networks().size(), input, "forward_on_device: outputs: expected ",
              speech.networks().size(), ", one per network, got ", outputs.size());
  std::vector<Scores> scores;
  for (const auto& [features, logits, probabilities] : outputs) {
    scores.push_back({reinterpret_cast<float*>(features), reinterpret_cast<float*>(logits),
                      reinterpret_cast<float*>(probabilities)});
  }
  const py::gil_scoped_release release;
  speech.forward_on_device(reinterpret_cast<const void*>(samples),
                           dtype == "int16" ? SampleType::int16 : SampleType::float32, batch, count, stride, scores,
                           reinterpret_cast<Stream>(stream));
}

py::tuple forward_fusion(const GpuFusion& fusion, const py::object& features, const py::object& scores) {
  const auto [x, s] = fusion_arrays("GpuFusion.forward", features, scores, fusion.features(), fusion.classes());
  const py::ssize_t batch = x.shape(0), count = x.shape(1), classes = fusion.classes();
  py::array_t<float> fused({batch, classes}), a({batch, classes}), b({batch, classes});
  float* const out[] = {fused.mutable_data(), a.mutable_data(), b.mutable_data()};
  {
    const py::gil_scoped_release release;
    fusion.forward(x.data(), s.data(), batch, count, out[0], out[1], out[2]);
  }
  return py::make_tuple(fused, a, b);
}

std::unique_ptr<GpuFusion> make_fusion(const py::dict& tensors, int64_t features, int64_t classes, int64_t hidden,
                                       double feature_weight, int device) {
  std::vector<FloatArray> arrays;
  const Tensors views = view_all(tensors, "GpuFusion: ", arrays);
  return std::make_unique<GpuFusion>(features, classes, hidden, feature_weight, views, device);
}

py::dict gpu_info(int device) {
  const int count = device_count();
  AVSER_CHECK(device >= 0 && device < count, backend, "CUDA: expected a GPU from 0 to ", count - 1, ", got ", device);
  const DeviceInfo info = device_info(device);
  py::dict out;
  out["name"] = info.name;
  out["capability"] = py::make_tuple(info.major, info.minor);
  out["multiprocessors"] = info.multiprocessors;
  out["shared_bytes"] = info.shared_bytes;
  out["emulated"] = is_emulated();
  return out;
}

}  // namespace

void bind_gpu_engine(py::module_& m) {
  py::class_<GpuModel, std::shared_ptr<GpuModel>>(
      m, "GpuModel", py::module_local(),
      "A network's whole forward on an NVIDIA GPU; immutable, safe to call from many threads.")
      .def("forward", &forward, py::arg("clips"), py::arg("valid") = py::none(),
           "clips (B, L, channels, frames, bands), valid (B, L) bool (None: every clip votes) ->\n"
           "(probabilities (B, classes), features (B, L, D), clip_logits (B, L, classes)), float32.\n"
           "Raises InputError naming the argument, BackendError with the driver's words.")
      .def("forward_on_device", &forward_on_device, py::arg("clips"), py::arg("valid"), py::arg("batch"),
           py::arg("count"), py::arg("probabilities"), py::arg("features"), py::arg("logits"), py::arg("stream"),
           "The same between addresses in this GPU's memory, float32 and contiguous, queued on a stream without "
           "waiting; valid: bytes, 0: every clip votes.")
      .def("run_steps", &run_steps, py::arg("clips"), py::arg("batch"), py::arg("count"), py::arg("probabilities"),
           py::arg("features"), py::arg("logits"), py::arg("begin"), py::arg("end"), py::arg("stream"),
           "For measurements: steps [begin, end) of forward_on_device, every clip voting; begin == end: one launch "
           "that\n"
           "does nothing.  Those before `begin` must have been the last call on that stream, for the same batch.\n"
           "InputError where they leave nothing behind: where a team carries clips in turn, in a recorded graph.")
      .def("stages", &stages,
           "One dict per step: name, flops and read_bytes and write_bytes (activations) of a clip, weight_bytes read "
           "once.")
      .def("warm_up", &GpuModel::warm_up, py::arg("batch"), py::arg("count"), py::call_guard<py::gil_scoped_release>(),
           "Makes the memory and the graph for batches of this size before the first call.")
      .def("schedule", &schedule, py::arg("batch"), py::arg("count"),
           "How a batch of this size is run: blocks of a team, clips that it carries at a time, a launch per stage or "
           "one,\nmaps through memory or on chip, teams, and the shared memory of a block.")
      .def_property_readonly("features", &GpuModel::features)
      .def_property_readonly("precision", [](const GpuModel& model) { return gpu_precision_name(model.precision()); })
      .def_property_readonly("device_name", [](const GpuModel& model) { return model.device().name; });
  py::class_<GpuMdscm, GpuModel, std::shared_ptr<GpuMdscm>>(m, "GpuEngine", py::module_local(),
                                                            "One MDSCM on an NVIDIA GPU.")
      .def(
          py::init(&make_engine), py::arg("spec_json"), py::arg("tensors"), py::kw_only(),
          py::arg("precision") = "float32", py::arg("device") = 0, py::arg("team") = 0, py::arg("group") = 1,
          py::arg("staged") = false, py::arg("through_memory") = false, py::arg("direct_weights") = false,
          py::arg("poison") = false,
          "spec_json: json.dumps(ModelSpec.to_dict()).  tensors: the state dict of avser_fast.nn.MDSCM as arrays, "
          "which are copied.\nprecision: float32, tf32, bf16, fp16 or fp8 (fp16 with 8-bit encoder weights).\n"
          "team, group, staged: blocks that share a group of clips, and a launch per stage; team 0: chosen by the "
          "size of the batch.  through_memory: the maps of the convolutions also where they would fit into the blocks' "
          "shared memory; direct_weights: the encoder's also where they could come ahead of its stages.  poison fills "
          "activations with NaN before every call, for tests.\n"
          "Raises BackendError where there is no such GPU, ConfigError or ModelError naming the field or tensor.");
  py::class_<GpuResNet18, GpuModel, std::shared_ptr<GpuResNet18>>(
      m, "GpuResNet18", py::module_local(), "The ResNet-18 audio-visual encoder on an NVIDIA GPU.")
      .def(py::init(&make_resnet18), py::arg("tensors"), py::kw_only(), py::arg("in_channels") = 1,
           py::arg("height") = 224, py::arg("width") = 40, py::arg("classes") = 4, py::arg("precision") = "float32",
           py::arg("device") = 0, py::arg("team") = 0, py::arg("group") = 1, py::arg("staged") = false,
           py::arg("poison") = false,
           "tensors: the state dict of avser_fast.nn.AVRE(body='resnet18').  precision: float32, tf32, bf16 or fp16.\n"
           "The other arguments and the errors are as of GpuEngine.");
  const LogMelOptions o;
  py::class_<GpuSpeech>(m, "GpuSpeech", py::module_local(),
                        "Front end, clips and networks on an NVIDIA GPU; immutable, safe to call from many threads.")
      .def(py::init(&make_speech), py::arg("networks"), py::kw_only(), py::arg("device") = 0,
           py::arg("sampling_rate") = o.sampling_rate, py::arg("mel_bands") = o.mel_bands,
           py::arg("frame_length") = o.frame_length, py::arg("frame_step") = o.frame_step, py::arg("n_fft") = o.n_fft,
           py::arg("preemphasis") = o.preemphasis, py::arg("low_hz") = o.low_hz, py::arg("high_hz") = o.high_hz,
           py::arg("channels") = 1, py::arg("delta_window") = 2, py::arg("normalization") = "none",
           py::arg("mean") = std::vector<double>(), py::arg("std") = std::vector<double>(),
           py::arg("rule") = "published", py::arg("clips") = 5, py::arg("clip_frames") = 224, py::arg("voice") = false,
           "networks: GpuEngine and GpuResNet18 objects on the same device; each reads the first channels of the same "
           "clips.\nThe others are the fields of avser_fast.config.FrontEnd and ClipRule.\n"
           "Raises ConfigError naming the field, BackendError for what the kernels do not do.")
      .def("frames_of", &GpuSpeech::frames_of, py::arg("samples"), "Frames of a recording of so many samples.")
      .def("clips_of", &GpuSpeech::clips_of, py::arg("samples"), "Clips of a recording of so many samples that vote.")
      .def("forward", &forward_speech, py::arg("recordings"),
           "recordings: 1-D arrays of samples at int16 scale and at the front end's rate, of any lengths -> for every\n"
           "network (features (N, D), clip_logits (N, classes)), float32, of the N clips of all recordings in order.")
      .def("clips", &speech_clips, py::arg("recordings"),
           "What the networks read: (N, planes of the front end, clip_frames, mel_bands), float32.")
      .def("forward_on_device", &forward_speech_on_device, py::arg("samples"), py::arg("dtype"), py::arg("batch"),
           py::arg("count"), py::arg("stride"), py::arg("outputs"), py::arg("stream"),
           "The same for recordings of one length at an address in this GPU's memory, int16 or float32, `stride` "
           "elements apart,\nqueued on a stream without waiting.  outputs: for every network the addresses of features "
           "(batch * L, D), clip_logits (batch * L, classes) and probabilities (batch, classes), float32.");
  py::class_<GpuFusion>(m, "GpuFusion", py::module_local(),
                        "Fusion of clip features and clip logits by two LSTMs on a GPU, float32.")
      .def(py::init(&make_fusion), py::arg("tensors"), py::kw_only(), py::arg("features") = 1280,
           py::arg("classes") = 4, py::arg("hidden") = 128, py::arg("feature_weight") = 0.7, py::arg("device") = 0,
           "tensors: the state dict of avser_fast.nn.Fusion.")
      .def("forward", &forward_fusion, py::arg("features"), py::arg("scores"),
           "features (B, L, D), scores (B, L, classes) -> (fused, a, b), each (B, classes) logits.");
  m.def("gpu_info", &gpu_info, py::arg("device") = 0,
        "name, capability, multiprocessors, shared_bytes of a GPU; BackendError where there is none that can be used.");
}

}  // namespace avser::gpu
