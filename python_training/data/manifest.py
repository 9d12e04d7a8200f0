"""Any corpus as a JSON Lines manifest: one object per utterance.

    {"key": "a1", "wav": "a1.wav", "emo": "ang", "speaker": "03", "session": "1",
     "video": "dialog.avi", "start": 12.5, "end": 15.0, "box": [0, 40, 180, 240]}

======== ============================================================================================================
key      name of the utterance, different for each
emo      its emotion
wav      its recording; relative paths start at the manifest's folder.  A line without it is a face alone
speaker  whom evaluation must separate (default: unknown)
session  recording session (default: none)
start    seconds where the utterance starts and ends in ``wav`` and in ``video`` (default: the whole file); with
end      ``"span": "video"`` (``"wav"``) in that one alone, the other holds nothing but the utterance
video    video of the face
image    image of the face, or a list of them, instead of a video
box      x, y, width, height of the face in pixels
face     ``whole``: the pictures are the face; ``box``: it is what is inside ``box``; ``detect``: a detector finds it
         (within ``box`` where there is one).  Default: ``box`` where there is one, else ``whole`` for images and
         ``detect`` for a video
======== ============================================================================================================
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .corpus import Classes, Corpus, FaceSource, Fault, Utterance, sorted_utterances

#: Emotions that a manifest may name without being faulty; those that are not among the classes are counted.
EMOTIONS = ("ang", "hap", "exc", "neu", "sad", "fru", "sur", "fea", "dis", "cal", "bor", "con", "oth", "xxx")


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def _path(value: Any) -> bool:
    try:
        return _text(value) and bool(os.fsencode(value))
    except UnicodeEncodeError:  # half a character: "\\ud800"
        return False


def _seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9


#: What ``prepare`` adds to the lines that it writes.
_PREPARED = {"waveform", "samples", "faces"}

_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "key": ("a string that is not empty", _text),
    "emo": ("a string that is not empty", _text),
    "wav": ("a path", _path),
    "speaker": ("a string", lambda v: isinstance(v, str)),
    "session": ("a string", lambda v: isinstance(v, str)),
    "start": ("seconds, 0 or more", _seconds),
    "end": ("seconds, 0 or more", _seconds),
    "span": ("both, wav or video", lambda v: v in ("both", "wav", "video")),
    "video": ("a path", _path),
    "image": (
        "a path or a list of paths",
        lambda v: _path(v) or (isinstance(v, list) and len(v) > 0 and all(map(_path, v))),
    ),
    "box": (
        "[x, y, width, height] in whole pixels",
        lambda v: (
            isinstance(v, list)
            and len(v) == 4
            and all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in v)
            and v[2] > 0
            and v[3] > 0
        ),
    ),
    "face": ("whole, box or detect", lambda v: v in ("whole", "box", "detect")),
}


class _Wrong(ValueError):
    """What is wrong with a line."""


def _checked(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"expected a JSON object, got {line.strip()[:60]!r} ({error})") from error
    if not isinstance(entry, dict):
        raise _Wrong(f"expected a JSON object, got {line.strip()[:60]!r}")
    entry = {name: value for name, value in entry.items() if value is not None}
    for name in ("key", "emo"):
        if name not in entry:
            raise _Wrong(f"expected the field {name!r}, got {', '.join(entry) or 'none'}")
    for name, value in entry.items():
        expected, fits = _FIELDS.get(name, ("", lambda v: True))
        if not fits(value):
            raise _Wrong(f"field {name!r}: expected {expected}, got {json.dumps(value)[:60]}")
    start, end = entry.get("start", 0), entry.get("end")
    if end is not None and end <= start:
        raise _Wrong(f"fields 'start' and 'end': expected an end after the start, got {start} to {end}")
    if "video" in entry and "image" in entry:
        raise _Wrong("expected 'video' or 'image', got both")
    if not {"wav", "video", "image"} & set(entry):
        raise _Wrong("expected 'wav', 'video' or 'image', got none of them")
    if entry.get("face") == "box" and "box" not in entry:
        raise _Wrong("field 'face': expected a field 'box' for it, got none")
    return entry


def _utterance(entry: dict[str, Any], label: int, folder: Path) -> Utterance:
    span, whole = (float(entry.get("start", 0)), entry.get("end")), (0.0, None)
    which = entry.get("span", "both")
    box = tuple(entry["box"]) if "box" in entry else None
    face = None
    if "video" in entry:
        crop = entry.get("face", "box" if box else "detect")
        start, end = whole if which == "wav" else span
        face = FaceSource(video=folder / entry["video"], start=start, end=end, crop=crop, box=box)
    elif "image" in entry:
        crop = entry.get("face", "box" if box else "whole")
        names = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
        face = FaceSource(images=tuple(folder / name for name in names), crop=crop, box=box)
    start, end = whole if which == "video" else span
    wav = folder / entry["wav"] if "wav" in entry else None
    return Utterance(entry["key"], wav, entry.get("speaker", ""), label, entry.get("session", ""), start, end, face)


def read_manifest(path: Path, classes: Classes | None = None) -> Corpus:
    """The utterances of a manifest (see above) whose emotion is in ``classes``; the corpus has the name of the file.

    A line that cannot be used is a fault that names it, and the others are read; an unknown field is named once and
    ignored.  ValueError for a file that cannot be read or holds no line.
    """
    classes = classes or Classes()
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON may hold U+2028 as it is
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a manifest in UTF-8, got other bytes ({error})") from error
    except OSError as error:
        raise ValueError(f"{path}: expected a readable manifest, got an error ({error.strerror})") from error
    utterances: list[Utterance] = []
    faults: list[Fault] = []
    dropped: Counter[str] = Counter()
    first_line: dict[str, int] = {}
    unknown: dict[str, list[int]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = _checked(line)
            key, emotion = entry["key"], entry["emo"]
            if key in first_line:
                raise _Wrong(f"expected a key of its own, got {key!r} of line {first_line[key]}")
            first_line[key] = number
            label = classes.index(emotion)
            if label is None and emotion not in EMOTIONS:
                known = ", ".join(dict.fromkeys((*classes.labels, *classes.merged, *EMOTIONS)))
                raise _Wrong(f"field 'emo': expected one of {known}, got {emotion!r}")
        except _Wrong as wrong:
            faults.append(Fault("bad-manifest", where, str(wrong)))
            continue
        for name in set(entry) - set(_FIELDS) - _PREPARED:
            unknown.setdefault(name, []).append(number)
        if label is None:
            dropped[emotion] += 1
            continue
        utterances.append(_utterance(entry, label, path.parent))
    for name, numbers in sorted(unknown.items()):
        lines_ = f"line {numbers[0]}" + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else "")
        message = f"expected the fields {', '.join(_FIELDS)}, got {name!r} too, which is ignored"
        faults.append(Fault("unknown-field", f"{path}, {lines_}", message))
    if not any(line.strip() for line in lines):
        raise ValueError(f"{path}: expected a manifest of one JSON object per line, got an empty file")
    return Corpus(path.stem, classes.labels, sorted_utterances(utterances), tuple(faults), dict(dropped))


def entry_of(utterance: Utterance, labels: tuple[str, ...]) -> dict[str, Any]:
    """The line of an utterance, with absolute paths; ``read_manifest`` makes the same utterance of it."""
    face = utterance.face
    entry: dict[str, Any] = {"key": utterance.key, "emo": labels[utterance.label]}
    if utterance.path is not None:
        entry["wav"] = str(utterance.path.absolute())
    entry.update({k: v for k, v in (("speaker", utterance.speaker), ("session", utterance.session)) if v})
    spans: dict[str, tuple[float, float | None]] = {}
    if utterance.path is not None:
        spans["wav"] = (utterance.start, utterance.end)
    if face is not None and face.video is not None:
        entry["video"] = str(face.video.absolute())
        spans["video"] = (face.start, face.end)
    if face is not None and face.images:
        entry["image"] = [str(p.absolute()) for p in face.images]
    if face is not None:
        entry["face"] = face.crop
        if face.box is not None:
            entry["box"] = list(face.box)
    cut = {name: span for name, span in spans.items() if span != (0.0, None)}
    if cut:
        start, end = next(iter(cut.values()))
        if len(set(cut.values())) > 1:
            raise ValueError(f"{utterance.key}: expected one span, got different ones of wav and video")
        entry.update({"start": start} if end is None else {"start": start, "end": end})
        if len(cut) < len(spans):
            entry["span"] = next(iter(cut))
    return entry
