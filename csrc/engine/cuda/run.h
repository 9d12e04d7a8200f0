// A batch of clips as kernels see it, and how one is carried through a network.
//
// A team of thread blocks carries a group of clips through all stages and meets after each of them.  A team is a
// cluster of blocks that meet in hardware; or one block; or, a stage per launch, any number of blocks.  The stages are
// the same functions every time, and so are the bits.
#pragma once

#include <cstdint>

#include "gpu/device.h"

namespace avser::gpu {

struct Batch {
  int clips;
  int clips_per_utterance;
  int all_vote;
};

struct Run {
  const Batch* batch;  // in device memory, since it may differ between two launches of one graph; null: `given`
  Batch given;
  const float* clips;    // (clips, channels, frames, bands)
  const uint8_t* valid;  // (clips,), read unless all vote
  float* features;
  float* logits;
  float* probabilities;  // (utterances, classes), null where nobody wants them
  int* arrived;          // per utterance, 0 before and after
  char* memory;          // of all teams
  int group;             // clips that a team carries together
  int team;              // blocks of a team
};

}  // namespace avser::gpu
