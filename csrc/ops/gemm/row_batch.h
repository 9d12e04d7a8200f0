// Collects rows of a product until they fill whole register tiles, then multiplies them.  For *_cpu.cpp files.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser::AVSER_ISA_NAMESPACE {

class RowBatch {
 public:
  // Rows whose operands share a panel of weights while it is close: whole tiles of 14, 12 or 6 rows.
  static constexpr int64_t kRows = 336;

  RowBatch(const GemmWeights& weights, const GemmWindow& window, const GemmOutput& output, int64_t panel,
           int64_t panel_end)
      : weights_(weights), window_(window), output_(output), panel_(panel), panel_end_(panel_end) {}

  void push(const void* x, void* y, const void* add) {
    if (count_ == kRows) flush();
    rows_[count_++] = {x, y, add};
  }
  // To be called after the last row.
  void flush() {
    gemm_kernels().run(weights_, panel_, panel_end_, window_, rows_, count_, output_);
    count_ = 0;
  }

 private:
  const GemmWeights& weights_;
  const GemmWindow window_;
  const GemmOutput output_;
  const int64_t panel_, panel_end_;
  int64_t count_ = 0;
  GemmRow rows_[kRows];
};

}  // namespace avser::AVSER_ISA_NAMESPACE
