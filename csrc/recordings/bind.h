#pragma once

#include <pybind11/pybind11.h>

namespace avser {

// Adds read_files, at_rate, front_end and the class Decoder.
void bind_recordings(pybind11::module_& m);

}  // namespace avser
