#include "ops/gemm/gemm_amx.h"

#include <cstring>

#include "common/amx.h"
#include "ops/gemm/finish_cpu.h"

namespace avser::AVSER_ISA_NAMESPACE {
namespace {

// Tiles 0..3 are sums of two tiles of rows times two of outputs, 4 and 5 rows, 6 and 7 weights.
constexpr int kRows = 2 * amx::kRows;
constexpr int kWords = amx::kRowBytes / 4;  // of k in a tile
static_assert(kLanes == kWords && amx::kRows == kWords, "a tile of weights is a vector wide");

template <class T, int kSum, int kLeft, int kRight>
AVSER_INLINE void dot() {
  if constexpr (T::kPrecision == Precision::bf16) {
    amx::dot_bf16<kSum, kLeft, kRight>();
  } else {
    amx::dot_int8<kSum, kLeft, kRight>();
  }
}

// Words [word, word + count) of a row's operand, and zeros up to a tile's width.
AVSER_INLINE void gather(const GemmWindow& window, const void* x, int64_t word, int64_t count, uint32_t* to) {
  const uint32_t* from = static_cast<const uint32_t*>(x);
  int64_t done = 0;
  while (done < count) {
    const int64_t segment = (word + done) / window.words, offset = (word + done) % window.words;
    const int64_t run = count - done < window.words - offset ? count - done : window.words - offset;
    std::memcpy(to + done, from + segment * window.stride + offset, static_cast<size_t>(run) * 4);
    done += run;
  }
  if (count < kWords) std::memset(to + count, 0, static_cast<size_t>(kWords - count) * 4);
}

// Rows of a tile as they lie in memory, where they lie a constant number of bytes apart; 0: they do not.
AVSER_INLINE int64_t distance(const GemmWindow& window, const GemmRow* rows, int64_t count) {
  if (window.segments != 1 || count != amx::kRows) return 0;
  const char* first = static_cast<const char*>(rows[0].x);
  const int64_t apart = static_cast<const char*>(rows[1].x) - first;
  for (int64_t r = 2; r < count; ++r) {
    if (static_cast<const char*>(rows[r].x) != first + r * apart) return 0;
  }
  return apart;
}

template <int kTile>
AVSER_INLINE void load_rows(const GemmWindow& window, const GemmRow* rows, int64_t count, int64_t apart, int64_t word,
                            int64_t words) {
  if (apart != 0 && words == kWords) {
    return amx::load<kTile>(static_cast<const uint32_t*>(rows[0].x) + word, apart);
  }
  alignas(64) uint32_t gathered[amx::kRows][kWords];
  for (int64_t r = 0; r < count; ++r) gather(window, rows[r].x, word, words, gathered[r]);
  if (count < amx::kRows) std::memset(gathered[count], 0, static_cast<size_t>(amx::kRows - count) * amx::kRowBytes);
  amx::load<kTile>(gathered, amx::kRowBytes);
}

// `count` rows, at most kRows, and the panel at `column`.
template <class T, class Out, int Vectors>
void block(const GemmWeights& w, const GemmWindow& window, const GemmRow* rows, int64_t count, int64_t column,
           const GemmOutput& out) {
  constexpr int64_t kStride = Vectors * amx::kRowBytes;  // bytes from word to word of the panel
  const uint32_t* panel = w.panels + column * w.words;
  const int64_t first = count < amx::kRows ? count : amx::kRows, second = count - first;
  const int64_t apart[] = {distance(window, rows, first), distance(window, rows + first, second)};
  amx::zero<0>();
  amx::zero<1>();
  amx::zero<2>();
  amx::zero<3>();
  for (int64_t word = 0; word < w.words; word += kWords) {
    const int64_t words = w.words - word < kWords ? w.words - word : kWords;
    const uint32_t* right = panel + word * Vectors * kLanes;
    alignas(64) uint32_t last[kWords * Vectors * kLanes];
    if (words < kWords) {  // the panel ends within the tile
      std::memcpy(last, right, static_cast<size_t>(words * kStride));
      std::memset(last + words * Vectors * kLanes, 0, static_cast<size_t>((kWords - words) * kStride));
      right = last;
    }
    load_rows<4>(window, rows, first, apart[0], word, words);
    amx::load<6>(right, kStride);
    dot<T, 0, 4, 6>();
    if constexpr (Vectors == 2) {
      amx::load<7>(right + kLanes, kStride);
      dot<T, 1, 4, 7>();
    }
    if (second == 0) continue;
    load_rows<5>(window, rows + first, second, apart[1], word, words);
    dot<T, 2, 5, 6>();
    if constexpr (Vectors == 2) dot<T, 3, 5, 7>();
  }
  alignas(64) typename T::Sum sums[kRows][Vectors];
  amx::store<0>(&sums[0][0], kStride);
  if constexpr (Vectors == 2) amx::store<1>(&sums[0][1], kStride);
  if (second > 0) {
    amx::store<2>(&sums[amx::kRows][0], kStride);
    if constexpr (Vectors == 2) amx::store<3>(&sums[amx::kRows][1], kStride);
  }
  const Finish<T, Out, Vectors> finish(w, column, out);
  for (int64_t r = 0; r < count; ++r) finish(sums[r], rows[r]);
}

template <class T, class Out>
void run(const GemmWeights& w, int64_t panel, int64_t panel_end, const GemmWindow& window, const GemmRow* rows,
         int64_t count, const GemmOutput& out) {
  amx::configure();
  for (; panel < panel_end; ++panel) {
    const int64_t column = panel * 2 * kLanes;
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t some = count - row < kRows ? count - row : kRows;
      if (w.n - column > kLanes) {
        block<T, Out, 2>(w, window, rows + row, some, column, out);
      } else {
        block<T, Out, 1>(w, window, rows + row, some, column, out);
      }
    }
  }
  amx::release();
}

}  // namespace

void gemm_amx(const GemmWeights& w, int64_t panel, int64_t panel_end, const GemmWindow& window, const GemmRow* rows,
              int64_t count, const GemmOutput& out) {
  const auto with = [&](auto left) {
    with_operands(out.precision, [&](auto stored) {
      run<decltype(left), decltype(stored)>(w, panel, panel_end, window, rows, count, out);
    });
  };
  w.precision == Precision::bf16 ? with(Bf16{}) : with(Int8{});
}

}  // namespace avser::AVSER_ISA_NAMESPACE
