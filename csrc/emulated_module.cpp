// _emulated: the GPU engine on the emulated GPU (gpu/emulator.h), for tests; not part of the package.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/translate.h"
#include "engine/cuda/bind.h"
#include "engine/cuda/weights.h"
#include "gpu/device.h"
#include "gpu/emulated_runtime.h"
#include "gpu/emulator.h"
#include "gpu/maps.h"
#include "gpu/small_floats.h"

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

Format format_named(const std::string& name) {
  const std::pair<const char*, Format> all[] = {{"float32", Format::float32},
                                                {"tf32", Format::tf32},
                                                {"bf16", Format::bf16},
                                                {"fp16", Format::fp16},
                                                {"fp8", Format::fp8}};
  for (const auto& [known, format] : all) {
    if (name == known) return format;
  }
  fail(ErrorKind::config, "format: expected float32, tf32, bf16, fp16 or fp8, got ", name);
}

// (bytes, bias, scale, pairs, column tiles)
py::tuple pack(const py::array_t<double, py::array::c_style>& weight, const std::vector<double>& bias,
               const std::string& format, const std::vector<int64_t>& places, int64_t length) {
  const Matrix matrix{weight.shape(0), weight.shape(1), {weight.data(), weight.data() + weight.size()}, bias};
  const Panels panels = pack_panels(matrix, format_named(format), places, length);
  return py::make_tuple(py::bytes(panels.bytes.data(), panels.bytes.size()), panels.bias, panels.scale, panels.pairs,
                        panels.n_tiles);
}

// What becomes of floats that are stored narrow and widened again.
py::array_t<float> narrowed(const py::array_t<float, py::array::c_style>& values, const std::string& name) {
  const Format format = format_named(name);
  py::array_t<float> out(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i) {
    const float x = values.data()[i];
    float& y = out.mutable_data()[i];
    if (format == Format::bf16) y = bf16_to_float(float_to_bf16(x));
    if (format == Format::fp16) y = f16_to_float(float_to_f16(x));
    if (format == Format::fp8) y = f8_to_float(float_to_f8(x));
    if (format == Format::tf32) y = bits_float(float_to_tf32(x));
    if (format == Format::float32) y = x;
  }
  return out;
}

// Rows of a map that a block of a team makes, and who makes a row.
std::pair<int, int> rows_of(int height, int rank, int size) {
  const RowRange own = own_rows(height, rank, size);
  return {own.begin, own.end};
}

// Kernels with a fault each, for tests of the emulator: a missing barrier, a thread that never comes, an access behind
// the end.
void missing_barrier(int* out) {
  const Shared<int> shared = shared_memory().as<int>();
  shared[thread()] = thread();
  out[thread()] = shared[(thread() + 1) % threads()];
}
void missing_thread(int*) {
  if (thread() != 5) sync();
}
void behind_the_end(int*) { shared_memory().as<int>()[thread() + 1] = 0; }

// Of two groups of copies, only the older is waited for.
void early_read(int* out) {
  const Shared<char> shared = shared_memory();
  const int64_t number = 7 + 8 * thread();
  for (int i = 0; i < 2; ++i) {
    if (thread() < 16) copy8_async(shared + (2 * thread() + i) * 8, &number);
    copy_commit();
  }
  copy_wait_group<1>();
  if (thread() < 16) {
    for (int i = 0; i < 2; ++i) out[2 * thread() + i] = shared.as<int>()[2 * (2 * thread() + i)];
  }
  copy_wait();
}
void no_wait(int* out) { copy16_async(shared_memory(), out, true); }

std::vector<int> run_faulty(const std::string& fault) {
  std::vector<int> out(64, -1);
  int* const at = out.data();
  const auto kernel = fault == "barrier"  ? &missing_barrier
                      : fault == "thread" ? &missing_thread
                      : fault == "early"  ? &early_read
                      : fault == "wait"   ? &no_wait
                                          : &behind_the_end;
  emulate({1, 64, 1, 64 * static_cast<int64_t>(sizeof(int))}, [=] { kernel(at); });
  return out;
}

}  // namespace
}  // namespace avser::gpu

PYBIND11_MODULE(_emulated, m) {
  py::register_local_exception_translator(&avser::translate);
  avser::gpu::bind_gpu_engine(m);
  m.def("set_device", &avser::gpu::set_device, py::arg("major") = 9, py::arg("minor") = 0,
        py::arg("multiprocessors") = 132, py::arg("shared_bytes") = 227 << 10);
  m.def("pack", &avser::gpu::pack, py::arg("weight"), py::arg("bias"), py::arg("format"),
        py::arg("places") = std::vector<int64_t>(), py::arg("length") = 0);
  m.def("own_rows", &avser::gpu::rows_of, py::arg("height"), py::arg("rank"), py::arg("size"));
  m.def("owner_of", &avser::gpu::owner_of, py::arg("row"), py::arg("height"), py::arg("size"));
  m.def("narrowed", &avser::gpu::narrowed, py::arg("values"), py::arg("format"));
  m.def("group_waits", &avser::gpu::group_waits);
  m.def("run_faulty", &avser::gpu::run_faulty, py::arg("fault"));
  m.def("set_order", &avser::gpu::set_order, py::arg("order"), py::arg("seed") = 0);
}
