"""What one item of a batch comes back as."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Segment(NamedTuple):
    """One clip of an utterance: where it lies, in seconds, and its own probabilities, largest first.

    They are the softmax of its own logits; of a system, which fuses whole utterances, of the larger ones of its two
    networks, so that the utterance's scores are not their mean.
    """

    start_s: float
    end_s: float
    scores: dict[str, float]


@dataclass(frozen=True)
class EmotionResult:
    """The answer for one item.

    label: the most probable emotion; score: its probability.  Both None when ``error`` says why there is no answer.
    scores: probabilities by label, largest first; all labels (they sum to 1) unless ``top_k`` asked for fewer.
    segments: the clips that contain speech, in order of time, each with its own scores; clips may overlap.
    duration_s: length of the item as it came.
    padded_fraction: share of the frames behind ``scores`` that are padding, 0 to 1.
    backend: what computed it: ``engine`` (float32), ``engine/bf16``, ``engine/int8`` or ``reference`` (float32).
    error: one sentence naming the item, or None.
    """

    label: str | None
    score: float | None
    scores: dict[str, float] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    duration_s: float = 0.0
    padded_fraction: float = 0.0
    backend: str = ""
    error: str | None = None

    @property
    def ok(self) -> bool:
        """True when there is an answer."""
        return self.error is None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form, every field by its name."""
        return {
            "label": self.label,
            "score": self.score,
            "scores": dict(self.scores),
            "segments": [{"start_s": s.start_s, "end_s": s.end_s, "scores": dict(s.scores)} for s in self.segments],
            "duration_s": self.duration_s,
            "padded_fraction": self.padded_fraction,
            "backend": self.backend,
            "error": self.error,
        }
