// Arguments of the Python modules: arrays, tensors by name, and a network's fields.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "engine/network.h"
#include "engine/packer.h"

namespace avser {

namespace py = pybind11;

using FloatArray =
    py::array_t<float, py::array::c_style | py::array::forcecast | py::detail::npy_api::NPY_ARRAY_ALIGNED_>;

inline std::string text(const py::handle& value) { return py::cast<std::string>(py::str(value)); }

inline std::string shape_text(const py::array& array) { return text(array.attr("shape")); }

// Contiguous float32; anything that is not an array of real numbers is an error.
inline FloatArray real_array(const py::handle& value, const std::string& what, ErrorKind kind) {
  const py::array array = py::array::ensure(value);
  if (!array) {
    PyErr_Clear();
    fail(kind, what, ": expected an array of numbers, got ", text(py::type::of(value).attr("__name__")));
  }
  if (std::string("fiub").find(array.dtype().kind()) == std::string::npos) {
    fail(kind, what, ": expected an array of real numbers, got dtype ", text(array.dtype()));
  }
  const FloatArray out = FloatArray::ensure(array);
  if (!out) throw py::error_already_set();
  return out;
}

// A field of the network's configuration; a missing one keeps its default, as in avser_fast.config.
template <typename T>
void read(const py::dict& fields, const char* name, T& value, const char* expected) {
  if (!fields.contains(name)) return;
  const py::object found = fields[name];
  try {
    if constexpr (std::is_same_v<T, bool>) {
      if (!py::isinstance<py::bool_>(found)) throw py::cast_error();
      value = py::cast<bool>(found);
    } else if constexpr (std::is_same_v<T, int64_t>) {
      if (!py::isinstance<py::int_>(found) || py::isinstance<py::bool_>(found)) throw py::cast_error();
      value = py::cast<int64_t>(found);
    } else {
      value.clear();
      for (const py::handle width : found) value.push_back(py::cast<int64_t>(width));
    }
  } catch (const std::exception&) {  // a cast_error, or the iteration's TypeError
    fail(ErrorKind::config, "Engine: network.", name, ": expected ", expected, ", got ", text(py::repr(found)));
  }
}

inline Network read_network(const std::string& spec_json) {
  py::object spec;
  try {
    spec = py::module_::import("json").attr("loads")(spec_json);
  } catch (py::error_already_set& error) {
    fail(ErrorKind::config, "Engine: spec_json: expected the JSON form of a ModelSpec, got ", text(error.value()));
  }
  if (!py::isinstance<py::dict>(spec) || !spec.contains("network") || !py::isinstance<py::dict>(spec["network"])) {
    fail(ErrorKind::config, "Engine: spec_json: expected the JSON form of a ModelSpec with a 'network', got ",
         spec_json);
  }
  const py::dict fields = spec["network"];
  Network network;
  for (const auto& [name, field] : {std::pair{"mel_bands", &Network::mel_bands},
                                    {"in_channels", &Network::in_channels},
                                    {"clip_frames", &Network::clip_frames},
                                    {"classes", &Network::classes},
                                    {"attention_reduction", &Network::attention_reduction},
                                    {"encoder_layers", &Network::encoder_layers},
                                    {"encoder_heads", &Network::encoder_heads},
                                    {"encoder_ff", &Network::encoder_ff},
                                    {"statistics", &Network::statistics},
                                    {"statistics_hidden", &Network::statistics_hidden}}) {
    read(fields, name, network.*field, "an integer");
  }
  read(fields, "stem", network.stem, "a list of integers");
  read(fields, "blocks", network.blocks, "a list of integers");
  read(fields, "spatial_attention", network.spatial_attention, "true or false");
  read(fields, "voice", network.voice, "true or false");
  read(fields, "channel_attention", network.channel_attention, "true or false");
  if (fields.contains("pooling")) {
    const std::string pooling = text(fields["pooling"]);
    AVSER_CHECK(pooling == "mean" || pooling == "mean_std", config,
                "Engine: network.pooling: expected 'mean' or 'mean_std', got '", pooling, "'");
    network.mean_std = pooling == "mean_std";
  }
  return network;
}

// Arrays that stay alive while `views` are used.
inline Tensors view_all(const py::dict& tensors, const std::string& what, std::vector<FloatArray>& arrays) {
  Tensors views;
  for (const auto& [key, value] : tensors) {
    const std::string name = text(key);
    arrays.push_back(real_array(value, what + name, ErrorKind::model));
    const FloatArray& array = arrays.back();
    views[name] = {array.data(), {array.shape(), array.shape() + array.ndim()}};
  }
  return views;
}

using VoteArray = py::array_t<bool, py::array::c_style>;

// The clips that vote, (batch, count); empty when `valid` is None.
inline VoteArray votes_array(const std::string& what, const py::object& valid, py::ssize_t batch, py::ssize_t count) {
  if (valid.is_none()) return VoteArray();
  const py::array array = py::array::ensure(valid);
  if (!array) PyErr_Clear();
  const bool boolean = array && array.dtype().kind() == 'b';
  AVSER_CHECK(boolean, input, what, ": valid: expected an array of bool, got ",
              array ? "dtype " + text(array.dtype()) : text(py::type::of(valid).attr("__name__")));
  AVSER_CHECK(array.ndim() == 2 && array.shape(0) == batch && array.shape(1) == count, input, what,
              ": valid: expected shape (", batch, ", ", count, "), got ", shape_text(array));
  return array;
}

// Features (B, L, width) and scores (B, L, classes) of a fusion.
inline std::pair<FloatArray, FloatArray> fusion_arrays(const std::string& what, const py::object& features,
                                                       const py::object& scores, int64_t width, int64_t classes) {
  const FloatArray x = real_array(features, what + ": features", ErrorKind::input);
  const FloatArray s = real_array(scores, what + ": scores", ErrorKind::input);
  AVSER_CHECK(x.ndim() == 3 && x.shape(2) == width, input, what, ": features: expected shape (B, L, ", width, "), got ",
              shape_text(x));
  AVSER_CHECK(s.ndim() == 3 && s.shape(0) == x.shape(0) && s.shape(1) == x.shape(1) && s.shape(2) == classes, input,
              what, ": scores: expected shape (", x.shape(0), ", ", x.shape(1), ", ", classes, "), got ",
              shape_text(s));
  return {x, s};
}

}  // namespace avser
