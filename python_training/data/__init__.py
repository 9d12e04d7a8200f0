"""Corpora: from raw folders (``corpora``) over prepared ones (``prepare``, ``prepared``) to batches (``batches``).

Preparing and reading need no torch; ``batches`` makes tensors.
"""

from __future__ import annotations

from .corpora import CORPORA, read_corpus
from .corpus import LABELS, Classes, Corpus, FaceSource, Fault, Utterance
from .prepare import Prepared, prepare
from .prepared import PreparedCorpus

__all__ = [
    "CORPORA",
    "LABELS",
    "Classes",
    "Corpus",
    "FaceSource",
    "Fault",
    "Prepared",
    "PreparedCorpus",
    "Utterance",
    "prepare",
    "read_corpus",
]
