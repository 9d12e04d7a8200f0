#include "engine/cuda/bind.h"

#include <memory>
#include <string>
#include <vector>

#include "common/check.h"
#include "engine/arrays.h"
#include "engine/cuda/gpu_engine.h"

namespace avser::gpu {
namespace {

std::unique_ptr<GpuEngine> make_engine(const std::string& spec_json, const py::dict& tensors,
                                       const std::string& precision, int device, int team, int group, bool staged,
                                       bool poison) {
  const Network network = read_network(spec_json);
  std::vector<FloatArray> arrays;
  const Tensors views = view_all(tensors, "GpuEngine: ", arrays);
  GpuOptions options;
  options.precision = gpu_precision_named(precision, "GpuEngine: precision");
  options.device = device;
  options.schedule = {team, group, staged};
  options.poison = poison;
  const py::gil_scoped_release release;
  return std::make_unique<GpuEngine>(network, views, options);
}

py::tuple forward(const GpuEngine& engine, const py::object& clips, const py::object& valid) {
  const Network& network = engine.network();
  const FloatArray x = real_array(clips, "GpuEngine.forward: clips", ErrorKind::input);
  const bool fits = x.ndim() == 5 && x.shape(2) == network.in_channels && x.shape(3) == network.clip_frames &&
                    x.shape(4) == network.mel_bands;
  AVSER_CHECK(fits, input, "GpuEngine.forward: clips: expected shape (B, L, ", network.in_channels, ", ",
              network.clip_frames, ", ", network.mel_bands, "), got ", shape_text(x));
  const py::ssize_t batch = x.shape(0), count = x.shape(1), classes = network.classes;
  const VoteArray votes = votes_array("GpuEngine.forward", valid, batch, count);
  py::array_t<float> probabilities({batch, classes}), logits({batch, count, classes});
  py::array_t<float> features({batch, count, static_cast<py::ssize_t>(network.features())});
  float* const out[] = {probabilities.mutable_data(), features.mutable_data(), logits.mutable_data()};
  const bool* voting = valid.is_none() ? nullptr : votes.data();
  {
    const py::gil_scoped_release release;
    engine.forward(x.data(), voting, batch, count, out[0], out[1], out[2]);
  }
  return py::make_tuple(probabilities, features, logits);
}

void forward_on_device(const GpuEngine& engine, uintptr_t clips, uintptr_t valid, int64_t batch, int64_t count,
                       uintptr_t probabilities, uintptr_t features, uintptr_t logits, uintptr_t stream) {
  const py::gil_scoped_release release;
  engine.forward_on_device(reinterpret_cast<const float*>(clips), reinterpret_cast<const uint8_t*>(valid), batch, count,
                           reinterpret_cast<float*>(probabilities), reinterpret_cast<float*>(features),
                           reinterpret_cast<float*>(logits), reinterpret_cast<Stream>(stream));
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
  py::class_<GpuEngine>(m, "GpuEngine",
                        "The whole forward of one MDSCM on an NVIDIA GPU; immutable, safe to call from many threads.")
      .def(py::init(&make_engine), py::arg("spec_json"), py::arg("tensors"), py::kw_only(),
           py::arg("precision") = "float32", py::arg("device") = 0, py::arg("team") = 0, py::arg("group") = 1,
           py::arg("staged") = false, py::arg("poison") = false,
           "spec_json: json.dumps(ModelSpec.to_dict()).  tensors: the state dict of avser_fast.nn.MDSCM as arrays, "
           "which are copied.\nprecision: float32, tf32, bf16, fp16 or fp8 (fp16 with 8-bit encoder weights).\n"
           "team, group, staged: blocks that share a group of clips, and a launch per stage; team 0: chosen by the "
           "size of the batch.  poison fills activations with NaN before every call, for tests.\n"
           "Raises BackendError where there is no such GPU, ConfigError or ModelError naming the field or tensor.")
      .def("forward", &forward, py::arg("clips"), py::arg("valid") = py::none(),
           "clips (B, L, channels, clip_frames, bands), valid (B, L) bool (None: every clip votes) ->\n"
           "(probabilities (B, classes), features (B, L, D), clip_logits (B, L, classes)), float32.")
      .def("forward_on_device", &forward_on_device, py::arg("clips"), py::arg("valid"), py::arg("batch"),
           py::arg("count"), py::arg("probabilities"), py::arg("features"), py::arg("logits"), py::arg("stream"),
           "The same between addresses in this GPU's memory, float32 and contiguous, queued on a stream without "
           "waiting; valid: bytes, 0: every clip votes.")
      .def("warm_up", &GpuEngine::warm_up, py::arg("batch"), py::arg("count"), py::call_guard<py::gil_scoped_release>(),
           "Makes the memory and the graph for batches of this size before the first call.")
      .def_property_readonly("precision",
                             [](const GpuEngine& engine) { return gpu_precision_name(engine.precision()); })
      .def_property_readonly("device_name", [](const GpuEngine& engine) { return engine.device().name; });
  m.def("gpu_info", &gpu_info, py::arg("device") = 0,
        "name, capability, multiprocessors, shared_bytes of a GPU; BackendError where there is none that can be used.");
}

}  // namespace avser::gpu
