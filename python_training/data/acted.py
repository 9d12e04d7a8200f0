"""RAVDESS and CREMA-D: acted sentences, audio and video of one take in files of one name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .corpus import Classes, Corpus, FaceSource, Fault, Utterance, sorted_utterances
from .files import AUDIO, VIDEO, existing_folder, files_under

#: Third field of a RAVDESS name (Livingstone and Russo, PLoS ONE 2018).
RAVDESS_EMOTIONS = {
    "01": "neu",
    "02": "cal",
    "03": "hap",
    "04": "sad",
    "05": "ang",
    "06": "fea",
    "07": "dis",
    "08": "sur",
}
#: Third field of a CREMA-D name (Cao et al., IEEE Transactions on Affective Computing 2014).
CREMAD_EMOTIONS = {"ANG": "ang", "DIS": "dis", "FEA": "fea", "HAP": "hap", "NEU": "neu", "SAD": "sad"}

# Modality (01 sound and picture, 02 picture, 03 sound), channel (01 speech, 02 song), emotion, intensity, statement,
# repetition, actor.
_RAVDESS = re.compile(r"(?P<modality>0[123])-(?P<take>0[12]-(?P<emotion>0[1-8])-\d\d-\d\d-\d\d-(?P<actor>\d\d))")
# Actor, sentence, emotion, level (LO, MD, HI, XX; the release has one X).
_CREMAD = re.compile(r"(?P<actor>\d{4})_[A-Z]{3}_(?P<emotion>[A-Z]{3})_[A-Z]{1,2}")


@dataclass(frozen=True)
class _Take:
    """What a file's name says: ``key`` joins sound and picture, ``rank`` prefers one file to another of its kind.

    ``emotion`` is ``song`` for what is no speech.
    """

    key: str
    emotion: str
    speaker: str
    rank: str = ""


def _ravdess_take(path: Path) -> _Take | None:
    match = _RAVDESS.fullmatch(path.stem)
    if match is None:
        return None
    # Both carry the same picture; the one without sound is smaller.
    rank = "0" if match["modality"] in ("02", "03") else "1"
    emotion = "song" if match["take"].startswith("02") else RAVDESS_EMOTIONS[match["emotion"]]
    return _Take(match["take"], emotion, match["actor"], rank)


def _cremad_take(path: Path) -> _Take | None:
    match = _CREMAD.fullmatch(path.stem)
    if match is None or match["emotion"] not in CREMAD_EMOTIONS:
        return None
    rank = str(AUDIO.index(path.suffix.lower())) if path.suffix.lower() in AUDIO else "0"
    return _Take(path.stem, CREMAD_EMOTIONS[match["emotion"]], match["actor"], rank)


def _read(
    root: Path, classes: Classes, name: str, title: str, example: str, take_of: Callable[[Path], _Take | None]
) -> Corpus:
    root = existing_folder(root, title)
    faults: list[Fault] = []
    takes: dict[str, _Take] = {}
    sound: dict[str, tuple[str, Path]] = {}
    picture: dict[str, tuple[str, Path]] = {}
    for path in files_under(root, (*AUDIO, *VIDEO)):
        take = take_of(path)
        if take is None:
            faults.append(Fault("bad-name", str(path), f"expected a {title} name such as {example}, got {path.stem}"))
            continue
        takes[take.key] = take
        kept = sound if path.suffix.lower() in AUDIO else picture
        # A release is often unpacked twice, by actor and all together: the first of equals is taken.
        if take.key not in kept or take.rank < kept[take.key][0]:
            kept[take.key] = (take.rank, path)
    if not takes and not faults:
        raise ValueError(f"{root}: expected files of {title} such as {example}.wav, found none")
    utterances: list[Utterance] = []
    dropped: Counter[str] = Counter()
    for key, take in takes.items():
        label = classes.index(take.emotion)
        if label is None:
            dropped[take.emotion] += 1
            continue
        wav = sound[key][1] if key in sound else None
        face = FaceSource(video=picture[key][1], crop="detect") if key in picture else None
        if wav is None and sound:
            faults.append(Fault("missing-wav", key, f"expected a recording beside {picture[key][1]}, found none"))
        if face is None and picture:
            faults.append(Fault("missing-video", key, f"expected a video beside {wav}, found none"))
        utterances.append(Utterance(key, wav, take.speaker, label, face=face))
    return Corpus(name, classes.labels, sorted_utterances(utterances), tuple(faults), dict(dropped))


def read_ravdess(root: Path, classes: Classes | None = None) -> Corpus:
    """The spoken takes under ``root``, audio-only files and video files of one take joined.

    A take is an utterance of its sound (modality 03) and, where present, its picture (02, else 01), which needs a
    face detector.  Takes of other emotions and songs are counted, names that are not RAVDESS' are faults; ValueError
    for a folder without files.
    """
    return _read(root, classes or Classes(), "ravdess", "RAVDESS", "03-01-06-01-02-01-12", _ravdess_take)


def read_cremad(root: Path, classes: Classes | None = None) -> Corpus:
    """The takes under ``root`` (``AudioWAV``, ``AudioMP3``, ``VideoFlash``), sound and picture of one name joined.

    Where a take is there as wav and as mp3, the wav is read.  Faults and errors as in ``read_ravdess``.
    """
    return _read(root, classes or Classes(), "cremad", "CREMA-D", "1001_DFA_ANG_XX", _cremad_take)
