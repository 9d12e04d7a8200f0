"""EMO-DB (Burkhardt et al., Interspeech 2005), the four classes that the published system knows."""

from __future__ import annotations

import re
from pathlib import Path

from .utterance import Utterance

#: Class names in label order; the code letter of each in a file name.
LABELS = ("ang", "hap", "neu", "sad")
_CODES = {"W": "ang", "F": "hap", "N": "neu", "T": "sad"}
_NAME = re.compile(r"(?P<speaker>\d\d)(?P<text>[ab]\d\d)(?P<emotion>[A-Z])(?P<version>[a-z])")

#: Where a checkout keeps the recordings.
SHIPPED = Path(__file__).resolve().parents[2] / "data" / "emodb4"


def load_emodb(root: Path | None = None) -> list[Utterance]:
    """The utterances of the classes in LABELS under ``root`` (``SStttEv.flac`` or ``.wav``), sorted by name.

    Recordings of other classes (boredom, disgust, fear) are left out.  Raises ValueError naming a file whose name
    is not EMO-DB's, or a folder without recordings.
    """
    root = SHIPPED if root is None else Path(root)
    utterances = []
    for path in sorted([*root.glob("*.flac"), *root.glob("*.wav")]):
        match = _NAME.fullmatch(path.stem)
        if match is None:
            raise ValueError(f"{path}: expected an EMO-DB name such as 03a01Fa, got {path.stem}")
        emotion = _CODES.get(match["emotion"])
        if emotion is not None:
            utterances.append(Utterance(path.stem, path, match["speaker"], LABELS.index(emotion)))
    if not utterances:
        raise ValueError(f"{root}: expected EMO-DB recordings (*.flac, *.wav), got none")
    return utterances
