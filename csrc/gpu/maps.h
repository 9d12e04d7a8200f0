// Maps of a clip and where they lie: in the team's memory, which all of its blocks read and write through L2; or on
// chip, every row in the shared memory of the block that makes it, from where the others fetch the few that they need.
#pragma once

#include "gpu/tiles.h"

namespace avser::gpu {

// Channels side by side, positions `stride` elements apart (channels rounded up to 8), rows one after the other.
struct GpuMap {
  int64_t offset;  // bytes into the team's memory
  int height, width, stride;
  // On chip: where in each block's shared memory the rows are that it holds, how many of them there is room for, and
  // how many of those come before the block's own.
  int shared = 0, held = 0, above = 0;
};

struct RowRange {
  int begin, end;
};

// Rows of a map that one block of a team makes, where maps are on chip.
AVSER_HOST_DEVICE RowRange own_rows(int height, int rank, int size) {
  return {height * rank / size, height * (rank + 1) / size};
}
AVSER_HOST_DEVICE int owner_of(int row, int height, int size) { return ((row + 1) * size - 1) / height; }
// Rows that the rows `of` are made from: of `stride` times as many, `before` and `after` the one in the middle.
AVSER_HOST_DEVICE RowRange rows_under(const RowRange& of, int stride, int before, int after) {
  if (of.begin >= of.end) return {0, 0};
  return {stride * of.begin - before, stride * (of.end - 1) + after + 1};
}

// How a team shares the work on maps.
struct MapWork {
  Team team;
  bool on_chip;
  // Who make a stage's output together: the team, or each block its own rows alone.
  AVSER_DEVICE Team sharers() const { return on_chip ? Team{0, 1} : team; }
  AVSER_DEVICE RowRange rows(int height) const {
    return on_chip ? own_rows(height, team.rank, team.size) : RowRange{0, height};
  }
};

// A map as a block sees it; of T, or as bytes of elements of so many bytes.
template <typename T>
class MapRows {
 public:
  AVSER_DEVICE MapRows(const GpuMap& map, char* memory, const MapWork& work, int element = int{sizeof(T)})
      : stride_(map.stride * element) {
    const int first = work.on_chip ? work.rows(map.height).begin - map.above : 0;
    first_ = first * map.width;
    end_ = (first + (work.on_chip ? map.held : map.height)) * map.width;
    char* const base = work.on_chip ? (shared_memory() + map.shared).generic() : memory + map.offset;
    at_ = base - static_cast<int64_t>(first_) * stride_;
  }
  // The channels of a position, counted through; of the clip whose maps are so many bytes behind the first one's.
  AVSER_DEVICE T* at(int position, int64_t clip = 0) const {
    expect(position >= first_ && position < end_);
    return reinterpret_cast<T*>(at_ + clip + static_cast<int64_t>(position) * stride_);
  }

 private:
  char* at_;  // of position 0, wherever that is
  int stride_, first_, end_;
};

// Pieces of 16 bytes, by all threads of the block: from(i), null for zeros, to(i).  Several are in flight: in the order
// in which they are written, each load would wait for the store before it.
template <typename From, typename To>
AVSER_DEVICE void copy_pieces(int count, const From& from, const To& to) {
  constexpr int kInFlight = 4;
  for (int first = thread(); first < count; first += kInFlight * kThreads) {
    Words4 words[kInFlight] = {};
    AVSER_UNROLL
    for (int j = 0; j < kInFlight; ++j) {
      const int i = first + j * kThreads;
      const void* const at = i < count ? from(i) : nullptr;
      if (at != nullptr) words[j] = load16(at);
    }
    AVSER_UNROLL
    for (int j = 0; j < kInFlight; ++j) {
      const int i = first + j * kThreads;
      if (i < count) to(i)[0] = words[j];
    }
  }
}

// The same of maps into shared memory; done after copy_wait() and sync().
template <typename From, typename To>
AVSER_DEVICE void copy_of_map(const MapWork& work, const void* memory, int count, const From& from, const To& to) {
  if (work.on_chip) return copy_pieces(count, from, to);
  for (int i = thread(); i < count; i += kThreads) {
    const void* const at = from(i);
    copy16_async(to(i).template as<char>(), at != nullptr ? at : memory, at != nullptr);
  }
}

// Where the block that made a row has it; on chip.
template <typename T>
AVSER_DEVICE const T* row_of_owner(const GpuMap& map, int row, const Team& team) {
  const int owner = owner_of(row, map.height, team.size), row_bytes = map.width * map.stride * int{sizeof(T)};
  const int first = own_rows(map.height, owner, team.size).begin - map.above;
  return reinterpret_cast<const T*>(of_block(shared_memory() + (map.shared + (row - first) * row_bytes), owner));
}

// Rows [needed.begin, needed.end) of a map, as far as there are such, that other blocks have made, into this block's
// shared memory; done after sync().
template <typename T>
AVSER_DEVICE void fetch_rows(const GpuMap& map, const RowRange& needed, const MapWork& work) {
  if (!work.on_chip) return;
  const MapRows<T> rows(map, nullptr, work);
  const RowRange own = work.rows(map.height);
  const int chunks = map.width * map.stride * int{sizeof(T)} / 16;
  const int begin = most(needed.begin, 0), end = least(needed.end, map.height);
  const int before = most(0, least(end, own.begin) - begin), behind = most(0, end - most(begin, own.end));
  const auto row_of = [&](int i) {
    return i / chunks < before ? begin + i / chunks : end - behind + i / chunks - before;
  };
  copy_pieces(
      (before + behind) * chunks,
      [&](int i) { return reinterpret_cast<const Words4*>(row_of_owner<T>(map, row_of(i), work.team)) + i % chunks; },
      [&](int i) { return reinterpret_cast<Words4*>(rows.at(row_of(i) * map.width)) + i % chunks; });
}

}  // namespace avser::gpu
