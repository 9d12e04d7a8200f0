// From a recording to emotions in one call: a model file, its front end, clip rule and network.
//
//   #include <avser_fast/speech_model.h>
//   const avser::SpeechModel model = avser::SpeechModel::open("model.safetensors");
//   const avser::Result result = model.classify(samples, count, rate);
//   std::puts(model.labels()[result.best()].c_str());
//
// This header is installed and includes nothing of the project.  Errors are avser::Error (check.h), a runtime_error
// whose text is one sentence.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace avser {

class Engine;
class Executor;  // executor.h
struct ModelSpec;
struct TensorView;
using Tensors = std::map<std::string, TensorView>;

// The part of the recording that one clip holds: frames [begin, end) of the front end and their seconds.  All zero for
// a clip of padding alone, which votes under the published clip rule.
struct Segment {
  int64_t begin_frame = 0;
  int64_t end_frame = 0;
  double start_s = 0;
  double end_s = 0;
};

// Of K classes, and of the L clips that vote.
struct Result {
  std::vector<float> probabilities;  // (K), softmax of the clips' mean logits
  std::vector<float> features;       // (L, D)
  std::vector<float> clip_logits;    // (L, K)
  std::vector<Segment> segments;     // (L)

  // Place of the largest probability, the first one of equals.
  size_t best() const;
};

// Immutable: any number of threads may share one.  A recording's result has the same bits with any number of threads
// and whatever ran before, and they are those of the Python package's engine.
class SpeechModel {
 public:
  // A file written by avser_fast.  precision: float32, bf16, or int8, for which the file must hold ranges (`avser-fast
  // convert`).  Throws a model error that names the file.
  static SpeechModel open(const std::string& path, const std::string& precision = "float32");

  // Tensors by the names of the state dict of avser_fast.nn.MDSCM, and ranges of int8; they are copied.
  SpeechModel(const ModelSpec& spec, const Tensors& tensors, const std::string& precision = "float32",
              const Tensors* calibration = nullptr);
  SpeechModel(SpeechModel&&) noexcept;
  SpeechModel& operator=(SpeechModel&&) noexcept;
  ~SpeechModel();

  const ModelSpec& spec() const { return *spec_; }
  const std::vector<std::string>& labels() const;
  int64_t sampling_rate() const;  // hertz, of the front end; any other rate is resampled to it

  // `count` samples of one channel at int16 scale (floats in [-1, 1] times 32768), `rate` in hertz.  Throws an input
  // error for no sample, for one that is not finite or far beyond full scale, and for a rate outside 4000..384000.
  Result classify(const float* samples, int64_t count, int64_t rate, int threads = 1) const;
  Result classify(const int16_t* samples, int64_t count, int64_t rate, int threads = 1) const;
  // The same in the caller's own threads.
  Result run(const float* samples, int64_t count, int64_t rate, Executor& executor) const;
  Result run(const int16_t* samples, int64_t count, int64_t rate, Executor& executor) const;

 private:
  template <typename Sample>
  Result run_samples(const Sample* samples, int64_t count, int64_t rate, Executor& executor) const;

  std::unique_ptr<const ModelSpec> spec_;
  std::unique_ptr<const Engine> engine_;
};

}  // namespace avser
