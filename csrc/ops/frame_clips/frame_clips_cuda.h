// Clips of normalised features on a GPU, from the log-mel features of a batch of recordings.
#pragma once

#include "gpu/recordings.h"
#include "ops/frame_clips/frame_clips.h"
#include "ops/log_mel/add_deltas_cuda.h"
#include "ops/normalize/normalize_cuda.h"

namespace avser::gpu {

struct FrameClipsStage {
  int channels, bands, clip_frames;  // without the voice, which is one more channel of whoever wants it
  Deltas deltas;
  NormalizeStage normalize;
};

// Statistics of a recording's channel `channel`, by one block: one per band.
AVSER_DEVICE void recording_statistics(const FrameClipsStage& stage, const Recording& own, const float* features,
                                       int channel, BandStatistics* statistics) {
  const float* rows = features + static_cast<int64_t>(own.first_frame) * stage.bands;
  for (int band = warp(); band < stage.bands; band += threads() / kWarp) {
    const BandStatistics found = band_statistics(own.frames, [&](int t) {
      return static_cast<double>(feature_at(stage.deltas, rows, own.frames, stage.bands, channel, t, band));
    });
    if (lane() == 0) statistics[band] = found;
  }
}

// Element `at` of clips (clips, channels of the network, clip_frames, bands); features: (frames of all recordings,
// bands), voice: (frames, kVoiceValues), statistics: (recordings, stage.channels, bands).
AVSER_DEVICE float clip_element(const FrameClipsStage& stage, const Recordings& recordings, const float* features,
                                const float* voice, const BandStatistics* statistics, int channels, int64_t at) {
  const int band = static_cast<int>(at % stage.bands);
  at /= stage.bands;
  const int row = static_cast<int>(at % stage.clip_frames);
  at /= stage.clip_frames;
  const int channel = static_cast<int>(at % channels), clip = static_cast<int>(at / channels);
  const int place = holder<&Recording::first_clip>(recordings, clip);
  const Recording own = recordings[place];
  const int of_own = clip - own.first_clip;
  if (of_own >= own.filled) return 0.0f;
  const int64_t t = clip_start(of_own, own.filled, own.span) - own.pad + row;
  if (t < 0 || t >= own.frames) return 0.0f;
  if (channel == stage.channels) {
    return band < kVoiceValues ? voice[(own.first_frame + t) * kVoiceValues + band] : 0.0f;
  }
  const float* rows = features + static_cast<int64_t>(own.first_frame) * stage.bands;
  const float value = feature_at(stage.deltas, rows, own.frames, stage.bands, channel, static_cast<int>(t), band);
  const int64_t of_band = (static_cast<int64_t>(place) * stage.channels + channel) * stage.bands + band;
  return normalized(stage.normalize, channel, statistics + of_band, value);
}

}  // namespace avser::gpu
