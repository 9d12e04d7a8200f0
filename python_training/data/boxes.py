"""Where the faces are: crop boxes of dialog video, and folders of faces that are cropped already."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .corpus import Corpus, FaceSource, Fault, Utterance
from .files import IMAGES, VIDEO, existing_folder, files_under

Box = tuple[int, int, int, int]


def _box(value: Any, where: str) -> Box:
    whole = isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not whole or len(value) != 4 or min(value) < 0 or min(value[2:]) < 1:
        raise ValueError(f"{where}: expected [x, y, width, height] in whole pixels, got {json.dumps(value)[:60]}")
    return (value[0], value[1], value[2], value[3])


class Boxes:
    """Crop boxes by the beginning of a key, the longest one that fits; by the speaker where faces share a picture.

    ``{"Ses01": {"F": [x, y, width, height], "M": [...]}, "Ses02F_impro01": ...}``: under a prefix stands one box, or
    one for each end of a speaker's name.  A prefix does not end within a number: ``a1`` begins ``a1b``, not ``a10``.
    """

    def __init__(self, entries: Mapping[str, Any], where: str = "boxes"):
        self.entries: dict[str, dict[str, Box]] = {}
        for prefix, value in entries.items():
            by_speaker = value if isinstance(value, dict) else {"": value}
            self.entries[prefix] = {
                speaker: _box(box, f"{where}: {prefix}{' ' + speaker if speaker else ''}")
                for speaker, box in by_speaker.items()
            }

    @classmethod
    def read(cls, path: Path) -> Boxes:
        """From a JSON file; ValueError naming it and what is wrong in it."""
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ValueError(f"{path}: expected a readable file of boxes, got an error ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"{path}: expected boxes as a JSON object, got something else ({error})") from error
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: expected boxes as a JSON object, got {type(entries).__name__}")
        return cls(entries, str(path))

    def of(self, utterance: Utterance) -> Box | None:
        key = utterance.key
        for length in range(len(key), -1, -1):
            if key[length - 1 : length].isdigit() and key[length : length + 1].isdigit():
                continue
            for speaker, box in self.entries.get(key[:length], {}).items():
                if utterance.speaker.endswith(speaker):
                    return box
        return None


def with_boxes(corpus: Corpus, boxes: Boxes, detect: bool) -> Corpus:
    """The faces of video taken from inside their boxes, by a detector where ``detect``; a face without a box is a
    fault."""
    utterances, faults = [], list(corpus.faults)
    for utterance in corpus.utterances:
        face = utterance.face
        if face is not None and face.video is not None and face.crop == "detect" and face.box is None:
            box = boxes.of(utterance)
            if box is None:
                message = f"expected a crop box for speaker {utterance.speaker or '(none)'} of this key, found none"
                faults.append(Fault("missing-box", utterance.key, message))
                face = None
            else:
                face = dataclasses.replace(face, box=box, crop="detect" if detect else "box")
        utterances.append(dataclasses.replace(utterance, face=face))
    return dataclasses.replace(corpus, utterances=tuple(utterances), faults=tuple(faults))


def with_face_clips(corpus: Corpus, folder: Path) -> Corpus:
    """Faces out of ``folder``, cropped already (the published way): ``<key>.avi`` (any video suffix), else ``<key>/``
    with images, else ``<key>.png`` (any image suffix), in whatever folder below it; a key with slashes is the whole
    path.  An utterance without one, or with several of a kind, is a fault."""
    folder = existing_folder(folder, "face clips")
    videos: dict[str, list[Path]] = {}
    folders: dict[str, dict[Path, list[Path]]] = {}
    images: dict[str, list[Path]] = {}

    def names(path: Path, own: str) -> set[str]:
        return {own, (path.parent / own).relative_to(folder).as_posix()}

    keys = {u.key for u in corpus.utterances}
    for path in files_under(folder, (*VIDEO, *IMAGES)):
        if path.suffix.lower() in VIDEO:
            for name in names(path, path.stem):
                videos.setdefault(name, []).append(path)
            continue
        of_folder = names(path.parent, path.parent.name) if path.parent != folder else set()
        for name in of_folder:
            folders.setdefault(name, {}).setdefault(path.parent, []).append(path)
        if not of_folder & keys:  # a frame of another utterance is no face of its own
            for name in names(path, path.stem):
                images.setdefault(name, []).append(path)
    utterances, faults = [], list(corpus.faults)
    for utterance in corpus.utterances:
        key = utterance.key
        found = [FaceSource(video=path) for path in videos.get(key, ())]
        found = found or [FaceSource(images=tuple(own)) for own in folders.get(key, {}).values()]
        found = found or [FaceSource(images=(path,)) for path in images.get(key, ())]
        if len(found) != 1:
            shown = " and ".join(str(f.video or f.images[0]) for f in found[:2])
            came = f"got {len(found)}: {shown}{', ...' if len(found) > 2 else ''}" if found else "found none"
            faults.append(Fault("missing-video", key, f"expected a face clip {key}.* in {folder}, {came}"))
        utterances.append(dataclasses.replace(utterance, face=found[0] if len(found) == 1 else None))
    return dataclasses.replace(corpus, utterances=tuple(utterances), faults=tuple(faults))


def without_faces(corpus: Corpus, keep: Iterable[str] = ()) -> Corpus:
    """The corpus without its faces, but for those whose crop is one of ``keep``."""
    kept = set(keep)
    utterances = tuple(
        u if u.face is None or u.face.crop in kept else dataclasses.replace(u, face=None) for u in corpus.utterances
    )
    return dataclasses.replace(corpus, utterances=utterances)
