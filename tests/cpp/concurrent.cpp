// Runs everything in the library that may be called from several threads at once: models on the same weights, training
// ops on the same inputs, each with executors of 1 to 4 threads, and compares every result with that of one thread
// alone, bit by bit.  tests/sanitizers.py runs it under ThreadSanitizer and others.
//
//   concurrent MODEL.safetensors THREADS ROUNDS
//
// prints the name of each case and a hash of its results.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/check.h"
#include "common/executor.h"
#include "common/fork_mutex.h"
#include "engine/engine.h"
#include "engine/fusion.h"
#include "engine/resnet18.h"
#include "model/speech_model.h"
#include "ops/cs_attention/cs_attention_training.h"
#include "ops/emotion_head/emotion_head_training.h"
#include "ops/pool_shortcut/pool_shortcut.h"
#include "ops/separable_conv2d/separable_conv2d.h"
#include "ops/strided_conv2d/strided_conv2d.h"
#include "ops/temporal_attention/temporal_attention_training.h"

namespace {

using namespace avser;

constexpr int kMostThreads = 4;  // of an executor

// Values of a precision: random numbers, or room for results.
class Array {
 public:
  Array(int64_t size, Precision precision) : precision(precision), bytes_(size * element_bytes(precision)) {}
  static Array random(int64_t size, Precision precision, float scale = 1.0f, float middle = 0.0f) {
    static std::mt19937 generator(7);
    Array out(size, precision);
    for (int64_t i = 0; i < size; ++i) {
      const float value = middle + scale * (static_cast<float>(generator() >> 8) / 8388608.0f - 1.0f);
      const char* bits = reinterpret_cast<const char*>(&value);
      const int64_t width = element_bytes(precision);
      std::copy(bits + sizeof value - width, bits + sizeof value, out.bytes_.data() + i * width);  // bf16: cut off
    }
    return out;
  }
  const Precision precision;
  char* data() { return bytes_.data(); }
  const char* data() const { return bytes_.data(); }
  float* floats() { return reinterpret_cast<float*>(bytes_.data()); }
  const float* floats() const { return reinterpret_cast<const float*>(bytes_.data()); }
  size_t size() const { return bytes_.size(); }

 private:
  std::vector<char> bytes_;
};

// FNV-1a of all bytes.
class Hash {
 public:
  Hash& add(const void* data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
      value_ = (value_ ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
    }
    return *this;
  }
  Hash& add(const Array& array) { return add(array.data(), array.size()); }
  Hash& add(const std::vector<float>& values) { return add(values.data(), values.size() * sizeof(float)); }
  operator uint64_t() const { return value_; }

 private:
  uint64_t value_ = 14695981039346656037u;
};

struct Case {
  std::string name;
  std::function<uint64_t(Executor&)> run;
};

// A channels-last map on the memory of an array, which the kernels do not change unless it is a result.
MapView map_of(const Array& array, int64_t n, int64_t channels, int64_t height, int64_t width) {
  return {const_cast<char*>(array.data()),
          array.precision,
          n,
          channels,
          height,
          width,
          height * width * channels,
          1,
          width * channels,
          channels};
}

// The tensors of a network whose constructor names what it misses: asked again and again, each made up.
class MadeUp {
 public:
  template <typename Build>
  explicit MadeUp(const Build& build) {
    for (;;) {
      try {
        build(tensors);
        return;
      } catch (const Error& error) {
        add(error.what());
      }
    }
  }
  Tensors tensors;

 private:
  void add(const std::string& sentence) {  // "Class: name: expected a tensor of shape (1, 2), which is missing"
    const size_t begin = sentence.find(": ") + 2, end = sentence.find(": expected a tensor of shape (");
    if (end == std::string::npos) throw std::runtime_error(sentence);
    const std::string name = sentence.substr(begin, end - begin);
    std::vector<int64_t> shape;
    int64_t size = 1;
    for (const char* at = sentence.c_str() + sentence.find('(', end) + 1; *at >= '0' && *at <= '9';) {
      char* next;
      shape.push_back(std::strtoll(at, &next, 10));
      size *= shape.back();
      at = next + (next[1] == ' ' ? 2 : 1);
    }
    const bool variance = name.find("running_var") != std::string::npos;
    const float scale = std::sqrt(3.0f * static_cast<float>(shape[0]) / static_cast<float>(size));
    arrays_.push_back(variance ? Array::random(size, Precision::float32, 0.3f, 1.0f)
                               : Array::random(size, Precision::float32, shape.size() == 1 ? 0.5f : scale));
    tensors[name] = {arrays_.back().floats(), shape};
  }
  std::deque<Array> arrays_;
};

// Ranges of int8 as tensors.
Tensors views(const Calibration& ranges) {
  Tensors out;
  for (const auto& [name, values] : ranges) out[name] = {values.data(), {2, static_cast<int64_t>(values.size() / 2)}};
  return out;
}

// A member of the family with every part that one may have.
Network network_with_everything() {
  Network network;
  network.mel_bands = 24;
  network.in_channels = 2;
  network.clip_frames = 50;
  network.stem = {8, 20};
  network.blocks = {24, 33};
  network.encoder_heads = 3;
  network.encoder_ff = 40;
  network.mean_std = true;
  network.statistics = 5;
  network.statistics_hidden = 9;
  return network;
}

std::vector<Case> model_cases(const std::string& path) {
  std::vector<Case> cases;
  constexpr int64_t kSamples = 20000, kRate = 22050, kBatch = 2, kClips = 5;
  const auto samples = std::make_shared<Array>(Array::random(kSamples, Precision::float32, 8000.0f));
  const Network network = network_with_everything();
  const auto input =
      std::make_shared<Array>(Array::random(kBatch * kClips * network.clip_floats(), Precision::float32));
  const MadeUp tensors([&](const Tensors& some) { Engine(network, some); });
  const auto first = std::make_shared<const Engine>(network, tensors.tensors);
  const Calibration ranges = first->calibrate(input->floats(), kBatch * kClips);
  cases.push_back({"Engine.calibrate", [=](Executor&) {
                     Hash hash;
                     for (const auto& [name, values] : first->calibrate(input->floats(), 1)) hash.add(values);
                     return hash;
                   }});
  const MadeUp of_encoder([](const Tensors& some) { ResNet18(1, 4, some, Precision::float32); });
  const MadeUp of_fusion([](const Tensors& some) { Fusion(50, 4, 20, 0.7, some); });
  for (const char* precision : {"float32", "bf16", "int8"}) {
    const auto model = std::make_shared<const SpeechModel>(SpeechModel::open(path, precision));
    cases.push_back({cat("SpeechModel ", precision), [=](Executor& executor) {
                       const Result result = model->run(samples->floats(), kSamples, kRate, executor);
                       return Hash().add(result.probabilities).add(result.features).add(result.clip_logits);
                     }});
    EngineOptions options;
    options.precision = precision_named(precision, "precision");
    options.poison = true;
    if (options.precision == Precision::int8) options.calibration = views(ranges);
    const auto engine = std::make_shared<const Engine>(network, tensors.tensors, options);
    cases.push_back({cat("Engine ", precision), [=](Executor& executor) {
                       std::vector<float> probabilities(kBatch * network.classes),
                           features(kBatch * kClips * network.features()), logits(kBatch * kClips * network.classes);
                       engine->forward(input->floats(), nullptr, kBatch, kClips, probabilities.data(), features.data(),
                                       logits.data(), executor);
                       return Hash().add(probabilities).add(features).add(logits);
                     }});
    for (const std::string& stem : engine->stems()) {
      cases.push_back({cat("Engine ", precision, " ", stem),
                       [=](Executor&) { return Hash().add(engine->intermediate(input->floats(), 1, stem).values); }});
    }
    if (options.precision == Precision::int8) continue;
    const auto encoder = std::make_shared<const ResNet18>(1, 4, of_encoder.tensors, options.precision, true);
    cases.push_back({cat("ResNet18 ", precision), [=](Executor& executor) {
                       std::vector<float> probabilities(4), features(3 * ResNet18::kFeatures), logits(3 * 4);
                       encoder->forward(input->floats(), nullptr, 1, 3, 35, 21, probabilities.data(), features.data(),
                                        logits.data(), executor);
                       return Hash().add(probabilities).add(features).add(logits);
                     }});
  }
  const auto fusion = std::make_shared<const Fusion>(50, 4, 20, 0.7, of_fusion.tensors, true);
  cases.push_back({"Fusion", [=](Executor& executor) {
                     std::vector<float> fused(5 * 4), a(5 * 4), b(5 * 4);
                     fusion->forward(input->floats(), input->floats() + 5 * 3 * 50, 5, 3, fused.data(), a.data(),
                                     b.data(), executor);
                     return Hash().add(fused).add(a).add(b);
                   }});
  return cases;
}

// Inputs of training ops live as long as the program.
const Array& kept(Array array) {
  static std::deque<Array> all;
  all.push_back(std::move(array));
  return all.back();
}
const Array& kept_random(int64_t size, Precision precision) { return kept(Array::random(size, precision, 0.5f)); }
const float* kept_floats(int64_t size, float middle = 0.0f) {
  return kept(Array::random(size, Precision::float32, 0.5f, middle)).floats();
}

std::vector<Case> training_cases(Precision precision) {
  std::vector<Case> cases;
  const std::string suffix = cat(" ", precision_name(precision));
  constexpr int64_t n = 9, in = 20, out = 37, height = 11, width = 7, positions = height * width;
  const int64_t half_height = halved(height), half_width = halved(width);
  const int64_t halved_positions = half_height * half_width;
  const auto some = [precision](int64_t size) -> const Array& { return kept_random(size, precision); };
  const Array &x = some(n * positions * in), &weights = some(out * in * 9), &bias = some(out);
  const Array &grad = some(n * positions * out), &y_given = some(n * positions * out);
  const float *mean = kept_floats(out), *scale = kept_floats(out, 1.0f), *shift = kept_floats(out);
  const float *y_mean = kept_floats(out), *grad_mean = kept_floats(out), *grad_var = kept_floats(out);
  const MapView x_map = map_of(x, n, in, height, width);
  const Dropout dropout = dropout_of(0.4, 12345, 1);

  cases.push_back(
      {"separable_conv2d" + suffix, [=, &weights, &grad, &y_given](Executor& executor) {
         const SeparableArguments arguments{x_map, out,   weights.data(), weights.data() + 9 * 4 * in,
                                            mean,  scale, shift,          true};
         Array y(n * positions * out, precision), dx(n * positions * in, precision), depthwise(in * 9, precision),
             pointwise(out * in, precision);
         std::vector<float> means(out), variances(out), dscale(in), dshift(in);
         separable_conv2d(arguments, map_of(y, n, out, height, width), means.data(), variances.data(), executor);
         separable_conv2d_backward(
             arguments,
             {map_of(grad, n, out, height, width), map_of(y_given, n, out, height, width), y_mean, grad_mean, grad_var},
             {map_of(dx, n, in, height, width), depthwise.data(), pointwise.data(), dscale.data(), dshift.data()},
             executor);
         Hash hash;
         for (const Array* part : {&y, &dx, &depthwise, &pointwise}) hash.add(*part);
         return hash.add(means).add(variances).add(dscale).add(dshift);
       }});
  for (const int64_t kernel : {1, 3}) {
    cases.push_back(
        {cat("strided_conv2d ", kernel, suffix), [=, &weights, &bias, &grad, &y_given](Executor& executor) {
           const StridedArguments arguments{x_map, out, kernel, weights.data(), bias.data(), mean, scale, shift, true};

           Array y(n * halved_positions * out, precision), dx(n * positions * in, precision),
               dweight(out * in * kernel * kernel, precision), dbias(out, precision);
           std::vector<float> means(out), variances(out), dscale(in), dshift(in);
           strided_conv2d(arguments, map_of(y, n, out, half_height, half_width), means.data(), variances.data(),
                          executor);
           strided_conv2d_backward(
               arguments,
               {map_of(grad, n, out, half_height, half_width), map_of(y_given, n, out, half_height, half_width), y_mean,
                grad_mean, grad_var},
               {map_of(dx, n, in, height, width), dweight.data(), dbias.data(), dscale.data(), dshift.data()},
               executor);
           Hash hash;
           for (const Array* part : {&y, &dx, &dweight, &dbias}) hash.add(*part);
           return hash.add(means).add(variances).add(dscale).add(dshift);
         }});
  }
  const Array& shortcut = some(n * halved_positions * in);
  cases.push_back({"pool_shortcut" + suffix, [=, &shortcut, &grad](Executor& executor) {
                     const PoolShortcutArguments arguments{
                         x_map, mean,  scale, shift,  map_of(shortcut, n, in, half_height, half_width),
                         shift, scale, mean,  dropout};
                     Array y(n * halved_positions * in, precision), dx(n * positions * in, precision),
                         dshortcut(n * halved_positions * in, precision);
                     std::vector<float> vectors(4 * in);
                     pool_shortcut(arguments, map_of(y, n, in, half_height, half_width), executor);
                     pool_shortcut_backward(arguments, map_of(grad, n, in, half_height, half_width),
                                            {map_of(dx, n, in, height, width), vectors.data(), vectors.data() + in,
                                             map_of(dshortcut, n, in, half_height, half_width), vectors.data() + 2 * in,
                                             vectors.data() + 3 * in},
                                            executor);
                     return Hash().add(y).add(dx).add(dshortcut).add(vectors);
                   }});
  cases.push_back({"cs_attention" + suffix, [=, &weights, &grad](Executor& executor) {
                     constexpr int64_t hidden = 5;
                     const char* given = weights.data();
                     const AttentionArguments arguments{x_map, given, given, given, given, given, given, hidden};
                     Array y(n * positions * in, precision), dx(n * positions * in, precision);
                     Array spatial(18, precision), spatial_bias(1, precision), weight1(hidden * in, precision),
                         bias1(hidden, precision), weight2(in * hidden, precision), bias2(in, precision);
                     trained_attention(arguments, map_of(y, n, in, height, width), executor);
                     trained_attention_backward(arguments, map_of(grad, n, in, height, width),
                                                {map_of(dx, n, in, height, width), spatial.data(), spatial_bias.data(),
                                                 weight1.data(), bias1.data(), weight2.data(), bias2.data()},
                                                executor);
                     Hash hash;
                     for (const Array* part : {&y, &dx, &spatial, &spatial_bias, &weight1, &bias1, &weight2, &bias2}) {
                       hash.add(*part);
                     }
                     return hash;
                   }});
  cases.push_back({"temporal_attention" + suffix, [=, &x, &weights, &grad](Executor& executor) {
                     constexpr int64_t clips = 41, tokens = 5, wide = 24, hidden = 31, rows = clips * tokens;
                     const char* given = weights.data();
                     const float* norm = scale;
                     const LayerArguments arguments{precision, clips, tokens, wide,  hidden, 3,       x.data(),
                                                    given,     given, given,  given, given,  given,   given,
                                                    given,     norm,  shift,  norm,  shift,  dropout, 1e-5f};
                     const auto array = [&](int64_t size) { return Array(size, precision); };
                     Array y = array(rows * wide), qkv = array(rows * 3 * wide), mixed = array(rows * wide),
                           sum1 = array(rows * wide), inner = array(rows * hidden), sum2 = array(rows * wide);
                     trained_layer(arguments,
                                   {y.data(), qkv.data(), mixed.data(), sum1.data(), inner.data(), sum2.data()},
                                   executor);
                     Array dx = array(rows * wide), din = array(3 * wide * wide), din_bias = array(3 * wide),
                           dout = array(wide * wide), dout_bias = array(wide), dff1 = array(hidden * wide),
                           dff1_bias = array(hidden), dff2 = array(wide * hidden), dff2_bias = array(wide);
                     std::vector<float> norms(4 * wide);
                     trained_layer_backward(
                         arguments, {grad.data(), qkv.data(), mixed.data(), sum1.data(), inner.data(), sum2.data()},
                         {dx.data(), din.data(), din_bias.data(), dout.data(), dout_bias.data(), dff1.data(),
                          dff1_bias.data(), dff2.data(), dff2_bias.data(), norms.data(), norms.data() + wide,
                          norms.data() + 2 * wide, norms.data() + 3 * wide},
                         executor);
                     Hash hash;
                     for (const Array* part : {&y, &qkv, &mixed, &sum1, &inner, &sum2, &dx, &din, &din_bias, &dout,
                                               &dout_bias, &dff1, &dff1_bias, &dff2, &dff2_bias}) {
                       hash.add(*part);
                     }
                     return hash.add(norms);
                   }});
  cases.push_back({"emotion_head" + suffix, [=, &x, &weights, &grad](Executor& executor) {
                     constexpr int64_t clips = 13, tokens = 6, wide = 20, statistics = 8, classes = 4;
                     const HeadArguments arguments{precision,      clips,          tokens,     wide,
                                                   statistics,     classes,        true,       x.data(),
                                                   weights.data(), weights.data(), grad.data()};
                     const int64_t features = arguments.features();
                     Array feature(clips * features, precision), logits(clips * classes, precision),
                         dtokens(clips * tokens * wide, precision), dweight(classes * features, precision),
                         dbias(classes, precision), dstatistics(clips * statistics, precision);
                     trained_head(arguments, feature.data(), logits.data(), executor);
                     trained_head_backward(arguments,
                                           {grad.data(), grad.data(), feature.data(), dtokens.data(), dweight.data(),
                                            dbias.data(), dstatistics.data()},
                                           executor);
                     Hash hash;
                     for (const Array* part : {&feature, &logits, &dtokens, &dweight, &dbias, &dstatistics}) {
                       hash.add(*part);
                     }
                     return hash;
                   }});
  return cases;
}

// A piece that throws: the others end, the caller hears of it, the pool goes on.
uint64_t thrown(Executor& executor) {
  try {
    executor.parallel_for(100, 1, [](int64_t begin, int64_t end, int) {
      if (begin <= 50 && 50 < end) throw std::runtime_error("piece 50");
    });
  } catch (const std::runtime_error& error) {
    return Hash().add(error.what(), 8);
  }
  return 0;
}

// Whether a child finds a lock open that another thread of its parent held when it was made.
bool open_after_a_fork() {
  ForkMutex mutex;
  std::atomic<bool> held{false};
  std::thread holder([&] {
    const std::lock_guard<ForkMutex> lock(mutex);
    held = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  });
  while (!held) std::this_thread::yield();
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    mutex.lock();
    _exit(0);
  }
  holder.join();
  int status = -1;
  waitpid(child, &status, 0);
  return status == 0;
}

// Whether all cases, in an order of this caller's own, give what they gave alone.
bool agrees(const std::vector<Case>& cases, const std::vector<uint64_t>& expected, int rounds, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<size_t> order(cases.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  bool good = true;
  for (int round = 0; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), generator);
    for (const size_t i : order) {
      PoolExecutor executor(1 + static_cast<int>(generator() % kMostThreads));
      if (cases[i].run(executor) == expected[i]) continue;
      std::fprintf(stderr, "%s: expected the same bits from %d threads, got others\n", cases[i].name.c_str(),
                   executor.threads());
      good = false;
    }
  }
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s MODEL.safetensors THREADS ROUNDS\n", argv[0]);
    return 2;
  }
  const int threads = std::atoi(argv[2]), rounds = std::atoi(argv[3]);
  std::vector<Case> cases = model_cases(argv[1]);
  for (const Precision precision : {Precision::float32, Precision::bf16}) {
    for (Case& each : training_cases(precision)) cases.push_back(std::move(each));
  }
  cases.push_back({"an exception", &thrown});
  std::vector<uint64_t> expected;
  SerialExecutor alone;
  for (const Case& each : cases) {
    expected.push_back(each.run(alone));
    std::printf("%016llx %s\n", static_cast<unsigned long long>(expected.back()), each.name.c_str());
  }
  std::vector<std::thread> callers;
  std::atomic<bool> good{true};
  for (int i = 0; i < threads; ++i) {
    callers.emplace_back([&, i] {
      if (!agrees(cases, expected, rounds, static_cast<unsigned>(i))) good = false;
    });
  }
  for (std::thread& caller : callers) caller.join();
  if (!open_after_a_fork()) {
    std::fprintf(stderr, "fork: expected the child to find an open lock, got one that stays closed\n");
    good = false;
  }
  return good ? 0 : 1;
}
