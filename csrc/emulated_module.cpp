// _emulated: the GPU engine on the emulated GPU (gpu/emulator.h), for tests; not part of the package.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/check.h"
#include "common/translate.h"
#include "engine/cuda/bind.h"
#include "gpu/emulated_runtime.h"
#include "gpu/emulator.h"

namespace py = pybind11;

namespace avser::gpu {
namespace {

void set_device(int major, int minor, int multiprocessors, int64_t shared_bytes) {
  set_emulated_device({"emulated GPU", major, minor, multiprocessors, shared_bytes, major >= 9});
}

void set_order(const std::string& order, uint32_t seed) {
  AVSER_CHECK(order == "forward" || order == "backward" || order == "shuffled", config,
              "set_order: expected forward, backward or shuffled, got ", order);
  set_fiber_order(order == "forward"    ? FiberOrder::forward
                  : order == "backward" ? FiberOrder::backward
                                        : FiberOrder::shuffled,
                  seed);
}

}  // namespace
}  // namespace avser::gpu

PYBIND11_MODULE(_emulated, m) {
  py::register_local_exception_translator(&avser::translate);
  avser::gpu::bind_gpu_engine(m);
  m.def("set_device", &avser::gpu::set_device, py::arg("major") = 9, py::arg("minor") = 0,
        py::arg("multiprocessors") = 132, py::arg("shared_bytes") = 227 << 10);
  m.def("set_order", &avser::gpu::set_order, py::arg("order"), py::arg("seed") = 0);
}
