#include "ops/frame_clips/frame_clips.h"

#include <algorithm>
#include <cstring>

#include "common/check.h"

namespace avser {
namespace {

constexpr int64_t kMostFrames = int64_t{1} << 28;  // of all clips

// Of `frames`, padding included.
int64_t published_count(int64_t frames, int64_t clips, int64_t clip_frames) {
  // Clip i is filled while i * step < frames - clip_frames.
  const int64_t step = frames / clips, room = frames - clip_frames;
  if (room <= 0) return 0;
  return step == 0 ? clips : std::min(clips, (room + step - 1) / step);
}

int64_t even_count(int64_t span, int64_t clips, int64_t clip_frames) {
  if (span == 0) return 1;
  const int64_t hop = std::max<int64_t>(1, clip_frames / 2);
  const int64_t count = 1 + (span + hop - 1) / hop;
  return clips == kNoClipLimit ? count : std::min(count, clips);
}

}  // namespace

ClipStarts clip_starts(int64_t frames, int64_t clips, int64_t clip_frames, const std::string& rule) {
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

  ClipStarts starts;
  if (published) {
    if (frames < clips + clip_frames) starts.pad = clip_frames / 2;
    const int64_t padded = frames + 2 * starts.pad;
    starts.filled = published_count(padded, clips, clip_frames);
    starts.span = std::max<int64_t>(0, starts.filled - 1) * (padded / clips);
    starts.clips = starts.voting = clips;
  } else {
    starts.pad = std::max<int64_t>(0, clip_frames - frames) / 2;
    starts.span = std::max<int64_t>(0, frames - clip_frames);
    starts.filled = starts.voting = even_count(starts.span, clips, clip_frames);
    starts.clips = clips == kNoClipLimit ? starts.filled : clips;
  }
  return starts;
}

ClipTable clip_table(int64_t frames, int64_t clips, int64_t clip_frames, const std::string& rule) {
  const ClipStarts starts = clip_starts(frames, clips, clip_frames, rule);
  ClipTable table;
  table.clips = starts.clips;
  table.clip_frames = clip_frames;
  table.frame.assign(static_cast<size_t>(table.clips * clip_frames), 0);
  table.valid.assign(static_cast<size_t>(table.clips), 0);
  std::fill_n(table.valid.begin(), starts.voting, uint8_t{1});
  for (int64_t clip = 0; clip < starts.filled; ++clip) {
    const int64_t first = clip_start(clip, starts.filled, starts.span) - starts.pad;
    for (int64_t i = 0; i < clip_frames; ++i) {
      const int64_t frame = first + i;
      if (frame >= 0 && frame < frames) table.frame[clip * clip_frames + i] = frame + 1;
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
