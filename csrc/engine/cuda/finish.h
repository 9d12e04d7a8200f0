// The groups of a batch, and a group's last step, for every network's kernel.
#pragma once

#include "engine/cuda/run.h"
#include "ops/emotion_head/emotion_head_cuda.h"

namespace avser::gpu {

// use(batch, team, memory of the team, first clip, clips) for the groups of this block's team.
template <typename Use>
AVSER_DEVICE void for_each_group(const Run& run, int64_t team_bytes, const Use& use) {
  const Batch batch = run.batch != nullptr ? *run.batch : run.given;
  const int team = block() / run.team, teams = blocks() / run.team;
  for (int first = team * run.group; first < batch.clips; first += teams * run.group) {
    use(batch, Team{block() % run.team, run.team}, run.memory + team * team_bytes, first,
        least(run.group, batch.clips - first));
  }
}

// Head and vote of a group's clips, whose rows tokens(slot) are; hidden: (clips, head.hidden) of the statistics path.
template <typename Tokens>
AVSER_DEVICE void finish_clips(const EmotionHeadStage& head, const Run& run, const Batch& batch, int first, int clips,
                               const Team& team, int count, int stride, const float* hidden, const Tokens& tokens) {
  const int classes = head.classes;
  for (int slot = team.rank; slot < clips; slot += team.size) {
    const int clip = first + slot, utterance = clip / batch.clips_per_utterance;
    emotion_head(head, tokens(slot), count, stride, hidden + slot * head.hidden,
                 run.features + static_cast<int64_t>(clip) * head.features(), run.logits + clip * classes);
    if (run.probabilities == nullptr) continue;
    // Whoever is the last of an utterance takes the vote.
    const Shared<int> last = shared_memory().as<int>();
    if (thread() == 0) {
      last[0] = fetch_add(run.arrived + utterance) == batch.clips_per_utterance - 1 ? 1 : 0;
      if (last[0] != 0) run.arrived[utterance] = 0;
    }
    sync();
    if (warp() == 0 && last[0] != 0) {
      const int begin = utterance * batch.clips_per_utterance;
      average_clips(run.logits + begin * classes, batch.all_vote != 0 ? nullptr : run.valid + begin,
                    batch.clips_per_utterance, classes, run.probabilities + utterance * classes);
    }
    sync();
  }
}

}  // namespace avser::gpu
