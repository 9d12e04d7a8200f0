#include "recordings/bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/check.h"
#include "common/executor.h"
#include "model/front_end.h"
#include "recordings/recordings.h"

namespace py = pybind11;

namespace avser {
namespace {

// An array that owns the block.
template <typename T>
py::array array_of(Block<T>& block, std::vector<py::ssize_t> shape) {
  T* data = block.data.get();
  const py::capsule owner(data, [](void* p) { delete[] static_cast<T*>(p); });
  block.data.release();
  return py::array_t<T>(std::move(shape), data, owner);
}

py::array array_of(Sound& sound) {
  return sound.whole.size > 0 ? array_of(sound.whole, {sound.whole.size}) : array_of(sound.real, {sound.real.size});
}

py::list read_files(const std::vector<std::string>& paths, int64_t limit) {
  std::vector<Block<uint8_t>> files;
  {
    const py::gil_scoped_release release;
    int64_t total = 0;
    for (const std::string& path : paths) {
      files.push_back(read_file(path, limit));
      total += files.back().size;
      if (total >= limit) break;
    }
  }
  py::list out;
  for (Block<uint8_t>& file : files) {
    if (file.size == 0) {
      out.append(py::none());
    } else {
      out.append(array_of(file, {file.size}));
    }
  }
  return out;
}

py::array at_rate_array(const py::array_t<float, py::array::c_style | py::array::forcecast>& waveform,
                        int64_t from_rate, int64_t to_rate) {
  AVSER_CHECK(waveform.ndim() == 1, input, "at_rate: waveform: expected a 1-D array, got ", waveform.ndim(),
              " dimensions");
  Sound sound;
  {
    const py::gil_scoped_release release;
    sound = at_rate(waveform.data(), waveform.shape(0), 1, from_rate, to_rate);
  }
  return array_of(sound);
}

class Decoder {
 public:
  explicit Decoder(const Sndfile& library) : library_(library) {}

  py::list decode(const std::vector<py::array_t<uint8_t, py::array::c_style>>& files, int64_t rate) const {
    std::vector<Sound> sounds(files.size());
    {
      const py::gil_scoped_release release;
      for (size_t i = 0; i < files.size(); ++i) {
        sounds[i] = avser::decode(library_, files[i].data(), files[i].size(), rate);
      }
    }
    py::list out;
    for (Sound& sound : sounds) {
      if (sound.samples() == 0) {
        out.append(py::none());
      } else {
        out.append(py::make_tuple(array_of(sound), sound.file_rate));
      }
    }
    return out;
  }

 private:
  Sndfile library_;
};

Waveform view(const py::array& array) {
  const bool whole = py::dtype::of<int16_t>().equal(array.dtype());
  const bool fits = array.ndim() == 1 && (whole || py::dtype::of<float>().equal(array.dtype())) &&
                    (array.flags() & py::array::c_style) != 0;
  AVSER_CHECK(fits && array.shape(0) >= 1, input,
              "front_end: waveforms: expected contiguous 1-D arrays of int16 or float32 with at least 1 sample, got ",
              std::string(py::str(array.dtype())), " of shape ", std::string(py::str(array.attr("shape"))));
  return {array.data(), whole ? SampleType::int16 : SampleType::float32, array.shape(0)};
}

py::list front_end_arrays(const std::vector<py::array>& arrays, int64_t channels, int64_t delta_window, bool voice,
                          const LogMelOptions& options, int threads) {
  voice ? check_voice(options) : check_log_mel(options);
  AVSER_CHECK(channels >= 1 && channels <= 3, config, "front_end: channels: expected 1, 2 or 3, got ", channels);
  const FrontEnd front_end{options, channels, delta_window, {}, voice};
  std::vector<Waveform> waveforms;
  for (const py::array& array : arrays) waveforms.push_back(view(array));
  PoolExecutor executor(threads);
  std::vector<Block<float>> made;
  {
    const py::gil_scoped_release release;
    for (const Waveform& waveform : waveforms) {
      made.emplace_back(front_end.planes() * log_mel_frames(waveform.samples, options) * options.mel_bands);
      run_front_end(waveform, front_end, made.back().data.get(), executor);
    }
  }
  py::list out;
  for (size_t i = 0; i < made.size(); ++i) {
    const int64_t frames = log_mel_frames(waveforms[i].samples, options);
    out.append(array_of(made[i], {front_end.planes(), frames, options.mel_bands}));
  }
  return out;
}

}  // namespace

void bind_recordings(py::module_& m) {
  const LogMelOptions o;
  m.def("read_files", &read_files, py::arg("paths"), py::arg("limit"));
  m.def("at_rate", &at_rate_array, py::arg("waveform"), py::arg("from_rate"), py::arg("to_rate"));
  m.def(
      "front_end",
      [](const std::vector<py::array>& waveforms, int64_t channels, int64_t delta_window, int64_t sampling_rate,
         int64_t mel_bands, int64_t frame_length, int64_t frame_step, int64_t n_fft, double preemphasis, double low_hz,
         double high_hz, double vtlp, bool voice, int threads) {
        return front_end_arrays(
            waveforms, channels, delta_window, voice,
            {sampling_rate, mel_bands, frame_length, frame_step, n_fft, preemphasis, low_hz, high_hz, vtlp}, threads);
      },
      py::arg("waveforms"), py::kw_only(), py::arg("channels") = 1, py::arg("delta_window") = 2,
      py::arg("sampling_rate") = o.sampling_rate, py::arg("mel_bands") = o.mel_bands,
      py::arg("frame_length") = o.frame_length, py::arg("frame_step") = o.frame_step, py::arg("n_fft") = o.n_fft,
      py::arg("preemphasis") = o.preemphasis, py::arg("low_hz") = o.low_hz, py::arg("high_hz") = o.high_hz,
      py::arg("vtlp") = o.vtlp, py::arg("voice") = false, py::arg("threads") = 1);
  py::class_<Decoder>(m, "Decoder")
      .def(py::init([](uintptr_t open_virtual, uintptr_t readf_short, uintptr_t readf_float, uintptr_t error,
                       uintptr_t close) { return Decoder({open_virtual, readf_short, readf_float, error, close}); }),
           py::kw_only(), py::arg("sf_open_virtual"), py::arg("sf_readf_short"), py::arg("sf_readf_float"),
           py::arg("sf_error"), py::arg("sf_close"))
      .def("decode", &Decoder::decode, py::arg("files"), py::arg("sampling_rate"));
}

}  // namespace avser
