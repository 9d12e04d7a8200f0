#include "common/training.h"

#include <cmath>
#include <cstring>

#include "common/dropout.h"

namespace avser {
namespace {

float value_at(const void* values, Precision precision, int64_t i) {
  if (precision == Precision::float32) return static_cast<const float*>(values)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(values)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::vector<float> padded(const float* values, int64_t n, int64_t lanes) {
  std::vector<float> out(round_up(n, lanes), 0.0f);
  if (values != nullptr) std::memcpy(out.data(), values, n * sizeof(float));
  return out;
}

}  // namespace

std::vector<float> padded_floats(const void* values, Precision precision, int64_t rows, int64_t n, int64_t stride) {
  std::vector<float> out(rows * stride, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) out[r * stride + i] = value_at(values, precision, r * n + i);
  }
  return out;
}

std::vector<float> transposed_floats(const void* values, Precision precision, int64_t rows, int64_t n, int64_t stride) {
  std::vector<float> out(rows * stride, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) out[r * stride + i] = value_at(values, precision, i * rows + r);
  }
  return out;
}

void store_value(double value, void* to, Precision precision, int64_t i) {
  const float rounded = static_cast<float>(value);
  if (precision == Precision::float32) {
    static_cast<float*>(to)[i] = rounded;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  const uint32_t kept = rounded != rounded ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(kept);
}

Dropout dropout_of(double p, int64_t seed, uint32_t site) {
  Dropout dropout;
  dropout.threshold = static_cast<uint32_t>(std::nearbyint(p * 16777216.0));
  dropout.factor = p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f;
  dropout.seed = static_cast<uint64_t>(seed);
  dropout.site = site;
  return dropout;
}

void store_values(const double* values, int64_t n, void* to, Precision precision, int64_t first) {
  if (precision == Precision::float32) {
    float* out = static_cast<float*>(to) + first;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(values[i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) store_value(values[i], to, precision, first + i);
}

void add_rows(const float* values, int64_t rows, int64_t stride, int64_t n, double* sums) {
  for (int64_t i = 0; i < n; ++i) sums[i] = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    const float* of = values + row * stride;
    for (int64_t i = 0; i < n; ++i) sums[i] += static_cast<double>(of[i]);
  }
}

BatchSums::BatchSums(int64_t images, int64_t doubles, int64_t floats)
    : images_(images),
      shares_(std::min(images, kMostShares)),
      double_count_(doubles),
      float_count_(floats),
      doubles_(shares_ * doubles, 0.0),
      floats_(shares_ * floats * static_cast<int64_t>(sizeof(float))) {}

std::vector<double> BatchSums::of_doubles() const {
  std::vector<double> sums(double_count_);
  for (int64_t share = 0; share < shares_; ++share) {
    for (int64_t i = 0; i < double_count_; ++i) sums[i] += doubles_[share * double_count_ + i];
  }
  return sums;
}

void BatchSums::of_floats(int64_t at, int64_t n, double* sums) const {
  add_rows(floats_.as<float>() + at, shares_, float_count_, n, sums);
}

PaddedBefore::PaddedBefore(const float* mean_of, const float* scale_of, const float* shift_of, bool relu,
                           int64_t channels, int64_t lanes) {
  before.relu = relu;
  if (mean_of == nullptr) return;
  mean = padded(mean_of, channels, lanes);
  scale = padded(scale_of, channels, lanes);
  shift = padded(shift_of, channels, lanes);
  before.mean = mean.data();
  before.scale = scale.data();
  before.shift = shift.data();
}

BatchMoments::BatchMoments(int64_t images, int64_t stride)
    : images_(images), stride_(stride), values_(2 * images * stride, 0.0) {}

Moments BatchMoments::of(int64_t image) {
  double* mean = values_.data() + 2 * image * stride_;
  return {mean, mean + stride_};
}

void BatchMoments::finish(int64_t channels, int64_t count, float* mean, float* var) const {
  std::vector<double> average(channels), squares(channels);
  for (int64_t i = 0; i < images_; ++i) {
    const double* of = values_.data() + 2 * i * stride_;
    const double share = 1.0 / static_cast<double>(i + 1);
    for (int64_t c = 0; c < channels; ++c) {
      const double apart = of[c] - average[c];
      average[c] += apart * share;
      squares[c] += of[stride_ + c] + apart * apart * share * static_cast<double>(i) * static_cast<double>(count);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = static_cast<float>(average[c]);
    var[c] = images_ * count == 0 ? 0.0f : static_cast<float>(squares[c] / static_cast<double>(images_ * count));
  }
}

PaddedOutput::PaddedOutput(const MapView& grad, const MapView& y, const float* mean, const float* grad_mean,
                           const float* grad_var, int64_t lanes)
    : y_mean(padded(mean, y.channels, lanes)),
      mean_term(padded(grad_mean, y.channels, lanes)),
      var_term(padded(grad_var, y.channels, lanes)) {
  const float count = static_cast<float>(y.n * y.positions());
  for (float& value : mean_term) value /= count;
  for (float& value : var_term) value *= 2.0f / count;
  gradient = {grad, y, y_mean.data(), mean_term.data(), var_term.data()};
}

}  // namespace avser
