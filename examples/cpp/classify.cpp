// classify MODEL.safetensors FILE.wav: prints the emotion of a recording and the score of every class.
#include <avser_fast/speech_model.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Wav {
  std::vector<float> samples;  // channels averaged, at int16 scale
  int64_t rate = 0;            // hertz
};

// A little-endian number at `at`; 0 beyond the end.
uint32_t number(const std::string& bytes, size_t at, int size) {
  uint32_t out = 0;
  for (int i = 0; i < size && at + i < bytes.size(); ++i) {
    out |= static_cast<uint32_t>(static_cast<unsigned char>(bytes[at + i])) << (8 * i);
  }
  return out;
}

// One sample in [-1, 1].
float sample(const std::string& bytes, size_t at, int bits, bool is_float) {
  if (bits == 8) return (static_cast<float>(number(bytes, at, 1)) - 128.0f) / 128.0f;  // the one unsigned format
  const uint32_t raw = number(bytes, at, bits / 8);
  if (!is_float) return static_cast<float>(static_cast<int32_t>(raw << (32 - bits))) / 2147483648.0f;
  float value;
  std::memcpy(&value, &raw, sizeof value);
  return value;
}

Wav read_wav(const std::string& path) {
  const auto refuse = [&](const std::string& why) { throw std::runtime_error("'" + path + "': expected " + why); };
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse("a wav file that can be read, got none");
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  if (bytes.compare(0, 4, "RIFF") != 0 || bytes.compare(8, 4, "WAVE") != 0) refuse("a wav file, got something else");

  Wav wav;
  uint32_t tag = 0, channels = 0, bits = 0;
  for (size_t at = 12; at + 8 <= bytes.size();) {
    const std::string chunk = bytes.substr(at, 4);
    const size_t size = number(bytes, at + 4, 4);
    at += 8;
    const size_t there = bytes.size() - at;
    if (chunk == "fmt ") {
      tag = number(bytes, at, 2);
      channels = number(bytes, at + 2, 2);
      wav.rate = number(bytes, at + 4, 4);
      bits = number(bytes, at + 14, 2);
      if (tag == 0xfffe) tag = number(bytes, at + 24, 2);  // WAVE_FORMAT_EXTENSIBLE names the format further down
    } else if (chunk == "data") {
      const bool pcm = tag == 1 && (bits == 8 || bits == 16 || bits == 24 || bits == 32);
      if (!pcm && !(tag == 3 && bits == 32)) refuse("samples of 8, 16, 24 or 32 bits or 32-bit floats, got others");
      if (channels < 1 || channels > 8) refuse("1 to 8 channels, got " + std::to_string(channels));
      if (size > there) refuse("the " + std::to_string(size) + " bytes of samples it announces, got fewer");
      const size_t width = bits / 8;
      for (size_t frame = at; frame + channels * width <= at + size; frame += channels * width) {
        double sum = 0;
        for (uint32_t c = 0; c < channels; ++c) sum += sample(bytes, frame + c * width, bits, tag == 3);
        wav.samples.push_back(static_cast<float>(sum / channels * 32768));
      }
      if (wav.samples.empty()) break;
      return wav;
    }
    at += std::min(there, size + size % 2);
  }
  refuse("samples, got a wav without");
  return wav;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s MODEL.safetensors FILE.wav\n", argv[0]);
    return 2;
  }
  try {
    const avser::SpeechModel model = avser::SpeechModel::open(argv[1]);
    const Wav wav = read_wav(argv[2]);
    const auto count = static_cast<int64_t>(wav.samples.size());
    const avser::Result result = model.classify(wav.samples.data(), count, wav.rate);
    std::printf("%s %.9g\n", model.labels()[result.best()].c_str(), result.probabilities[result.best()]);
    for (size_t k = 0; k < model.labels().size(); ++k) {
      std::printf("  %s %.9g\n", model.labels()[k].c_str(), result.probabilities[k]);
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
