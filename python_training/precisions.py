"""What bf16 and int8 make of a trained MDSCM, measured with the engine that will run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from avser_fast.config import ModelSpec
from avser_fast.inference.backends import Engine, softmax
from avser_fast.inference.convert import calibrate
from avser_fast.precision import PRECISIONS

from .data.prepared import PreparedCorpus
from .system import utterance_clips

LOW = PRECISIONS[1:]


def heard_clips(corpus: PreparedCorpus, items: Sequence[int], spec: ModelSpec) -> list[np.ndarray]:
    """The clips that vote (L, C, W, M) of each of the ``items`` with speech."""
    values, clips = corpus.features(spec.front_end), []
    for known in (values[i] for i in items):
        if known is not None:
            cut, valid = utterance_clips(known, spec.front_end, spec.clip_rule)
            clips.append(cut[valid].numpy())
    return clips


def _engine(spec: ModelSpec, state: Mapping[str, Tensor], precision: str, ranges: Any = None) -> Engine:
    arrays = {name: t.cpu().numpy() for name, t in state.items() if not name.endswith(".num_batches_tracked")}
    return Engine(spec, arrays, 1, precision, {}, ranges)


def ranges_of(spec: ModelSpec, state: Mapping[str, Tensor], training: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The ranges that int8 needs, measured on the clips of the utterances that trained the network."""
    return calibrate(_engine(spec, state, "float32"), training)


def low_precisions(
    spec: ModelSpec, state: Mapping[str, Tensor], training: Sequence[np.ndarray], tested: Sequence[np.ndarray]
) -> dict[str, list[list[float]]]:
    """Probabilities of the tested utterances in bf16 and int8, whose ranges come from the training utterances."""
    found = {}
    for name in LOW:
        engine = _engine(spec, state, name, ranges_of(spec, state, training) if name == "int8" else None)
        scored = engine.score(tested, False)
        found[name] = [softmax(logits.astype(np.float64).mean(0)).tolist() for logits, _ in scored]
    return found
