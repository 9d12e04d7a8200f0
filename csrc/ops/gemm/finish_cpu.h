// What becomes of the sums of a product's row.  For files of one instruction set.
#pragma once

#include <type_traits>

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
  AVSER_INLINE Finish(const GemmWeights& weights, int64_t column, const GemmOutput& out)
      : column_(column), out_(out), least_(broadcast(out.relu ? 0.0f : -__builtin_inff())) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      bias_[v] = weights.bias == nullptr ? vfloat{} : load(weights.bias + column + v * kLanes);
      if (T::kPrecision == Precision::int8) scale_[v] = load(weights.scale + column + v * kLanes);
    }
  }

  AVSER_INLINE void operator()(const typename T::Sum (&sum)[Vectors], const GemmRow& row) const {
    with_add(row, [&](auto* added) { store(sum, row, added); });
  }

  // store() of a tile's rows, which are like the first of them.  What is asked once leaves the way of a row without a
  // branch; those of many rows one after the other would lie scattered over more code than is fetched in time.
  template <int Rows>
  AVSER_INLINE void tile(const typename T::Sum (&sums)[Rows][Vectors], const GemmRow* rows) const {
    with_add(*rows, [&](auto* added) {
#pragma GCC unroll 14
      for (int r = 0; r < Rows; ++r) store(sums[r], rows[r], added);
    });
  }

 private:
  // then(null pointer to what `add` of such rows points to), void where it is null.
  template <class Then>
  AVSER_INLINE void with_add(const GemmRow& row, const Then& then) const {
    if (row.add == nullptr) {
      then(static_cast<void*>(nullptr));
    } else if (out_.add == Precision::float32) {
      then(static_cast<float*>(nullptr));
    } else {
      then(static_cast<uint16_t*>(nullptr));
    }
  }

  template <class Added>
  AVSER_INLINE void store(const typename T::Sum (&sum)[Vectors], const GemmRow& row, Added*) const {
    vfloat values[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      const vfloat product = as_floats(sum[v]);
      values[v] = T::kPrecision == Precision::int8 ? fma(product, scale_[v], bias_[v]) : product + bias_[v];
      if constexpr (!std::is_void_v<Added>) {
        values[v] += load_operand(static_cast<const Added*>(row.add) + column_ + v * kLanes);
      }
      // Steps are limited to 0, which is also where those of a rectified value begin.  NaN stays.
      if (Out::kPrecision != Precision::int8) values[v] = max(least_, values[v]);
    }
    store_operands(static_cast<typename Out::Element*>(row.y) + column_, values);
  }

  vfloat bias_[Vectors], scale_[Vectors];
  const int64_t column_;
  const GemmOutput& out_;
  const vfloat least_;
};

}  // namespace avser::AVSER_ISA_NAMESPACE
