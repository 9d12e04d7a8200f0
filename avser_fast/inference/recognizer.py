"""A loaded model that answers for batches of any kind of item."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import SystemSpec
from ..errors import BackendError, InputError, ModelError
from .audio import Waveform, item_name, load_item
from .backends import Backend, make_backend, softmax
from .result import EmotionResult, Segment
from .weights import Spec, find_model, read_any

#: Items decoded together when every one of them is short or bad.
ITEMS_AT_ONCE = 256

Progress = Callable[[int, "int | None"], object]


@dataclass
class _Prepared:
    """One item ready to be scored by the backend, and which frames its voting clips hold."""

    item: np.ndarray
    table: np.ndarray
    duration_s: float


class Recognizer:
    """A model, ready to run; made by ``load``.  Immutable, and safe to use from many threads at once.

    An MDSCM or an audio-visual encoder votes: an utterance's scores are the softmax of the mean of its clips' logits.
    A system fuses: two LSTMs read the clips' features and logits in order.

    An item's answer does not depend on what else is in the batch, on its place in it, or on ``batch_size``: it is bit
    for bit the same.  On the engine it does not depend on ``threads`` either.
    """

    __slots__ = ("spec", "card", "path", "_backend", "_arguments")

    spec: Spec
    card: Mapping[str, Any]
    path: str | None
    _backend: Backend
    _arguments: tuple[Any, ...]

    def __init__(
        self,
        spec: Spec,
        tensors: Mapping[str, np.ndarray],
        card: Mapping[str, Any] | None = None,
        *,
        path: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        backend: str = "auto",
        calibration: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """From tensors in memory, named as in the state dict of ``nn.MDSCM`` (an encoder's: ``nn.AVRE``, without the
        domain classifier; a system's: as in its file); ``load`` reads them from a file.

        ``calibration``: the ranges that precision int8 needs, as ``read_model_file`` returns them.
        """
        own_card = json.loads(json.dumps(dict(card or {})))
        made = make_backend(
            spec,
            tensors,
            device=device,
            precision=precision,
            threads=threads,
            backend=backend,
            card=own_card,
            calibration=calibration,
        )
        for name, value in (
            ("spec", spec),
            ("card", own_card),
            ("path", path),
            ("_backend", made),
            ("_arguments", (path, device, precision, threads, backend)),
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Recognizer is immutable: {name} cannot be set; load another one")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"Recognizer is immutable: {name} cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            raise TypeError("Recognizer: expected one made by load for pickling, got one made from tensors in memory")
        return load, self._arguments

    def __repr__(self) -> str:
        return (
            f"Recognizer({self.path or 'in memory'!r}, backend={self._backend.ran!r}, device={self._backend.device!r})"
        )

    # The public calls

    def infer(
        self,
        batch: Iterable[Any],
        *,
        sampling_rate: int | None = None,
        batch_size: int | None = None,
        top_k: int | None = None,
        on_error: str = "raise",
        progress: bool | Progress | None = None,
    ) -> list[EmotionResult]:
        """One result per item, in order; arguments and errors as in ``avser_fast.infer``."""
        return list(
            self.iter_infer(
                batch,
                sampling_rate=sampling_rate,
                batch_size=batch_size,
                top_k=top_k,
                on_error=on_error,
                progress=progress,
            )
        )

    def iter_infer(
        self,
        batch: Iterable[Any],
        *,
        sampling_rate: int | None = None,
        batch_size: int | None = None,
        top_k: int | None = None,
        on_error: str = "raise",
        progress: bool | Progress | None = None,
    ) -> Iterator[EmotionResult]:
        """``infer`` as a generator, for batches without end: results come group by group, in order."""
        total = check_batch(batch)
        _check_count("batch_size", batch_size)
        _check_count("top_k", top_k)
        if on_error not in ("raise", "return"):
            raise InputError(f"on_error: expected 'raise' or 'return', got {on_error!r}")
        report = _reporter(progress)

        def results() -> Iterator[EmotionResult]:
            done = 0
            fused = isinstance(self.spec, SystemSpec)
            for item, logits, found in self._score(batch, sampling_rate, batch_size, on_error, features=fused):
                if isinstance(item, InputError):
                    yield EmotionResult(label=None, score=None, backend=self._backend.ran, error=str(item))
                else:
                    yield self._result(item, logits, found, top_k)
                done += 1
                if report is not None:
                    report(done, total)

        return results()

    def embed(
        self, batch: Iterable[Any], *, sampling_rate: int | None = None, batch_size: int | None = None
    ) -> list[np.ndarray]:
        """Clip features: for each item (L, D) float32, one row per clip that votes: f_s of an MDSCM, f_v of an encoder,
        f_s and then f_v of a system.

        Raises InputError at the first item that cannot be used.
        """
        check_batch(batch)
        _check_count("batch_size", batch_size)
        return [found for _, _, found in self._score(batch, sampling_rate, batch_size, "raise", features=True)]

    def forward(self, clips: Any, valid: Any = None) -> tuple[Any, Any, Any]:
        """The networks alone: (B, L, C, W, M) float32 clips in, three float32 arrays out.

        Returns probabilities (B, K), clip features (B, L, D) and clip logits (B, L, K), of a system the larger ones of
        its two networks.  ``valid``: (B, L) bool, the clips that vote (None: all), at least one of each utterance; a
        system fuses these alone.  Both may be torch tensors.  Raises InputError for another shape or dtype.

        With backend ``cuda``, clips in the memory of the model's own GPU stay there: the outputs are torch tensors
        beside them, queued on torch's current stream.  What waits for the GPU is ``valid``, which is read on the host,
        and a system, whose fusion begins there.  A CUDA graph that recorded such a call may run as long as the model
        lives.
        """
        front, classes = self.spec.front_end, len(self.spec.labels)
        there = self._on_gpu(clips)
        array = _plain_array(clips) if there is None else clips
        inner = (front.planes, self.spec.clip_rule.clip_frames, front.mel_bands)
        dtype = _dtype(array)
        if array.ndim != 5 or tuple(array.shape[2:]) != inner or array.shape[1] < 1 or dtype != "float32":
            shape = ", ".join(map(str, inner))
            raise InputError(
                f"forward: clips: expected float32 of shape (B, L, {shape}) with L >= 1, got {dtype} "
                f"{tuple(array.shape)}"
            )
        votes = None
        if valid is not None:
            votes = _plain_array(valid)
            if votes.dtype != np.bool_ or votes.shape != tuple(array.shape[:2]) or not votes.any(1).all():
                raise InputError(
                    f"forward: valid: expected bool of shape {tuple(array.shape[:2])} with a clip that votes in every "
                    f"row, got {votes.dtype} {votes.shape}"
                )
        if not len(array):
            empty = (0, array.shape[1])
            outputs = (
                np.zeros((0, classes), np.float32),
                np.zeros((*empty, self.spec.features), np.float32),
                np.zeros((*empty, classes), np.float32),
            )
            return outputs if there is None else _beside(outputs, array)
        if there is not None:
            return there.forward_tensors(array, votes)
        return self._backend.forward(array, votes)

    def forward_samples(self, samples: Any) -> tuple[Any, Any, Any]:
        """Front end, clips and networks, of recordings of one length: (B, n) in, three float32 arrays out.

        samples: int16 or float32 at int16 scale and at the front end's rate, an array or a torch tensor; n at least 1.
        Returns probabilities (B, K), and features (B, L, D) and logits (B, L, K) of the L clips that vote.  Nothing is
        resampled, and a NaN is not looked for: it comes out as NaN.  Raises InputError for another shape or dtype.

        With backend ``cuda``, samples in the memory of the model's own GPU stay there, as clips do in ``forward``.
        """
        there = self._on_gpu(samples)
        array = _plain_array(samples) if there is None else samples
        dtype = _dtype(array)
        if array.ndim != 2 or min(array.shape) < 1 or dtype not in ("int16", "float32"):
            raise InputError(
                f"forward_samples: samples: expected int16 or float32 of shape (B, n), got {dtype} {tuple(array.shape)}"
            )
        if there is not None:
            return there.forward_sample_tensors(array)
        front, rule = self.spec.front_end, self.spec.clip_rule
        rows = [self._backend.prepare(row, front, rule)[0] for row in array.astype(np.float32)]
        found = list(self._backend.score(rows, True))
        votes = [softmax(self._backend.vote(logits, features)).astype(np.float32) for logits, features in found]
        return np.stack(votes), np.stack([features for _, features in found]), np.stack([x for x, _ in found])

    def _on_gpu(self, value: Any) -> Any:
        """The backend, where it takes ``value`` as it lies in its GPU's memory; None otherwise."""
        backend: Any = self._backend
        return backend if backend.name == "cuda" and backend.holds(value) else None

    def info(self) -> dict[str, Any]:
        """What runs and what it was trained on, as plain data.

        Backend, device, the precision that runs and why (``precision_reason``), instruction set or GPU, threads, the
        kind of model and its networks, labels, front end, clip rule, and ``network``, ``encoder``, ``fusion``, those
        that the kind has; from the model's card the protocol, the metrics and the licence of the data, and the card
        itself.
        """
        data = self.card.get("data")
        return {
            "model": Path(self.path).stem if self.path else None,
            "path": self.path,
            **self._backend.info(),
            "kind": self.spec.kind,
            "networks": list(self.spec.networks),
            **self.spec.to_dict(),
            "labels": list(self.spec.labels),
            "protocol": self.card.get("protocol"),
            "metrics": self.card.get("metrics"),
            "licence": data.get("licence") if isinstance(data, Mapping) else None,
            "card": json.loads(json.dumps(self.card)),
        }

    # The way of an item

    def _prepare(self, item: Any, sampling_rate: int | None, name: str) -> _Prepared:
        waveform: Waveform = load_item(item, sampling_rate, name)
        front = self.spec.front_end
        try:
            samples = self._backend.resample(waveform.samples, waveform.rate, front.sampling_rate)
            ready, table = self._backend.prepare(samples, front, self.spec.clip_rule)
        except MemoryError as error:
            length = f"{waveform.duration_s:.0f} s at {waveform.rate} hertz"
            raise InputError(f"{name}: expected audio whose features fit into memory, got {length}") from error
        return _Prepared(ready, table, waveform.duration_s)

    def _score(
        self, batch: Iterable[Any], sampling_rate: int | None, batch_size: int | None, on_error: str, *, features: bool
    ) -> Iterator[tuple[_Prepared | InputError, np.ndarray, np.ndarray]]:
        """(item or its error, clip logits (L, K), clip features (L, D)) in order, a bounded group at a time."""
        group: list[_Prepared | InputError] = []
        clips = 0
        for index, item in enumerate(batch):
            name = item_name(index, item)
            try:
                prepared: _Prepared | InputError = self._prepare(item, sampling_rate, name)
            except InputError as error:
                if on_error == "raise":
                    raise
                prepared = error
            del item  # a decoded item of a generator need not outlive its features
            group.append(prepared)
            if isinstance(prepared, _Prepared):
                clips += len(prepared.table)
            full = clips >= self._backend.clips_at_once or len(group) >= ITEMS_AT_ONCE
            if (len(group) >= batch_size) if batch_size is not None else full:
                yield from self._flush(group, features)
                group, clips = [], 0
        yield from self._flush(group, features)

    def _flush(
        self, group: Sequence[_Prepared | InputError], features: bool
    ) -> Iterator[tuple[_Prepared | InputError, np.ndarray, np.ndarray]]:
        ready = [item for item in group if isinstance(item, _Prepared)]
        outputs = iter(self._backend.score([item.item for item in ready], features))
        nothing = np.empty((0, 0), np.float32)
        for item in group:
            if isinstance(item, InputError):
                yield item, nothing, nothing
            else:
                logits, found = next(outputs)
                yield item, logits, found

    def _result(
        self, item: _Prepared, clip_logits: np.ndarray, features: np.ndarray, top_k: int | None
    ) -> EmotionResult:
        front = self.spec.front_end
        # The vote is taken here, item by item, so that it is the same however the clips were grouped.
        logits = self._backend.vote(clip_logits, features)
        if not (np.isfinite(logits).all() and np.isfinite(clip_logits).all()):
            raise ModelError(
                f"model {self.path or 'in memory'!r}: its scores are not finite, the weights cannot be used"
            )
        scores = self._named(softmax(logits), top_k)
        label = next(iter(scores))
        # The frames of a clip, counted from 1, follow each other.
        lasts, counts = item.table.max(1).tolist(), np.count_nonzero(item.table, 1).tolist()
        segments = []
        for last, count, own in zip(lasts, counts, softmax(clip_logits.astype(np.float64))):
            if not count:
                continue  # a clip of padding alone votes under the published rule, but says nothing about a moment
            start = (last - count) * front.frame_step / front.sampling_rate
            end = ((last - 1) * front.frame_step + front.frame_length) / front.sampling_rate
            segments.append(Segment(min(start, item.duration_s), min(end, item.duration_s), self._named(own, top_k)))
        return EmotionResult(
            label=label,
            score=scores[label],
            scores=scores,
            segments=tuple(segments),
            duration_s=item.duration_s,
            padded_fraction=1 - sum(counts) / item.table.size,
            backend=self._backend.ran,
        )

    def _named(self, probabilities: np.ndarray, top_k: int | None) -> dict[str, float]:
        values = probabilities.tolist()
        order = sorted(range(len(values)), key=values.__getitem__, reverse=True)[:top_k]
        return {self.spec.labels[i]: values[i] for i in order}


def load(
    name_or_path: str | os.PathLike[str] = "default",
    device: str = "auto",
    precision: str = "auto",
    threads: int | None = None,
    backend: str = "auto",
) -> Recognizer:
    """Load a model for many calls.

    name_or_path: a shipped name (``default``) or a safetensors file written by this project: an MDSCM, an audio-visual
    encoder (``write_avre``) or a whole system (``write_system``, ``import_av4ser``).
    device: ``cpu``, ``cuda`` or ``cuda:1``; ``auto`` is the CPU.
    precision: ``float32``, ``bf16`` or ``int8`` on the engine, ``float32``, ``tf32``, ``bf16`` or ``fp16`` on a GPU,
    with backend ``cuda`` also ``fp8``, ``float32`` on the reference.  ``int8`` needs a file with calibrated ranges
    (``avser-fast convert``) and is never automatic.  ``auto`` is bf16 where the processor has instructions for it and
    the model's card shows that it decides as float32 does on at least 99 % of utterances, else float32; ``info()`` and
    ``EmotionResult.backend`` say which ran.  Encoders and systems run in float32 unless another is asked for.
    threads: of the engine, and of the front end before the Triton kernels; None takes as many as the process may use.
    Nothing outside this model changes.
    backend: ``engine`` (CPU, no torch), ``cuda`` (GPU, no torch), ``triton`` (GPU) or ``reference`` (plain PyTorch,
    both); ``auto`` is the engine on the CPU, on a GPU the first of ``cuda`` and ``triton`` that can run, never the
    reference.

    Raises ModelError for a file that cannot be used, BackendError for what this machine or version does not have.
    """
    spec, tensors, card, calibration = read_any(name_or_path)
    path = os.path.abspath(find_model(name_or_path))
    return Recognizer(
        spec,
        tensors,
        card,
        path=path,
        device=device,
        precision=precision,
        threads=threads,
        backend=backend,
        calibration=calibration,
    )


def infer(
    batch: Iterable[Any],
    *,
    model: str | os.PathLike[str] | Recognizer = "default",
    device: str = "auto",
    precision: str = "auto",
    sampling_rate: int | None = None,
    batch_size: int | None = None,
    top_k: int | None = None,
    on_error: str = "raise",
    progress: bool | Progress | None = None,
) -> list[EmotionResult]:
    """The emotion of each item of a batch: one item in, one result out, in order.

    batch: a list or any iterable, generators included, of
        paths of audio files (wav, flac, ogg, mp3, ...); bytes of such a file; file objects opened in binary mode;
        ``{"array": ..., "sampling_rate": ...}``; (n,) or (channels, n) arrays or torch tensors with ``sampling_rate=``.
        Samples are int8, int16, int32, uint8 (scaled by their dtype) or floats in [-1, 1].  Up to 8 channels are
        averaged; 4 to 384 kHz are resampled to the model's rate.
    model: a shipped name, a file, or a Recognizer.  The last few models stay loaded between calls.
    device, precision: as in ``load``.
    sampling_rate: in hertz, of arrays that do not bring their own; a file says its own.
    batch_size: items decoded and scored together; None chooses by their length.  Changes memory and speed, no result.
    top_k: keep only the k largest scores.
    on_error: ``raise`` at the first item that cannot be used, or ``return`` a result with ``error`` in its place.
    progress: True (a counter on stderr) or a callable that gets (done, total); total is None for a generator.

    Raises InputError naming the item (counted from 0), ModelError, BackendError.
    """
    if isinstance(model, Recognizer):
        if (device, precision) != ("auto", "auto"):
            raise BackendError(
                "infer: expected device and precision to stay 'auto' with a Recognizer, which has its own"
            )
        recognizer = model
    else:
        check_batch(batch)  # before the model is read: the cheaper mistake is named first
        recognizer = _cached(model, device, precision)
    return recognizer.infer(
        batch,
        sampling_rate=sampling_rate,
        batch_size=batch_size,
        top_k=top_k,
        on_error=on_error,
        progress=progress,
    )


_CACHE_SIZE = 4
_cache: OrderedDict[tuple[Any, ...], Recognizer] = OrderedDict()
_cache_lock = threading.Lock()


def _cached(model: str | os.PathLike[str], device: str, precision: str) -> Recognizer:
    path = find_model(model)
    try:
        found = os.stat(path)
        key = (os.path.realpath(path), found.st_mtime_ns, found.st_size, device, precision)
    except OSError:
        return load(model, device, precision)  # which says what is wrong with it
    with _cache_lock:
        if key not in _cache:
            _cache[key] = load(model, device, precision)
        _cache.move_to_end(key)
        recognizer = _cache[key]
        while len(_cache) > _CACHE_SIZE:
            _cache.popitem(last=False)
    return recognizer


def check_batch(batch: Any) -> int | None:
    """The number of items, None when it is not known; InputError when ``batch`` is one item instead of many."""
    kind = type(batch).__name__
    one = isinstance(batch, (str, os.PathLike, bytes, bytearray, memoryview, Mapping, np.ndarray)) or hasattr(
        batch, "read"
    )
    torch = sys.modules.get("torch")
    if one or (torch is not None and isinstance(batch, torch.Tensor)):
        raise InputError(f"batch: expected a list of items, got one item of type {kind}; write [item]")
    if not isinstance(batch, Iterable):
        raise InputError(f"batch: expected a list of items, got {kind}")
    try:
        return len(batch)  # type: ignore[arg-type]
    except TypeError:
        return None


def _check_count(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1):
        raise InputError(f"{name}: expected a whole number of at least 1 or None, got {value!r}")


def _reporter(progress: bool | Progress | None) -> Progress | None:
    if progress is None or progress is False:
        return None
    if callable(progress):
        return progress
    if progress is not True:
        raise InputError(f"progress: expected True or a callable, got {progress!r}")

    def report(done: int, total: int | None) -> None:
        end = "\n" if done == total else ""
        print(f"\r{done}/{'?' if total is None else total} items", end=end, file=sys.stderr, flush=True)

    return report


def _dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _beside(arrays: Iterable[np.ndarray], tensor: Any) -> tuple[Any, ...]:
    import torch

    return tuple(torch.from_numpy(array).to(tensor.device) for array in arrays)


def _plain_array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


__all__ = ["Recognizer", "infer", "load"]
