"""Seeded batches of speech and faces.

What stands in a batch follows from the seed and the number of the step alone, and so does every random number of its
augmentation: the stream is the same with any number of workers, cut among any number of processes, and when it is
taken up in the middle of an epoch.  There is no state to save but the number of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from avser_fast.config import ClipRule, FrontEnd
from avser_fast.inference.features import engine_module, normalized

from .augment import Augmentation, WaveformChange, augment_face, augment_features
from .faces import FRAMES, to_unit
from .features import compute_features
from .prepared import PreparedCorpus

#: From an item and its generator to values, which clips vote, and the values before augmentation.
_Make = Callable[[int, np.random.Generator], tuple[np.ndarray, np.ndarray, np.ndarray]]

# What a random stream is for; streams of different kinds share no number.
_ORDER, _FACE_ORDER, _PARTNER, _SPEECH, _FACE = range(5)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


class Draw(NamedTuple):
    """One row of a batch: ``speech`` and ``face`` are indices into their corpora, ``position`` the row's place in the
    epoch, ``partner`` (``face_partner``) the item that is mixed in."""

    epoch: int
    position: int
    speech: int
    partner: int
    face: int | None = None
    face_partner: int | None = None


class Plan:
    """Which items make which batch.

    ``speech`` are the utterances that an epoch goes through once in random order; a rest smaller than a batch is left
    out, another one in each epoch.  Every row also gets a face: that of its own utterance if ``paired``, else the next
    one of ``faces``, which are gone through in random order again and again.  ValueError for nothing to draw from.
    """

    def __init__(
        self,
        speech: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        faces: Sequence[int] = (),
        paired: bool = False,
    ):
        if len(speech) == 0:
            raise ValueError("plan: expected at least one utterance with speech, got none")
        if batch_size < 1:
            raise ValueError(f"plan: batch_size: expected at least 1, got {batch_size}")
        if paired and not set(speech) <= set(faces):
            missing = sorted(set(speech) - set(faces))
            raise ValueError(
                f"plan: paired: expected a face for every utterance, got none for {len(missing)} of {len(speech)} "
                f"(the first is number {missing[0]})"
            )
        self.speech, self.faces = np.asarray(speech), np.asarray(faces, dtype=np.int64)
        self.batch_size = min(batch_size, len(self.speech))
        self.seed, self.paired = seed, paired
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> int:
        return len(self.speech) // self.batch_size

    def _order(self, kind: int, number: int, items: np.ndarray) -> np.ndarray:
        key = (kind, number)
        if key not in self._orders:
            # Neighbouring steps need at most two orders of each kind.
            self._orders = {k: v for k, v in self._orders.items() if k[0] != kind or abs(k[1] - number) <= 1}
            self._orders[key] = items[_generator(self.seed, kind, number).permutation(len(items))]
        return self._orders[key]

    def _turn(self, step: int, kind: int) -> int:
        """By how many rows the partners of a step stand off: never their own, unless there is one row."""
        if self.batch_size == 1:
            return 0
        return int(_generator(self.seed, _PARTNER, step, kind).integers(1, self.batch_size))

    def batch(self, step: int) -> list[Draw]:
        """The rows of global step ``step``, counted from 0 over all epochs."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = self._order(_ORDER, epoch, self.speech)
        first = at * self.batch_size
        speech = order[first : first + self.batch_size]
        partners = np.roll(speech, self._turn(step, 0))
        faces: list[int | None] = [None] * self.batch_size
        face_partners = faces
        if self.paired:
            faces, face_partners = [int(i) for i in speech], [int(i) for i in partners]
        elif len(self.faces):
            counted = range(step * self.batch_size, (step + 1) * self.batch_size)
            n = len(self.faces)
            faces = [int(self._order(_FACE_ORDER, k // n, self.faces)[k % n]) for k in counted]
            turn = self._turn(step, 1)
            face_partners = faces[-turn:] + faces[:-turn]
        return [
            Draw(epoch, first + row, int(speech[row]), int(partners[row]), faces[row], face_partners[row])
            for row in range(self.batch_size)
        ]

    def rows(self, step: int, rank: int = 0, world: int = 1) -> list[Draw]:
        """The rows of process ``rank`` of ``world``: its equal, contiguous part of the batch."""
        if self.batch_size % world:
            raise ValueError(f"plan: expected a batch size that {world} processes can share, got {self.batch_size}")
        part = self.batch_size // world
        return self.batch(step)[rank * part : (rank + 1) * part]


class Batch(NamedTuple):
    """N rows of L clips: ``clips`` (N, L, planes, clip_frames, bands) float32, ``valid`` (N, L) the clips that vote
    (the others repeat them),
    ``labels`` (N,) and ``targets`` (N, classes), which are soft where samples were mixed.  ``skipped`` (N,) are rows in
    which another sample stands in for one that cannot be used.  ``clean`` are the clips before their features were
    augmented and mixed, where they are asked for.  The same of the faces: ``faces`` (N, frames, 1, 224, 40) in [-1, 1];
    None without faces."""

    clips: Tensor
    valid: Tensor
    labels: Tensor
    targets: Tensor
    skipped: Tensor
    clean: Tensor | None = None
    faces: Tensor | None = None
    face_labels: Tensor | None = None
    face_targets: Tensor | None = None

    def pin_memory(self) -> Batch:
        return Batch._make(None if x is None else x.pin_memory() for x in self)

    def to(self, device: torch.device) -> Batch:
        return Batch._make(None if x is None else x.to(device, non_blocking=True) for x in self)


@dataclass(frozen=True)
class _Half:
    """The speech of a row, or its face."""

    values: np.ndarray
    valid: np.ndarray
    label: int
    target: np.ndarray
    skipped: bool
    clean: np.ndarray


class SampleError(ValueError):
    """A sample cannot be used; the message names it."""


def bad_speech(corpus: PreparedCorpus, chosen: Sequence[int], front_end: FrontEnd) -> dict[int, SampleError]:
    """What is wrong with the stored features of those of ``chosen`` that cannot be read or are not finite."""
    bad = {}
    features = corpus.features(front_end)
    for item in chosen:
        try:
            values = features[item]
            finite = values is None or bool(np.isfinite(values).all())
        except Exception as error:  # whatever a damaged file leads to: which sample it was is the point
            bad[item] = unreadable(corpus, item, error)
            continue
        if not finite:
            bad[item] = not_finite(corpus, item)
    return bad


def unreadable(corpus: PreparedCorpus, item: int, error: Exception) -> SampleError:
    what = f"{corpus.folder}: {corpus.utterances[item].key}"
    return SampleError(f"{what}: expected a sample that can be read, got {type(error).__name__}: {error}")


def not_finite(corpus: PreparedCorpus, item: int) -> SampleError:
    return SampleError(f"{corpus.folder}: {corpus.utterances[item].key}: expected finite values, got NaN or infinity")


class Samples(Dataset[tuple[_Half, ...]]):
    """From a row of a plan to what a network sees.

    ``front_end`` brings the normalisation, measured on training speakers.  ``crops``: one crop of ``clip_frames`` at a
    random place (short utterances are padded at random) instead of the clips of ``clip_rule``.  ``face_frames`` are the
    evenly spaced frames of a face that are used.  ``faces`` may be another corpus than ``speech``: their classes
    must be the same, in the same order.  A sample that cannot be read or is not finite raises SampleError; with
    ``skip_bad`` the row's partner stands in for it.
    """

    def __init__(
        self,
        speech: PreparedCorpus,
        front_end: FrontEnd,
        clip_rule: ClipRule,
        *,
        seed: int,
        crops: bool = False,
        augmentation: Augmentation | None = None,
        faces: PreparedCorpus | None = None,
        face_frames: int = FRAMES,
        clean: bool = False,
        skip_bad: bool = False,
    ):
        if not crops and clip_rule.clips is None:
            raise ValueError("samples: clip_rule: expected a fixed number of clips, got as many as an utterance needs")
        if faces is not None and faces.labels != speech.labels:
            raise ValueError(
                f"samples: expected faces of the classes {', '.join(speech.labels)}, got {', '.join(faces.labels)} "
                f"({faces.folder})"
            )
        if not 1 <= face_frames <= FRAMES:
            raise ValueError(f"samples: face_frames: expected 1 to {FRAMES}, got {face_frames}")
        self.speech, self.faces = speech, faces
        self.front_end, self.clip_rule = front_end, clip_rule
        self.seed, self.crops = seed, crops
        self.augmentation = augmentation or Augmentation()
        self.face_frames = face_frames
        self.clean, self.skip_bad = clean, skip_bad
        self._features = self._mapped()

    def _mapped(self) -> dict[float, list[np.ndarray | None]]:
        return {s: self.speech.features(self.front_end, s) for s in (1.0, *self.augmentation.speeds)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": None}  # another process maps the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._features = self._mapped()

    def __getitem__(self, draw: Draw) -> tuple[_Half, ...]:
        speech = self._half(draw, self.speech, self._clips, _SPEECH, draw.speech, draw.partner)
        if draw.face is None or draw.face_partner is None or self.faces is None:
            return (speech,)
        return speech, self._half(draw, self.faces, self._face, _FACE, draw.face, draw.face_partner)

    def _half(self, draw: Draw, corpus: PreparedCorpus, make: _Make, kind: int, item: int, partner: int) -> _Half:
        key = (self.seed, kind, draw.epoch, draw.position)
        skipped = False
        try:
            values, valid, clean = self._made(corpus, make, item, _generator(*key, 0))
        except SampleError:
            if not self.skip_bad:
                raise
            item, skipped = partner, True
            values, valid, clean = self._made(corpus, make, item, _generator(*key, 0))
        one_hot = np.eye(len(corpus.labels), dtype=np.float32)
        label = corpus.utterances[item].label
        target = one_hot[label]
        if self.augmentation.mixup and not skipped:
            rng = _generator(*key, 1)
            try:
                other, _, _ = self._made(corpus, make, partner, rng)
                share = np.float32(1.0 - self.augmentation.mixup * rng.random())
                mixed = values * share + other * (1 - share)
                if make == self._clips:  # two voices have no mean
                    mixed[:, self.front_end.channels :] = values[:, self.front_end.channels :]
                values = mixed
                target = target * share + one_hot[corpus.utterances[partner].label] * (1 - share)
            except SampleError:
                if not self.skip_bad:
                    raise
                skipped = True
        return _Half(values, valid, label, target, skipped, clean)

    @staticmethod
    def _made(
        corpus: PreparedCorpus, make: _Make, item: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        try:
            values, valid, clean = make(item, rng)
        except Exception as error:  # as above
            raise unreadable(corpus, item, error) from error
        if not np.isfinite(values).all():
            raise not_finite(corpus, item)
        return values, valid, clean

    def _clips(self, item: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        settings = self.augmentation
        speeds = list(self._features)
        speed = speeds[int(rng.integers(len(speeds)))]
        change = WaveformChange.draw(settings, self.front_end.sampling_rate, rng) if settings.of_waveform else None
        if change is None or change.nothing:
            values = self._features[speed][item]
            if values is None:
                raise ValueError(f"{self.speech.utterances[item].key}: expected speech, this utterance has none")
        else:
            waveform = change.apply(self.speech.waveform(item), rng)
            (values,) = compute_features([waveform], self.front_end, speed, change.vtlp)
        rule = self.clip_rule
        values = normalized(values, self.front_end)
        if self.crops:
            clips, valid = _crop(values, rule.clip_frames, rng)[None], np.ones(1, dtype=bool)
        else:
            clips, valid = engine_module().frame_clips(values, rule.clips, rule.clip_frames, rule.rule)
            # Silence must not enter the statistics of batch norm: clips of padding repeat those that vote.
            votes = np.flatnonzero(valid)
            clips = clips[np.where(valid, np.arange(len(valid)), votes[np.arange(len(valid)) % len(votes)])]
        clips = np.asarray(clips)
        return augment_features(clips, settings, rng, self.front_end.channels), np.asarray(valid), clips

    def _face(self, item: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert self.faces is not None
        stored = self.faces.face(item)
        chosen = [len(stored) * (2 * i + 1) // (2 * self.face_frames) for i in range(self.face_frames)]
        clean = to_unit(stored[chosen])
        frames = augment_face(clean, self.augmentation, rng)
        return frames[:, None], np.ones(len(frames), dtype=bool), clean[:, None]


def _crop(values: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    """``frames`` frames of features (planes, T, bands) from a random place; shorter ones stand at a random place in
    silence (0)."""
    spare = values.shape[1] - frames
    offset = int(rng.integers(0, abs(spare) + 1))
    if spare >= 0:
        return values[:, offset : offset + frames]
    padded = np.zeros((values.shape[0], frames, values.shape[2]), np.float32)
    padded[:, offset : offset + values.shape[1]] = values
    return padded


class _Collate:
    def __init__(self, clean: bool):
        self.clean = clean

    def __call__(self, samples: list[tuple[_Half, ...]]) -> Batch:
        speech, *faces = zip(*samples)
        skipped = torch.tensor([any(half.skipped for half in row) for row in samples])
        clips, valid, labels, targets = self._stacked(speech)
        clean = torch.from_numpy(np.stack([half.clean for half in speech])) if self.clean else None
        if not faces:
            return Batch(clips, valid, labels, targets, skipped, clean)
        pictures, _, face_labels, face_targets = self._stacked(faces[0])
        return Batch(clips, valid, labels, targets, skipped, clean, pictures, face_labels, face_targets)

    @staticmethod
    def _stacked(halves: Sequence[_Half]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            torch.from_numpy(np.stack([h.values for h in halves])),
            torch.from_numpy(np.stack([h.valid for h in halves])),
            torch.tensor([h.label for h in halves]),
            torch.from_numpy(np.stack([h.target for h in halves])),
        )


class _Steps:
    """The rows of one process, step after step: what a DataLoader calls a batch sampler."""

    def __init__(self, plan: Plan, first: int, last: int, rank: int, world: int):
        self.plan, self.first, self.last, self.rank, self.world = plan, first, last, rank, world

    def __iter__(self) -> Iterator[list[Draw]]:
        return (self.plan.rows(step, self.rank, self.world) for step in range(self.first, self.last))

    def __len__(self) -> int:
        return self.last - self.first


def batches(
    plan: Plan,
    samples: Samples,
    *,
    first: int = 0,
    last: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches of steps ``first`` to ``last`` (exclusive), counted over all epochs.

    ``workers`` processes make them ahead of time; 0 makes them here.  ``rank`` of ``world`` gets its part of a batch.
    ValueError for a batch that cannot be split, and for a paired plan over faces of another corpus.
    """
    if plan.paired and samples.faces is not None and samples.faces.manifest_sha256 != samples.speech.manifest_sha256:
        raise ValueError(
            f"batches: expected faces of {samples.speech.folder} for a paired plan, got those of {samples.faces.folder}"
        )
    steps = _Steps(plan, first, last, rank, world)
    plan.rows(first, rank, world)  # an impossible split is said here, not in a worker
    loader = DataLoader(
        samples,
        batch_sampler=steps,
        collate_fn=_Collate(samples.clean),
        num_workers=workers,
        pin_memory=pin_memory,
    )
    return iter(loader)
