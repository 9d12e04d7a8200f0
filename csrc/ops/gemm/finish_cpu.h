// What becomes of the sums of a product's row.  For files of one instruction set.
#pragma once

#include "common/operands.h"
#include "common/vector_math.h"
#include "ops/gemm/gemm.h"

namespace avser::AVSER_ISA_NAMESPACE {

AVSER_INLINE vfloat as_floats(vfloat sum) { return sum; }
AVSER_INLINE vfloat as_floats(vint32 sum) { return __builtin_convertvector(sum, vfloat); }

// `Vectors` vectors of outputs from `column` on.
template <class T, class Out, int Vectors>
class Finish {
 public:
  AVSER_INLINE Finish(const GemmWeights& weights, int64_t column, const GemmOutput& out) : column_(column), out_(out) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      bias_[v] = weights.bias == nullptr ? vfloat{} : load(weights.bias + column + v * kLanes);
      if (T::kPrecision == Precision::int8) scale_[v] = load(weights.scale + column + v * kLanes);
    }
  }

  AVSER_INLINE void operator()(const typename T::Sum (&sum)[Vectors], const GemmRow& row) const {
    typename Out::Element* y = static_cast<typename Out::Element*>(row.y) + column_;
    vfloat values[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const vfloat product = as_floats(sum[v]);
      vfloat& value = values[v];
      value = T::kPrecision == Precision::int8 ? fma(product, scale_[v], bias_[v]) : product + bias_[v];
      if (row.add != nullptr) {
        const int64_t at = column_ + v * kLanes;
        value += out_.add == Precision::bf16 ? load_operand(static_cast<const uint16_t*>(row.add) + at)
                                             : load(static_cast<const float*>(row.add) + at);
      }
      // Steps are limited to 0, which is also where those of a rectified value begin.
      if (Out::kPrecision != Precision::int8 && out_.relu) value = relu(value);
    }
    store_operands(y, values);
  }

 private:
  vfloat bias_[Vectors], scale_[Vectors];
  const int64_t column_;
  const GemmOutput& out_;
};

}  // namespace avser::AVSER_ISA_NAMESPACE
