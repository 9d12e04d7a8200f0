// Spatial, then channel attention of a clip on a GPU, and its map as tokens: one block per clip.  Both gates are
// float32; only the two small layers of the channel gate are products, too small for tensor cores.
#pragma once

#include "gpu/maps.h"

namespace avser::gpu {

struct CsAttentionStage {
  GpuMap x;  // float
  int channels, tokens_stride;
  bool gathered;  // into shared memory before anything else; always where maps are on chip
  bool spatial, channel;
  const float* spatial_weight;  // 18 taps, of the maximum's map first, and a bias
  int hidden;                   // of the channel gate's layers
  const float* weight1;         // (hidden, channels)
  const float* bias1;
  const float* weight2;  // (channels, hidden)
  const float* bias2;
};

// The map, where it is gathered; pixels, twice; gates of pixels; mean and maximum, and gate, of channels; the hidden
// layer of both.
AVSER_HOST_DEVICE int cs_attention_shared(const CsAttentionStage& stage) {
  const int pixels = stage.x.height * stage.x.width;
  return 4 * ((stage.gathered ? pixels * stage.x.stride : 0) + 3 * pixels + 3 * stage.channels + 2 * stage.hidden);
}

// memory: the map of one clip, unless it is on chip; tokens: (x.height, tokens_stride) floats, a token the channels of
// each of its positions.
AVSER_DEVICE void cs_attention(const CsAttentionStage& stage, const char* memory, float* tokens, const MapWork& work) {
  const GpuMap& map = stage.x;
  const int pixels = map.height * map.width, channels = stage.channels;
  const auto* x = reinterpret_cast<const float*>(memory + map.offset);
  Shared<float> behind = shared_memory().as<float>();
  if (stage.gathered) {
    // Each value is looked at four times, by few threads at a time: one wait for all of them instead.
    const int chunks = map.width * map.stride / 4;
    copy_of_map(
        work, memory, map.height * chunks,
        [&](int i) {
          if (!work.on_chip) return x + 4 * i;
          return row_of_owner<float>(map, i / chunks, work.team) + i % chunks * 4;
        },
        [&](int i) { return (behind + 4 * i).as<Words4>(); });
    copy_wait();
    sync();
    x = behind.generic();
    behind = behind + pixels * map.stride;
  }
  const Shared<float> pixel_max = behind;
  const Shared<float> pixel_mean = pixel_max + pixels, pixel_gate = pixel_mean + pixels;
  const Shared<float> channel_mean = pixel_gate + pixels, channel_max = channel_mean + channels;
  const Shared<float> channel_gate = channel_max + channels, hidden = channel_gate + channels;

  if (stage.spatial) {
    for (int pixel = warp(); pixel < pixels; pixel += kWarps) {
      const float* row = x + static_cast<int64_t>(pixel) * map.stride;
      float sum = 0.0f, largest = row[0];
      for (int c = lane(); c < channels; c += kWarp) {
        sum += row[c];
        largest = max_nan(largest, row[c]);
      }
      sum = warp_sum(sum);
      largest = warp_max(largest);
      if (lane() == 0) {
        pixel_max[pixel] = largest;
        pixel_mean[pixel] = sum / static_cast<float>(channels);
      }
    }
    sync();
  }
  for (int pixel = thread(); pixel < pixels; pixel += kThreads) {
    float gate = 1.0f;
    if (stage.spatial) {
      const int oy = pixel / map.width, ox = pixel % map.width;
      float sum = stage.spatial_weight[18];
      for (int tap = 0; tap < 18; ++tap) {
        const int iy = oy - 1 + tap % 9 / 3, ix = ox - 1 + tap % 3;
        if (iy < 0 || iy >= map.height || ix < 0 || ix >= map.width) continue;
        const float value = tap < 9 ? pixel_max[iy * map.width + ix] : pixel_mean[iy * map.width + ix];
        sum = multiply_add(value, stage.spatial_weight[tap], sum);
      }
      gate = sigmoid(sum);
    }
    pixel_gate[pixel] = gate;
  }
  sync();
  if (stage.channel) {
    for (int c = thread(); c < channels; c += kThreads) {
      float sum = 0.0f, largest = 0.0f;
      for (int pixel = 0; pixel < pixels; ++pixel) {
        const float value = x[static_cast<int64_t>(pixel) * map.stride + c] * pixel_gate[pixel];
        sum += value;
        largest = pixel == 0 ? value : max_nan(largest, value);
      }
      channel_mean[c] = sum / static_cast<float>(pixels);
      channel_max[c] = largest;
    }
    sync();
    for (int i = warp(); i < 2 * stage.hidden; i += kWarps) {
      const float* weight = stage.weight1 + static_cast<int64_t>(i / 2) * channels;
      float sum = 0.0f;
      for (int c = lane(); c < channels; c += kWarp) {
        sum = multiply_add(i % 2 == 0 ? channel_mean[c] : channel_max[c], weight[c], sum);
      }
      sum = warp_sum(sum);
      if (lane() == 0) hidden[i] = relu(sum + stage.bias1[i / 2]);
    }
    sync();
  }
  for (int c = thread(); c < channels; c += kThreads) {
    float gate = 1.0f;
    if (stage.channel) {
      float sum = 2.0f * stage.bias2[c];
      for (int i = 0; i < stage.hidden; ++i) {
        sum = multiply_add(hidden[2 * i] + hidden[2 * i + 1], stage.weight2[static_cast<int64_t>(c) * stage.hidden + i],
                           sum);
      }
      gate = sigmoid(sum);
    }
    channel_gate[c] = gate;
  }
  sync();
  const int width = map.width * channels;
  for (int i = thread(); i < map.height * width; i += kThreads) {
    const int token = i / width, at = i % width, pixel = token * map.width + at / channels, c = at % channels;
    const float value = x[static_cast<int64_t>(pixel) * map.stride + c] * pixel_gate[pixel];
    tokens[static_cast<int64_t>(token) * stage.tokens_stride + at] = value * channel_gate[c];
  }
  sync();
}

}  // namespace avser::gpu
