// From the frames of an utterance to clips of fixed length, by one of two named rules.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/executor.h"

namespace avser {

constexpr int64_t kNoClipLimit = -1;  // `clips` of the rule "even" when as many as coverage needs are wanted

// Where the clips of an utterance begin: the first `filled` of `clips` hold frames, evenly spaced over `span`.
struct ClipStarts {
  int64_t clips = 0;
  int64_t voting = 0;  // the first ones
  int64_t filled = 0;
  int64_t span = 0;  // frames from the first one's start to that of the last filled one
  int64_t pad = 0;   // zero frames before the utterance's first one
};

// First frame of a filled clip, counted from the padding's first; to the nearest one, halves up.
constexpr int64_t clip_start(int64_t clip, int64_t filled, int64_t span) {
  return filled < 2 ? 0 : (2 * clip * span + filled - 1) / (2 * (filled - 1));
}

struct ClipTable {
  int64_t clips = 0;
  int64_t clip_frames = 0;
  std::vector<int64_t> frame;  // (clips, clip_frames), 1-based frame numbers, 0 = padding
  std::vector<uint8_t> valid;  // (clips), 1 = takes part in the vote
};

// rule "published": with fewer than clips + clip_frames frames, clip_frames / 2 zero frames go before and after; clip i
// starts at i * (frames / clips), and only while start < frames - clip_frames is it filled; the others stay zero and
// vote.  rule "even": up to clip_frames frames are one centred clip; a longer utterance is covered by evenly spaced,
// half-overlapping clips, at most `clips` of them; rows beyond are zero and not valid.
ClipStarts clip_starts(int64_t frames, int64_t clips, int64_t clip_frames, const std::string& rule);
ClipTable clip_table(int64_t frames, int64_t clips, int64_t clip_frames, const std::string& rule);

// features (channels, frames, row bytes) contiguous -> out (clips, channels, clip_frames, row bytes); padding is 0.
void frame_clips(const void* features, int64_t channels, int64_t frames, int64_t row_bytes, const ClipTable& table,
                 void* out, Executor& executor);

}  // namespace avser
