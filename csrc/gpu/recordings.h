// A batch of recordings in the GPU's memory, as kernels see it.
#pragma once

#include <cstdint>

#include "gpu/device.h"
#include "ops/log_mel/log_mel.h"

namespace avser::gpu {

// Where a recording's samples, frames and clips lie among those of its batch.
struct Recording {
  int64_t first_sample;  // elements
  int samples;
  int first_frame, frames;
  int first_clip, clips;
  int pad, filled, span;  // of its clips (ClipStarts)
};

struct Totals {
  int recordings, frames, clips;
};

struct Recordings {
  const void* samples;
  SampleType type;
  int64_t sample_stride;  // elements
  // Of any lengths, in device memory since it may differ between two launches of one graph; null: `given`.
  const Totals* totals;
  const Recording* list;
  // All of one length: the first of them, and how far apart they lie.
  Totals given_totals;
  Recording given;
  int64_t recording_stride;  // elements

  AVSER_HOST_DEVICE Totals all() const { return list != nullptr ? *totals : given_totals; }
  AVSER_HOST_DEVICE Recording operator[](int i) const {
    if (list != nullptr) return list[i];
    Recording own = given;
    own.first_sample = i * recording_stride;
    own.first_frame = i * own.frames;
    own.first_clip = i * own.clips;
    return own;
  }
};

// The place of the recording that holds element `at`: `first` is first_frame or first_clip.
template <int Recording::* first>
AVSER_DEVICE int holder(const Recordings& recordings, int at) {
  int low = 0, high = recordings.all().recordings;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (recordings[middle].*first <= at) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

AVSER_DEVICE double sample_at(const Recordings& recordings, int64_t at) {
  switch (recordings.type) {
    case SampleType::int16:
      return static_cast<const int16_t*>(recordings.samples)[at];
    case SampleType::float32:
      return static_cast<const float*>(recordings.samples)[at];
    default:
      return static_cast<const double*>(recordings.samples)[at];
  }
}

}  // namespace avser::gpu
