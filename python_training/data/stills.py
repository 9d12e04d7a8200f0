"""Folders of still face images: ``ROOT/<emotion>/[<speaker>/]<image>``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .corpus import Classes, Corpus, FaceSource, Utterance, sorted_utterances
from .files import IMAGES, existing_folder, files_under


def read_stills(root: Path, classes: Classes | None = None, crop: str = "whole") -> Corpus:
    """Every image under ``root`` as a face of its own; the name of the first folder is its emotion, that of a second
    one its speaker.

    ``crop`` is ``whole`` for images that are cropped to the face already, ``detect`` for others.  Folders of other
    emotions are counted; ValueError for a folder without images.
    """
    root = existing_folder(root, "face images, one folder for each emotion")
    classes = classes or Classes()
    utterances: list[Utterance] = []
    dropped: Counter[str] = Counter()
    for path in files_under(root, IMAGES):
        parts = path.relative_to(root).parts
        emotion = parts[0] if len(parts) > 1 else "(no folder)"
        label = classes.index(emotion)
        if label is None:
            dropped[emotion] += 1
            continue
        key = "/".join(parts)
        speaker = parts[1] if len(parts) > 2 else ""
        utterances.append(Utterance(key, None, speaker, label, face=FaceSource(images=(path,), crop=crop)))
    if not utterances:
        found = ", ".join(f"{name} ({count})" for name, count in sorted(dropped.items())) or "no image"
        raise ValueError(f"{root}: expected images in folders named {', '.join(classes.labels)}, found {found}")
    return Corpus("faces", classes.labels, sorted_utterances(utterances), (), dict(dropped))
