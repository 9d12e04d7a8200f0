#include "recordings/recordings.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "common/executor.h"
#include "ops/resample/resample.h"

namespace avser {
namespace {

struct Descriptor {
  explicit Descriptor(const std::string& path) : number(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {}
  ~Descriptor() {
    if (number >= 0) close(number);
  }
  Descriptor(const Descriptor&) = delete;
  const int number;
};

// The same values as int16; none where one of them would change.
Block<int16_t> whole_numbers(const Block<float>& samples) {
  Block<int16_t> out(samples.size);
  for (int64_t i = 0; i < samples.size; ++i) {
    const float x = samples.data[i];
    if (!(x >= -32768 && x <= 32767)) return {};
    out.data[i] = static_cast<int16_t>(x);
    if (static_cast<float>(out.data[i]) != x) return {};
  }
  return out;
}

}  // namespace

Block<uint8_t> read_file(const std::string& path, int64_t limit) {
  if (path.find('\0') != std::string::npos) return {};
  struct stat status;  // first: opening a pipe or a device does something to it
  if (stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) return {};
  const Descriptor file(path);
  if (file.number < 0 || fstat(file.number, &status) != 0 || !S_ISREG(status.st_mode)) return {};
  if (status.st_size < 1 || status.st_size > limit) return {};
  Block<uint8_t> out(status.st_size);
  for (int64_t got = 0; got < out.size;) {
    const ssize_t n = read(file.number, out.data.get() + got, static_cast<size_t>(out.size - got));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return {};
    got += n;
  }
  return out;
}

Waveform Sound::waveform() const {
  if (whole.size > 0) return {whole.data.get(), SampleType::int16, whole.size};
  return {real.data.get(), SampleType::float32, real.size};
}

Sound at_rate(const float* samples, int64_t count, int64_t stride, int64_t from_rate, int64_t to_rate) {
  Sound out;
  out.file_rate = from_rate;
  out.real = Block<float>(resampled_length(count, from_rate, to_rate));
  SerialExecutor executor;
  resample(samples, count, stride, from_rate, to_rate, out.real.data.get(), executor);
  out.whole = whole_numbers(out.real);
  if (out.whole.size > 0) out.real = {};
  return out;
}

}  // namespace avser
