"""What a corpus is before anything of it is decoded: labelled utterances, where their media are, and its faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: The classes of the published system, in label order.
LABELS = ("ang", "hap", "neu", "sad")

#: Every kind of fault: what it is called in a report, and whether something of the item is lost.
FAULTS: dict[str, tuple[str, bool]] = {
    "missing-wav": ("label without a recording", True),
    "missing-label": ("recording without a label", True),
    "bad-label": ("line of labels that cannot be read", True),
    "bad-name": ("file name that is not the corpus'", True),
    "bad-manifest": ("line of the manifest that cannot be used", True),
    "unknown-field": ("field of a manifest that is not known", False),
    "unreadable-audio": ("recording that cannot be used", True),
    "missing-video": ("utterance whose face is not there", True),
    "missing-box": ("face without a crop box", True),
    "unreadable-video": ("video or image that cannot be used", True),
    "blank-video": ("black or empty picture", True),
    "no-face": ("no face found", True),
    "wrong-totals": ("counts that are not the release's", False),
    "duplicate": ("the same recording under two keys", False),
    "damaged-shard": ("file of the prepared folder that was damaged, made again", False),
}


@dataclass(frozen=True)
class Fault:
    """Something wrong with ``item``: ``message`` is one sentence that says what was expected and what came."""

    kind: str
    item: str
    message: str

    def __post_init__(self) -> None:
        if self.kind not in FAULTS:
            raise ValueError(f"kind of a fault: expected one of {', '.join(FAULTS)}, got {self.kind!r}")

    @property
    def lost(self) -> bool:
        """Whether an utterance, its sound or its face is left out because of this."""
        return FAULTS[self.kind][1]

    def __str__(self) -> str:
        return f"{self.item}: {self.message}"


@dataclass(frozen=True)
class FaceSource:
    """Where the frames of one face are: in a ``video``, from ``start`` to ``end`` seconds (None: its end), or in
    ``images``.

    ``crop`` says what of a picture is the face: ``whole`` (already cropped), ``box`` (``box``, x, y, width and height
    in pixels) or ``detect`` (what a face detector finds, within ``box`` where there is one).
    """

    video: Path | None = None
    images: tuple[Path, ...] = ()
    start: float = 0.0
    end: float | None = None
    crop: str = "whole"
    box: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if (self.video is None) == (not self.images):
            raise ValueError("face: expected a video or images, got both" if self.images else "face: got neither")
        if self.crop not in ("whole", "box", "detect") or (self.crop == "box" and self.box is None):
            raise ValueError(f"face: expected crop whole, detect, or box with a box, got {self.crop!r}, {self.box}")


@dataclass(frozen=True)
class Utterance:
    """One labelled item.  ``label`` is an index into the corpus' class names, ``speaker`` whom evaluation must
    separate (empty: unknown).

    ``path`` is the recording, of which ``start`` to ``end`` seconds are the utterance (None: to its end); it is None
    for an item of a face corpus.  ``face`` is None for speech alone.
    """

    key: str
    path: Path | None
    speaker: str
    label: int
    session: str = ""
    start: float = 0.0
    end: float | None = None
    face: FaceSource | None = None


@dataclass(frozen=True)
class Corpus:
    """The utterances of a corpus sorted by key, what is wrong with it, and how many of which emotion were left out
    because it is not among ``labels``."""

    name: str
    labels: tuple[str, ...]
    utterances: tuple[Utterance, ...]
    faults: tuple[Fault, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counted = Counter(u.key for u in self.utterances)
        if len(counted) < len(self.utterances):
            twice = next(key for key, count in counted.items() if count > 1)
            raise ValueError(
                f"{self.name}: expected a key of its own for every utterance, got {twice!r} more than once"
            )


@dataclass(frozen=True)
class Classes:
    """Class names in label order, and emotions that count as one of them (``exc`` as ``hap``)."""

    labels: tuple[str, ...] = LABELS
    merged: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(self.labels)) < len(self.labels) or not all(self.labels):
            raise ValueError(f"labels: expected different names, got {', '.join(self.labels) or 'none'}")
        for name, target in self.merged.items():
            if target not in self.labels:
                raise ValueError(f"labels: expected {name} to count as one of {', '.join(self.labels)}, got {target}")

    def index(self, emotion: str) -> int | None:
        """Label of an emotion; None for one that is not among the classes."""
        name = self.merged.get(emotion, emotion)
        return self.labels.index(name) if name in self.labels else None


def sorted_utterances(utterances: Iterable[Utterance]) -> tuple[Utterance, ...]:
    return tuple(sorted(utterances, key=lambda u: u.key))
