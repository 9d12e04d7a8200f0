#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "recordings/recordings.h"

namespace avser {
namespace {

// The part of libsndfile's interface that is used, as sndfile.h has declared it since version 1.0.
struct Info {
  int64_t frames;
  int samplerate, channels, format, sections, seekable;
};
struct VirtualFile {
  int64_t (*size)(void*);
  int64_t (*seek)(int64_t, int, void*);
  int64_t (*read)(void*, int64_t, void*);
  int64_t (*write)(const void*, int64_t, void*);
  int64_t (*tell)(void*);
};
using Handle = void;
using OpenVirtual = Handle* (*)(VirtualFile*, int, Info*, void*);
using ReadShort = int64_t (*)(Handle*, int16_t*, int64_t);
using ReadFloat = int64_t (*)(Handle*, float*, int64_t);
using Answer = int (*)(Handle*);
constexpr int kRead = 0x10;
constexpr int kSubtypes = 0xFFFF;
constexpr int kPcm16 = 2;

// Plain recordings are within these; others are read one by one.
constexpr int kMaxChannels = 2, kMinRate = 4000, kMaxRateOfFile = 192000;
constexpr int64_t kMaxSamples = int64_t{1} << 23;
constexpr float kMaxPeak = 1;
constexpr float kFullScale = 32768;

struct Memory {
  const uint8_t* bytes;
  int64_t size;
  int64_t at;
};

int64_t size_of(void* user) { return static_cast<Memory*>(user)->size; }
int64_t tell_of(void* user) { return static_cast<Memory*>(user)->at; }
int64_t no_write(const void*, int64_t, void*) { return 0; }

int64_t seek_in(int64_t offset, int whence, void* user) {
  auto& memory = *static_cast<Memory*>(user);
  const int64_t base = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? memory.at : memory.size;
  memory.at = std::clamp<int64_t>(base + offset, 0, memory.size);
  return memory.at;
}

int64_t read_from(void* to, int64_t count, void* user) {
  auto& memory = *static_cast<Memory*>(user);
  count = std::clamp<int64_t>(count, 0, memory.size - memory.at);
  std::memcpy(to, memory.bytes + memory.at, static_cast<size_t>(count));
  memory.at += count;
  return count;
}

// A wav that holds all of the data that it announces.  libsndfile would read what is left of one that does not.
bool is_whole_wav(const uint8_t* bytes, int64_t size) {
  if (size < 12 || std::memcmp(bytes, "RIFF", 4) != 0 || std::memcmp(bytes + 8, "WAVE", 4) != 0) return false;
  for (int64_t at = 12; at + 8 <= size;) {
    const uint8_t* field = bytes + at + 4;
    const int64_t length = field[0] | field[1] << 8 | field[2] << 16 | int64_t{field[3]} << 24;
    if (std::memcmp(bytes + at, "data", 4) == 0) return length > 0 && length <= size - at - 8;
    at += 8 + length + (length & 1);
  }
  return false;
}

bool is_flac(const uint8_t* bytes, int64_t size) { return size >= 4 && std::memcmp(bytes, "fLaC", 4) == 0; }

class File {
 public:
  File(const Sndfile& library, const uint8_t* bytes, int64_t size) : library_(library), memory_{bytes, size, 0} {
    VirtualFile calls{size_of, seek_in, read_from, no_write, tell_of};
    handle_ = reinterpret_cast<OpenVirtual>(library.open_virtual)(&calls, kRead, &info_, &memory_);
  }
  ~File() {
    if (handle_ != nullptr) reinterpret_cast<Answer>(library_.close)(handle_);
  }
  File(const File&) = delete;

  bool is_plain() const {
    return handle_ != nullptr && info_.channels >= 1 && info_.channels <= kMaxChannels &&
           info_.samplerate >= kMinRate && info_.samplerate <= kMaxRateOfFile && info_.frames >= 1 &&
           info_.frames <= kMaxSamples / info_.channels;
  }
  const Info& info() const { return info_; }

  // Every frame; false where there are fewer than announced or libsndfile found something to complain about.
  bool read(int16_t* to) { return whole(reinterpret_cast<ReadShort>(library_.readf_short)(handle_, to, info_.frames)); }
  bool read(float* to) { return whole(reinterpret_cast<ReadFloat>(library_.readf_float)(handle_, to, info_.frames)); }

 private:
  bool whole(int64_t frames) const {
    return frames == info_.frames && reinterpret_cast<Answer>(library_.error)(handle_) == 0;
  }

  const Sndfile& library_;
  Memory memory_;
  Info info_{};
  Handle* handle_ = nullptr;
};

// Samples at int16 scale; the average of several channels is taken in double and rounded once.
template <typename T>
Block<float> mono(const Block<T>& interleaved, int64_t frames, int channels, float scale) {
  Block<float> out(frames);
  for (int64_t i = 0; i < frames; ++i) {
    const T* frame = interleaved.data.get() + i * channels;
    if (channels == 1) {
      out.data[i] = static_cast<float>(frame[0]) * scale;
      continue;
    }
    double sum = 0;
    for (int channel = 0; channel < channels; ++channel) sum += static_cast<double>(frame[channel]);
    out.data[i] = static_cast<float>(sum / channels * static_cast<double>(scale));
  }
  return out;
}

}  // namespace

Sound decode(const Sndfile& library, const uint8_t* bytes, int64_t size, int64_t to_rate) {
  if (!is_whole_wav(bytes, size) && !is_flac(bytes, size)) return {};
  File file(library, bytes, size);
  if (!file.is_plain()) return {};
  const auto [frames, rate, channels, format, sections, seekable] = file.info();
  Block<float> samples;
  if ((format & kSubtypes) == kPcm16) {
    Block<int16_t> read(frames * channels);
    if (!file.read(read.data.get())) return {};
    if (channels == 1 && rate == to_rate) {
      Sound out;
      out.whole = std::move(read);
      out.file_rate = rate;
      return out;
    }
    samples = mono(read, frames, channels, 1);
  } else {
    Block<float> read(frames * channels);
    if (!file.read(read.data.get())) return {};
    for (int64_t i = 0; i < read.size; ++i) {
      if (!(std::fabs(read.data[i]) <= kMaxPeak)) return {};
    }
    samples = mono(read, frames, channels, kFullScale);
  }
  return at_rate(samples.data.get(), frames, 1, rate, to_rate);
}

}  // namespace avser
