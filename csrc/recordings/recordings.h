// Recordings as they lie in a corpus, many in one call: files to bytes, bytes to waveforms, waveforms to features.
//
// What is not plain - a pipe, a damaged file, a strange format, a long recording - gives nothing here: whoever reads
// recordings one by one says what is wrong with it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/log_mel/log_mel.h"

namespace avser {

// Memory that is written before it is read.
template <typename T>
struct Block {
  Block() = default;
  explicit Block(int64_t n) : data(new T[static_cast<size_t>(n)]), size(n) {}
  std::unique_ptr<T[]> data;
  int64_t size = 0;
};

// The bytes of a regular file of 1..limit bytes; none of anything else.
Block<uint8_t> read_file(const std::string& path, int64_t limit);

// A mono waveform at int16 scale: int16 where that loses nothing, else float32.  `file_rate` 0: there is none.
struct Sound {
  Block<int16_t> whole;
  Block<float> real;
  int64_t file_rate = 0;

  int64_t samples() const { return whole.size + real.size; }
  Waveform waveform() const;
};

// Samples of a recording, int16 scale, at another rate.
Sound at_rate(const float* samples, int64_t count, int64_t stride, int64_t from_rate, int64_t to_rate);

// libsndfile, by the addresses of its functions in a process that has loaded it.
struct Sndfile {
  uintptr_t open_virtual, readf_short, readf_float, error, close;
};

// A whole wav or FLAC file, averaged to mono, at `to_rate`.
Sound decode(const Sndfile& library, const uint8_t* bytes, int64_t size, int64_t to_rate);

}  // namespace avser
