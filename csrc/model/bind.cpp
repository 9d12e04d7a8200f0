#include "model/bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "engine/network.h"
#include "engine/weights.h"
#include "model/json.h"
#include "model/spec.h"
#include "model/speech_model.h"

namespace py = pybind11;

namespace avser {
namespace {

template <typename T>
bool holds(const py::array& array) {
  return py::dtype::of<T>().equal(array.dtype());
}

std::string describe(const py::array& array) {
  return cat(std::string(py::str(array.dtype())), " of shape ", std::string(py::str(array.attr("shape"))));
}

template <typename T>
py::array_t<T, py::array::c_style> contiguous(const py::array& array) {
  const auto out = py::array_t<T, py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_>::ensure(array);
  if (!out) throw py::error_already_set();
  return out;
}

using Arrays = std::vector<py::array_t<float, py::array::c_style>>;

// Arrays that stay alive while the views are used.
Tensors view_all(const py::dict& tensors, Arrays& arrays) {
  Tensors views;
  for (const auto& [key, value] : tensors) {
    const auto name = py::cast<std::string>(py::str(key));
    const bool fits = py::isinstance<py::array>(value) && holds<float>(py::reinterpret_borrow<py::array>(value));
    AVSER_CHECK(fits, model, "tensor '", name, "': expected a float32 array, got ",
                py::isinstance<py::array>(value) ? describe(py::reinterpret_borrow<py::array>(value))
                                                 : std::string(py::str(py::type::of(value).attr("__name__"))));
    arrays.push_back(contiguous<float>(py::reinterpret_borrow<py::array>(value)));
    views[name] = {arrays.back().data(), {arrays.back().shape(), arrays.back().shape() + arrays.back().ndim()}};
  }
  return views;
}

std::unique_ptr<SpeechModel> make_model(const std::string& spec_json, const py::dict& tensors,
                                        const std::string& precision, const std::optional<py::dict>& calibration) {
  const ModelSpec spec = read_spec(parse_json(spec_json, ErrorKind::config, "spec_json"));
  Arrays arrays;
  const Tensors views = view_all(tensors, arrays);
  const Tensors ranges = calibration ? view_all(*calibration, arrays) : Tensors{};
  const py::gil_scoped_release release;
  return std::make_unique<SpeechModel>(spec, views, precision, calibration ? &ranges : nullptr);
}

std::unique_ptr<SpeechModel> open_model(const py::object& path, const std::string& precision) {
  const auto name = py::cast<std::string>(py::module_::import("os").attr("fsencode")(path));
  const py::gil_scoped_release release;
  return std::make_unique<SpeechModel>(SpeechModel::open(name, precision));
}

template <typename T>
Result classify(const SpeechModel& model, const py::array& waveform, int64_t rate, int threads) {
  const auto samples = contiguous<T>(waveform);
  const T* data = samples.data();
  const py::ssize_t count = samples.shape(0);
  const py::gil_scoped_release release;
  return model.classify(data, count, rate, threads);
}

py::array_t<float> rows(const std::vector<float>& values, py::ssize_t count) {
  const auto width = static_cast<py::ssize_t>(values.size()) / count;
  return py::array_t<float>({count, width}, values.data());
}

py::tuple run(const SpeechModel& model, const py::array& waveform, const std::optional<int64_t>& rate, int threads) {
  AVSER_CHECK(waveform.ndim() == 1 && (holds<int16_t>(waveform) || holds<float>(waveform)), input,
              "waveform: expected a 1-D array of int16 or float32, got ", describe(waveform));
  const int64_t hertz = rate.value_or(model.sampling_rate());
  const Result result = holds<float>(waveform) ? classify<float>(model, waveform, hertz, threads)
                                               : classify<int16_t>(model, waveform, hertz, threads);
  const auto clips = static_cast<py::ssize_t>(result.segments.size());
  py::array_t<int64_t> frames({clips, py::ssize_t{2}});
  py::array_t<double> seconds({clips, py::ssize_t{2}});
  for (py::ssize_t i = 0; i < clips; ++i) {
    const Segment& segment = result.segments[static_cast<size_t>(i)];
    frames.mutable_at(i, 0) = segment.begin_frame;
    frames.mutable_at(i, 1) = segment.end_frame;
    seconds.mutable_at(i, 0) = segment.start_s;
    seconds.mutable_at(i, 1) = segment.end_s;
  }
  return py::make_tuple(
      py::array_t<float>(static_cast<py::ssize_t>(result.probabilities.size()), result.probabilities.data()),
      rows(result.features, clips), rows(result.clip_logits, clips), frames, seconds);
}

}  // namespace

void bind_model(py::module_& m) {
  py::class_<SpeechModel>(m, "SpeechModel")
      .def(py::init(&make_model), py::arg("spec_json"), py::arg("tensors"), py::kw_only(),
           py::arg("precision") = "float32", py::arg("calibration") = py::none())
      .def_static("open", &open_model, py::arg("path"), py::kw_only(), py::arg("precision") = "float32")
      .def("run", &run, py::arg("waveform"), py::arg("sampling_rate") = py::none(), py::kw_only(),
           py::arg("threads") = 1)
      .def_property_readonly("labels", [](const SpeechModel& model) { return py::tuple(py::cast(model.labels())); })
      .def_property_readonly("sampling_rate", &SpeechModel::sampling_rate);
}

}  // namespace avser
