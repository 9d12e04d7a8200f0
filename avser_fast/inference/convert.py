"""Model files for other precisions: ranges for int8 measured on recordings, agreement with float32 in the card.

The weights in the file stay float32 and are rounded when they are loaded, so that one file runs in every precision
that it has been measured for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelSpec
from ..errors import ConfigError, InputError, ModelError
from ..precision import PRECISIONS
from ..precision import measured as known_measurement
from .backends import Engine
from .recognizer import Recognizer
from .weights import find_model, read_any, write_model

#: Files under a folder that are taken for recordings.
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
#: Measured ranges are widened by this share, because a value beyond its range is cut off.  Ranges of one EMO-DB speaker
#: then err by at most 0.30 instead of 0.36 in a score on the other nine, ranges of nine on the tenth by 0.017 instead
#: of 0.027; the coarser steps cost nothing that could be measured.
HEADROOM = 0.25

Progress = Callable[[str, int, int], object]


@dataclass(frozen=True)
class Conversion:
    """What ``convert_model`` wrote: ``measured`` are the card's entries by precision, ``bad`` the files left out and
    what was wrong with each."""

    output: Path
    measured: dict[str, dict[str, Any]]
    calibrated_on: int
    bad: dict[Path, str]


def merged(found: Mapping[str, np.ndarray] | None, more: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The ranges that cover both."""
    if found is None:
        return dict(more)
    return {
        name: np.stack([np.minimum(found[name][0], low), np.maximum(found[name][1], high)])
        for name, (low, high) in more.items()
    }


def with_headroom(ranges: Mapping[str, np.ndarray], share: float = HEADROOM) -> dict[str, np.ndarray]:
    """Ranges in which 0 lies, each end ``share`` further from it than it was measured."""
    return {
        name: np.stack([np.minimum(low, 0), np.maximum(high, 0)]).astype(np.float32) * np.float32(1 + share)
        for name, (low, high) in ranges.items()
    }


def calibrate(engine: Engine, utterances: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """The ranges of int8, headroom included, from the clips (L, C, W, M) of each utterance and a float32 engine; empty
    without utterances."""
    ranges: dict[str, np.ndarray] | None = None
    for clips in utterances:
        ranges = merged(ranges, engine.calibrate(clips))
    return with_headroom(ranges or {})


def agreement(expected: np.ndarray, actual: np.ndarray) -> dict[str, Any]:
    """How (utterances, classes) probabilities compare with those of float32, in the words of a model's card."""
    return {
        "agreement": round(float(np.mean(expected.argmax(1) == actual.argmax(1))), 6),
        "utterances": len(expected),
        "largest_difference": round(float(np.max(np.abs(expected - actual))), 6),
    }


def find_audio(folder: str | os.PathLike[str], what: str, limit: int | None = None) -> list[Path]:
    """Recordings under ``folder``, at any depth, in sorted order; hidden names are left out.

    ``limit`` takes so many of them, evenly spread, so that they are not all of the first speaker.  InputError naming
    ``what`` when there are none.
    """
    top = Path(folder)
    if not top.is_dir():
        got = "a file" if top.exists() else "no such folder"
        raise InputError(f"{what} {str(top)!r}: expected a folder of recordings, got {got}")
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected a whole number of at least 1 or None, got {limit!r}")

    def refuse(error: OSError) -> None:
        raise InputError(f"{what} {error.filename!r}: cannot be read ({error.strerror or error})") from error

    found = []
    for path, folders, names in os.walk(top, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(path, n) for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    if not found:
        raise InputError(f"{what} {str(top)!r}: expected recordings ({', '.join(SUFFIXES)}), found none")
    found.sort()
    if limit is None or limit >= len(found):
        return found
    return [found[i * len(found) // limit] for i in range(limit)]


def convert_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    precision: str,
    calibrate_on: str | os.PathLike[str] | None = None,
    measure_on: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    on_bad_file: Callable[[str], object] | None = None,
) -> Conversion:
    """Write ``model`` again, ready for ``precision``, with the agreement that was measured in its card.

    model: a shipped name or a safetensors file of an MDSCM.
    precision: ``int8`` measures ranges on the recordings under ``calibrate_on`` and then compares int8 and bf16 with
    float32, and the card keeps what it said of bf16; ``bf16``, which needs no ranges, compares bf16.
    measure_on: recordings to compare on; for int8 those of ``calibrate_on`` when it is None.
    limit: of each folder so many files, evenly spread; None takes all.
    progress: called with what is being done, files done, files in all.
    on_bad_file: called with a sentence for each file that cannot be used, which is then left out.

    Raises ModelError, InputError or ConfigError; ``output`` is then as it was.
    """
    if precision not in PRECISIONS[1:]:
        raise ConfigError(f"precision: expected 'bf16' or 'int8', got {precision!r}")
    if precision == "int8" and calibrate_on is None:
        raise ConfigError("precision 'int8': expected a folder of recordings to calibrate on, got none")
    if precision == "bf16" and calibrate_on is not None:
        raise ConfigError("precision 'bf16': expected no folder to calibrate on, because bf16 has no ranges, got one")
    if precision == "bf16" and measure_on is None:
        raise ConfigError("precision 'bf16': expected a folder of recordings to measure on, got none")
    spec, tensors, card, calibration = read_any(model)
    path = str(find_model(model))
    if not isinstance(spec, ModelSpec):
        raise ModelError(
            f"model {path!r}: expected an MDSCM to convert, got a model of kind {spec.kind!r}, which has no int8 and "
            "runs in bf16 as it is where that is asked for"
        )

    def load(name: str) -> Recognizer:
        return Recognizer(
            spec, tensors, card, path=path, backend="engine", precision=name, calibration=calibration or None
        )

    whole = load("float32")
    engine = whole._backend
    assert isinstance(engine, Engine)
    bad: dict[Path, str] = {}

    def prepared(doing: str, files: Sequence[Path]) -> Iterator[Any]:
        """The files' clips, one file at a time, without those that cannot be used."""
        for done, file in enumerate(files, start=1):
            try:
                item = None if file in bad else whole._prepare(file, None, repr(str(file)))
            except InputError as error:
                item = None
                bad[file] = str(error)
                if on_bad_file is not None:
                    on_bad_file(str(error))
            if item is not None:
                yield item
            if progress is not None:
                progress(doing, done, len(files))

    def none_left(what: str, files: Sequence[Path], folder: str | os.PathLike[str]) -> InputError:
        return InputError(
            f"{what} {os.fspath(folder)!r}: expected recordings that can be used, got {len(files)} that cannot"
        )

    names = ["bf16"]
    calibrated_on = 0
    if calibrate_on is not None:
        files = find_audio(calibrate_on, "calibrate", limit)
        if measure_on is not None:  # is named before the work begins when there is something wrong with it
            find_audio(measure_on, "measure", limit)
        calibration = calibrate(engine, (item.item for item in prepared("calibrating", files)))
        if not calibration:
            raise none_left("calibrate", files, calibrate_on)
        calibrated_on = len(files) - len(bad)
        names.append("int8")
    what, folder = ("measure", measure_on) if measure_on is not None else ("calibrate", calibrate_on)
    assert folder is not None
    files = find_audio(folder, what, limit)
    runs = {"float32": whole, **{name: load(name) for name in names}}
    scores: dict[str, list[list[float]]] = {name: [] for name in runs}
    for item in prepared("measuring", files):
        for name, recognizer in runs.items():
            logits, features = next(recognizer._backend.score([item.item], False))
            by_label = recognizer._result(item, logits, features, None).scores
            scores[name].append([by_label[label] for label in spec.labels])
    expected = np.array(scores.pop("float32"))
    if not len(expected):
        raise none_left(what, files, folder)
    where = Path(folder).resolve().name
    own = calibrate_on is not None and Path(folder).resolve() == Path(calibrate_on).resolve()
    measured = {name: agreement(expected, np.array(actual)) for name, actual in scores.items()}
    for entry in measured.values():
        entry["isa"] = engine.isa
        entry["protocol"] = f"these weights against themselves in float32, recordings of {where!r}"
    if "int8" in measured:
        if own:
            measured["int8"]["protocol"] += ", on which the ranges were measured too"
        measured["int8"]["calibration"] = {"utterances": calibrated_on, "headroom": HEADROOM}
    kept = {
        name: entry for name, entry in measured.items() if name == precision or known_measurement(card, name) is None
    }
    known = card.get("precisions")
    card = {**card, "precisions": {**(known if isinstance(known, Mapping) else {}), **kept}}
    write_model(output, spec, tensors, card, calibration)
    return Conversion(Path(output), measured, calibrated_on, bad)
