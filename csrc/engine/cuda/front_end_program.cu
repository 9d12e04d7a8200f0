#include "engine/cuda/front_end_program.h"

namespace avser::gpu {
namespace {

AVSER_KERNEL void AVSER_LAUNCH_BOUNDS(kFrontEndThreads, 1)
    statistics_kernel(AVSER_GRID_CONSTANT const FrameClipsStage stage, AVSER_GRID_CONSTANT const Recordings recordings,
                      const float* features, BandStatistics* statistics) {
  const int planes = recordings.all().recordings * stage.channels;
  for (int plane = block(); plane < planes; plane += blocks()) {
    recording_statistics(stage, recordings[plane / stage.channels], features, plane % stage.channels,
                         statistics + static_cast<int64_t>(plane) * stage.bands);
  }
}

AVSER_KERNEL void AVSER_LAUNCH_BOUNDS(kFrontEndThreads, 1)
    clips_kernel(AVSER_GRID_CONSTANT const FrameClipsStage stage, AVSER_GRID_CONSTANT const Recordings recordings,
                 const float* features, const float* voice, const BandStatistics* statistics, int channels,
                 float* clips) {
  const int64_t elements = int64_t{recordings.all().clips} * channels * stage.clip_frames * stage.bands;
  for (int64_t at = int64_t{block()} * kFrontEndThreads + thread(); at < elements;
       at += int64_t{blocks()} * kFrontEndThreads) {
    clips[at] = clip_element(stage, recordings, features, voice, statistics, channels, at);
  }
}

}  // namespace

void launch_statistics(const FrameClipsStage& stage, const Recordings& recordings, const float* features,
                       BandStatistics* statistics, int blocks, Stream stream) {
  launch(&statistics_kernel, kFrontEndThreads, {blocks, 1, 0}, stream, stage, recordings, features, statistics);
}

void launch_clips(const FrameClipsStage& stage, const Recordings& recordings, const float* features, const float* voice,
                  const BandStatistics* statistics, int channels, float* clips, int blocks, Stream stream) {
  launch(&clips_kernel, kFrontEndThreads, {blocks, 1, 0}, stream, stage, recordings, features, voice, statistics,
         channels, clips);
}

}  // namespace avser::gpu
