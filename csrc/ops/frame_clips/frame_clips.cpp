#include "ops/frame_clips/frame_clips.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"

namespace avser {
namespace {

constexpr int64_t kMostFrames = int64_t{1} << 28;  // of all clips

std::vector<int64_t> published_starts(int64_t frames, int64_t clips, int64_t clip_frames) {
  std::vector<int64_t> starts;
  for (int64_t i = 0; i < clips && i * (frames / clips) < frames - clip_frames; ++i) {
    starts.push_back(i * (frames / clips));
  }
  return starts;
}

std::vector<int64_t> even_starts(int64_t frames, int64_t clips, int64_t clip_frames) {
  const int64_t span = frames - clip_frames;
  if (span <= 0) return {0};
  const int64_t hop = std::max<int64_t>(1, clip_frames / 2);
  int64_t count = 1 + (span + hop - 1) / hop;
  if (clips != kNoClipLimit) count = std::min(count, clips);
  if (count == 1) return {0};
  std::vector<int64_t> starts;
  // i * span / (count - 1) rounded to the nearest frame, halves up.
  for (int64_t i = 0; i < count; ++i) starts.push_back((2 * i * span + count - 1) / (2 * (count - 1)));
  return starts;
}

}  // namespace

ClipTable clip_table(int64_t frames, int64_t clips, int64_t clip_frames, const std::string& rule) {
  const bool published = rule == "published";
  AVSER_CHECK(published || rule == "even", config, "clip_table: rule: expected published or even, got '", rule, "'");
  AVSER_CHECK(frames >= 1, input, "clip_table: frames: expected at least 1, got ", frames);
  AVSER_CHECK(clip_frames >= 1 && clip_frames <= kMostFrames, config, "clip_table: clip_frames: expected 1..",
              kMostFrames, ", got ", clip_frames);
  AVSER_CHECK(clips >= 1 || (!published && clips == kNoClipLimit), config,
              "clip_table: clips: expected at least 1 (or None with rule even), got ",
              clips == kNoClipLimit ? "None" : cat(clips));
  AVSER_CHECK(clips <= kMostFrames / clip_frames, config, "clip_table: clips: expected at most ",
              kMostFrames / clip_frames, " of ", clip_frames, " frames, got ", clips);

  int64_t pad = 0;  // zero frames before the first one
  std::vector<int64_t> starts;
  if (published) {
    if (frames < clips + clip_frames) pad = clip_frames / 2;
    starts = published_starts(frames + 2 * pad, clips, clip_frames);
  } else {
    pad = std::max<int64_t>(0, clip_frames - frames) / 2;
    starts = even_starts(frames, clips, clip_frames);
  }

  ClipTable table;
  table.clips = clips == kNoClipLimit ? static_cast<int64_t>(starts.size()) : clips;
  table.clip_frames = clip_frames;
  table.frame.assign(static_cast<size_t>(table.clips * clip_frames), 0);
  table.valid.assign(static_cast<size_t>(table.clips), published ? 1 : 0);
  for (size_t row = 0; row < starts.size(); ++row) {
    table.valid[row] = 1;
    for (int64_t i = 0; i < clip_frames; ++i) {
      const int64_t frame = starts[row] - pad + i;
      if (frame >= 0 && frame < frames) table.frame[row * clip_frames + i] = frame + 1;
    }
  }
  return table;
}

void frame_clips(const void* features, int64_t channels, int64_t frames, int64_t row_bytes, const ClipTable& table,
                 void* out, Executor& executor) {
  const char* from = static_cast<const char*>(features);
  char* to = static_cast<char*>(out);
  const int64_t width = table.clip_frames;
  executor.parallel_for(table.clips * channels, 4, [&](int64_t begin, int64_t end, int) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t* row = table.frame.data() + plane / channels * width;
      const char* source = from + plane % channels * frames * row_bytes;
      char* target = to + plane * width * row_bytes;
      // A clip is padding, a run of consecutive frames, padding.
      int64_t first = 0;
      while (first < width && row[first] == 0) ++first;
      int64_t last = first;
      while (last < width && row[last] != 0) ++last;
      std::memset(target, 0, static_cast<size_t>(first * row_bytes));
      if (last > first) {
        std::memcpy(target + first * row_bytes, source + (row[first] - 1) * row_bytes,
                    static_cast<size_t>((last - first) * row_bytes));
      }
      std::memset(target + last * row_bytes, 0, static_cast<size_t>((width - last) * row_bytes));
    }
  });
}

}  // namespace avser
