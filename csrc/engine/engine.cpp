#include "engine/engine.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "common/executor.h"

namespace avser {
namespace {

// Clips that share the encoder's matrix products: enough that reading the weights costs little, few enough that the
// tokens stay in cache and memory is bounded for any batch.
constexpr int64_t kGroup = 16;

// True for +0 everywhere; -0 takes the long way, where it may give other bits.
bool all_zero(const float* x, int64_t n) {
  uint32_t any = 0;
  constexpr int64_t kChunk = 256;
  for (int64_t i = 0; i < n && any == 0; i += kChunk) {
    for (int64_t j = i; j < std::min(n, i + kChunk); ++j) {
      uint32_t bits;
      std::memcpy(&bits, x + j, sizeof bits);
      any |= bits;
    }
  }
  return any == 0;
}

const Network& checked(const Network& network) {
  network.check();
  return network;
}

}  // namespace

// A workspace for one call, taken from the idle ones and returned to them.
class Engine::Lease {
 public:
  Lease(const Engine& engine, int64_t floats) : engine_(engine) {
    {
      std::lock_guard<std::mutex> lock(engine_.mutex_);
      if (!engine_.idle_.empty()) {
        buffer_ = std::move(engine_.idle_.back());
        engine_.idle_.pop_back();
      }
    }
    if (buffer_ == nullptr || buffer_->size() < floats) {
      buffer_.reset();  // before the larger one is allocated
      buffer_ = std::make_unique<Buffer>(floats);
    }
    if (engine_.poison_) std::memset(buffer_->data(), 0xff, buffer_->size() * sizeof(float));
  }
  ~Lease() {
    std::lock_guard<std::mutex> lock(engine_.mutex_);
    engine_.idle_.push_back(std::move(buffer_));
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  float* data() const { return buffer_->data(); }

 private:
  const Engine& engine_;
  std::unique_ptr<Buffer> buffer_;
};

Engine::Engine(const Network& network, const Tensors& tensors, bool poison)
    : network_(checked(network)),
      isa_(current_isa()),
      conv_stem_(AVSER_PICK_FOR(isa_, conv_stem_kernels)),
      dsc_block_(AVSER_PICK_FOR(isa_, dsc_block_kernels)),
      cs_attention_(AVSER_PICK_FOR(isa_, cs_attention_kernels)),
      temporal_attention_(AVSER_PICK_FOR(isa_, temporal_attention_kernels)),
      emotion_head_(AVSER_PICK_FOR(isa_, emotion_head_kernels)),
      weights_(network_, tensors, conv_stem_.lanes),
      poison_(poison) {
  const int64_t lanes = conv_stem_.lanes;
  int64_t height = network_.clip_frames, width = network_.mel_bands;
  const auto halve = [&](int64_t channels) {
    height = (height + 1) / 2;
    width = (width + 1) / 2;
    map_floats_ = std::max(map_floats_, height * width * round_up(channels, lanes));
  };
  const auto need = [&](int64_t floats) { scratch_floats_ = std::max(scratch_floats_, floats); };
  for (const ConvStemLayer& layer : weights_.stem) {
    need(conv_stem_.scratch(layer, height, width));
    halve(layer.out_channels);
  }
  for (const DscBlock& block : weights_.blocks) {
    need(dsc_block_.scratch(block, height, width));
    halve(block.out_channels);
  }
  need(cs_attention_.scratch(weights_.attention, height, width));
  need(emotion_head_.scratch(weights_.head));
  map_floats_ = round_up(map_floats_, 16);  // cache lines
  scratch_floats_ = round_up(scratch_floats_, 16);

  zero_feature_.resize(network_.features());
  zero_logits_.resize(network_.classes);
  const std::vector<float> zeros(network_.clip_floats(), 0.0f);
  const int64_t first = 0;
  SerialExecutor executor;
  const Lease lease(*this, worker_floats() + group_floats(1, 1));
  run_group(zeros.data(), &first, 1, zero_feature_.data(), zero_logits_.data(), lease.data(), executor);
}

Engine::~Engine() = default;

int64_t Engine::worker_floats() const { return 2 * map_floats_ + scratch_floats_; }

int64_t Engine::group_floats(int64_t clips, int threads) const {
  const int64_t lanes = conv_stem_.lanes;
  int64_t scratch = 0;
  for (const EncoderLayer& layer : weights_.encoder) {
    scratch =
        std::max(scratch, temporal_attention_scratch(temporal_attention_, layer, clips, network_.tokens(), threads));
  }
  return round_up(clips * network_.tokens() * round_up(network_.token_width(), lanes), 16) + scratch;
}

void Engine::convolve(const float* clip, float* tokens, float* workspace) const {
  float* map = workspace;
  float* next = map + map_floats_;
  float* scratch = next + map_floats_;
  int64_t height = network_.clip_frames, width = network_.mel_bands;
  const float* x = clip;
  for (const ConvStemLayer& layer : weights_.stem) {
    conv_stem_.run(layer, x, height, width, next, scratch);
    std::swap(map, next);
    x = map;
    height = (height + 1) / 2;
    width = (width + 1) / 2;
  }
  for (const DscBlock& block : weights_.blocks) {
    dsc_block_.run(block, map, height, width, next, scratch);
    std::swap(map, next);
    height = (height + 1) / 2;
    width = (width + 1) / 2;
  }
  cs_attention_.run(weights_.attention, map, height, width, scratch);
  temporal_attention_.to_tokens(map, height, width, network_.blocks.back(), tokens);
}

void Engine::run_group(const float* clips, const int64_t* which, int64_t count, float* features, float* logits,
                       float* workspace, Executor& executor) const {
  const int64_t tokens = network_.tokens();
  const int64_t clip_tokens = tokens * round_up(network_.token_width(), conv_stem_.lanes);
  float* group = workspace + executor.threads() * worker_floats();
  float* scratch = group + round_up(count * clip_tokens, 16);

  executor.parallel_for(count, 1, [&](int64_t begin, int64_t end, int worker) {
    for (int64_t i = begin; i < end; ++i) {
      convolve(clips + which[i] * network_.clip_floats(), group + i * clip_tokens,
               workspace + worker * worker_floats());
    }
  });
  for (const EncoderLayer& layer : weights_.encoder) {
    temporal_attention(temporal_attention_, layer, group, count, tokens, scratch, executor);
  }
  for (int64_t i = 0; i < count; ++i) {
    emotion_head_.classify(weights_.head, group + i * clip_tokens, tokens, features + which[i] * network_.features(),
                           logits + which[i] * network_.classes, workspace + 2 * map_floats_);
  }
}

void Engine::forward(const float* clips, const bool* valid, int64_t batch, int64_t clips_per_utterance,
                     float* probabilities, float* features, float* logits, Executor& executor) const {
  const int64_t total = batch * clips_per_utterance;
  std::vector<int64_t> heard;
  for (int64_t i = 0; i < total; ++i) {
    if (!all_zero(clips + i * network_.clip_floats(), network_.clip_floats())) {
      heard.push_back(i);
      continue;
    }
    std::copy(zero_feature_.begin(), zero_feature_.end(), features + i * network_.features());
    std::copy(zero_logits_.begin(), zero_logits_.end(), logits + i * network_.classes);
  }
  if (!heard.empty()) {
    const int64_t count = heard.size(), largest = std::min(count, kGroup);
    const int threads = executor.threads();
    const Lease lease(*this, threads * worker_floats() + group_floats(largest, threads));
    for (int64_t i = 0; i < count; i += kGroup) {
      run_group(clips, heard.data() + i, std::min(kGroup, count - i), features, logits, lease.data(), executor);
    }
  }
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t first = i * clips_per_utterance;
    average_clips(logits + first * network_.classes, valid == nullptr ? nullptr : valid + first, clips_per_utterance,
                  network_.classes, probabilities + i * network_.classes);
  }
}

}  // namespace avser
