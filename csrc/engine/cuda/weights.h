// Packs a model's tensors for the GPU: rounds them, puts them in the order in which lanes take them, and uploads them.
#pragma once

#include <string>
#include <vector>

#include "engine/cuda/model.h"
#include "engine/packer.h"
#include "gpu/runtime.h"
#include "gpu/tiles.h"

namespace avser::gpu {

// How a linear map's weights are stored; bf16 and fp16 stand for their sizes in everything else.
enum class Format { float32, tf32, bf16, fp16, fp8 };
int element_bytes(Format format);
// Of everything but the encoder of an MDSCM.
Format format_of(GpuPrecision precision);

// The bytes of packed panels: for every 8 columns and every 64 bytes of k, what lane 0, 1, ... 31 takes: 16 bytes (of
// fp8, where an element takes one byte instead of two, 8).  `places`: where a column of the matrix stands in k (empty:
// as it is); `length`: how long k is then.  `scale`, of fp8 alone: one factor per row.
struct Panels {
  std::vector<char> bytes;
  std::vector<float> bias, scale;
  int pairs, n_tiles;
};
Panels pack_panels(const Matrix& matrix, Format format, const std::vector<int64_t>& places, int64_t length);

class GpuUploader {
 public:
  explicit GpuUploader(std::vector<DeviceMemory>& memory) : memory_(memory) {}
  // A copy of the bytes on the current device, 256-byte aligned.
  const char* upload(const void* from, int64_t bytes);
  const float* upload(const std::vector<float>& values) {
    return reinterpret_cast<const float*>(upload(values.data(), static_cast<int64_t>(values.size() * sizeof(float))));
  }
  Packed upload(const Matrix& matrix, Format format, const std::vector<int64_t>& places = {}, int64_t length = 0);

 private:
  std::vector<DeviceMemory>& memory_;
  const OwnedStream stream_ = make_stream();
  int64_t used_ = 0, size_ = 0;
};

}  // namespace avser::gpu
