// In what a model's products are computed: the element of both operands.
#pragma once

#include <cstdint>
#include <string>

namespace avser {

// float32: float operands.  bf16: bfloat16 operands, float sums.  int8: unsigned activations and signed weights of 8
// bits, 32-bit integer sums.  Norms, softmax, statistics and the residual stream are float in all three.
enum class Precision { float32 = 0, bf16 = 1, int8 = 2 };
constexpr int kPrecisions = 3;

// Operands are read as 32-bit words of `group` neighbouring channels.
constexpr int64_t group(Precision p) { return p == Precision::float32 ? 1 : p == Precision::bf16 ? 2 : 4; }
constexpr int64_t element_bytes(Precision p) { return 4 / group(p); }

const char* precision_name(Precision p);
// The precision of that name; a config error that begins with `what` for any other one.
Precision precision_named(const std::string& name, const std::string& what);

}  // namespace avser
