// kDoubleLanes frames at once, one per lane: every step below is the plain per-frame algorithm on vectors.
//
// The real transform of n_fft points is a complex one of half = n_fft / 2 (even samples real, odd imaginary) in radix-4
// passes that leave the outputs in digit-reversed order, and an unpacking step that reads them back through a table.
#include <algorithm>

#include "common/simd.h"
#include "ops/log_mel/log_mel.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

constexpr int kLanes = kDoubleLanes;
constexpr double kEps = 2.220446049250313e-16;  // what replaces an empty band before the log

// Natural log of x > 0, within 1 ulp.  x = 2^e m with m in [sqrt(1/2), sqrt(2)), s = (m-1) / (m+1),
// log m = 2 s + s z P(z), z = s^2; P is our minimax fit on that interval (error 2^-59 of the result).
AVSER_INLINE vdouble log_of(vdouble x) {
  constexpr int64_t kRootHalf = 0x3fe6a09e667f3bcd;  // bits of sqrt(1/2)
  constexpr int64_t kMantissa = 0x000fffffffffffff;
  constexpr int64_t kTwo52 = 0x4330000000000000;
  const vdouble smallest = broadcast(2.2250738585072014e-308);
  const auto subnormal = x < smallest;
  const vdouble scaled = subnormal ? x * broadcast(18014398509481984.0) : x;  // 2^54
  const vint64 shifted = as_bits(scaled) + (0x3ff0000000000000 - kRootHalf);
  // The biased exponent becomes a double by standing in the mantissa of 2^52.
  const vdouble biased = from_bits((shifted >> 52) | kTwo52) - broadcast(4503599627370496.0);
  const vdouble e = biased - (subnormal ? broadcast(1023.0 + 54.0) : broadcast(1023.0));
  const vdouble f = from_bits((shifted & kMantissa) + kRootHalf) - broadcast(1.0);
  const vdouble s = f / (f + broadcast(2.0));
  const vdouble z = s * s;
  vdouble p = broadcast(0.14796110331388546443);
  p = fma(p, z, broadcast(0.1531403538195311792));
  p = fma(p, z, broadcast(0.18183564882245180904));
  p = fma(p, z, broadcast(0.22222198563254132104));
  p = fma(p, z, broadcast(0.28571428742475952742));
  p = fma(p, z, broadcast(0.39999999999414326496));
  p = fma(p, z, broadcast(0.6666666666666734456));
  // 2 s = f - s f, and s f = f^2 / 2 - s f^2 / 2: the large part f - f^2 / 2 is known without s's rounding.
  const vdouble half_square = broadcast(0.5) * f * f;
  const vdouble tail = fma(s, fma(p, z, half_square), e * broadcast(1.90821492927058770002e-10));  // low part of ln 2
  const vdouble result = fma(e, broadcast(6.93147180369123816490e-01), f - (half_square - tail));  // high part, 32 bits
  return x < broadcast(__builtin_inf()) ? result : x;  // infinity and NaN stay
}

void log_many(const double* x, double* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(y + i, log_of(load(x + i)));
}

// Sample rows: row r holds the pre-emphasised samples r, r + step, r + 2 step, ... counted from the block's first
// sample, so that sample t of the block's frames is the vector at row t % step, column t / step.  Each sample is
// converted once although it stands in frame_length / frame_step frames.  One more row of zeros stands for the
// transform's padding.
struct Rows {
  int64_t rows, columns;
  explicit Rows(const LogMelOptions& o)
      : rows(std::min(o.frame_step, o.frame_length)), columns(kLanes + (o.frame_length - 1) / o.frame_step) {}
  int64_t doubles() const { return (rows + 1) * columns; }
};

// What a block needs besides its input: everything is written before it is read, and the parts that share memory are
// never in use at the same time.
struct Memory {
  double* z;         // 2 half vectors; before the transform: the samples, column after column
  double* rows;      // Rows::doubles(); after the first pass: the spectrum, half + 1 vectors
  double* features;  // mel_bands vectors
  int32_t* place;    // [n_fft] where in `rows` the vector of sample t begins

  static int64_t align(int64_t doubles) { return (doubles + 7) / 8 * 8; }
  static int64_t z_size(const LogMelTables& t, const Rows& shape) {
    return align(std::max(2 * kLanes * t.spectrum.half, shape.rows * shape.columns));
  }
  static int64_t rows_size(const LogMelTables& t, const Rows& shape) {
    return align(std::max(shape.doubles(), kLanes * (t.spectrum.half + 1)));
  }
  static int64_t bytes(const LogMelTables& t, const Rows& shape) {
    return 8 * (z_size(t, shape) + rows_size(t, shape) + kLanes * t.options.mel_bands + t.spectrum.half);
  }
  Memory(double* scratch, const LogMelTables& t, const Rows& shape)
      : z(scratch),
        rows(z + z_size(t, shape)),
        features(rows + rows_size(t, shape)),
        place(reinterpret_cast<int32_t*>(features + kLanes * t.options.mel_bands)) {
    const LogMelOptions& o = t.options;
    int64_t row = 0, column = 0;
    for (int64_t i = 0; i < o.n_fft; ++i) {
      place[i] = static_cast<int32_t>(i < o.frame_length ? row * shape.columns + column : shape.rows * shape.columns);
      if (++row == o.frame_step) {
        row = 0;
        ++column;
      }
    }
  }
};

template <typename S>
void fill_rows(const S* x, int64_t stride, int64_t samples, const LogMelOptions& o, const Rows& shape,
               int64_t first_frame, double* emphasised, double* rows) {
  for (int64_t column = 0; column < shape.columns; ++column) {
    const int64_t start = (first_frame + column) * o.frame_step;
    const int64_t count = std::clamp<int64_t>(samples - start, 0, shape.rows);
    double* y = emphasised + column * shape.rows;
    const S* from = x + start * stride;
    int64_t i = 0;
    if (start == 0 && count > 0) {  // the first sample of a waveform has no predecessor and is kept
      y[0] = static_cast<double>(from[0]);
      i = 1;
    }
    if (stride == 1) {
      for (; i < count; ++i) y[i] = static_cast<double>(from[i]) - o.preemphasis * static_cast<double>(from[i - 1]);
    } else {
      for (; i < count; ++i) {
        y[i] = static_cast<double>(from[i * stride]) - o.preemphasis * static_cast<double>(from[(i - 1) * stride]);
      }
    }
    for (; i < shape.rows; ++i) y[i] = 0.0;
  }
  const int64_t whole_rows = shape.rows / kLanes * kLanes, whole_columns = shape.columns / kLanes * kLanes;
  for (int64_t row = 0; row < whole_rows; row += kLanes) {
    for (int64_t column = 0; column < whole_columns; column += kLanes) {
      vdouble v[kLanes];
      for (int k = 0; k < kLanes; ++k) v[k] = load(emphasised + (column + k) * shape.rows + row);
      transpose(v);
      for (int k = 0; k < kLanes; ++k) store(rows + (row + k) * shape.columns + column, v[k]);
    }
  }
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int64_t column = row < whole_rows ? whole_columns : 0; column < shape.columns; ++column) {
      rows[row * shape.columns + column] = emphasised[column * shape.rows + row];
    }
  }
  for (int64_t column = 0; column < shape.columns; ++column) rows[shape.rows * shape.columns + column] = 0.0;
}

struct Complex {
  vdouble re, im;
};
AVSER_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
AVSER_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
// times (c - i s)
AVSER_INLINE Complex rotate(Complex a, const double* cs) {
  const vdouble c = broadcast(cs[0]), s = broadcast(cs[1]);
  return {fma(a.re, c, a.im * s), fma(a.im, c, -(a.re * s))};
}
AVSER_INLINE Complex get(const double* z, int64_t i) {
  return {load(z + 2 * kLanes * i), load(z + (2 * i + 1) * kLanes)};
}
AVSER_INLINE void put(double* z, int64_t i, Complex v) {
  store(z + 2 * kLanes * i, v.re);
  store(z + (2 * i + 1) * kLanes, v.im);
}

// a, b, c, d are a quarter of the block's length apart.
template <bool kRotate>
AVSER_INLINE void radix4(double* z, int64_t at, int64_t quarter, Complex a, Complex b, Complex c, Complex d,
                         const double* w) {
  const Complex t0 = a + c, t1 = a - c, t2 = b + d, t3 = b - d;
  const Complex y1 = {t1.re + t3.im, t1.im - t3.re}, y2 = t0 - t2, y3 = {t1.re - t3.im, t1.im + t3.re};
  put(z, at, t0 + t2);
  put(z, at + quarter, kRotate ? rotate(y1, w) : y1);
  put(z, at + 2 * quarter, kRotate ? rotate(y2, w + 2) : y2);
  put(z, at + 3 * quarter, kRotate ? rotate(y3, w + 4) : y3);
}

template <bool kRotate>
AVSER_INLINE void radix4_inside(double* z, int64_t at, int64_t quarter, const double* w) {
  const Complex a = get(z, at), b = get(z, at + quarter), c = get(z, at + 2 * quarter), d = get(z, at + 3 * quarter);
  radix4<kRotate>(z, at, quarter, a, b, c, d, w);
}

// All passes of a block of `length` points, one quarter after the other so that it stays in the nearest cache.
void passes(double* z, int64_t length, const double* w) {
  if (length == 2) {
    const Complex a = get(z, 0), b = get(z, 1);
    put(z, 0, a + b);
    put(z, 1, a - b);
  }
  if (length < 4) return;
  const int64_t quarter = length / 4;
  radix4_inside<false>(z, 0, quarter, w);
  for (int64_t j = 1; j < quarter; ++j, w += 6) radix4_inside<true>(z, j, quarter, w);
  if (quarter == 1) return;
  for (int64_t k = 0; k < 4; ++k) passes(z + 2 * kLanes * k * quarter, quarter, w);
}

// From the vector value(i) of each real point i to the complex points in digit-reversed order.
template <class Value>
void transform(const RealTransform& t, const Value& value, double* z) {
  const int64_t quarter = t.half / 4;
  const double* w = t.twiddles.data();
  const auto pair = [&](int64_t i) { return Complex{value(2 * i), value(2 * i + 1)}; };
  radix4<false>(z, 0, quarter, pair(0), pair(quarter), pair(2 * quarter), pair(3 * quarter), w);
  for (int64_t j = 1; j < quarter; ++j, w += 6) {
    radix4<true>(z, j, quarter, pair(j), pair(j + quarter), pair(j + 2 * quarter), pair(j + 3 * quarter), w);
  }
  for (int64_t k = 0; k < 4; ++k) passes(z + 2 * kLanes * k * quarter, quarter, w);
}

// Twice the transform's bins k and half - k, 0 < k <= half / 2.  With E, O the transforms of the even and odd points,
// X[k] = E + w^k O and X[half - k] = conj(E - w^k O).
struct Bins {
  Complex e, q;
  AVSER_INLINE Bins(const double* z, const RealTransform& t, int64_t k) {
    const Complex a = get(z, t.position[k]), b = get(z, t.position[t.half - k]);
    e = {a.re + b.re, a.im - b.im};
    q = rotate({a.im + b.im, b.re - a.re}, t.unpack.data() + 2 * k);
  }
  AVSER_INLINE Complex low() const { return e + q; }
  AVSER_INLINE Complex high() const {
    const Complex y = e - q;
    return {y.re, -y.im};
  }
};

// |X[k]|^2 / n_fft for k in [0, half].
void power(const double* z, const LogMelTables& t, double* spectrum) {
  const int64_t half = t.spectrum.half;
  const double scale = 1.0 / static_cast<double>(t.options.n_fft);  // exact, a power of two
  {
    const Complex first = get(z, 0);
    const vdouble x = first.re + first.im, y = first.re - first.im;
    store(spectrum, x * x * broadcast(scale));
    store(spectrum + half * kLanes, y * y * broadcast(scale));
  }
  const vdouble quarter = broadcast(0.25 * scale);  // the bins below are doubled
  for (int64_t k = 1; k <= half / 2; ++k) {
    const Bins bins(z, t.spectrum, k);
    const Complex x = bins.low(), y = bins.high();
    store(spectrum + k * kLanes, fma(x.re, x.re, x.im * x.im) * quarter);
    store(spectrum + (half - k) * kLanes, fma(y.re, y.re, y.im * y.im) * quarter);
  }
}

void bands(const double* spectrum, const LogMelTables& t, double* features) {
  const double* weights = t.weights.data();
  // 0, or NaN when the frame holds a NaN or an infinity: bands without a bin must say so too.
  const vdouble zero = load(spectrum) * broadcast(0.0);
  for (int64_t band = 0; band < t.options.mel_bands; ++band) {
    const double* from = spectrum + t.band_bin[band] * int64_t{kLanes};
    vdouble sum = zero;
    for (int32_t i = 0; i < t.band_size[band]; ++i) sum = fma(load(from + i * kLanes), broadcast(weights[i]), sum);
    weights += t.band_size[band];
    store(features + band * kLanes, log_of(sum == broadcast(0.0) ? broadcast(kEps) : sum));
  }
}

// From one vector per band to one row per frame.
template <typename T>
void write(const double* features, int64_t bands, int64_t count, T* out) {
  const int64_t whole = bands / kLanes * kLanes;
  for (int64_t band = 0; band < whole; band += kLanes) {
    vdouble v[kLanes];
    for (int k = 0; k < kLanes; ++k) v[k] = load(features + (band + k) * kLanes);
    transpose(v);
    for (int k = 0; k < kLanes; ++k) {
      if (k < count) store_as(out + k * bands + band, v[k]);
    }
  }
  for (int64_t band = whole; band < bands; ++band) {
    for (int64_t k = 0; k < count; ++k) out[k * bands + band] = static_cast<T>(features[band * kLanes + k]);
  }
}

// Power spectra of kLanes frames from `frame` on, in m.rows.
void spectra(const Waveform& waveform, const LogMelTables& t, const Rows& shape, int64_t frame, const Memory& m) {
  const auto fill = [&](const auto* x) {
    fill_rows(x, waveform.stride, waveform.samples, t.options, shape, frame, m.z, m.rows);
  };
  switch (waveform.type) {
    case SampleType::int16:
      fill(static_cast<const int16_t*>(waveform.data));
      break;
    case SampleType::float32:
      fill(static_cast<const float*>(waveform.data));
      break;
    case SampleType::float64:
      fill(static_cast<const double*>(waveform.data));
      break;
  }
  transform(t.spectrum, [&](int64_t i) { return load(m.rows + m.place[i]); }, m.z);
  power(m.z, t, m.rows);
}

// Behind the memory of the features: the autocorrelation.
struct VoiceMemory : Memory {
  double* lags;

  VoiceMemory(double* scratch, const LogMelTables& t, const Rows& shape)
      : Memory(scratch, t, shape), lags(scratch + Memory::bytes(t, shape) / 8) {}
  static int64_t bytes(const LogMelTables& t, const Rows& shape) {
    return Memory::bytes(t, shape) + 8 * (t.lag_end - t.lag_begin) * kLanes;
  }
};

int64_t scratch_bytes(const LogMelTables& t, bool voice) {
  const Rows shape(t.options);
  return voice ? VoiceMemory::bytes(t, shape) : Memory::bytes(t, shape);
}

// Whitens the spectrum.  Returns its cosine sum at lag 1: x[0] / 2 + sum of x[k] cos(pi k / half) - x[half] / 2.
vdouble whiten(const LogMelTables& t, double* spectrum) {
  const int64_t half = t.spectrum.half;
  const auto flat = [&](int64_t k) {
    const vdouble x = load(spectrum + k * kLanes) * broadcast(t.whiten[k]);
    store(spectrum + k * kLanes, x);
    return x;
  };
  vdouble sums[2] = {broadcast(0.5) * (flat(0) - flat(half)), vdouble{}};
  for (int64_t k = 1; k < half / 2; ++k) {
    sums[k % 2] = fma(flat(k) - flat(half - k), broadcast(t.spectrum.unpack[2 * k]), sums[k % 2]);
  }
  flat(half / 2);
  return sums[0] + sums[1];
}

// The autocorrelation, of its value at lag 0, from a whitened spectrum: the transform of a real and even sequence of
// n_fft points.  Folded to (x[k] + x[half - k]) / 2 - sin(pi k / half) (x[k] - x[half - k]), half as many real points
// have the even lags as real parts of their bins, and as imaginary parts what one odd lag is less than the last.
void autocorrelation(const double* spectrum, vdouble first_lag, const LogMelTables& t, double* z, double* lags) {
  const RealTransform& folded = t.folded;
  const int64_t half = t.spectrum.half;
  const auto fold = [&](int64_t k) {
    const vdouble a = load(spectrum + k * kLanes), b = load(spectrum + (half - k) * kLanes);
    return fma(a - b, broadcast(-t.spectrum.unpack[2 * std::min(k, half - k) + 1]), broadcast(0.5) * (a + b));
  };
  transform(folded, fold, z);
  const Complex first = get(z, 0);
  const vdouble energy = first.re + first.im, floor = broadcast(1e-30);
  const vdouble unit = broadcast(0.5) / (energy > floor ? energy : floor);
  const auto keep = [&](int64_t lag, vdouble value) {
    const int64_t at = lag - t.lag_begin;
    if (at >= 0 && lag < t.lag_end) store(lags + at * kLanes, value * unit * broadcast(t.lag_scale[at]));
  };
  vdouble odd = first_lag + first_lag;
  for (int64_t k = 1; 2 * k < t.lag_end; ++k) {
    const Complex bin = 2 * k <= folded.half ? Bins(z, folded, k).low() : Bins(z, folded, folded.half - k).high();
    odd -= bin.im;
    keep(2 * k, bin.re);
    keep(2 * k + 1, odd);
  }
}

// Values of kLanes frames, each a vector, from whitened spectra and their autocorrelation.
void describe(const double* spectrum, const double* lags, const LogMelTables& t, double* values) {
  const int64_t count = t.lag_end - t.lag_begin;
  const vdouble zero{}, one = broadcast(1.0);
  vdouble best = broadcast(-__builtin_inf()), lag = broadcast(static_cast<double>(t.lag_begin + 1));
  vdouble left = zero, top = zero, right = zero;
  for (int64_t i = 1; i + 1 < count; ++i) {
    const vdouble a = load(lags + (i - 1) * kLanes), b = load(lags + i * kLanes), c = load(lags + (i + 1) * kLanes);
    const vdouble score = b + broadcast(t.lag_bonus[i]);
    const auto better = (b > a) & (b >= c) & (score > best);
    best = better ? score : best;
    lag = better ? broadcast(static_cast<double>(t.lag_begin + i)) : lag;
    left = better ? a : left;
    top = better ? b : top;
    right = better ? c : right;
  }
  // The peak of the parabola through three points, at most half a sample away.
  const vdouble half = broadcast(0.5), bend = left - (top + top) + right;
  const vdouble shift = max(min(half * (left - right) / (bend - broadcast(1e-12)), half), -half);
  const vdouble height = top - broadcast(0.25) * (left - right) * shift;
  const vdouble periodic = max(min(height, broadcast(0.999)), zero);
  const vdouble bounded = max(periodic, broadcast(0.01));
  const vdouble rate = broadcast(static_cast<double>(t.options.sampling_rate));
  const vdouble hertz = rate / (lag + shift);
  const vdouble bin = hertz * broadcast(static_cast<double>(t.options.n_fft)) / rate;
  const auto level = [&](vdouble bins) {  // of the loudest of three bins
    vdouble found{};
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto near = static_cast<int64_t>(bins[lane] + 0.5);
      const int64_t at = std::clamp<int64_t>(near, 1, t.spectrum.half - 1);
      const double* p = spectrum + at * kLanes + lane;
      found[lane] = std::max({p[-kLanes], p[0], p[kLanes]});
    }
    return log_of(found + broadcast(1e-3));
  };
  store(values, log_of(hertz) * broadcast(1.4426950408889634));
  store(values + kLanes, log_of(bounded / (one - bounded)) * broadcast(4.3429448190325176));
  store(values + 2 * kLanes, level(bin) - level(bin + bin));
  store(values + 3 * kLanes, periodic);
}

// From power spectra to the voice; the spectra are whitened.
void listen(const VoiceMemory& m, const LogMelTables& t) {
  const vdouble first_lag = whiten(t, m.rows);
  autocorrelation(m.rows, first_lag, t, m.z, m.lags);
  describe(m.rows, m.lags, t, m.features);
  std::fill_n(m.features + kVoiceValues * kLanes, (t.options.mel_bands - kVoiceValues) * kLanes, 0.0);
}

template <typename T>
void run(const Waveform& waveform, const LogMelTables& t, int64_t begin, int64_t end, T* out, T* voice,
         double* scratch) {
  const Rows shape(t.options);
  const int64_t mel_bands = t.options.mel_bands;
  const auto frames = [&](const auto& m, const auto& more) {
    for (int64_t frame = begin; frame < end; frame += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, end - frame);
      spectra(waveform, t, shape, frame, m);
      bands(m.rows, t, m.features);
      write(m.features, mel_bands, count, out + frame * mel_bands);
      more(m, frame, count);
    }
  };
  if (voice == nullptr) return frames(Memory(scratch, t, shape), [](const Memory&, int64_t, int64_t) {});
  frames(VoiceMemory(scratch, t, shape), [&](const VoiceMemory& m, int64_t frame, int64_t count) {
    listen(m, t);
    write(m.features, mel_bands, count, voice + frame * mel_bands);
  });
}

}  // namespace

const LogMelKernels& log_mel_kernels() {
  static const LogMelKernels kernels{kLanes, &scratch_bytes, &run<float>, &run<double>, &log_many};
  return kernels;
}

}  // namespace avser::AVSER_ISA_NAMESPACE
