#include "engine/cuda/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gpu/small_floats.h"

namespace avser::gpu {
namespace {

constexpr int64_t kSlab = int64_t{8} << 20;
// The largest 8-bit float.
constexpr double kMostEightBits = 448.0;

// The stored element, little end first.
uint32_t stored(double value, Format format) {
  const float x = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  switch (format) {
    case Format::float32:
      return bits;
    case Format::tf32:
      return float_to_tf32(x);
    case Format::bf16:
      return float_to_bf16(x);
    case Format::fp16:
      return float_to_f16(x);
    case Format::fp8:
      return float_to_f8(x);
  }
  return 0;
}

}  // namespace

Format format_of(GpuPrecision precision) {
  constexpr Format kFormats[kGpuPrecisions] = {Format::float32, Format::tf32, Format::bf16, Format::fp16, Format::fp16};
  return kFormats[static_cast<int>(precision)];
}

int element_bytes(Format format) {
  return format == Format::float32 || format == Format::tf32 ? 4 : format == Format::fp8 ? 1 : 2;
}

Panels pack_panels(const Matrix& matrix, Format format, const std::vector<int64_t>& places, int64_t length) {
  // An 8-bit weight becomes a 16-bit operand: it has the place of one.
  const int operand = std::max(element_bytes(format), 2), per_word = 4 / operand;
  const int64_t columns = length > 0 ? length : matrix.k;
  Panels out;
  out.pairs = static_cast<int>((columns * operand + kPairBytes - 1) / kPairBytes);
  out.n_tiles = static_cast<int>((matrix.n + 7) / 8);
  const int bytes = element_bytes(format);
  const int64_t lane_bytes = kPairBytes / 4 * bytes / operand;
  out.bytes.assign(static_cast<size_t>(out.n_tiles * out.pairs * kWarp * lane_bytes), 0);
  out.bias.assign(static_cast<size_t>(out.n_tiles) * 8, 0.0f);
  if (format == Format::fp8) out.scale.assign(out.bias.size(), 1.0f);
  for (int64_t n = 0; n < matrix.n; ++n) {
    const double* row = matrix.weight.data() + n * matrix.k;
    double scale = 1.0;
    if (format == Format::fp8) {
      double largest = 0.0;
      for (int64_t k = 0; k < matrix.k; ++k) largest = std::max(largest, std::fabs(row[k]));
      // A power of two: dividing by it rounds nothing.
      if (largest > 0.0) scale = std::exp2(std::ceil(std::log2(largest / kMostEightBits)));
      out.scale[n] = static_cast<float>(scale);
    }
    out.bias[n] = static_cast<float>(matrix.bias[n]);
    for (int64_t k = 0; k < matrix.k; ++k) {
      const int64_t place = places.empty() ? k : places[k];
      // Within 64 bytes of k: the instruction, the half of its 32 bytes, the lane's word, the element of the word.
      const int64_t byte = place * operand, pair = byte / kPairBytes, in_pair = byte % kPairBytes;
      const int64_t word = in_pair / 16;  // 2 * instruction + half
      const int64_t lane = n % 8 * 4 + in_pair % 16 / 4;
      const int64_t at =
          ((n / 8 * out.pairs + pair) * kWarp + lane) * lane_bytes + (word * per_word + place % per_word) * bytes;
      const uint32_t bits = stored(row[k] / scale, format);
      std::memcpy(out.bytes.data() + at, &bits, static_cast<size_t>(bytes));
    }
  }
  return out;
}

const char* GpuUploader::upload(const void* from, int64_t bytes) {
  const int64_t whole = round_up(bytes, kAlignment);
  if (memory_.empty() || used_ + whole > size_) {
    size_ = std::max(kSlab, whole);
    memory_.push_back(allocate_device(size_));
    used_ = 0;
  }
  char* const at = memory_.back().get() + used_;
  used_ += whole;
  copy_to_device(at, from, bytes, stream_.get());
  synchronize(stream_.get());
  return at;
}

Packed GpuUploader::upload(const Matrix& matrix, Format format, const std::vector<int64_t>& places, int64_t length) {
  const Panels panels = pack_panels(matrix, format, places, length);
  Packed out{};
  out.panels = upload(panels.bytes.data(), static_cast<int64_t>(panels.bytes.size()));
  out.bias = upload(panels.bias);
  out.scale = panels.scale.empty() ? nullptr : upload(panels.scale);
  out.pairs = panels.pairs;
  out.n_tiles = panels.n_tiles;
  return out;
}

}  // namespace avser::gpu
