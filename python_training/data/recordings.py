"""The recordings of a corpus as waveforms and features, several at a time.

Short whole files, which most corpora are made of, go through compiled code in a few calls for all of them: between
those no thread waits for the interpreter.  What that code leaves out - parts of a long recording, strange formats,
damaged files - is read one by one, and reading it so is what says what is wrong with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from avser_fast.config import FrontEnd
from avser_fast.errors import InputError
from avser_fast.inference.features import engine_module

from .corpus import Fault
from .features import SAMPLING_RATE, compute_features, read_spans
from .files import file_digest

Span = tuple[float, float | None]
_WHOLE: Span = (0.0, None)
#: Files of a run are read until they have this many bytes; a longer one is read by itself.
_RUN_BYTES = 4 << 20
_SNDFILE = ("sf_open_virtual", "sf_readf_short", "sf_readf_float", "sf_error", "sf_close")


@dataclass(frozen=True)
class Recording:
    """What was read of a file: its digest and, for every span, its waveform with the features of each front end, an
    error, or None where nothing of it was asked for.  ``rate`` is that of the file, 0 where it was not decoded."""

    digest: str
    made: list[tuple[np.ndarray, list[np.ndarray]] | InputError | None]
    rate: int = 0


def span_key(digest: str, start: float, end: float | None) -> str:
    """The name under which arrays made of this part of a file are stored."""
    whole = (start, end) == _WHOLE
    return digest[:32] if whole else f"{digest[:32]}:{start:.4f}-{'' if end is None else f'{end:.4f}'}"


def read_recordings(
    files: Sequence[tuple[Path, Sequence[Span]]], stored: Callable[[str], bool], front_ends: Sequence[FrontEnd]
) -> list[Recording | Fault]:
    """Of every file and its spans what is not ``stored`` under its key, or why the file cannot be used."""
    whole = (
        [i for i, (_, spans) in enumerate(files) if list(spans) == [_WHOLE]] if sndfile_decoder() is not None else []
    )
    found: dict[int, Recording] = {}
    while whole:
        contents = engine_module().read_files([os.fsencode(files[i][0]) for i in whole], _RUN_BYTES)
        read = {i: content for i, content in zip(whole, contents) if content is not None}
        found.update(_read_whole(read, stored, front_ends))
        whole = whole[len(contents) :]
    return [
        found[i] if i in found else _read_by_itself(path, spans, stored, front_ends)
        for i, (path, spans) in enumerate(files)
    ]


def _read_whole(
    contents: dict[int, np.ndarray], stored: Callable[[str], bool], front_ends: Sequence[FrontEnd]
) -> dict[int, Recording]:
    """The recordings that these bytes of files are, but for those that only reading them one by one explains."""
    digests = {i: hashlib.sha256(content.data).hexdigest() for i, content in contents.items()}
    new = [i for i, digest in digests.items() if not stored(span_key(digest, *_WHOLE))]
    sounds = dict(zip(new, sndfile_decoder().decode([contents[i] for i in new], SAMPLING_RATE)))
    waveforms = {i: sound[0] for i, sound in sounds.items() if sound is not None}
    features = [compute_features(list(waveforms.values()), f) for f in front_ends]
    found = {i: Recording(digest, [None]) for i, digest in digests.items() if i not in sounds}
    for place, (i, waveform) in enumerate(waveforms.items()):
        found[i] = Recording(digests[i], [(waveform, [values[place] for values in features])], sounds[i][1])
    return found


def _read_by_itself(
    path: Path, spans: Sequence[Span], stored: Callable[[str], bool], front_ends: Sequence[FrontEnd]
) -> Recording | Fault:
    try:
        digest = file_digest(path)
        new = list(dict.fromkeys(span for span in spans if not stored(span_key(digest, *span))))
        if not new:
            return Recording(digest, [None] * len(spans))
        waveforms, rate = read_spans(path, new)
    except InputError as error:
        return Fault("unreadable-audio", str(path), str(error))
    except FileNotFoundError:
        return Fault("missing-wav", str(path), f"expected the recording {path}, found none")
    except OSError as error:
        message = f"expected a readable recording {path}, got an error ({error.strerror or error})"
        return Fault("unreadable-audio", str(path), message)
    made = {
        span: value if isinstance(value, InputError) else (value, [compute_features([value], f)[0] for f in front_ends])
        for span, value in zip(new, waveforms)
    }
    return Recording(digest, [made.get(span) for span in spans], rate)


@cache
def sndfile_decoder() -> Any:
    """Compiled code that decodes by the libsndfile which the package soundfile has loaded; None without one."""
    try:
        import soundfile

        library, ffi = soundfile._snd, soundfile._ffi
        addresses = {name: int(ffi.cast("uintptr_t", ffi.addressof(library, name))) for name in _SNDFILE}
    except (ImportError, OSError, AttributeError):  # OSError: the module is there, its library is not
        return None
    return engine_module().Decoder(**addresses)
