// Packing of tensors for the kernels of one instruction set, shared by every network.
#pragma once

#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "engine/buffer.h"
#include "ops/conv_stem/conv_stem.h"
#include "ops/gemm/gemm.h"
#include "ops/winograd_conv/winograd_conv.h"

namespace avser {

// A borrowed, contiguous tensor.
struct TensorView {
  const float* data = nullptr;
  std::vector<int64_t> shape;
};

// By the names of a module's state dict; or ranges, (2, channels) lowest and highest, by the names of the values that
// int8 rounds.
using Tensors = std::map<std::string, TensorView>;

std::string shape_text(const std::vector<int64_t>& shape);

// A linear map in double, (n, k) row-major, with its bias.
struct Matrix {
  int64_t n, k;
  std::vector<double> weight;
  std::vector<double> bias;
  std::string name = {};  // of its weight, for errors
};

// How a range becomes steps 0..255: a value is (number - zero) * size.  One pair per channel.
struct Quantisation {
  std::vector<double> size;
  std::vector<double> zero;
};

// How a matrix is packed: the places of its columns in k and how long k is (empty, 0: as the columns are), the steps of
// its inputs when they are int8, and those of its outputs when they are.
struct Packing {
  Precision precision;
  std::vector<int64_t> places = {};
  int64_t length = 0;
  const Quantisation* in = nullptr;   // by column
  const Quantisation* out = nullptr;  // by row
};

// Takes tensors by name and leaves them packed in `memory`.  Throws a model error that begins with `owner` and names
// the tensor when one is missing, misshaped or holds what no network can use, and in `finish` when one was never taken.
class Packer {
 public:
  Packer(const char* owner, const Tensors& tensors, int64_t lanes, std::vector<Buffer>& memory)
      : owner_(owner), tensors_(tensors), lanes_(lanes), memory_(memory) {}

  const float* take(const std::string& name, const std::vector<int64_t>& shape);
  Matrix linear(const std::string& name, int64_t n, int64_t k, const std::vector<int64_t>& kernel = {},
                bool bias = true);
  // Folds the batch norm that follows the map.
  void fold(const std::string& name, Matrix& matrix);
  // Folds the batch norm that stands before the map: it scales columns.
  void fold_before(const std::string& name, Matrix& matrix);
  // The matrix with row i in place places[i].
  static Matrix rows_at(const std::vector<int64_t>& places, const Matrix& matrix);
  // A vector with element i in place places[i].
  std::vector<double> vector_at(const std::vector<int64_t>& places, const std::string& name);
  GemmWeights pack(const Matrix& matrix, const Packing& how);
  // The places of a convolution's columns, (channel, ky, kx), in windows of channels-last maps whose positions are
  // `stride` elements.
  static Packing windows(Precision precision, int64_t kernel, int64_t in_channels, int64_t stride);
  // A 3x3 convolution's matrix, columns (channel, ky, kx), for minimal filtering.
  WinogradLayer winograd(const Matrix& matrix, bool relu);
  // Values rounded to floats, padded with zeros to whole vectors.
  const float* padded(const std::vector<double>& values);
  // Tensors whose names start so are none of the network's business.
  void ignore(const std::string& prefix);
  void finish() const;

  template <typename T>
  T* allocate(int64_t count) {
    memory_.emplace_back(count * static_cast<int64_t>(sizeof(T)));
    std::memset(memory_.back().data(), 0, count * sizeof(T));
    return reinterpret_cast<T*>(memory_.back().data());
  }
  int64_t lanes() const { return lanes_; }

 private:
  const char* const owner_;
  const Tensors& tensors_;
  const int64_t lanes_;
  std::vector<Buffer>& memory_;
  std::set<std::string> used_;
};

}  // namespace avser
