"""The corpora that can be read, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import iemocap
from .acted import read_cremad, read_ravdess
from .corpus import Classes, Corpus
from .emodb import read_emodb
from .iemocap import read_iemocap
from .manifest import read_manifest
from .stills import read_stills

#: Name, reader and what its ROOT is.
CORPORA: dict[str, tuple[Callable[[Path, Classes], Corpus], str]] = {
    "iemocap": (read_iemocap, "the folder IEMOCAP_full_release"),
    "emodb": (read_emodb, "the folder of EMO-DB's wav (or flac) files"),
    "ravdess": (read_ravdess, "the folder that holds Actor_01, ..., audio and video"),
    "cremad": (read_cremad, "the folder that holds AudioWAV and VideoFlash"),
    "manifest": (read_manifest, "a JSON Lines file, see python_training/data/manifest.py"),
    "faces": (read_stills, "a folder of face images, one folder for each emotion"),
}


def read_corpus(name: str, root: Path, classes: Classes | None = None) -> Corpus:
    """The corpus ``name`` under ``root``; ``classes`` default to the four published ones."""
    if name not in CORPORA:
        raise ValueError(f"corpus: expected one of {', '.join(CORPORA)}, got {name!r}")
    if classes is None:
        classes = iemocap.CLASSES if name == "iemocap" else Classes()
    return CORPORA[name][0](Path(root), classes)
