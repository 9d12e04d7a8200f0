#include "engine/cuda/speech.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/check.h"

namespace avser::gpu {
namespace {

// What goes to the GPU in one piece, if recordings end there; with kMostClips.
constexpr int64_t kMostSamples = int64_t{1} << 26;
constexpr int64_t kMostWindow = 1000;  // as in avser_fast/config.py
// Blocks of a multiprocessor at once.
constexpr int kLogMelBlocks = 16, kClipBlocks = 8;

int64_t power_of_two(int64_t least) {
  int64_t n = 1;
  while (n < least) n *= 2;
  return n;
}

int checked_device(int device, const GpuSpeech::Networks& networks) {
  const int count = device_count();
  AVSER_CHECK(device >= 0 && device < count, backend, "CUDA: expected a GPU from 0 to ", count - 1, ", got ", device);
  for (const auto& network : networks) {
    AVSER_CHECK(network != nullptr, config, "GpuSpeech: networks: expected GpuEngine or GpuResNet18, got None");
    AVSER_CHECK(network->device_index() == device, config, "GpuSpeech: networks: expected all on GPU ", device,
                ", got one on GPU ", network->device_index());
  }
  return device;
}

}  // namespace

// What a batch becomes on its way to the networks' outputs.
struct GpuSpeech::Features {
  int64_t recordings, frames, clips;
  DeviceMemory memory;
  float* log_mel;              // (frames, bands)
  float* voice;                // (frames, kVoiceValues), null unless wanted
  BandStatistics* statistics;  // (recordings, channels, bands)
  std::vector<float*> network_clips;
  std::vector<std::unique_ptr<GpuModel::Activations>> activations;
};

// Of calls from and to the host's memory.
struct GpuSpeech::Workspace {
  struct Head {
    Batch batch;
    Totals totals;
  };
  // In the host's memory and, at the same places, in the GPU's.
  struct Arrays {
    Head* head;
    Recording* list;
    float* samples;
    std::vector<Scores> outputs;  // side by side; no probabilities, for which utterances would have to be known
    char* outputs_begin;
  };

  int64_t samples;
  std::unique_ptr<Features> features;
  OwnedStream stream;
  DeviceMemory memory;
  PinnedMemory staging;
  Arrays host, device;
  Graph graph;

  Recordings recordings() const {
    Recordings all{};
    all.samples = device.samples;
    all.type = SampleType::float32;
    all.sample_stride = 1;
    all.totals = &device.head->totals;
    all.list = device.list;
    return all;
  }
};

GpuSpeech::GpuSpeech(const FrontEnd& front_end, const ClipRule& rule, Networks networks, int device)
    : rule_(rule),
      networks_(std::move(networks)),
      voice_(front_end.voice),
      device_(checked_device(device, networks_)),
      multiprocessors_(device_info(device_).multiprocessors) {
  const LogMelOptions& options = front_end.log_mel;
  const Normalization& normalization = front_end.normalization;
  AVSER_CHECK(front_end.channels >= 1 && front_end.channels <= kMostFeatureChannels, config,
              "GpuSpeech: channels: expected 1, 2 or 3, got ", front_end.channels);
  AVSER_CHECK(front_end.delta_window >= 1 && front_end.delta_window <= kMostWindow, config,
              "GpuSpeech: delta_window: expected 1..", kMostWindow, ", got ", front_end.delta_window);
  for (const auto& network : networks_) {
    const std::vector<int64_t>& shape = network->clip_shape();
    AVSER_CHECK(shape[1] == rule.clip_frames && shape[2] == options.mel_bands, config,
                "GpuSpeech: networks: expected clips of ", rule.clip_frames, " frames and ", options.mel_bands,
                " bands, got ", shape[1], " and ", shape[2]);
    if (network->voice()) {
      AVSER_CHECK(front_end.voice && shape[0] == front_end.planes(), config, "GpuSpeech: networks: expected clips of ",
                  front_end.channels, " channels and ", front_end.voice ? "" : "no ", "voice, got ", shape[0] - 1,
                  " and a voice");
    } else {
      AVSER_CHECK(shape[0] <= front_end.channels, config, "GpuSpeech: networks: expected clips of at most ",
                  front_end.channels, " channels, got ", shape[0]);
    }
  }
  stage_.channels = static_cast<int>(front_end.channels);
  stage_.bands = static_cast<int>(options.mel_bands);
  stage_.clip_frames = static_cast<int>(rule.clip_frames);
  stage_.deltas.window = static_cast<int>(front_end.delta_window);
  for (int64_t n = 1; n <= front_end.delta_window; ++n) stage_.deltas.divisor += 2.0 * static_cast<double>(n * n);
  stage_.normalize.rule = normalization.rule;
  check_normalization(normalization, front_end.channels);
  if (normalization.rule == NormalizeRule::global) {
    std::copy(normalization.mean.begin(), normalization.mean.end(), stage_.normalize.mean);
    std::copy(normalization.std.begin(), normalization.std.end(), stage_.normalize.std);
  }
  clip_starts(1, rule.clips, rule.clip_frames, rule.rule);  // says now what is wrong with the rule
  const OnDevice guard(device_);
  log_mel_ = std::make_unique<const GpuLogMel>(options, voice_);
  const int64_t most = device_info(device_).shared_bytes;
  AVSER_CHECK(log_mel_->shared_bytes() <= most, backend, "GpuSpeech: n_fft: ", log_mel_->shared_bytes(),
              " bytes of shared memory are needed for ", options.n_fft, " points, GPU ", device_, " has ", most);
}

GpuSpeech::~GpuSpeech() = default;

Recording GpuSpeech::recording_of(int64_t samples) const {
  AVSER_CHECK(samples <= INT32_MAX, input, "GpuSpeech: samples: expected at most ", INT32_MAX, " of a recording, got ",
              samples);
  const int64_t frames = log_mel_frames(samples, log_mel_->options());
  const ClipStarts starts = clip_starts(frames, rule_.clips, rule_.clip_frames, rule_.rule);
  Recording own{};
  own.samples = static_cast<int>(samples);
  own.frames = static_cast<int>(frames);
  own.clips = static_cast<int>(starts.voting);
  own.pad = static_cast<int>(starts.pad);
  own.filled = static_cast<int>(starts.filled);
  own.span = static_cast<int>(starts.span);
  return own;
}

int64_t GpuSpeech::clips_of(int64_t samples) const { return recording_of(samples).clips; }

std::unique_ptr<GpuSpeech::Features> GpuSpeech::make_features(int64_t recordings, int64_t frames, int64_t clips) const {
  auto own = std::make_unique<Features>();
  own->recordings = recordings;
  own->frames = frames;
  own->clips = clips;
  own->network_clips.resize(networks_.size());
  const auto lay_out = [&](char* base) {
    Layout layout(base);
    own->log_mel = layout.place<float>(frames * stage_.bands);
    own->voice = voice_ ? layout.place<float>(frames * kVoiceValues) : nullptr;
    own->statistics = layout.place<BandStatistics>(recordings * stage_.channels * stage_.bands);
    for (size_t i = 0; i < networks_.size(); ++i) {
      own->network_clips[i] = layout.place<float>(clips * networks_[i]->clip_floats());
    }
    return layout.bytes();
  };
  own->memory = allocate_device(lay_out(nullptr));
  lay_out(own->memory.get());
  for (const auto& network : networks_) own->activations.push_back(network->make_activations(clips));
  return own;
}

int GpuSpeech::blocks(int64_t wanted, int per_multiprocessor) const {
  return static_cast<int>(std::clamp<int64_t>(wanted, 1, int64_t{multiprocessors_} * per_multiprocessor));
}

void GpuSpeech::queue_features(const Features& own, const Recordings& recordings, int64_t frames, Stream stream) const {
  log_mel_->queue(recordings, blocks(frames, kLogMelBlocks), own.log_mel, own.voice, stream);
  if (stage_.normalize.rule != NormalizeRule::utterance) return;
  launch_statistics(stage_, recordings, own.log_mel, own.statistics,
                    blocks(own.recordings * stage_.channels, kClipBlocks), stream);
}

void GpuSpeech::queue_clips(const Features& own, const Recordings& recordings, int64_t channels, int64_t clips,
                            float* to, Stream stream) const {
  const int64_t elements = clips * channels * stage_.clip_frames * stage_.bands;
  launch_clips(stage_, recordings, own.log_mel, own.voice, own.statistics, static_cast<int>(channels), to,
               blocks((elements + kFrontEndThreads - 1) / kFrontEndThreads, kClipBlocks), stream);
}

void GpuSpeech::queue(const Features& own, const Recordings& recordings, int64_t frames, int64_t clips,
                      const Batch* batch, const Batch& given, const std::vector<Scores>& outputs, Stream stream) const {
  queue_features(own, recordings, frames, stream);
  for (size_t i = 0; i < networks_.size(); ++i) {
    queue_clips(own, recordings, networks_[i]->clip_shape()[0], clips, own.network_clips[i], stream);
    Run run{};
    run.batch = batch;
    run.given = given;
    run.clips = own.network_clips[i];
    run.features = outputs[i].features;
    run.logits = outputs[i].logits;
    run.probabilities = outputs[i].probabilities;
    networks_[i]->queue(*own.activations[i], run, stream);
  }
}

std::unique_ptr<GpuSpeech::Workspace> GpuSpeech::take(int64_t samples, int64_t frames, int64_t clips) const {
  const int64_t slots = slots_of(clips);
  auto found = idle_.take([&](const Workspace& own) {
    return own.features->clips == slots && own.features->frames >= frames && own.samples >= samples;
  });
  if (found != nullptr) return found;

  auto own = std::make_unique<Workspace>();
  own->samples = power_of_two(samples);
  own->features = make_features(slots, power_of_two(frames), slots);  // a recording has a clip at least
  own->stream = make_stream();
  const auto lay_out = [&](char* base, Workspace::Arrays& arrays) {
    Layout layout(base);
    arrays.head = layout.place<Workspace::Head>(1);
    arrays.list = layout.place<Recording>(slots);
    arrays.samples = layout.place<float>(own->samples);
    arrays.outputs_begin = layout.place<char>(0);
    arrays.outputs.clear();
    for (const auto& network : networks_) {
      float* const features = layout.place<float>(slots * network->features());
      arrays.outputs.push_back({features, layout.place<float>(slots * network->classes()), nullptr});
    }
    return layout.bytes();
  };
  const int64_t bytes = lay_out(nullptr, own->device);
  own->memory = allocate_device(bytes);
  own->staging = allocate_pinned(bytes);
  lay_out(own->memory.get(), own->device);
  lay_out(own->staging.get(), own->host);

  const Stream stream = own->stream.get();
  // Without the samples: how many they are differs from call to call.
  Capture capture(stream);
  queue(*own->features, own->recordings(), own->features->frames, slots, &own->device.head->batch, {},
        own->device.outputs, stream);
  copy_from_device(own->host.outputs_begin, own->device.outputs_begin,
                   own->memory.get() + bytes - own->device.outputs_begin, stream);
  own->graph = capture.finish();
  return own;
}

GpuSpeech::Piece GpuSpeech::piece_from(const std::vector<Samples>& recordings, size_t begin) const {
  Piece piece{begin, begin, {}};
  for (; piece.end < recordings.size(); ++piece.end) {
    Recording own = recording_of(recordings[piece.end].count);
    const bool full = piece.clips + own.clips > kMostClips || piece.samples + own.samples > kMostSamples;
    if (full && !piece.list.empty()) break;
    own.first_sample = piece.samples;
    own.first_frame = static_cast<int>(piece.frames);
    own.first_clip = static_cast<int>(piece.clips);
    piece.samples += own.samples;
    piece.frames += own.frames;
    piece.clips += own.clips;
    piece.list.push_back(own);
  }
  return piece;
}

std::unique_ptr<GpuSpeech::Workspace> GpuSpeech::begin(const std::vector<Samples>& recordings,
                                                       const Piece& piece) const {
  auto own = take(piece.samples, piece.frames, piece.clips);
  const Workspace::Arrays& host = own->host;
  const int clips = static_cast<int>(piece.clips);
  *host.head = {{clips, clips, 1}, {static_cast<int>(piece.list.size()), static_cast<int>(piece.frames), clips}};
  std::copy(piece.list.begin(), piece.list.end(), host.list);
  for (size_t i = piece.begin; i < piece.end; ++i) {
    std::copy_n(recordings[i].data, recordings[i].count, host.samples + piece.list[i - piece.begin].first_sample);
  }
  const int64_t bytes = reinterpret_cast<char*>(host.samples + piece.samples) - own->staging.get();
  copy_to_device(own->memory.get(), own->staging.get(), bytes, own->stream.get());
  return own;
}

void GpuSpeech::forward(const std::vector<Samples>& recordings, const std::vector<Scores>& outputs) const {
  const OnDevice guard(device_);
  int64_t done = 0;
  for (size_t first = 0; first < recordings.size();) {
    const Piece piece = piece_from(recordings, first);
    auto own = begin(recordings, piece);
    launch_graph(own->graph, own->stream.get());
    synchronize(own->stream.get());
    for (size_t i = 0; i < networks_.size(); ++i) {
      const int64_t width = networks_[i]->features(), classes = networks_[i]->classes();
      std::copy_n(own->host.outputs[i].features, piece.clips * width, outputs[i].features + done * width);
      std::copy_n(own->host.outputs[i].logits, piece.clips * classes, outputs[i].logits + done * classes);
    }
    done += piece.clips;
    first = piece.end;
    idle_.give_back(std::move(own));
  }
}

void GpuSpeech::clips(const std::vector<Samples>& recordings, float* out) const {
  const OnDevice guard(device_);
  const int64_t planes = clip_shape()[0];
  const int64_t clip_bytes = 4 * planes * stage_.clip_frames * stage_.bands;
  for (size_t first = 0; first < recordings.size();) {
    const Piece piece = piece_from(recordings, first);
    auto own = begin(recordings, piece);
    const Stream stream = own->stream.get();
    const DeviceMemory made = allocate_device(piece.clips * clip_bytes);
    queue_features(*own->features, own->recordings(), piece.frames, stream);
    queue_clips(*own->features, own->recordings(), planes, piece.clips, reinterpret_cast<float*>(made.get()), stream);
    copy_from_device(out, made.get(), piece.clips * clip_bytes, stream);
    synchronize(stream);
    out += piece.clips * clip_bytes / 4;
    first = piece.end;
    idle_.give_back(std::move(own));
  }
}

void GpuSpeech::forward_on_device(const void* samples, SampleType type, int64_t batch, int64_t count, int64_t stride,
                                  const std::vector<Scores>& outputs, Stream stream) const {
  if (batch == 0) return;
  const Recording given = recording_of(count);
  const int64_t frames = batch * given.frames, clips = batch * given.clips;
  AVSER_CHECK(frames <= INT32_MAX, input, "GpuSpeech: samples: expected at most ", INT32_MAX, " frames in a call, got ",
              frames);
  Recordings recordings{};
  recordings.samples = samples;
  recordings.type = type;
  recordings.sample_stride = 1;
  recordings.given_totals = {static_cast<int>(batch), static_cast<int>(frames), static_cast<int>(clips)};
  recordings.given = given;
  recordings.recording_stride = stride;
  const OnDevice guard(device_);
  const int64_t slots = slots_of(clips);
  queued_.with(
      stream, slots, [&](const Features& own) { return own.recordings >= batch && own.frames >= frames; },
      [&] { return make_features(power_of_two(batch), power_of_two(frames), slots); },
      [&](const Features& own) {
        queue(own, recordings, frames, clips, nullptr, {static_cast<int>(clips), given.clips, 1}, outputs, stream);
      });
}

}  // namespace avser::gpu
