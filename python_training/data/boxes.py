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
    one for each end of a speaker's name.
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
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path}: expected a readable file of boxes, got an error ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"{path}: expected boxes as a JSON object, got something else ({error})") from error
        if not isinstance(entries, dict):
            raise ValueError(f"{path}: expected boxes as a JSON object, got {type(entries).__name__}")
        return cls(entries, str(path))

    def of(self, utterance: Utterance) -> Box | None:
        for prefix in sorted(self.entries, key=len, reverse=True):
            if utterance.key.startswith(prefix):
                for speaker, box in self.entries[prefix].items():
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
    """Faces out of ``folder``, cropped already (the published way): ``<key>.avi`` (any video or image suffix), or
    ``<key>/`` with images.  An utterance without one is a fault."""
    folder = existing_folder(folder, "face clips")
    found: dict[str, FaceSource] = {}
    images: dict[str, list[Path]] = {}
    for path in files_under(folder, (*VIDEO, *IMAGES)):
        if path.suffix.lower() in VIDEO:
            found.setdefault(path.stem, FaceSource(video=path))
        else:
            images.setdefault(path.stem, []).append(path)
            images.setdefault(path.parent.name, []).append(path)
    utterances, faults = [], list(corpus.faults)
    for utterance in corpus.utterances:
        face = found.get(utterance.key)
        if face is None and utterance.key in images:
            face = FaceSource(images=tuple(images[utterance.key]))
        if face is None:
            message = f"expected a face clip {utterance.key}.* in {folder}, found none"
            faults.append(Fault("missing-video", utterance.key, message))
        utterances.append(dataclasses.replace(utterance, face=face))
    return dataclasses.replace(corpus, utterances=tuple(utterances), faults=tuple(faults))


def without_faces(corpus: Corpus, keep: Iterable[str] = ()) -> Corpus:
    """The corpus without its faces, but for those whose crop is one of ``keep``."""
    kept = set(keep)
    utterances = tuple(
        u if u.face is None or u.face.crop in kept else dataclasses.replace(u, face=None) for u in corpus.utterances
    )
    return dataclasses.replace(corpus, utterances=utterances)
