#pragma once

#include <pybind11/pybind11.h>

namespace avser {

// Adds the class SpeechModel.
void bind_model(pybind11::module_& m);

}  // namespace avser
