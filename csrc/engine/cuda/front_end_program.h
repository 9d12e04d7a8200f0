// The kernels between log-mel features and clips.
#pragma once

#include "gpu/launch.h"
#include "ops/frame_clips/frame_clips_cuda.h"

namespace avser::gpu {

constexpr int kFrontEndThreads = 256;  // of a block

// features: (frames of all recordings, bands) -> statistics: (recordings, stage.channels, bands).
void launch_statistics(const FrameClipsStage& stage, const Recordings& recordings, const float* features,
                       BandStatistics* statistics, int blocks, Stream stream);
// -> clips: (clips of all recordings, channels, clip_frames, bands).
void launch_clips(const FrameClipsStage& stage, const Recordings& recordings, const float* features, const float* voice,
                  const BandStatistics* statistics, int channels, float* clips, int blocks, Stream stream);

}  // namespace avser::gpu
