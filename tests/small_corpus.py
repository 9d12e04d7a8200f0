"""Corpora and recipes small enough to train in a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from python_training.data import PreparedCorpus

SPEAKERS = ("03", "08", "10", "12")


def two_per_class(corpus: PreparedCorpus, speakers: Sequence[str] = SPEAKERS) -> list[int]:
    """Items of two utterances per class of some speakers."""
    chosen: list[int] = []
    for speaker in speakers:
        for label in range(4):
            chosen += [i for i, u in enumerate(corpus.utterances) if (u.speaker, u.label) == (speaker, label)][:2]
    return sorted(chosen)


#: Changes that make ``avdal-small`` train in a second.
TINY: dict[str, Any] = {
    "clip_rule.clip_frames": 64,
    "network.clip_frames": 64,
    "network.stem": [4, 4],
    "network.blocks": [8],
    "network.attention_reduction": 4,
    "network.block_dropout": 0.0,
    "encoder.mdscm.clip_frames": 64,
    "encoder.mdscm.stem": [4, 4],
    "encoder.mdscm.blocks": [8],
    "encoder.mdscm.attention_reduction": 4,
    "encoder.mdscm.block_dropout": 0.0,
    "encoder.domain_hidden": [8],
    "fusion_lstm.hidden": 8,
}
for _name in ("optimisation", "avdal", "fusion", "joint"):
    TINY |= {f"{_name}.epochs": 3, f"{_name}.batch_size": 6, f"{_name}.warmup_epochs": 1}
