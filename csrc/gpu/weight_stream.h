// Packed weights on their way through shared memory, ahead of the stages that multiply with them.
//
// Every lane has slots of its own there, for the fragments of the next kSteps steps that it will take, and asks for the
// next as soon as it has taken one: through norms, softmax and meetings the weights keep coming.  A lane reads what it
// copied itself and nothing else, so that nobody waits for anybody.
#pragma once

#include "gpu/tiles.h"

namespace avser::gpu {

constexpr int kStreamColumns = 2;  // column tiles of a step
// Of a block, whatever the precision.
constexpr int kStreamBytes = 128 << 10;

// The maps of a stream are a sequence: operator[](i) for i in [0, maps) gives the Packed that is multiplied i-th, by
// all warps of the team, each with the items first(), first() + step(), ... of kStreamColumns column tiles.
template <bool kEightBits, typename Maps>
class WeightStream {
 public:
  static constexpr int kLaneBytes = kEightBits ? 8 : 16;
  static constexpr int kStepOfWarp = kStreamColumns * kWarp * kLaneBytes;
  static constexpr int kWarpBytes = kStreamBytes / kWarps;
  static constexpr int kSteps = kWarpBytes / kStepOfWarp;
  static_assert((kWarpBytes & (kWarpBytes - 1)) == 0, "a ring that masks its addresses");

  // `offset`: where kStreamBytes lie in shared memory that nobody else uses; 0: there are none, and no stream.
  AVSER_DEVICE WeightStream(const Maps& maps, int count, const Team& team, int offset)
      : maps_(maps),
        count_(count),
        first_(warp() * team.size + team.rank),
        step_(kWarps * team.size),
        slots_(shared_memory() + (offset + warp() * kWarpBytes + lane() * kLaneBytes)),
        on_(offset > 0) {
    if (!on_) return;
    find(0, first_);
    for (int step = 0; step < kSteps; ++step) ask(step * kStepOfWarp);
  }

  AVSER_DEVICE bool on() const { return on_; }
  AVSER_DEVICE int first() const { return first_; }
  AVSER_DEVICE int step() const { return step_; }

  // Words of the step that is next, or, after it, of the one behind it.  Each step is a group of copies, an empty one
  // behind the end, so that counting groups is counting steps.  Somebody's copy_wait() in between, for a tile, waits
  // for more than is needed here, but all of it was asked for earlier than the tile and comes earlier.
  template <int ahead>
  AVSER_DEVICE void read(Words4 (&to)[kStreamColumns]) const {
    copy_wait_group<kSteps - 1 - ahead>();
    const Shared<char> from = slots_ + ((at_ + ahead * kStepOfWarp) & (kWarpBytes - 1));
    AVSER_UNROLL
    for (int j = 0; j < kStreamColumns; ++j) to[j] = words(from + j * kWarp * kLaneBytes);
  }
  // The next step has been taken: its slot is free.
  AVSER_DEVICE void advance() {
    ask(at_);
    at_ = (at_ + kStepOfWarp) & (kWarpBytes - 1);
  }

 private:
  static AVSER_DEVICE Words4 words(Shared<char> from) {
    if constexpr (kEightBits) {
      return widened(from.as<Words2>()[0]);
    } else {
      return from.as<Words4>()[0];
    }
  }

  AVSER_DEVICE void ask(int slot) {
    if (pairs_ > 0) {
      const Shared<char> to = slots_ + slot;
      copy(to, from_);
      copy(to + kWarp * kLaneBytes, from_ + second_);
      from_ += kWarp * kLaneBytes;
      if (--pairs_ == 0) find(map_, item_ + step_);
    }
    copy_commit();
  }
  static AVSER_DEVICE void copy(Shared<char> to, const char* from) {
    if constexpr (kEightBits) {
      copy8_async(to, from);
    } else {
      copy16_async(to, from, true);
    }
  }

  // What is to be asked for from item `item` of map `map` on, or behind it where that has so many no more.
  AVSER_DEVICE void find(int map, int item) {
    for (; map < count_; ++map, item = first_) {
      const Packed& w = maps_[map];
      const int n_tile = item * kStreamColumns;
      if (n_tile >= w.n_tiles) continue;
      const int bytes = w.pairs * kWarp * kLaneBytes;  // of a column tile
      from_ = static_cast<const char*>(w.panels) + static_cast<int64_t>(n_tile) * bytes + lane() * kLaneBytes;
      second_ = n_tile + 1 < w.n_tiles ? bytes : 0;
      pairs_ = w.pairs;
      map_ = map;
      item_ = item;
      return;
    }
  }

  const Maps maps_;
  const int count_, first_, step_;
  const Shared<char> slots_;
  const bool on_;
  int at_ = 0;  // the slot of the next step to be taken
  // What is asked for next: a lane's fragment, how far it is to that of the item's second column tile, pairs of
  // instructions that are left of the item (0: nothing is left at all), and which item that is.
  const char* from_ = nullptr;
  int second_ = 0, pairs_ = 0, map_ = 0, item_ = 0;
};

// multiply() of one row tile with the stream's next item: the same instructions in the same order.
template <typename Op, typename Stream>
AVSER_DEVICE void multiply_next(Shared<char> a, int pitch, int pairs, Stream& stream,
                                Accumulators<1, kStreamColumns>& acc) {
  const Shared<char> row = a + ((lane() % 8 + lane() / 8 % 2 * 8) * pitch + lane() / 16 * 16);
  Words4 weights[kStreamColumns];
  uint32_t first[4], second[4];
  stream.template read<0>(weights);
  ldmatrix(first, row);
  ldmatrix(second, row + kStepBytes);
  for (int pair = 0; pair < pairs; ++pair) {
    AVSER_UNROLL
    for (int j = 0; j < kStreamColumns; ++j) Op::multiply(acc.at[0][j], first, weights[j].x, weights[j].y);
    AVSER_UNROLL
    for (int j = 0; j < kStreamColumns; ++j) Op::multiply(acc.at[0][j], second, weights[j].z, weights[j].w);
    // The products are still under way: what the next ones need comes meanwhile.
    if (pair + 1 < pairs) {
      stream.template read<1>(weights);
      ldmatrix(first, row + (pair + 1) * kPairBytes);
      ldmatrix(second, row + ((pair + 1) * kPairBytes + kStepBytes));
    }
    stream.advance();
  }
}

}  // namespace avser::gpu
