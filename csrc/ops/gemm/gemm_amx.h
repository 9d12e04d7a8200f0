// The product of bf16 and int8 operands on matrix tiles (common/amx.h), with the weights of gemm.h for 16 lanes.
#pragma once

#include "ops/gemm/gemm.h"

namespace avser::isa_amx {

// As GemmKernels::run.  Needs AVX-512 with bf16, and that the process was allowed to use tiles (common/isa.cpp).
void gemm_amx(const GemmWeights& w, int64_t panel, int64_t panel_end, const GemmWindow& window, const GemmRow* rows,
              int64_t count, const GemmOutput& out);

}  // namespace avser::isa_amx
