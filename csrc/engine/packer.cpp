#include "engine/packer.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"

namespace avser {
namespace {

constexpr double kBatchNormEpsilon = 1e-5;
constexpr const char* kNotUsed = "num_batches_tracked";  // of a batch norm; the forward does not depend on it

uint16_t to_bf16(double value) {
  const float rounded = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += cat(i > 0 ? ", " : "", shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

const float* Packer::take(const std::string& name, const std::vector<int64_t>& shape) {
  const auto found = tensors_.find(name);
  AVSER_CHECK(found != tensors_.end(), model, owner_, ": ", name, ": expected a tensor of shape ", shape_text(shape),
              ", which is missing");
  AVSER_CHECK(found->second.shape == shape, model, owner_, ": ", name, ": expected shape ", shape_text(shape), ", got ",
              shape_text(found->second.shape));
  used_.insert(name);
  return found->second.data;
}

Matrix Packer::linear(const std::string& name, int64_t n, int64_t k, const std::vector<int64_t>& kernel, bool bias) {
  std::vector<int64_t> shape = {n, k};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  int64_t size = k;
  for (int64_t extent : kernel) size *= extent;
  const float* weight = take(name + ".weight", shape);
  Matrix matrix{n, size, {weight, weight + n * size}, std::vector<double>(n, 0.0), name + ".weight"};
  if (bias) {
    const float* values = take(name + ".bias", {n});
    matrix.bias.assign(values, values + n);
  }
  return matrix;
}

void Packer::fold(const std::string& name, Matrix& matrix) {
  const float* weight = take(name + ".weight", {matrix.n});
  const float* bias = take(name + ".bias", {matrix.n});
  const float* mean = take(name + ".running_mean", {matrix.n});
  const float* variance = take(name + ".running_var", {matrix.n});
  used_.insert(name + "." + kNotUsed);
  for (int64_t i = 0; i < matrix.n; ++i) {
    AVSER_CHECK(variance[i] >= 0, model, owner_, ": ", name, ".running_var: expected variances of at least 0, got ",
                variance[i]);
    const double scale = weight[i] / std::sqrt(static_cast<double>(variance[i]) + kBatchNormEpsilon);
    for (int64_t j = 0; j < matrix.k; ++j) matrix.weight[i * matrix.k + j] *= scale;
    matrix.bias[i] = (matrix.bias[i] - mean[i]) * scale + bias[i];
  }
}

void Packer::fold_before(const std::string& name, Matrix& matrix) {
  Matrix norm{matrix.k, 1, std::vector<double>(matrix.k, 1.0), std::vector<double>(matrix.k, 0.0)};
  fold(name, norm);
  for (int64_t i = 0; i < matrix.n; ++i) {
    for (int64_t j = 0; j < matrix.k; ++j) {
      double& weight = matrix.weight[i * matrix.k + j];
      matrix.bias[i] += weight * norm.bias[j];
      weight *= norm.weight[j];
    }
  }
}

Matrix Packer::rows_at(const std::vector<int64_t>& places, const Matrix& matrix) {
  Matrix out = matrix;
  for (int64_t i = 0; i < matrix.n; ++i) {
    std::copy_n(matrix.weight.begin() + i * matrix.k, matrix.k, out.weight.begin() + places[i] * matrix.k);
    out.bias[places[i]] = matrix.bias[i];
  }
  return out;
}

std::vector<double> Packer::vector_at(const std::vector<int64_t>& places, const std::string& name) {
  const float* values = take(name, {static_cast<int64_t>(places.size())});
  std::vector<double> out(places.size());
  for (size_t i = 0; i < out.size(); ++i) out[places[i]] = values[i];
  return out;
}

GemmWeights Packer::pack(const Matrix& matrix, const Packing& how) {
  const int64_t per_word = group(how.precision);
  const int64_t length = how.length > 0 ? how.length : matrix.k;
  const int64_t words = (length + per_word - 1) / per_word;
  const int64_t panel = 2 * lanes_, columns = round_up(matrix.n, lanes_);
  uint32_t* panels = allocate<uint32_t>(columns * words);
  float* bias = allocate<float>(columns);
  float* scale = how.precision == Precision::int8 ? allocate<float>(columns) : nullptr;
  std::vector<double> row(length);
  for (int64_t i = 0; i < matrix.n; ++i) {
    std::fill(row.begin(), row.end(), 0.0);
    for (int64_t j = 0; j < matrix.k; ++j) {
      const int64_t place = how.places.empty() ? j : how.places[j];
      row[place] = matrix.weight[i * matrix.k + j] * (how.in == nullptr ? 1.0 : how.in->size[j]);
    }
    // Outputs in steps: value / size + zero.
    const double steps = how.out == nullptr ? 1.0 : 1.0 / how.out->size[i];
    double offset = matrix.bias[i] * steps + (how.out == nullptr ? 0.0 : how.out->zero[i]);
    const int64_t begin = i / panel * panel;
    const int64_t width = columns - begin < panel ? columns - begin : panel;
    char* to = reinterpret_cast<char*>(panels + begin * words + (i - begin));
    const auto element = [&](int64_t place) {
      return to + place / per_word * width * 4 + place % per_word * (4 / per_word);
    };
    if (how.precision == Precision::int8) {
      double most = 0.0;
      for (double value : row) most = std::fmax(most, std::fabs(value));
      const double size = most > 0 ? most / 127.0 : 1.0;
      double largest = 0.0;  // sum of products
      for (int64_t j = 0; j < matrix.k; ++j) {
        const int64_t place = how.places.empty() ? j : how.places[j];
        const double number = std::nearbyint(row[place] / size);
        const int8_t stored = static_cast<int8_t>(number);
        std::memcpy(element(place), &stored, sizeof stored);
        largest += 255.0 * std::fabs(number);
        offset -= number * how.in->zero[j] * size * steps;
      }
      AVSER_CHECK(largest <= std::numeric_limits<int32_t>::max(), model, owner_, ": ", matrix.name,
                  ": expected rows whose sums of int8 products fit 32 bits, got one of ", matrix.k,
                  " weights whose sums may not");
      scale[i] = static_cast<float>(size * steps);
    } else {
      for (int64_t place = 0; place < length; ++place) {
        if (how.precision == Precision::bf16) {
          const uint16_t stored = to_bf16(row[place] * steps);
          std::memcpy(element(place), &stored, sizeof stored);
        } else {
          const float stored = static_cast<float>(row[place] * steps);
          std::memcpy(element(place), &stored, sizeof stored);
        }
      }
    }
    bias[i] = static_cast<float>(offset);
  }
  return {how.precision, words, matrix.n, panels, bias, scale};
}

Packing Packer::windows(Precision precision, int64_t kernel, int64_t in_channels, int64_t stride) {
  const int64_t taps = kernel * kernel;
  Packing how{precision, {}, taps * stride};
  for (int64_t j = 0; j < taps * in_channels; ++j) how.places.push_back(j % taps * stride + j / taps);
  return how;
}

WinogradLayer Packer::winograd(const Matrix& matrix, bool relu) {
  // G g G^T with G of F(2x2, 3x3).
  constexpr double kG[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  const int64_t in = matrix.k / 9;
  WinogradLayer layer{in, matrix.n, relu, {}, padded(matrix.bias)};
  for (int64_t term = 0; term < kWinogradTerms; ++term) {
    const double *down = kG[term / 4], *across = kG[term % 4];
    Matrix part{matrix.n, in, std::vector<double>(matrix.n * in), std::vector<double>(matrix.n, 0.0), matrix.name};
    for (int64_t i = 0; i < matrix.n * in; ++i) {
      const double* taps = matrix.weight.data() + i * 9;
      for (int y = 0; y < 3; ++y) {
        for (int x = 0; x < 3; ++x) part.weight[i] += down[y] * across[x] * taps[3 * y + x];
      }
    }
    layer.weights[term] = pack(part, {Precision::float32});
  }
  return layer;
}

const float* Packer::padded(const std::vector<double>& values) {
  float* out = allocate<float>(round_up(values.size(), lanes_));
  for (size_t i = 0; i < values.size(); ++i) out[i] = static_cast<float>(values[i]);
  return out;
}

void Packer::ignore(const std::string& prefix) {
  for (const auto& [name, tensor] : tensors_) {
    if (name.rfind(prefix, 0) == 0) used_.insert(name);
  }
}

void Packer::finish() const {
  for (const auto& [name, tensor] : tensors_) {
    AVSER_CHECK(used_.count(name) != 0, model, owner_, ": ", name,
                ": expected a tensor of this network, got one of shape ", shape_text(tensor.shape),
                " that it does not have");
  }
}

}  // namespace avser
