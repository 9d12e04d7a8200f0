// What the host side needs of a GPU, under two implementations: runtime_cuda.cu, the CUDA runtime; and
// runtime_emulated.cpp, which runs everything on the CPU for tests.  Every failure is a backend error with the driver's
// own words.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace avser::gpu {

struct DeviceInfo {
  std::string name;
  int major = 0, minor = 0;
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // most that a block may have
  bool clusters = false;     // blocks that meet, from 9.0 on
};

// Number of GPUs; where there is none, a backend error that says why: no driver, or none that can be used.
int device_count();
DeviceInfo device_info(int device);

// Makes a device the calling thread's own, and puts the one before it back.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_;
};

// Memory of the current device, or of the host where copies can reach it without a detour, aligned to kAlignment bytes.
constexpr int64_t kAlignment = 256;
struct FreeDevice {
  int device;
  void operator()(char* at) const;
};
struct FreePinned {
  void operator()(char* at) const;
};
using DeviceMemory = std::unique_ptr<char, FreeDevice>;
using PinnedMemory = std::unique_ptr<char, FreePinned>;
DeviceMemory allocate_device(int64_t bytes);
PinnedMemory allocate_pinned(int64_t bytes);

// A cudaStream_t.
using Stream = void*;
struct FreeStream {
  void operator()(void* stream) const;
};
using OwnedStream = std::unique_ptr<void, FreeStream>;
OwnedStream make_stream();
void synchronize(Stream stream);
// Whether the stream's owner is recording it into a graph.
bool is_capturing(Stream stream);

// While it lives, the calling thread may allocate and free although somebody records a graph; memory is always had and
// given back so.
class WhileRecording {
 public:
  WhileRecording();
  ~WhileRecording();
  WhileRecording(const WhileRecording&) = delete;
  WhileRecording& operator=(const WhileRecording&) = delete;

 private:
  int mode_;
};

void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream);
void copy_from_device(void* to, const void* from, int64_t bytes, Stream stream);
void fill(void* at, int value, int64_t bytes, Stream stream);

// What was queued between begin_capture and end_capture, to be queued again as one.
struct FreeGraph {
  void operator()(void* graph) const;
};
using Graph = std::unique_ptr<void, FreeGraph>;
void begin_capture(Stream stream);
Graph end_capture(Stream stream);

// From its beginning to finish(); an exception in between leaves nothing recording.
class Capture {
 public:
  explicit Capture(Stream stream) : stream_(stream) { begin_capture(stream); }
  ~Capture() {
    if (finished_) return;
    try {
      end_capture(stream_);
    } catch (...) {
    }
  }
  Capture(const Capture&) = delete;
  Capture& operator=(const Capture&) = delete;
  Graph finish() {
    finished_ = true;
    return end_capture(stream_);
  }

 private:
  const Stream stream_;
  bool finished_ = false;
};
void launch_graph(const Graph& graph, Stream stream);

// Whether kernels run on a real GPU.
bool is_emulated();

}  // namespace avser::gpu
