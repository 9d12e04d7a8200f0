#include "engine/resnet18.h"

#include <algorithm>

#include "common/check.h"
#include "common/executor.h"

namespace avser {
namespace {

constexpr int64_t kWidths[] = {64, 128, 256, 512};
// Clips that go through the layers together.
constexpr int64_t kGroup = 8;
// Positions whose products share a panel of weights while it is close.
constexpr int64_t kPositions = 336;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kSlack = 64;
// Of a band of tiles: few enough that their values and sums stay in L2, enough that weights are not read too often.
constexpr int64_t kBandFloats = 128 * 1024;
constexpr int64_t kLeastTiles = 42;  // three whole register tiles

int64_t band_tiles(const WinogradLayer& layer) {
  return std::max(kLeastTiles, kBandFloats / (kWinogradTerms * (layer.in_channels + layer.out_channels)));
}
// Their values and sums.
int64_t band_floats(const WinogradLayer& layer) {
  return band_tiles(layer) * kWinogradTerms * (layer.in_channels + layer.out_channels);
}

Precision checked(Precision precision) {
  AVSER_CHECK(precision != Precision::int8, config,
              "ResNet18: precision: expected float32 or bf16, which this encoder has, got int8");
  return precision;
}

}  // namespace

ResNet18::ResNet18(int64_t in_channels, int64_t classes, const Tensors& tensors, Precision precision, bool poison)
    : in_channels_(in_channels),
      classes_(classes),
      precision_(checked(precision)),
      isa_(current_isa()),
      kernels_(AVSER_PICK_FOR(isa_, conv_stem_kernels)),
      winograd_(AVSER_PICK_FOR(isa_, winograd_kernels)),
      emotion_head_(AVSER_PICK_FOR(isa_, emotion_head_kernels)),
      workspaces_(poison) {
  AVSER_CHECK(in_channels >= 1, config, "ResNet18: in_channels: expected at least 1, got ", in_channels);
  AVSER_CHECK(classes >= 1, config, "ResNet18: classes: expected at least 1, got ", classes);
  const int64_t lanes = float_lanes(isa_);
  Packer packer("ResNet18", tensors, lanes, memory_);
  const auto conv = [&](const std::string& name, const std::string& norm, int64_t kernel, int64_t stride, int64_t in,
                        int64_t in_stride, int64_t out, bool relu, Precision precision) {
    Matrix matrix = packer.linear(name, out, in, {kernel, kernel}, false);
    packer.fold(norm, matrix);
    Layer layer{};
    layer.filtered = kernel == 3 && stride == 1 && precision == Precision::float32;
    if (layer.filtered) {
      layer.winograd = packer.winograd(matrix, relu);
    } else {
      const Packing windows = Packer::windows(precision, kernel, in, in_stride);
      layer.conv = {kernel, stride, in, out, relu, packer.pack(matrix, windows)};
    }
    return layer;
  };
  // The input stays float32 and unpadded, as in the stem of an MDSCM.
  stem_ = conv("body.conv", "body.norm", 7, 2, in_channels, in_channels, 64, true, Precision::float32);
  int64_t in = 64;
  for (size_t stage = 0; stage < 4; ++stage) {
    const int64_t out = kWidths[stage];
    for (int i = 0; i < 2; ++i) {
      const std::string name = cat("body.blocks.", 2 * stage + i, ".");
      const int64_t stride = stage > 0 && i == 0 ? 2 : 1, padded = round_up(in, lanes);
      Block block{};
      block.projected = stride != 1 || in != out;
      block.conv1 = conv(name + "conv1", name + "norm1", 3, stride, in, padded, out, true, precision_);
      block.conv2 = conv(name + "conv2", name + "norm2", 3, 1, out, round_up(out, lanes), out, true, precision_);
      if (block.projected) {
        block.downsample =
            conv(name + "downsample", name + "downsample_norm", 1, stride, in, padded, out, false, precision_);
      }
      blocks_.push_back(block);
      in = out;
    }
  }
  head_ = {kFeatures, 1, false, 0, packer.pack(packer.linear("head", classes, kFeatures), {Precision::float32})};
  packer.ignore("domain.");
  packer.finish();
}

// Areas of a group: the input, two for a layer's input and output, two for what a block keeps meanwhile.
struct ResNet18::Maps {
  int64_t area_bytes = 0;  // of one clip

  static Map map(int64_t height, int64_t width, int64_t channels, int64_t border, Precision precision) {
    return {nullptr, height, width, channels, border, precision};
  }
  void fit(const Map& map) { area_bytes = std::max(area_bytes, round_up(map.bytes() + kSlack, kCacheLine)); }

  Maps(const ResNet18& net, int64_t height, int64_t width) {
    fit(map(height, width, net.in_channels_, 3, Precision::float32));
    height = halved(height);
    width = halved(width);
    fit(map(height, width, 64, 1, net.precision_));
    for (int64_t channels : kWidths) {
      height = halved(height);
      width = halved(width);
      fit(map(height, width, channels, 1, net.precision_));
    }
    fit(map(height, width, kFeatures, 0, Precision::float32));
  }
};

void ResNet18::filter(const WinogradLayer& layer, const std::vector<Map>& x, const std::vector<Map>* add,
                      const std::vector<Map>& y, float* scratch, Executor& executor) const {
  const int64_t all = static_cast<int64_t>(x.size()) * winograd_tiles(y[0]), band = band_tiles(layer);
  const int64_t bands = (all + band - 1) / band, tiles = (all + bands - 1) / bands;
  const int64_t pieces = kWinogradTerms * gemm_panels(layer.out_channels, float_lanes(isa_));
  const Map* added = add == nullptr ? nullptr : add->data();
  const auto v_of = [&](int64_t worker) { return scratch + worker * band_floats(layer); };
  const auto m_of = [&](float* v) { return v + kWinogradTerms * band * layer.in_channels; };
  if (bands >= 2 * executor.threads()) {  // each worker with bands of its own
    executor.parallel_for(bands, 1, [&](int64_t begin, int64_t end, int worker) {
      float* const v = v_of(worker);
      for (int64_t first = begin * tiles; first < std::min(all, end * tiles); first += tiles) {
        const int64_t last = std::min(all, first + tiles), count = last - first;
        winograd_.transform(x.data(), first, last, first, count, v);
        winograd_.multiply(layer, 0, pieces, count, v, m_of(v));
        winograd_.finish(layer, first, last, first, count, m_of(v), added, y.data());
      }
    });
    return;
  }
  float* const v = v_of(0);
  for (int64_t first = 0; first < all; first += tiles) {
    const int64_t last = std::min(all, first + tiles), count = last - first;
    executor.parallel_for(count, 4, [&](int64_t begin, int64_t end, int) {
      winograd_.transform(x.data(), first + begin, first + end, first, count, v);
    });
    executor.parallel_for(
        pieces, 1, [&](int64_t begin, int64_t end, int) { winograd_.multiply(layer, begin, end, count, v, m_of(v)); });
    executor.parallel_for(count, 4, [&](int64_t begin, int64_t end, int) {
      winograd_.finish(layer, first + begin, first + end, first, count, m_of(v), added, y.data());
    });
  }
}

void ResNet18::convolve(const Layer& either, const std::vector<Map>& x, const std::vector<Map>* add,
                        const std::vector<Map>& y, float* scratch, Executor& executor) const {
  if (either.filtered) return filter(either.winograd, x, add, y, scratch, executor);
  const ConvLayer& layer = either.conv;
  // Pieces are a band of rows and a panel of weights; neighbours share the band.
  const int64_t panels = gemm_panels(layer.out_channels, float_lanes(isa_));
  const int64_t rows = static_cast<int64_t>(y.size()) * y[0].height;
  const int64_t most = std::max<int64_t>(1, kPositions / y[0].width);
  const int64_t bands = (rows + most - 1) / most, band = (rows + bands - 1) / bands;
  executor.parallel_for(bands * panels, 1, [&](int64_t begin, int64_t end, int) {
    while (begin < end) {
      const int64_t row = begin / panels * band, panel = begin % panels;
      const int64_t panel_end = std::min(panels, panel + end - begin);
      if (row < rows) {
        kernels_.run(layer, x.data(), add == nullptr ? nullptr : add->data(), y.data(), row, std::min(rows, row + band),
                     panel, panel_end);
      }
      begin += panel_end - panel;
    }
  });
}

void ResNet18::run_group(const float* clips, int64_t count, int64_t height, int64_t width, float* features,
                         float* logits, char* workspace, Executor& executor) const {
  const Maps maps(*this, height, width);
  const int64_t clip_floats = in_channels_ * height * width;
  const auto place = [&](int area, int64_t h, int64_t w, int64_t channels, int64_t border, Precision precision) {
    std::vector<Map> placed(count, Maps::map(h, w, channels, border, precision));
    for (int64_t i = 0; i < count; ++i) placed[i].data = workspace + (area * count + i) * maps.area_bytes;
    return placed;
  };

  float* const scratch = reinterpret_cast<float*>(workspace + 4 * count * maps.area_bytes);
  std::vector<Map> x = place(0, height, width, in_channels_, 3, Precision::float32);
  executor.parallel_for(count * height, height, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin / height; i < end / height; ++i) {
      kernels_.load(clips + i * clip_floats, in_channels_, x[i], 0, height);
    }
  });
  int64_t h = halved(height), w = halved(width);
  std::vector<Map> y = place(1, h, w, 64, 1, precision_);
  convolve(stem_, x, nullptr, y, scratch, executor);
  h = halved(h);
  w = halved(w);
  x = place(0, h, w, 64, 1, precision_);
  executor.parallel_for(count * h, h,
                        [&](int64_t begin, int64_t end, int) { kernels_.pool(y.data(), x.data(), begin, end); });

  int at = 0;  // the area of x
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const Block& block = blocks_[i];
    const int64_t channels = kWidths[i / 2];
    if (block.projected) {
      h = halved(h);
      w = halved(w);
    }
    const bool last = i + 1 == blocks_.size();
    std::vector<Map> hidden = place((at + 1) % 4, h, w, channels, 1, precision_);
    convolve(block.conv1, x, nullptr, hidden, scratch, executor);
    std::vector<Map> shortcut = x;
    if (block.projected) {
      shortcut = place((at + 2) % 4, h, w, channels, 1, precision_);
      convolve(block.downsample, x, nullptr, shortcut, scratch, executor);
    }
    at = (at + 3) % 4;
    x = last ? place(at, h, w, channels, 0, Precision::float32) : place(at, h, w, channels, 1, precision_);
    convolve(block.conv2, hidden, &shortcut, x, scratch, executor);
  }
  for (int64_t i = 0; i < count; ++i) {
    emotion_head_.classify(head_, reinterpret_cast<const float*>(x[i].data), h * w, nullptr, features + i * kFeatures,
                           logits + i * classes_, scratch);
  }
}

void ResNet18::forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance,
                       int64_t height, int64_t width, float* probabilities, float* features, float* logits,
                       Executor& executor) const {
  const int64_t total = batch * clips_per_utterance, clip_floats = in_channels_ * height * width;
  if (total > 0) {
    const int64_t largest = std::min(total, kGroup);
    int64_t floats = emotion_head_.scratch(head_);
    for (const Block& block : blocks_) {
      for (const Layer* layer : {&block.conv1, &block.conv2}) {
        if (layer->filtered) floats = std::max(floats, executor.threads() * band_floats(layer->winograd));
      }
    }
    const int64_t scratch = round_up(floats * static_cast<int64_t>(sizeof(float)), kCacheLine);
    const Workspaces::Lease lease(workspaces_, 4 * largest * Maps(*this, height, width).area_bytes + scratch + kSlack);
    for (int64_t i = 0; i < total; i += kGroup) {
      run_group(clips + i * clip_floats, std::min(kGroup, total - i), height, width, features + i * kFeatures,
                logits + i * classes_, lease.data(), executor);
    }
  }
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t first = i * clips_per_utterance;
    average_clips(logits + first * classes_, valid == nullptr ? nullptr : valid + first, clips_per_utterance, classes_,
                  probabilities + i * classes_);
  }
}

}  // namespace avser
