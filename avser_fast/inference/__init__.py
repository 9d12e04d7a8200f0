"""Speech in, emotions out: model files, decoding, front end and the Recognizer.  Nothing here needs torch."""

from __future__ import annotations

from .recognizer import Recognizer, infer, load
from .result import EmotionResult, Segment
from .weights import read_model, read_tensors, write_avre, write_model, write_system, write_tensors

__all__ = [
    "EmotionResult",
    "Recognizer",
    "Segment",
    "infer",
    "load",
    "read_model",
    "read_tensors",
    "write_avre",
    "write_model",
    "write_system",
    "write_tensors",
]
