#include "common/rows.h"
#include "ops/cs_attention/cs_attention_training.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// Of one image: its values as padded rows, and everything that is computed from them on the way.
struct State {
  int64_t channels, stride, height, width, positions, hidden;
  float *x, *scaled, *d;                           // (positions, stride): input, after spatial attention, gradient
  float *most, *mean, *spatial;                    // (positions,): over channels; the gate
  float *grad_most, *grad_mean;                    // (positions,)
  float *pooled_mean, *pooled_most, *gate, *work;  // (stride,)
  float *hidden_mean, *hidden_most;                // (hidden,): before ReLU
  int64_t bytes;

  State(const TrainedAttention& op, char* memory) {
    channels = op.x.channels;
    stride = round_up(channels, kLanes);
    height = op.x.height;
    width = op.x.width;
    positions = height * width;
    hidden = op.hidden;
    int64_t at = 0;
    const auto part = [&](int64_t floats) {
      float* here = reinterpret_cast<float*>(memory + at);
      at += round_up(floats * static_cast<int64_t>(sizeof(float)), 64);
      return here;
    };
    x = part(positions * stride);
    scaled = part(positions * stride);
    d = part(positions * stride);
    most = part(positions), mean = part(positions), spatial = part(positions);
    grad_most = part(positions), grad_mean = part(positions);
    pooled_mean = part(stride), pooled_most = part(stride), gate = part(stride), work = part(stride);
    hidden_mean = part(hidden), hidden_most = part(hidden);
    bytes = at;
  }
};

int64_t scratch(const TrainedAttention& op) {
  char none;
  return State(op, &none).bytes;
}

template <class Element>
void load_image(const MapView& x, int64_t i, int64_t stride, float* to) {
  for (int64_t h = 0; h < x.height; ++h) {
    for (int64_t w = 0; w < x.width; ++w, to += stride) {
      const Element* from = reinterpret_cast<const Element*>(x.at(i, h, w));
      for (int64_t c = 0; c < x.channels; c += kLanes) store(to + c, load_channels(from, x.stride_c, c, x.channels));
    }
  }
}

float sigmoid_of(float x) { return sigmoid(broadcast(x))[0]; }

float dot(const float* a, const float* b, int64_t n) {
  vfloat sum{};
  for (int64_t c = 0; c < n; c += kLanes) sum = fma(load(a + c), load(b + c), sum);
  return lane_sum(sum);
}

// Calls body(position of the neighbour, tap) for the neighbours of p that exist.
template <class Body>
AVSER_INLINE void neighbours(const State& s, int64_t p, const Body& body) {
  const int64_t h = p / s.width, w = p % s.width;
  for (int64_t ky = 0; ky < 3; ++ky) {
    for (int64_t kx = 0; kx < 3; ++kx) {
      const int64_t y = h + ky - 1, x = w + kx - 1;
      if (y >= 0 && y < s.height && x >= 0 && x < s.width) body(y * s.width + x, ky * 3 + kx);
    }
  }
}

void attend_spatially(const TrainedAttention& op, const State& s) {
  for (int64_t p = 0; p < s.positions; ++p) {
    const float* row = s.x + p * s.stride;
    vfloat sum{};
    for (int64_t c = 0; c < s.stride; c += kLanes) sum += load(row + c);
    float most = row[0];
    for (int64_t c = 1; c < s.channels; ++c) most = max_or_nan(most, row[c]);
    s.most[p] = most;
    s.mean[p] = lane_sum(sum) / static_cast<float>(s.channels);
  }
  for (int64_t p = 0; p < s.positions; ++p) {
    float sum = op.spatial[18];
    neighbours(s, p,
               [&](int64_t q, int64_t tap) { sum += s.most[q] * op.spatial[tap] + s.mean[q] * op.spatial[9 + tap]; });
    s.spatial[p] = sigmoid_of(sum);
    const vfloat gate = broadcast(s.spatial[p]);
    for (int64_t c = 0; c < s.stride; c += kLanes) {
      store(s.scaled + p * s.stride + c, load(s.x + p * s.stride + c) * gate);
    }
  }
}

void find_channel_gate(const TrainedAttention& op, const State& s) {
  for (int64_t c = 0; c < s.stride; c += kLanes) {
    vfloat sum{}, most = load(s.scaled + c);
    for (int64_t p = 0; p < s.positions; ++p) {
      const vfloat value = load(s.scaled + p * s.stride + c);
      sum += value;
      most = max_or_nan(most, value);
    }
    store(s.pooled_mean + c, sum / broadcast(static_cast<float>(s.positions)));
    store(s.pooled_most + c, most);
    store(s.work + c, load(op.bias2 + c) + load(op.bias2 + c));
  }
  for (int64_t j = 0; j < s.hidden; ++j) {
    const float* weight1 = op.weight1 + j * s.stride;
    s.hidden_mean[j] = dot(weight1, s.pooled_mean, s.stride) + op.bias1[j];
    s.hidden_most[j] = dot(weight1, s.pooled_most, s.stride) + op.bias1[j];
    const auto rectified = [](float x) { return x > 0.0f || x != x ? x : 0.0f; };
    const vfloat active = broadcast(rectified(s.hidden_mean[j]) + rectified(s.hidden_most[j]));
    for (int64_t c = 0; c < s.stride; c += kLanes) {
      store(s.work + c, fma(active, load(op.weight2 + j * s.stride + c), load(s.work + c)));
    }
  }
  for (int64_t c = 0; c < s.stride; c += kLanes) store(s.gate + c, sigmoid(load(s.work + c)));
}

template <class Element>
void compute(const TrainedAttention& op, const State& s, int64_t i) {
  load_image<Element>(op.x, i, s.stride, s.x);
  if (op.spatial != nullptr) {
    attend_spatially(op, s);
  } else {
    std::memcpy(s.scaled, s.x, s.positions * s.stride * sizeof(float));
  }
  if (op.weight1 != nullptr) find_channel_gate(op, s);
}

template <class Element>
void forward(const TrainedAttention& op, const MapView& y, int64_t i, char* memory) {
  const State s(op, memory);
  compute<Element>(op, s, i);
  if (op.weight1 != nullptr) {
    for (int64_t p = 0; p < s.positions; ++p) {
      for (int64_t c = 0; c < s.stride; c += kLanes) {
        float* at = s.scaled + p * s.stride + c;
        store(at, load(at) * load(s.gate + c));
      }
    }
  }
  store_rows<Element>(s.scaled, y, i, 0, s.positions);
}

// From the gradient of the output in d to that of what went into channel attention.
void channel_backward(const TrainedAttention& op, const State& s, const AttentionSums& sums) {
  const vfloat count = broadcast(static_cast<float>(s.positions)), one = broadcast(1.0f);
  for (int64_t c = 0; c < s.stride; c += kLanes) {
    const vfloat gate = load(s.gate + c);
    vfloat sum{};
    for (int64_t p = 0; p < s.positions; ++p) {
      float* d = s.d + p * s.stride + c;
      sum = fma(load(d), load(s.scaled + p * s.stride + c), sum);
      store(d, load(d) * gate);
    }
    const vfloat dz = sum * gate * (one - gate);
    store(s.work + c, dz);
    store(sums.bias2 + c, load(sums.bias2 + c) + dz + dz);
    store(s.gate + c, vfloat{});  // from here on the gradient of the pooled mean
  }
  float* of_mean = s.gate;
  const vfloat zero{};
  for (int64_t j = 0; j < s.hidden; ++j) {
    const float* weight2 = op.weight2 + j * s.stride;
    const float d = dot(weight2, s.work, s.stride);
    const float mean = s.hidden_mean[j], most = s.hidden_most[j];
    const vfloat active = broadcast((mean > 0.0f ? mean : 0.0f) + (most > 0.0f ? most : 0.0f));
    const float d_mean = mean > 0.0f ? d : 0.0f, d_most = most > 0.0f ? d : 0.0f;
    sums.bias1[j] += d_mean + d_most;
    for (int64_t c = 0; c < s.stride; c += kLanes) {
      float* to = sums.weight2 + j * s.stride + c;
      store(to, fma(active, load(s.work + c), load(to)));
      to = sums.weight1 + j * s.stride + c;
      const vfloat pooled =
          fma(broadcast(d_most), load(s.pooled_most + c), broadcast(d_mean) * load(s.pooled_mean + c));
      store(to, load(to) + pooled);
      store(of_mean + c, fma(broadcast(d_mean), load(op.weight1 + j * s.stride + c), load(of_mean + c)));
    }
    s.hidden_most[j] = d_most;
  }
  for (int64_t c = 0; c < s.stride; c += kLanes) {
    vfloat of_maximum = zero;
    for (int64_t j = 0; j < s.hidden; ++j) {
      of_maximum = fma(broadcast(s.hidden_most[j]), load(op.weight1 + j * s.stride + c), of_maximum);
    }
    const vfloat most = load(s.pooled_most + c), share = load(of_mean + c) / count;
    vfloat equals{};
    for (int64_t p = 0; p < s.positions; ++p) {
      equals += load(s.scaled + p * s.stride + c) == most ? one : zero;
    }
    const vfloat each = of_maximum / equals;  // equal maxima share their gradient, as torch's amax has it
    for (int64_t p = 0; p < s.positions; ++p) {
      float* d = s.d + p * s.stride + c;
      store(d, load(d) + share + (load(s.scaled + p * s.stride + c) == most ? each : zero));
    }
  }
}

// From the gradient of what spatial attention returned in d to that of x.
void spatial_backward(const TrainedAttention& op, const State& s, const AttentionSums& sums) {
  for (int64_t p = 0; p < s.positions; ++p) s.grad_most[p] = s.grad_mean[p] = 0.0f;
  for (int64_t p = 0; p < s.positions; ++p) {
    const float gate = s.spatial[p];
    const float da = dot(s.d + p * s.stride, s.x + p * s.stride, s.stride) * gate * (1.0f - gate);
    sums.spatial[18] += static_cast<double>(da);
    neighbours(s, p, [&](int64_t q, int64_t tap) {
      sums.spatial[tap] += static_cast<double>(da) * static_cast<double>(s.most[q]);
      sums.spatial[9 + tap] += static_cast<double>(da) * static_cast<double>(s.mean[q]);
      s.grad_most[q] += da * op.spatial[tap];
      s.grad_mean[q] += da * op.spatial[9 + tap];
    });
  }
  for (int64_t p = 0; p < s.positions; ++p) {
    const float* x = s.x + p * s.stride;
    float equals = 0.0f;
    for (int64_t c = 0; c < s.channels; ++c) equals += x[c] == s.most[p] ? 1.0f : 0.0f;
    const vfloat gate = broadcast(s.spatial[p]), share = broadcast(s.grad_mean[p] / static_cast<float>(s.channels));
    const vfloat each = broadcast(s.grad_most[p] / equals), most = broadcast(s.most[p]);
    for (int64_t c = 0; c < s.stride; c += kLanes) {
      float* d = s.d + p * s.stride + c;
      store(d, fma(load(d), gate, share) + (load(x + c) == most ? each : vfloat{}));
    }
  }
}

template <class Element>
void backward(const TrainedAttention& op, const MapView& grad, const MapView& dx, int64_t i, const AttentionSums& sums,
              char* memory) {
  const State s(op, memory);
  compute<Element>(op, s, i);
  load_image<Element>(grad, i, s.stride, s.d);
  if (op.weight1 != nullptr) channel_backward(op, s, sums);
  if (op.spatial != nullptr) spatial_backward(op, s, sums);
  store_rows<Element>(s.d, dx, i, 0, s.positions);
}

void forward_any(const TrainedAttention& op, const MapView& y, int64_t i, char* memory) {
  op.x.precision == Precision::bf16 ? forward<uint16_t>(op, y, i, memory) : forward<float>(op, y, i, memory);
}

void backward_any(const TrainedAttention& op, const MapView& grad, const MapView& dx, int64_t i,
                  const AttentionSums& sums, char* memory) {
  op.x.precision == Precision::bf16 ? backward<uint16_t>(op, grad, dx, i, sums, memory)
                                    : backward<float>(op, grad, dx, i, sums, memory);
}

}  // namespace

const AttentionTrainingKernels& attention_training_kernels() {
  static constexpr AttentionTrainingKernels kernels{&scratch, &forward_any, &backward_any};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
