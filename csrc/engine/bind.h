#pragma once

#include <pybind11/pybind11.h>

namespace avser {

// Adds the class Engine.
void bind_engine(pybind11::module_& m);

}  // namespace avser
