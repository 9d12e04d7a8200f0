#include "common/operands.h"
#include "common/vector_math.h"
#include "ops/conv_stem/conv_stem.h"
#include "ops/gemm/row_batch.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

void load_clip(const float* clip, int64_t channels, const Map& map, int64_t row, int64_t row_end) {
  clear_border(map, row, row_end);
  for (int64_t y = row; y < row_end; ++y) {
    float* to = reinterpret_cast<float*>(map.at(y, 0));
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = clip + (c * map.height + y) * map.width;
      if (map.stride == 1) {
        std::memcpy(to, from, map.width * sizeof(float));
      } else {
        for (int64_t x = 0; x < map.width; ++x) to[x * map.stride + c] = from[x];
      }
    }
  }
}

void run(const ConvLayer& layer, const Map* x, const Map* add, const Map* y, int64_t row, int64_t row_end,
         int64_t panel, int64_t panel_end) {
  const int64_t height = y->height, width = y->width, pad = layer.kernel / 2;
  const GemmWindow window{layer.kernel, layer.kernel * x->position_bytes() / 4, x->row_bytes() / 4};
  const int64_t step = layer.stride * x->position_bytes();
  const Precision added = add == nullptr ? Precision::float32 : add->precision;
  RowBatch batch(layer.weights, window, {y->precision, layer.relu, added}, panel, panel_end);
  for (int64_t i = row; i < row_end; ++i) {
    const int64_t map = i / height, r = i % height;
    if (y[map].border > 0 && panel == 0) clear_border(y[map], r, r + 1);
    const char* from = x[map].at(layer.stride * r - pad, -pad);
    const char* other = add == nullptr ? nullptr : add[map].at(r, 0);
    char* to = y[map].at(r, 0);
    for (int64_t j = 0; j < width; ++j) {
      batch.push(from, to, other);
      from += step;
      to += y->position_bytes();
      if (other != nullptr) other += add->position_bytes();
    }
  }
  batch.flush();
  // 0 times infinity may have made the padding NaN where ReLU made the channels 0, and the next window reads it.
  const int64_t real = layer.out_channels * element_bytes(y->precision);
  if (y->position_bytes() == real || panel_end * 2 * kLanes < layer.out_channels) return;
  for (int64_t i = row; i < row_end; ++i) {
    char* to = y[i / height].at(i % height, 0) + real;
    for (int64_t j = 0; j < width; ++j, to += y->position_bytes()) std::memset(to, 0, y->position_bytes() - real);
  }
}

template <class Element>
void pool(const Map* x, const Map* y, int64_t row, int64_t row_end) {
  const int64_t height = y->height, stride = x->stride;
  for (int64_t i = row; i < row_end; ++i) {
    const int64_t map = i / height, r = i % height;
    clear_border(y[map], r, r + 1);
    for (int64_t j = 0; j < y->width; ++j) {
      Element* to = reinterpret_cast<Element*>(y[map].at(r, j));
      for (int64_t c = 0; c < stride; c += kLanes) {
        vfloat most{};  // the border's zeros are no larger than any value
        for (int64_t ky = -1; ky <= 1; ++ky) {
          const Element* from = reinterpret_cast<const Element*>(x[map].at(2 * r + ky, 2 * j - 1)) + c;
          for (int64_t kx = 0; kx < 3; ++kx) most = max_or_nan(most, load_operand(from + kx * stride));
        }
        store_operand(to + c, most);
      }
    }
  }
}

void pool_any(const Map* x, const Map* y, int64_t row, int64_t row_end) {
  x->precision == Precision::bf16 ? pool<uint16_t>(x, y, row, row_end) : pool<float>(x, y, row, row_end);
}

}  // namespace

const ConvStemKernels& conv_stem_kernels() {
  static constexpr ConvStemKernels kernels{&load_clip, &run, &pool_any};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
