// The network's ops of a training step.  Part of torch_ops.cpp, which alone includes it.
#pragma once

namespace avser {
namespace {

Precision precision_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Precision::float32;
    case ScalarType::BFloat16:
      return Precision::bf16;
    default:
      fail(ErrorKind::input, op, ": x: expected float32 or bfloat16 on the CPU, got dtype number ",
           static_cast<int>(t.scalar_type()), " (the reference runs every float dtype)");
  }
}

void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  AVSER_CHECK(t.scalar_type() == expected, input, op, ": ", name, ": expected dtype number ",
              static_cast<int>(expected), ", got ", static_cast<int>(t.scalar_type()));
}

MapView map_of(const char* op, const Tensor& t) {
  AVSER_CHECK(t.dim() == 4, input, op, ": x: expected (N, C, H, W), got ", t.dim(), " dimension(s)");
  MapView view;
  view.precision = precision_of(op, t);
  view.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  view.n = t.size(0), view.channels = t.size(1), view.height = t.size(2), view.width = t.size(3);
  view.stride_n = t.stride(0), view.stride_c = t.stride(1), view.stride_h = t.stride(2), view.stride_w = t.stride(3);
  if (view.channels == 1) view.stride_c = 1;
  return view;
}

// An empty channels-last map.
Tensor new_map(const Tensor& like, int64_t n, int64_t channels, int64_t height, int64_t width) {
  const Tensor dense = torch::stable::new_empty(like, {n, height, width, channels});
  return torch::stable::transpose(torch::stable::transpose(dense, 1, 3), 2, 3);
}

Tensor none_of(const Tensor& like) { return torch::stable::new_empty(like, {0}); }
Tensor new_floats(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* const_floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// A float32 vector of n values as contiguous memory; its tensor is kept alive beside the pointer.
class Vector {
 public:
  Vector(const char* op, const char* name, const Tensor& t, int64_t n) : tensor_(torch::stable::contiguous(t)) {
    check_dtype(op, name, t, ScalarType::Float);
    AVSER_CHECK(t.numel() == n, input, op, ": ", name, ": expected ", n, " values, got ", t.numel());
  }
  Vector(const char* op, const char* name, const std::optional<Tensor>& t, int64_t n) {
    if (t) *this = Vector(op, name, *t, n);
  }
  const float* data() const { return tensor_ ? const_floats(*tensor_) : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

// Weights in the dtype of the maps.
class Weights {
 public:
  Weights(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t count)
      : tensor_(torch::stable::contiguous(t)) {
    check_dtype(op, name, t, x.scalar_type());
    AVSER_CHECK(t.numel() == count, input, op, ": ", name, ": expected ", count, " values, got ", t.numel());
  }
  const void* data() const { return tensor_.const_data_ptr(); }

 private:
  Tensor tensor_;
};

struct BeforeVectors {
  Vector mean, scale, shift;
  BeforeVectors(const char* op, const std::optional<Tensor>& m, const std::optional<Tensor>& s,
                const std::optional<Tensor>& b, int64_t channels)
      : mean(op, "mean", m, channels), scale(op, "scale", s, channels), shift(op, "shift", b, channels) {
    AVSER_CHECK(
        (mean.data() == nullptr) == (scale.data() == nullptr) && (mean.data() == nullptr) == (shift.data() == nullptr),
        input, op, ": mean, scale, shift: expected all three or none");
  }
};

// What a convolution's backward reads of its output.
struct OfOutput {
  Vector y_mean, grad_mean, grad_var;
  ConvolutionGradients gradients;
  OfOutput(const char* op, const Tensor& grad, const Tensor& mean_grad, const Tensor& var_grad, const Tensor& y,
           const Tensor& mean)
      : y_mean(op, "y_mean", mean, y.size(1)),
        grad_mean(op, "grad_mean", mean_grad, y.size(1)),
        grad_var(op, "grad_var", var_grad, y.size(1)) {
    check_dtype(op, "grad", grad, y.scalar_type());
    gradients = {map_of(op, grad), map_of(op, y), y_mean.data(), grad_mean.data(), grad_var.data()};
  }
};

// ---- separable_conv2d

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Three separable_conv2d_cpu(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise,
                           const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                           const std::optional<Tensor>& shift, bool relu) {
  const char* op = "separable_conv2d";
  const MapView map = map_of(op, x);
  const int64_t out = pointwise.size(0);
  const Weights taps(op, "depthwise", depthwise, x, map.channels * 9);
  const Weights mixing(op, "pointwise", pointwise, x, out * map.channels);
  const BeforeVectors before(op, mean, scale, shift, map.channels);
  Tensor y = new_map(x, map.n, out, map.height, map.width), y_mean = new_floats(x, {out}), y_var = new_floats(x, {out});
  TorchExecutor executor;
  separable_conv2d(
      {map, out, taps.data(), mixing.data(), before.mean.data(), before.scale.data(), before.shift.data(), relu},
      map_of(op, y), floats(y_mean), floats(y_var), executor);
  return {y, y_mean, y_var};
}

Five separable_conv2d_backward_cpu(const Tensor& grad, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& y,
                                   const Tensor& y_mean, const Tensor& x, const Tensor& depthwise,
                                   const Tensor& pointwise, const std::optional<Tensor>& mean,
                                   const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool relu,
                                   bool need_input, bool need_weights) {
  const char* op = "separable_conv2d_backward";
  const MapView map = map_of(op, x);
  const int64_t out = pointwise.size(0);
  const Weights taps(op, "depthwise", depthwise, x, map.channels * 9);
  const Weights mixing(op, "pointwise", pointwise, x, out * map.channels);
  const BeforeVectors before(op, mean, scale, shift, map.channels);
  const OfOutput of(op, grad, grad_mean, grad_var, y, y_mean);
  const bool norm = need_input && before.mean.data() != nullptr;
  Tensor dx = need_input ? new_map(x, map.n, map.channels, map.height, map.width) : none_of(x);
  Tensor ddepthwise = need_weights ? torch::stable::new_empty(depthwise, sizes_of(depthwise)) : none_of(x);
  Tensor dpointwise = need_weights ? torch::stable::new_empty(pointwise, sizes_of(pointwise)) : none_of(x);
  Tensor dscale = new_floats(x, {norm ? map.channels : 0}), dshift = new_floats(x, {norm ? map.channels : 0});
  SeparableResults results{};
  if (need_input) results.dx = map_of(op, dx);
  if (need_weights)
    results.depthwise = ddepthwise.mutable_data_ptr(), results.pointwise = dpointwise.mutable_data_ptr();
  if (norm) results.scale = floats(dscale), results.shift = floats(dshift);
  TorchExecutor executor;
  separable_conv2d_backward(
      {map, out, taps.data(), mixing.data(), before.mean.data(), before.scale.data(), before.shift.data(), relu},
      of.gradients, results, executor);
  return {dx, ddepthwise, dpointwise, dscale, dshift};
}

// ---- strided_conv2d

int64_t kernel_of(const char* op, const Tensor& weight) {
  const int64_t kernel = weight.dim() == 4 ? weight.size(3) : 0;
  AVSER_CHECK(kernel == 1 || kernel == 3, input, op, ": weight: expected a kernel of 3x3 or 1x1");
  return kernel;
}

Three strided_conv2d_cpu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, bool relu) {
  const char* op = "strided_conv2d";
  const MapView map = map_of(op, x);
  const int64_t kernel = kernel_of(op, weight), out = weight.size(0);
  const Weights windows(op, "weight", weight, x, out * map.channels * kernel * kernel);
  std::optional<Weights> added;
  if (bias) added.emplace(op, "bias", *bias, x, out);
  const BeforeVectors before(op, mean, scale, shift, map.channels);
  Tensor y = new_map(x, map.n, out, halved(map.height), halved(map.width));
  Tensor y_mean = new_floats(x, {out}), y_var = new_floats(x, {out});
  TorchExecutor executor;
  strided_conv2d({map, out, kernel, windows.data(), added ? added->data() : nullptr, before.mean.data(),
                  before.scale.data(), before.shift.data(), relu},
                 map_of(op, y), floats(y_mean), floats(y_var), executor);
  return {y, y_mean, y_var};
}

Five strided_conv2d_backward_cpu(const Tensor& grad, const Tensor& grad_mean, const Tensor& grad_var, const Tensor& y,
                                 const Tensor& y_mean, const Tensor& x, const Tensor& weight,
                                 const std::optional<Tensor>& mean, const std::optional<Tensor>& scale,
                                 const std::optional<Tensor>& shift, bool relu, bool need_input, bool need_weights) {
  const char* op = "strided_conv2d_backward";
  const MapView map = map_of(op, x);
  const int64_t kernel = kernel_of(op, weight), out = weight.size(0);
  const Weights windows(op, "weight", weight, x, out * map.channels * kernel * kernel);
  const BeforeVectors before(op, mean, scale, shift, map.channels);
  const OfOutput of(op, grad, grad_mean, grad_var, y, y_mean);
  const bool norm = need_input && before.mean.data() != nullptr;
  Tensor dx = need_input ? new_map(x, map.n, map.channels, map.height, map.width) : none_of(x);
  Tensor dweight = need_weights ? torch::stable::new_empty(weight, sizes_of(weight)) : none_of(x);
  Tensor dbias = need_weights ? torch::stable::new_empty(weight, {out}) : none_of(x);
  Tensor dscale = new_floats(x, {norm ? map.channels : 0}), dshift = new_floats(x, {norm ? map.channels : 0});
  StridedResults results{};
  if (need_input) results.dx = map_of(op, dx);
  if (need_weights) results.weight = dweight.mutable_data_ptr(), results.bias = dbias.mutable_data_ptr();
  if (norm) results.scale = floats(dscale), results.shift = floats(dshift);
  TorchExecutor executor;
  strided_conv2d_backward(
      {map, out, kernel, windows.data(), nullptr, before.mean.data(), before.scale.data(), before.shift.data(), relu},
      of.gradients, results, executor);
  return {dx, dweight, dbias, dscale, dshift};
}

// ---- pool_shortcut

int64_t seed_of(const char* op, const Tensor& seed) {
  check_dtype(op, "seed", seed, ScalarType::Long);
  AVSER_CHECK(seed.numel() == 1, input, op, ": seed: expected one number, got ", seed.numel());
  return *static_cast<const int64_t*>(seed.const_data_ptr());
}

struct Paths {
  Vector mean, scale, shift, shortcut_mean, shortcut_scale, shortcut_shift;
  PoolShortcutArguments arguments;
  Paths(const char* op, const Tensor& x, const Tensor& m, const Tensor& s, const Tensor& b, const Tensor& shortcut,
        const Tensor& sm, const Tensor& ss, const Tensor& sb, double dropout, const Tensor& seed)
      : mean(op, "mean", m, x.size(1)),
        scale(op, "scale", s, x.size(1)),
        shift(op, "shift", b, x.size(1)),
        shortcut_mean(op, "shortcut_mean", sm, x.size(1)),
        shortcut_scale(op, "shortcut_scale", ss, x.size(1)),
        shortcut_shift(op, "shortcut_shift", sb, x.size(1)) {
    check_dtype(op, "shortcut", shortcut, x.scalar_type());
    const MapView map = map_of(op, x), other = map_of(op, shortcut);
    AVSER_CHECK(other.n == map.n && other.channels == map.channels && other.height == halved(map.height) &&
                    other.width == halved(map.width),
                input, op, ": shortcut: expected half the size of x, rounded up");
    arguments = {map,
                 mean.data(),
                 scale.data(),
                 shift.data(),
                 other,
                 shortcut_mean.data(),
                 shortcut_scale.data(),
                 shortcut_shift.data(),
                 dropout_of(dropout, seed_of(op, seed), 0)};
  }
};

Tensor pool_shortcut_cpu(const Tensor& x, const Tensor& mean, const Tensor& scale, const Tensor& shift,
                         const Tensor& shortcut, const Tensor& shortcut_mean, const Tensor& shortcut_scale,
                         const Tensor& shortcut_shift, double dropout, const Tensor& seed) {
  const char* op = "pool_shortcut";
  const Paths paths(op, x, mean, scale, shift, shortcut, shortcut_mean, shortcut_scale, shortcut_shift, dropout, seed);
  const MapView& like = paths.arguments.shortcut;
  Tensor y = new_map(x, like.n, like.channels, like.height, like.width);
  TorchExecutor executor;
  pool_shortcut(paths.arguments, map_of(op, y), executor);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pool_shortcut_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& scale, const Tensor& shift,
    const Tensor& shortcut, const Tensor& shortcut_mean, const Tensor& shortcut_scale, const Tensor& shortcut_shift,
    double dropout, const Tensor& seed) {
  const char* op = "pool_shortcut_backward";
  const Paths paths(op, x, mean, scale, shift, shortcut, shortcut_mean, shortcut_scale, shortcut_shift, dropout, seed);
  check_dtype(op, "grad", grad, x.scalar_type());
  const MapView &map = paths.arguments.x, &other = paths.arguments.shortcut;
  Tensor dx = new_map(x, map.n, map.channels, map.height, map.width);
  Tensor dshortcut = new_map(x, other.n, other.channels, other.height, other.width);
  Tensor vectors[4];
  for (Tensor& vector : vectors) vector = new_floats(x, {map.channels});
  TorchExecutor executor;
  pool_shortcut_backward(paths.arguments, map_of(op, grad),
                         {map_of(op, dx), floats(vectors[0]), floats(vectors[1]), map_of(op, dshortcut),
                          floats(vectors[2]), floats(vectors[3])},
                         executor);
  return {dx, vectors[0], vectors[1], dshortcut, vectors[2], vectors[3]};
}

// ---- cs_attention

using Six = std::array<std::optional<Tensor>, 6>;

// Contiguous copies of the six tensors, and the arguments that point to them.
struct AttentionTensors {
  Six tensors;
  AttentionArguments arguments;
  AttentionTensors(const char* op, const Tensor& x, Six given) : tensors(std::move(given)) {
    const int64_t channels = x.size(1);
    const int64_t hidden = tensors[2] ? tensors[2]->size(0) : 0;
    const int64_t counts[6] = {18, 1, hidden * channels, hidden, hidden * channels, channels};
    const void* data[6] = {};
    for (int i = 0; i < 6; ++i) {
      AVSER_CHECK(tensors[i].has_value() == tensors[i < 2 ? 0 : 2].has_value(), input, op,
                  ": expected the tensors of a kind of attention together");
      if (!tensors[i]) continue;
      check_dtype(op, "weights", *tensors[i], x.scalar_type());
      AVSER_CHECK(tensors[i]->numel() == counts[i], input, op, ": weights: expected ", counts[i], " values, got ",
                  tensors[i]->numel());
      tensors[i] = torch::stable::contiguous(*tensors[i]);
      data[i] = tensors[i]->const_data_ptr();
    }
    arguments = {map_of(op, x), data[0], data[1], data[2], data[3], data[4], data[5], hidden};
  }
};

Tensor cs_attention_cpu(const Tensor& x, const std::optional<Tensor>& spatial_weight,
                        const std::optional<Tensor>& spatial_bias, const std::optional<Tensor>& channel_weight1,
                        const std::optional<Tensor>& channel_bias1, const std::optional<Tensor>& channel_weight2,
                        const std::optional<Tensor>& channel_bias2) {
  const char* op = "cs_attention";
  const AttentionTensors given(
      op, x, {spatial_weight, spatial_bias, channel_weight1, channel_bias1, channel_weight2, channel_bias2});
  Tensor y = new_map(x, x.size(0), x.size(1), x.size(2), x.size(3));
  TorchExecutor executor;
  trained_attention(given.arguments, map_of(op, y), executor);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cs_attention_backward_cpu(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& spatial_weight,
    const std::optional<Tensor>& spatial_bias, const std::optional<Tensor>& channel_weight1,
    const std::optional<Tensor>& channel_bias1, const std::optional<Tensor>& channel_weight2,
    const std::optional<Tensor>& channel_bias2) {
  const char* op = "cs_attention_backward";
  const AttentionTensors given(
      op, x, {spatial_weight, spatial_bias, channel_weight1, channel_bias1, channel_weight2, channel_bias2});
  check_dtype(op, "grad", grad, x.scalar_type());
  Tensor dx = new_map(x, x.size(0), x.size(1), x.size(2), x.size(3));
  Tensor of[6];
  void* data[6] = {};
  for (int i = 0; i < 6; ++i) {
    of[i] = given.tensors[i] ? torch::stable::new_empty(x, sizes_of(*given.tensors[i])) : none_of(x);
    data[i] = of[i].mutable_data_ptr();
  }
  TorchExecutor executor;
  trained_attention_backward(given.arguments, map_of(op, grad),
                             {map_of(op, dx), data[0], data[1], data[2], data[3], data[4], data[5]}, executor);
  return {dx, of[0], of[1], of[2], of[3], of[4], of[5]};
}

// ---- temporal_attention

// Contiguous copies of a layer's tensors, and the arguments that point to them.
struct LayerTensors {
  Tensor x, weights[8];
  std::optional<Vector> norms[4];
  LayerArguments arguments{};
  LayerTensors(const char* op, const Tensor& given, const std::array<Tensor, 12>& tensors, int64_t heads,
               double dropout, const Tensor& seed, double eps)
      : x(torch::stable::contiguous(given)) {
    AVSER_CHECK(given.dim() == 3, input, op, ": x: expected (N, tokens, D), got ", given.dim(), " dimension(s)");
    LayerArguments& a = arguments;
    a.precision = precision_of(op, given);
    a.clips = given.size(0), a.tokens = given.size(1), a.width = given.size(2);
    a.hidden = tensors[4].size(0), a.heads = heads;
    AVSER_CHECK(heads >= 1 && a.width % heads == 0, config, op, ": heads: expected a divisor of the width ", a.width,
                ", got ", heads);
    const int64_t counts[8] = {3 * a.width * a.width, 3 * a.width, a.width * a.width,  a.width,
                               a.hidden * a.width,    a.hidden,    a.width * a.hidden, a.width};
    for (int i = 0; i < 8; ++i) {
      check_dtype(op, "weights", tensors[i], given.scalar_type());
      AVSER_CHECK(tensors[i].numel() == counts[i], input, op, ": weights: expected ", counts[i], " values, got ",
                  tensors[i].numel());
      weights[i] = torch::stable::contiguous(tensors[i]);
    }
    for (int i = 0; i < 4; ++i) norms[i].emplace(op, "norm", tensors[8 + i], a.width);
    a.x = x.const_data_ptr();
    const auto data = [&](int i) { return weights[i].const_data_ptr(); };
    a.in_weight = data(0), a.in_bias = data(1), a.out_weight = data(2), a.out_bias = data(3);
    a.ff1_weight = data(4), a.ff1_bias = data(5), a.ff2_weight = data(6), a.ff2_bias = data(7);
    a.norm1_weight = norms[0]->data(), a.norm1_bias = norms[1]->data();
    a.norm2_weight = norms[2]->data(), a.norm2_bias = norms[3]->data();
    a.dropout = dropout_of(dropout, seed_of(op, seed), 0);
    a.eps = static_cast<float>(eps);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> temporal_attention_cpu(
    const Tensor& x, const Tensor& in_weight, const Tensor& in_bias, const Tensor& out_weight, const Tensor& out_bias,
    const Tensor& ff1_weight, const Tensor& ff1_bias, const Tensor& ff2_weight, const Tensor& ff2_bias,
    const Tensor& norm1_weight, const Tensor& norm1_bias, const Tensor& norm2_weight, const Tensor& norm2_bias,
    int64_t heads, double dropout, const Tensor& seed, double eps) {
  const LayerTensors given("temporal_attention", x,
                           {in_weight, in_bias, out_weight, out_bias, ff1_weight, ff1_bias, ff2_weight, ff2_bias,
                            norm1_weight, norm1_bias, norm2_weight, norm2_bias},
                           heads, dropout, seed, eps);
  const LayerArguments& a = given.arguments;
  const auto rows = [&](int64_t columns) { return torch::stable::new_empty(x, {a.clips, a.tokens, columns}); };
  Tensor y = rows(a.width), qkv = rows(3 * a.width), mixed = rows(a.width), sum1 = rows(a.width);
  Tensor hidden = rows(a.hidden), sum2 = rows(a.width);
  TorchExecutor executor;
  trained_layer(a,
                {y.mutable_data_ptr(), qkv.mutable_data_ptr(), mixed.mutable_data_ptr(), sum1.mutable_data_ptr(),
                 hidden.mutable_data_ptr(), sum2.mutable_data_ptr()},
                executor);
  return {y, qkv, mixed, sum1, hidden, sum2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
temporal_attention_backward_cpu(const Tensor& grad, const Tensor& x, const Tensor& qkv, const Tensor& mixed,
                                const Tensor& sum1, const Tensor& hidden, const Tensor& sum2, const Tensor& in_weight,
                                const Tensor& in_bias, const Tensor& out_weight, const Tensor& out_bias,
                                const Tensor& ff1_weight, const Tensor& ff1_bias, const Tensor& ff2_weight,
                                const Tensor& ff2_bias, const Tensor& norm1_weight, const Tensor& norm1_bias,
                                const Tensor& norm2_weight, const Tensor& norm2_bias, int64_t heads, double dropout,
                                const Tensor& seed, double eps, bool need_weights) {
  const char* op = "temporal_attention_backward";
  const std::array<Tensor, 12> tensors = {in_weight,  in_bias,  out_weight,   out_bias,   ff1_weight,   ff1_bias,
                                          ff2_weight, ff2_bias, norm1_weight, norm1_bias, norm2_weight, norm2_bias};
  const LayerTensors given(op, x, tensors, heads, dropout, seed, eps);
  const Tensor* const sources[6] = {&grad, &qkv, &mixed, &sum1, &hidden, &sum2};
  Tensor saved[6];
  const void* data[6];
  for (int i = 0; i < 6; ++i) {
    check_dtype(op, "grad", *sources[i], x.scalar_type());
    saved[i] = torch::stable::contiguous(*sources[i]);
    data[i] = saved[i].const_data_ptr();
  }
  Tensor dx = torch::stable::new_empty(x, sizes_of(x));
  Tensor of[12];
  void* to[12] = {};
  for (int i = 0; i < 12; ++i) {
    of[i] = need_weights ? torch::stable::new_empty(tensors[i], sizes_of(tensors[i])) : none_of(tensors[i]);
    if (need_weights) to[i] = of[i].mutable_data_ptr();
  }
  TorchExecutor executor;
  const auto norm = [&](int i) { return static_cast<float*>(to[i]); };
  trained_layer_backward(given.arguments, {data[0], data[1], data[2], data[3], data[4], data[5]},
                         {dx.mutable_data_ptr(), to[0], to[1], to[2], to[3], to[4], to[5], to[6], to[7], norm(8),
                          norm(9), norm(10), norm(11)},
                         executor);
  return {dx, of[0], of[1], of[2], of[3], of[4], of[5], of[6], of[7], of[8], of[9], of[10], of[11]};
}

// ---- emotion_head, clip_cross_entropy

HeadArguments head_arguments(const char* op, const Tensor& tokens, const Tensor& weight, const std::string& pooling,
                             int64_t statistics) {
  AVSER_CHECK(tokens.dim() == 3, input, op, ": tokens: expected (N, tokens, D), got ", tokens.dim(), " dimension(s)");
  AVSER_CHECK(pooling == "mean" || pooling == "mean_std", config, op, ": pooling: expected mean or mean_std, got '",
              pooling, "'");
  HeadArguments a{};
  a.precision = precision_of(op, tokens);
  a.n = tokens.size(0), a.tokens = tokens.size(1), a.width = tokens.size(2);
  a.statistics = statistics;
  a.classes = weight.size(0);
  a.deviations = pooling == "mean_std";
  AVSER_CHECK(weight.size(1) == a.features(), input, op, ": weight: expected ", a.features(), " columns, got ",
              weight.size(1));
  return a;
}

std::tuple<Tensor, Tensor> emotion_head_cpu(const Tensor& tokens, const Tensor& weight, const Tensor& bias,
                                            const std::string& pooling, const std::optional<Tensor>& statistics) {
  const char* op = "emotion_head";
  HeadArguments a = head_arguments(op, tokens, weight, pooling, statistics ? statistics->size(1) : 0);
  const Weights values(op, "tokens", tokens, tokens, a.n * a.tokens * a.width);
  const Weights mixing(op, "weight", weight, tokens, a.classes * a.features());
  const Weights added(op, "bias", bias, tokens, a.classes);
  std::optional<Weights> beside;
  if (statistics) beside.emplace(op, "statistics", *statistics, tokens, a.n * a.statistics);
  a.values = values.data(), a.weight = mixing.data(), a.bias = added.data();
  a.of_statistics = beside ? beside->data() : nullptr;
  Tensor features = torch::stable::new_empty(tokens, {a.n, a.features()});
  Tensor logits = torch::stable::new_empty(tokens, {a.n, a.classes});
  TorchExecutor executor;
  trained_head(a, features.mutable_data_ptr(), logits.mutable_data_ptr(), executor);
  return {features, logits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> emotion_head_backward_cpu(const Tensor& grad_features,
                                                                     const Tensor& grad_logits, const Tensor& tokens,
                                                                     const Tensor& features, const Tensor& weight,
                                                                     const std::string& pooling) {
  const char* op = "emotion_head_backward";
  const int64_t pooled = tokens.size(2) * (pooling == "mean_std" ? 2 : 1);
  HeadArguments a = head_arguments(op, tokens, weight, pooling, weight.size(1) - pooled);
  const Weights values(op, "tokens", tokens, tokens, a.n * a.tokens * a.width);
  const Weights mixing(op, "weight", weight, tokens, a.classes * a.features());
  const Weights of_features(op, "grad_features", grad_features, tokens, a.n * a.features());
  const Weights of_logits(op, "grad_logits", grad_logits, tokens, a.n * a.classes);
  const Weights saved(op, "features", features, tokens, a.n * a.features());
  a.values = values.data(), a.weight = mixing.data();
  Tensor dtokens = torch::stable::new_empty(tokens, sizes_of(tokens));
  Tensor dweight = torch::stable::new_empty(weight, sizes_of(weight));
  Tensor dbias = torch::stable::new_empty(tokens, {a.classes});
  Tensor dstatistics = torch::stable::new_empty(tokens, {a.n, a.statistics});
  TorchExecutor executor;
  trained_head_backward(a,
                        {of_features.data(), of_logits.data(), saved.data(), dtokens.mutable_data_ptr(),
                         dweight.mutable_data_ptr(), dbias.mutable_data_ptr(), dstatistics.mutable_data_ptr()},
                        executor);
  return {dtokens, dweight, dbias, dstatistics};
}

// Contiguous copies, and the arguments that point to them.
struct LossTensors {
  Tensor clip_logits, targets;
  std::optional<Tensor> votes;
  LossArguments arguments;
  LossTensors(const char* op, const Tensor& logits, const Tensor& of, const std::optional<Tensor>& valid)
      : clip_logits(torch::stable::contiguous(logits)), targets(torch::stable::contiguous(of)) {
    AVSER_CHECK(logits.dim() == 3, input, op, ": clip_logits: expected (B, L, K), got ", logits.dim(), " dimension(s)");
    check_dtype(op, "clip_logits", logits, ScalarType::Float);
    check_dtype(op, "targets", of, ScalarType::Float);
    AVSER_CHECK(of.numel() == logits.size(0) * logits.size(2), input, op, ": targets: expected (B, K)");
    if (valid) {
      check_dtype(op, "valid", *valid, ScalarType::Bool);
      AVSER_CHECK(valid->numel() == logits.size(0) * logits.size(1), input, op, ": valid: expected (B, L)");
      votes = torch::stable::contiguous(*valid);
    }
    arguments = {logits.size(0),        logits.size(1),
                 logits.size(2),        const_floats(clip_logits),
                 const_floats(targets), votes ? static_cast<const bool*>(votes->const_data_ptr()) : nullptr};
  }
};

Tensor clip_cross_entropy_cpu(const Tensor& clip_logits, const Tensor& targets, const std::optional<Tensor>& valid) {
  const LossTensors given("clip_cross_entropy", clip_logits, targets, valid);
  Tensor loss = new_floats(clip_logits, {});
  *floats(loss) = static_cast<float>(clip_cross_entropy(given.arguments, 0.0, nullptr));
  return loss;
}

Tensor clip_cross_entropy_backward_cpu(const Tensor& grad, const Tensor& clip_logits, const Tensor& targets,
                                       const std::optional<Tensor>& valid) {
  const LossTensors given("clip_cross_entropy_backward", clip_logits, targets, valid);
  const Vector factor("clip_cross_entropy_backward", "grad", grad, 1);
  Tensor gradient = torch::stable::new_empty(clip_logits, sizes_of(clip_logits));
  clip_cross_entropy(given.arguments, *factor.data(), floats(gradient));
  return gradient;
}

}  // namespace
}  // namespace avser
