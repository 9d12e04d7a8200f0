#include "engine/cuda/bind.h"

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "common/check.h"
#include "engine/arrays.h"
#include "engine/cuda/fusion.h"
#include "engine/cuda/mdscm.h"
#include "engine/cuda/resnet18.h"

namespace avser::gpu {
namespace {

std::unique_ptr<GpuMdscm> make_engine(const std::string& spec_json, const py::dict& tensors,
                                      const std::string& precision, int device, int team, int group, bool staged,
                                      bool poison) {
  const Network network = read_network(spec_json);
  std::vector<FloatArray> arrays;
  const Tensors views = view_all(tensors, "GpuEngine: ", arrays);
  const GpuOptions options{
      gpu_precision_named(precision, "GpuEngine: precision"), device, {team, group, staged}, poison};
  const py::gil_scoped_release release;
  return std::make_unique<GpuMdscm>(network, views, options);
}

std::unique_ptr<GpuResNet18> make_resnet18(const py::dict& tensors, int64_t in_channels, int64_t height, int64_t width,
                                           int64_t classes, const std::string& precision, int device, int team,
                                           int group, bool staged, bool poison) {
  std::vector<FloatArray> arrays;
  const Tensors views = view_all(tensors, "GpuResNet18: ", arrays);
  const GpuOptions options{
      gpu_precision_named(precision, "GpuResNet18: precision"), device, {team, group, staged}, poison};
  const py::gil_scoped_release release;
  return std::make_unique<GpuResNet18>(in_channels, height, width, classes, views, options);
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

void forward_on_device(const GpuModel& model, uintptr_t clips, uintptr_t valid, int64_t batch, int64_t count,
                       uintptr_t probabilities, uintptr_t features, uintptr_t logits, uintptr_t stream) {
  const py::gil_scoped_release release;
  model.forward_on_device(reinterpret_cast<const float*>(clips), reinterpret_cast<const uint8_t*>(valid), batch, count,
                          reinterpret_cast<float*>(probabilities), reinterpret_cast<float*>(features),
                          reinterpret_cast<float*>(logits), reinterpret_cast<Stream>(stream));
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
  py::class_<GpuModel>(m, "GpuModel", py::module_local(),
                       "A network's whole forward on an NVIDIA GPU; immutable, safe to call from many threads.")
      .def("forward", &forward, py::arg("clips"), py::arg("valid") = py::none(),
           "clips (B, L, channels, frames, bands), valid (B, L) bool (None: every clip votes) ->\n"
           "(probabilities (B, classes), features (B, L, D), clip_logits (B, L, classes)), float32.\n"
           "Raises InputError naming the argument, BackendError with the driver's words.")
      .def("forward_on_device", &forward_on_device, py::arg("clips"), py::arg("valid"), py::arg("batch"),
           py::arg("count"), py::arg("probabilities"), py::arg("features"), py::arg("logits"), py::arg("stream"),
           "The same between addresses in this GPU's memory, float32 and contiguous, queued on a stream without "
           "waiting; valid: bytes, 0: every clip votes.")
      .def("warm_up", &GpuModel::warm_up, py::arg("batch"), py::arg("count"), py::call_guard<py::gil_scoped_release>(),
           "Makes the memory and the graph for batches of this size before the first call.")
      .def_property_readonly("precision", [](const GpuModel& model) { return gpu_precision_name(model.precision()); })
      .def_property_readonly("device_name", [](const GpuModel& model) { return model.device().name; });
  py::class_<GpuMdscm, GpuModel>(m, "GpuEngine", py::module_local(), "One MDSCM on an NVIDIA GPU.")
      .def(py::init(&make_engine), py::arg("spec_json"), py::arg("tensors"), py::kw_only(),
           py::arg("precision") = "float32", py::arg("device") = 0, py::arg("team") = 0, py::arg("group") = 1,
           py::arg("staged") = false, py::arg("poison") = false,
           "spec_json: json.dumps(ModelSpec.to_dict()).  tensors: the state dict of avser_fast.nn.MDSCM as arrays, "
           "which are copied.\nprecision: float32, tf32, bf16, fp16 or fp8 (fp16 with 8-bit encoder weights).\n"
           "team, group, staged: blocks that share a group of clips, and a launch per stage; team 0: chosen by the "
           "size of the batch.  poison fills activations with NaN before every call, for tests.\n"
           "Raises BackendError where there is no such GPU, ConfigError or ModelError naming the field or tensor.");
  py::class_<GpuResNet18, GpuModel>(m, "GpuResNet18", py::module_local(),
                                    "The ResNet-18 audio-visual encoder on an NVIDIA GPU.")
      .def(py::init(&make_resnet18), py::arg("tensors"), py::kw_only(), py::arg("in_channels") = 1,
           py::arg("height") = 224, py::arg("width") = 40, py::arg("classes") = 4, py::arg("precision") = "float32",
           py::arg("device") = 0, py::arg("team") = 0, py::arg("group") = 1, py::arg("staged") = false,
           py::arg("poison") = false,
           "tensors: the state dict of avser_fast.nn.AVRE(body='resnet18').  precision: float32, tf32, bf16 or fp16.\n"
           "The other arguments and the errors are as of GpuEngine.");
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
