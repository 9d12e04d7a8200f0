"""EMO-DB (Burkhardt et al., Interspeech 2005)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from .corpus import Classes, Corpus, Fault, Utterance, sorted_utterances
from .files import AUDIO, existing_folder, files_under

#: The sixth letter of a file's name: Wut, Freude, neutral, Trauer, Langeweile, Ekel, Angst.
EMOTIONS = {"W": "ang", "F": "hap", "N": "neu", "T": "sad", "L": "bor", "E": "dis", "A": "fea"}
_NAME = re.compile(r"(?P<speaker>\d\d)(?P<text>[ab]\d\d)(?P<emotion>[A-Z])(?P<version>[a-z])")

#: Where a checkout keeps the recordings of the four published classes.
SHIPPED = Path(__file__).resolve().parents[2] / "data" / "emodb4"


def read_emodb(root: Path | None = None, classes: Classes | None = None) -> Corpus:
    """The recordings under ``root`` (``SStttEv.wav`` or ``.flac``; default: those that come with the project) whose
    emotion is in ``classes``.  A name that is not EMO-DB's is a fault; ValueError for a folder without recordings."""
    root = existing_folder(SHIPPED if root is None else root, "EMO-DB")
    classes = classes or Classes()
    utterances: list[Utterance] = []
    faults: list[Fault] = []
    dropped: Counter[str] = Counter()
    # A release is often there twice, as wav and as flac or in two folders: of equals the first is taken.
    recordings: dict[str, Path] = {}
    for path in files_under(root, AUDIO):
        other = recordings.setdefault(path.stem, path)
        if AUDIO.index(path.suffix.lower()) < AUDIO.index(other.suffix.lower()):
            recordings[path.stem] = path
    for path in recordings.values():
        match = _NAME.fullmatch(path.stem)
        if match is None or match["emotion"] not in EMOTIONS:
            expected = f"an EMO-DB name such as 03a01Fa, its sixth letter one of {''.join(EMOTIONS)}"
            faults.append(Fault("bad-name", str(path), f"expected {expected}, got {path.stem}"))
            continue
        emotion = EMOTIONS[match["emotion"]]
        label = classes.index(emotion)
        if label is None:
            dropped[emotion] += 1
        else:
            utterances.append(Utterance(path.stem, path, match["speaker"], label))
    if not utterances and not faults and not dropped:
        raise ValueError(f"{root}: expected EMO-DB recordings ({', '.join('*' + s for s in AUDIO)}), got none")
    return Corpus("emodb", classes.labels, sorted_utterances(utterances), tuple(faults), dict(dropped))
