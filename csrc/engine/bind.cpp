#include "engine/bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/executor.h"
#include "engine/arrays.h"
#include "engine/engine.h"
#include "engine/fusion.h"
#include "engine/resnet18.h"

namespace py = pybind11;

namespace avser {
namespace {

// An engine as Python sees it: one that stops early gives what it has then.
struct PythonEngine {
  Engine engine;
  std::string stop_after;
};

std::unique_ptr<PythonEngine> make_engine(const std::string& spec_json, const py::dict& tensors,
                                          const std::string& precision, const std::optional<py::dict>& calibration,
                                          const std::string& stop_after, bool poison) {
  const Network network = read_network(spec_json);
  std::vector<FloatArray> arrays;
  const Tensors views = view_all(tensors, "Engine: ", arrays);
  EngineOptions options;
  options.precision = precision_named(precision, "Engine: precision");
  options.poison = poison;
  if (calibration) options.calibration = view_all(*calibration, "Engine: calibration: ", arrays);
  const py::gil_scoped_release release;
  std::unique_ptr<PythonEngine> made(new PythonEngine{{network, views, options}, stop_after});
  if (!stop_after.empty()) made->engine.intermediate(nullptr, 0, stop_after);  // refuses an unknown name now
  return made;
}

FloatArray clips_array(const Engine& engine, const char* method, const py::object& clips) {
  const Network& network = engine.network();
  const FloatArray x = real_array(clips, cat("Engine.", method, ": clips"), ErrorKind::input);
  const bool fits = x.ndim() == 5 && x.shape(2) == network.planes() && x.shape(3) == network.clip_frames &&
                    x.shape(4) == network.mel_bands;
  AVSER_CHECK(fits, input, "Engine.", method, ": clips: expected shape (B, L, ", network.planes(), ", ",
              network.clip_frames, ", ", network.mel_bands, "), got ", shape_text(x));
  return x;
}

py::object stopped(const Engine& engine, const FloatArray& x, const std::string& stem) {
  Intermediate found;
  {
    const float* clips = x.data();
    const int64_t count = x.shape(0) * x.shape(1);
    const py::gil_scoped_release release;
    found = engine.intermediate(clips, count, stem);
  }
  std::vector<py::ssize_t> shape = {x.shape(0), x.shape(1)};
  shape.insert(shape.end(), found.shape.begin() + 1, found.shape.end());
  py::array_t<float> out(shape);
  std::copy(found.values.begin(), found.values.end(), out.mutable_data());
  return out;
}

py::dict calibrate(const PythonEngine& python, const py::object& clips) {
  const FloatArray x = clips_array(python.engine, "calibrate", clips);
  Calibration found;
  {
    const float* data = x.data();
    const int64_t count = x.shape(0) * x.shape(1);
    const py::gil_scoped_release release;
    found = python.engine.calibrate(data, count);
  }
  py::dict out;
  for (const auto& [name, values] : found) {
    py::array_t<float> array({py::ssize_t{2}, static_cast<py::ssize_t>(values.size() / 2)});
    std::copy(values.begin(), values.end(), array.mutable_data());
    out[py::str(name)] = array;
  }
  return out;
}

py::object forward(const PythonEngine& python, const py::object& clips, const py::object& valid, int threads) {
  const Engine& engine = python.engine;
  const Network& network = engine.network();
  const FloatArray x = clips_array(engine, "forward", clips);
  if (!python.stop_after.empty()) return stopped(engine, x, python.stop_after);
  const py::ssize_t batch = x.shape(0), count = x.shape(1);

  const VoteArray votes = votes_array("Engine.forward", valid, batch, count);
  PoolExecutor executor(threads);
  py::array_t<float> probabilities({batch, static_cast<py::ssize_t>(network.classes)});
  py::array_t<float> features({batch, count, static_cast<py::ssize_t>(network.features())});
  py::array_t<float> logits({batch, count, static_cast<py::ssize_t>(network.classes)});
  float* const out[] = {probabilities.mutable_data(), features.mutable_data(), logits.mutable_data()};
  const bool* voting = valid.is_none() ? nullptr : votes.data();
  {
    const py::gil_scoped_release release;
    engine.forward(x.data(), voting, batch, count, out[0], out[1], out[2], executor);
  }
  return py::make_tuple(probabilities, features, logits);
}

std::unique_ptr<ResNet18> make_resnet18(const py::dict& tensors, int64_t in_channels, int64_t classes,
                                        const std::string& precision, bool poison) {
  std::vector<FloatArray> arrays;
  const Tensors views = view_all(tensors, "ResNet18: ", arrays);
  const Precision chosen = precision_named(precision, "ResNet18: precision");
  const py::gil_scoped_release release;
  return std::make_unique<ResNet18>(in_channels, classes, views, chosen, poison);
}

py::tuple forward_resnet18(const ResNet18& engine, const py::object& clips, const py::object& valid, int threads) {
  const FloatArray x = real_array(clips, "ResNet18.forward: clips", ErrorKind::input);
  const bool fits = x.ndim() == 5 && x.shape(2) == engine.in_channels() && x.shape(3) >= 1 && x.shape(4) >= 1;
  AVSER_CHECK(fits, input, "ResNet18.forward: clips: expected shape (B, L, ", engine.in_channels(),
              ", height, width), got ", shape_text(x));
  const py::ssize_t batch = x.shape(0), count = x.shape(1), classes = engine.classes();
  const VoteArray votes = votes_array("ResNet18.forward", valid, batch, count);
  PoolExecutor executor(threads);
  py::array_t<float> probabilities({batch, classes});
  py::array_t<float> features({batch, count, static_cast<py::ssize_t>(ResNet18::kFeatures)});
  py::array_t<float> logits({batch, count, classes});
  float* const out[] = {probabilities.mutable_data(), features.mutable_data(), logits.mutable_data()};
  const bool* voting = valid.is_none() ? nullptr : votes.data();
  {
    const py::gil_scoped_release release;
    engine.forward(x.data(), voting, batch, count, x.shape(3), x.shape(4), out[0], out[1], out[2], executor);
  }
  return py::make_tuple(probabilities, features, logits);
}

std::unique_ptr<Fusion> make_fusion(const py::dict& tensors, int64_t features, int64_t classes, int64_t hidden,
                                    double feature_weight, bool poison) {
  std::vector<FloatArray> arrays;
  const Tensors views = view_all(tensors, "Fusion: ", arrays);
  return std::make_unique<Fusion>(features, classes, hidden, feature_weight, views, poison);
}

py::tuple forward_fusion(const Fusion& engine, const py::object& features, const py::object& scores, int threads) {
  const auto [x, s] = fusion_arrays("Fusion.forward", features, scores, engine.features(), engine.classes());
  const py::ssize_t batch = x.shape(0), count = x.shape(1), classes = engine.classes();
  PoolExecutor executor(threads);
  py::array_t<float> fused({batch, classes}), a({batch, classes}), b({batch, classes});
  float* const out[] = {fused.mutable_data(), a.mutable_data(), b.mutable_data()};
  {
    const py::gil_scoped_release release;
    engine.forward(x.data(), s.data(), batch, count, out[0], out[1], out[2], executor);
  }
  return py::make_tuple(fused, a, b);
}

}  // namespace

void bind_engine(py::module_& m) {
  py::class_<PythonEngine>(m, "Engine",
                           "The whole forward of one MDSCM on the CPU; immutable, safe to call from many threads.")
      .def(py::init(&make_engine), py::arg("spec_json"), py::arg("tensors"), py::kw_only(),
           py::arg("precision") = "float32", py::arg("calibration") = py::none(), py::arg("stop_after") = "",
           py::arg("poison") = false,
           "spec_json: json.dumps(ModelSpec.to_dict()).  tensors: the state dict of avser_fast.nn.MDSCM as arrays, "
           "which are copied.\nprecision: float32, bf16 or int8; int8 needs the calibration of a float32 engine.\n"
           "stop_after: a name of stems(); forward then returns what that stem makes, (B, L, ...), for debugging.\n"
           "poison fills unwritten memory with NaN before every call, for tests.  Raises ConfigError or ModelError "
           "naming the field or tensor.")
      .def("forward", &forward, py::arg("clips"), py::arg("valid") = py::none(), py::arg("threads") = 1,
           "clips (B, L, channels, clip_frames, bands), valid (B, L) bool (None: every clip votes) ->\n"
           "(probabilities (B, classes), features (B, L, D), clip_logits (B, L, classes)), float32.\n"
           "An utterance of which no clip votes has NaN probabilities.  Raises InputError naming the argument.")
      .def("calibrate", &calibrate, py::arg("clips"),
           "The range of every value that int8 rounds, measured on clips: name -> (2, channels) lowest and highest.")
      .def(
          "stems", [](const PythonEngine& python) { return python.engine.stems(); }, "What stop_after may name.")
      .def_property_readonly("precision",
                             [](const PythonEngine& python) { return precision_name(python.engine.precision()); })
      .def_property_readonly(
          "isa", [](const PythonEngine& python) { return isa_name(python.engine.isa()); },
          "Instruction set that this engine runs on.");
  py::class_<ResNet18>(m, "ResNet18",
                       "The ResNet-18 audio-visual encoder with its emotion classifier on the CPU; immutable, safe to "
                       "call from many threads.")
      .def(py::init(&make_resnet18), py::arg("tensors"), py::kw_only(), py::arg("in_channels") = 1,
           py::arg("classes") = 4, py::arg("precision") = "float32", py::arg("poison") = false,
           "tensors: the state dict of avser_fast.nn.AVRE(body='resnet18').  precision: float32 or bf16.")
      .def("forward", &forward_resnet18, py::arg("clips"), py::arg("valid") = py::none(), py::arg("threads") = 1,
           "clips (B, L, channels, height, width), valid (B, L) bool (None: every clip votes) ->\n"
           "(probabilities (B, classes), features (B, L, 512), clip_logits (B, L, classes)), float32.")
      .def_property_readonly("precision", [](const ResNet18& engine) { return precision_name(engine.precision()); })
      .def_property_readonly("isa", [](const ResNet18& engine) { return isa_name(engine.isa()); });
  py::class_<Fusion>(m, "Fusion", "Fusion of clip features and clip logits by two LSTMs on the CPU, float32.")
      .def(py::init(&make_fusion), py::arg("tensors"), py::kw_only(), py::arg("features") = 1280,
           py::arg("classes") = 4, py::arg("hidden") = 128, py::arg("feature_weight") = 0.7, py::arg("poison") = false,
           "tensors: the state dict of avser_fast.nn.Fusion.")
      .def("forward", &forward_fusion, py::arg("features"), py::arg("scores"), py::arg("threads") = 1,
           "features (B, L, D), scores (B, L, classes) -> (fused, a, b), each (B, classes) logits.");
}

}  // namespace avser
