// Products on emulated matrix tiles (csrc/common/amx.h) against sums in double and, for int8, against exact ones; a row
// alone has the bits that it has among others.  Prints what is wrong and exits with 1.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "gpu/small_floats.h"
#include "ops/gemm/gemm_amx.h"

namespace {

using avser::Precision;
using avser::gpu::bf16_to_float;
using avser::gpu::float_to_bf16;
constexpr int64_t kLanes = 16;

std::mt19937 draw(7);
int64_t number(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(draw); }

struct Case {
  bool bytes;  // int8, else bf16
  int64_t segments, words, stride, n, rows, apart;
  bool narrow, relu, add, scattered;
};

int fail(const Case& c, const char* what, int64_t row, int64_t column, double found, double expected) {
  std::printf("%s: row %ld, output %ld: %.9g, expected %.9g (%s, %ld segments of %ld words, n %ld, %ld rows)\n", what,
              static_cast<long>(row), static_cast<long>(column), found, expected, c.bytes ? "int8" : "bf16",
              static_cast<long>(c.segments), static_cast<long>(c.words), static_cast<long>(c.n),
              static_cast<long>(c.rows));
  return 1;
}

int run(const Case& c) {
  const int64_t group = c.bytes ? 4 : 2, element = 4 / group, words = c.segments * c.words, k = words * group;
  const int64_t padded = (c.n + kLanes - 1) / kLanes * kLanes;
  std::normal_distribution<float> normal;
  // Operands end where their memory ends; what lies between runs of words is NaN (bf16) or large (int8).
  const int64_t span = (c.segments - 1) * c.stride + c.words;
  std::vector<uint32_t> x(static_cast<size_t>((c.rows - 1) * c.apart + span), 0xffffffffu);
  std::vector<uint32_t> panels(static_cast<size_t>(padded * words));
  std::vector<float> bias(static_cast<size_t>(padded)), scale(static_cast<size_t>(padded));
  std::vector<float> added(static_cast<size_t>(c.rows * padded));
  for (float& v : bias) v = normal(draw);
  for (float& v : scale) v = 0.01f + std::fabs(normal(draw)) * 0.01f;
  for (float& v : added) v = normal(draw);
  std::vector<std::vector<double>> left(static_cast<size_t>(c.rows)), right(static_cast<size_t>(c.n));
  std::vector<const void*> at(static_cast<size_t>(c.rows));
  for (int64_t r = 0; r < c.rows; ++r) {
    // Scattered rows lie in no constant distance.
    const int64_t place = c.scattered ? (r * 7919 % c.rows) : r;
    uint32_t* row = x.data() + place * c.apart;
    at[r] = row;
    for (int64_t i = 0; i < k; ++i) {
      char* to =
          reinterpret_cast<char*>(row + i / group / c.words * c.stride + i / group % c.words) + i % group * element;
      if (c.bytes) {
        const uint8_t v = static_cast<uint8_t>(number(0, 255));
        std::memcpy(to, &v, 1);
        left[r].push_back(v);
      } else {
        const uint16_t v = float_to_bf16(normal(draw));
        std::memcpy(to, &v, 2);
        left[r].push_back(bf16_to_float(v));
      }
    }
  }
  for (int64_t n = 0; n < padded; ++n) {
    const int64_t panel = n / (2 * kLanes), width = padded - panel * 2 * kLanes < 2 * kLanes ? kLanes : 2 * kLanes;
    for (int64_t i = 0; i < k; ++i) {
      char* to =
          reinterpret_cast<char*>(panels.data() + panel * 2 * kLanes * words + i / group * width + n % (2 * kLanes)) +
          i % group * element;
      double value = 0;
      if (c.bytes) {
        const int8_t v = static_cast<int8_t>(n < c.n ? number(-127, 127) : 0);
        std::memcpy(to, &v, 1);
        value = v;
      } else {
        const uint16_t v = n < c.n ? float_to_bf16(normal(draw)) : 0;
        std::memcpy(to, &v, 2);
        value = bf16_to_float(v);
      }
      if (n < c.n) right[n].push_back(value);
    }
  }
  avser::GemmWeights weights;
  weights.precision = c.bytes ? Precision::int8 : Precision::bf16;
  weights.words = words;
  weights.n = c.n;
  weights.panels = panels.data();
  weights.bias = bias.data();
  weights.scale = c.bytes ? scale.data() : nullptr;
  avser::GemmOutput out;
  out.precision = c.narrow ? weights.precision : Precision::float32;
  out.relu = c.relu;
  const int64_t bytes = c.narrow ? element : 4;
  std::vector<char> y(static_cast<size_t>(c.rows * padded * bytes), -1), alone(static_cast<size_t>(padded * bytes));
  std::vector<avser::GemmRow> rows;
  for (int64_t r = 0; r < c.rows; ++r) {
    rows.push_back({at[r], y.data() + r * padded * bytes, c.add ? added.data() + r * padded : nullptr});
  }
  const avser::GemmWindow window{c.segments, c.words, c.stride};
  const int64_t all = avser::gemm_panels(c.n, kLanes);
  avser::isa_amx::gemm_amx(weights, 0, all, window, rows.data(), c.rows, out);
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t n = 0; n < c.n; ++n) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        sum += left[r][i] * right[n][i];
        size += std::fabs(left[r][i] * right[n][i]);
      }
      float expected =
          c.bytes ? std::fmaf(static_cast<float>(sum), scale[n], bias[n]) : static_cast<float>(sum + bias[n]);
      if (c.add) expected += added[r * padded + n];
      if (c.relu && expected < 0) expected = 0;
      const char* from = y.data() + (r * padded + n) * bytes;
      double found, allowed = c.bytes ? 0 : 1e-6 * size + 1e-6;
      if (!c.narrow) {
        float v;
        std::memcpy(&v, from, 4);
        found = v;
      } else if (c.bytes) {
        found = static_cast<uint8_t>(*from);
        expected = std::fmin(std::fmax(std::nearbyint(expected), 0.0f), 255.0f);
      } else {
        uint16_t v;
        std::memcpy(&v, from, 2);
        found = bf16_to_float(v);
        allowed += std::fabs(expected) / 256;
      }
      if (!(std::fabs(found - expected) <= allowed)) return fail(c, "sum", r, n, found, expected);
    }
    avser::GemmRow own = rows[r];
    own.y = alone.data();
    avser::isa_amx::gemm_amx(weights, 0, all, window, &own, 1, out);
    if (std::memcmp(alone.data(), rows[r].y, static_cast<size_t>(padded * bytes)) != 0) {
      return fail(c, "alone and among others", r, 0, 0, 0);
    }
  }
  return 0;
}

}  // namespace

int main() {
  for (int i = 0; i < 300; ++i) {
    Case c{};
    c.bytes = i % 2 == 0;
    c.segments = number(0, 1) == 0 ? 1 : number(2, 3);
    c.words = number(0, 3) == 0 ? 16 * number(1, 3) : number(1, 40);
    c.stride = c.words + number(0, 5);
    c.n = number(0, 3) == 0 ? 16 * number(1, 4) : number(1, 70);
    c.rows = number(0, 3) == 0 ? 16 * number(1, 3) : number(1, 50);
    c.apart = (c.segments - 1) * c.stride + c.words + number(0, 3);
    c.narrow = number(0, 1) == 1;
    c.relu = number(0, 1) == 1;
    c.add = number(0, 2) == 0;
    c.scattered = number(0, 1) == 1 && c.rows % 7919 != 0;
    if (run(c) != 0) return 1;
  }
  std::puts("300 products agree");
  return 0;
}
