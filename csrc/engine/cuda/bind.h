#pragma once

#include <pybind11/pybind11.h>

namespace avser::gpu {

// Adds the class GpuEngine and the function gpu_info.
void bind_gpu_engine(pybind11::module_& m);

}  // namespace avser::gpu
