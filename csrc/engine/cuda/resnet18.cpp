#include "engine/cuda/resnet18.h"

#include <algorithm>
#include <string>

#include "common/check.h"
#include "engine/cuda/weights.h"

namespace avser::gpu {
namespace {

constexpr int kWidths[] = {64, 128, 256, 512};
constexpr int64_t kFeatures = 512;
constexpr int kMostGroup = 8;

const GpuOptions& checked(const GpuOptions& options) {
  AVSER_CHECK(options.precision != GpuPrecision::fp8, config,
              "ResNet18: precision: expected float32, tf32, bf16 or fp16, which this encoder has on a GPU, got fp8");
  return options;
}

int halved(int size) { return (size + 1) / 2; }

}  // namespace

GpuResNet18::GpuResNet18(int64_t in_channels, int64_t height, int64_t width, int64_t classes, const Tensors& tensors,
                         const GpuOptions& options)
    : GpuModel(checked(options), {in_channels, height, width}, kFeatures, classes) {
  for (const auto& [name, value] :
       {std::pair{"in_channels", in_channels}, {"height", height}, {"width", width}, {"classes", classes}}) {
    AVSER_CHECK(value >= 1, config, "ResNet18: ", name, ": expected at least 1, got ", value);
  }
  const OnDevice guard(options_.device);
  const Format format = format_of(options_.precision);
  const int element = element_bytes(format);
  std::vector<Buffer> unused;
  Packer packer("ResNet18", tensors, 8, unused);
  GpuUploader upload(weights_);

  // A block's input, what its first convolution makes, its shortcut and its output take turns in four areas.
  int64_t area_bytes = 0;
  std::vector<std::pair<int64_t*, int>> places;
  int next = 0;
  const auto put = [&](GpuMap& map, int area, int size) {
    map.offset = 0;
    places.emplace_back(&map.offset, area);
    area_bytes = std::max(area_bytes, int64_t{map.height} * map.width * map.stride * size);
  };
  const auto add = [&](const std::string& name, const std::string& norm, int kernel, int stride, const GpuMap& x,
                       int x_area, int64_t in, int out, bool relu, int y_area) -> ConvStage& {
    ConvStage& stage = program_.convolution[next++];
    const bool first = next == 1;
    stage.kernel = kernel;
    stage.stride = stride;
    stage.x = x;
    if (!first) put(stage.x, x_area, element);
    stage.y = {0, stride == 2 ? halved(x.height) : x.height, stride == 2 ? halved(x.width) : x.width, out};
    put(stage.y, y_area, element);
    stage.in_channels = static_cast<int>(in);
    stage.relu = relu;
    stage.add = -1;
    Matrix matrix = packer.linear(name, out, in, {kernel, kernel}, false);
    packer.fold(norm, matrix);
    if (first) {
      stage.bytes = row_bytes(kernel * kernel * static_cast<int>(in), 4);
      stage.weights = upload.upload(matrix, Format::float32);
    } else {
      const Packing windows = Packer::windows(Precision::float32, kernel, in, x.stride);
      stage.bytes = row_bytes(kernel * kernel * x.stride, element);
      stage.weights = upload.upload(matrix, format, windows.places, windows.length);
    }
    return stage;
  };

  const GpuMap clip{0, static_cast<int>(height), static_cast<int>(width), 0};
  const ConvStage& stem = add("body.conv", "body.norm", 7, 2, clip, 0, in_channels, 64, true, 0);
  program_.pool.x = stem.y;
  put(program_.pool.x, 0, element);
  program_.pool.y = {0, halved(stem.y.height), halved(stem.y.width), 64};
  put(program_.pool.y, 1, element);
  GpuMap x = program_.pool.y;
  int at = 1;
  for (int block = 0; block < 8; ++block) {
    const std::string name = cat("body.blocks.", block, ".");
    const int in = x.stride, out = kWidths[block / 2], stride = block > 0 && block % 2 == 0 ? 2 : 1;
    const int hidden = (at + 1) % 4, shortcut = (at + 2) % 4, result = (at + 3) % 4;
    const bool projected = stride != 1 || in != out;
    const ConvStage& first = add(name + "conv1", name + "norm1", 3, stride, x, at, in, out, true, hidden);
    if (projected) add(name + "downsample", name + "downsample_norm", 1, stride, x, at, in, out, false, shortcut);
    ConvStage& second = add(name + "conv2", name + "norm2", 3, 1, first.y, hidden, out, out, true, result);
    places.emplace_back(&second.add, projected ? shortcut : at);
    second.floats = block == 7;
    put(second.y, result, second.floats ? 4 : element);
    x = second.y;
    at = result;
  }
  area_bytes = round_up(area_bytes, kAlignment);
  for (const auto& [place, area] : places) *place = area * area_bytes;
  clip_bytes_ = 4 * area_bytes;
  for (ConvStage& stage : program_.convolution) stage.clip = clip_bytes_;
  program_.pool.clip = program_.clip_bytes = clip_bytes_;
  program_.features_offset = program_.convolution[kResNetConvolutions - 1].y.offset;
  program_.clip_floats = in_channels * height * width;

  const Matrix head = packer.linear("head", classes, kFeatures);
  program_.head.channels = kFeatures;
  program_.head.mel_rows = 1;
  program_.head.classes = static_cast<int>(classes);
  program_.head.weight = upload.upload(std::vector<float>(head.weight.begin(), head.weight.end()));
  program_.head.bias = upload.upload(std::vector<float>(head.bias.begin(), head.bias.end()));
  packer.ignore("domain.");
  packer.finish();
}

GpuModel::Plan GpuResNet18::plan(int64_t clips) const {
  Schedule schedule = choose(clips, kMostGroup);
  schedule.through_memory = schedule.direct_weights = true;
  const GpuMap& last = program_.convolution[kResNetConvolutions - 1].y;
  int64_t shared = emotion_head_shared(program_.head, last.height * last.width);
  for (const ConvStage& stage : program_.convolution) shared = std::max<int64_t>(shared, conv_shared(stage));
  return {schedule, teams_of(schedule, clips), clip_bytes_ * schedule.group, static_cast<int>(shared), program_.steps(),
          nullptr};
}

void GpuResNet18::launch(const Plan& plan, const Run& run, int begin, int end, Stream stream) const {
  launch_resnet18(options_.precision, program_, run, begin, end, !plan.schedule.staged, plan.teams, plan.shared_bytes,
                  stream);
}

}  // namespace avser::gpu
