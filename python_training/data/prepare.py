"""From a corpus to a prepared folder: everything decoded, checked and stored once.

    OUT/corpus.json      name, labels, digest of the manifest: written last, so that what has it is complete
    OUT/manifest.jsonl   one line per utterance, as ``manifest.py`` describes it, with the keys of its arrays
    OUT/report.json      what ``avser-fast prepare`` prints
    OUT/contact-sheet.png
    OUT/waveforms/<key>/ mono waveforms at 16 kHz     (see ``store.py``)
    OUT/features/<key>/  unnormalised features, one folder for each set of options
    OUT/faces/<key>/     grey face frames

Arrays are named by the content that they come from, so preparing again decodes only what is new.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from avser_fast.config import FrontEnd
from avser_fast.errors import InputError
from avser_fast.inference.whole_files import remove_unfinished, write_bytes

from .boxes import without_faces
from .contact_sheet import contact_sheet
from .corpus import Corpus, FaceSource, Fault, Utterance
from .faces import FRAMES, HEIGHT, WIDTH, Detector, FaceError, read_faces
from .features import SAMPLING_RATE, feature_options, waveform_options
from .files import file_digest
from .in_order import in_order
from .manifest import entry_of
from .recordings import Recording, read_recordings, span_key
from .report import corpus_report
from .store import Store, mend, options_key, writing

FORMAT = 1
_SHEET_FACES = 40


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` did: the folder, the report (see ``report.corpus_report``) and every fault."""

    folder: Path
    report: dict[str, Any]
    faults: tuple[Fault, ...]


def prepare(
    corpus: Corpus,
    out: Path,
    *,
    front_ends: Sequence[FrontEnd] = (),
    detector: tuple[str, Detector] | None = None,
    workers: int | None = None,
    seed: int = 0,
    prune: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Prepared:
    """Decode, check and store a corpus under ``out`` and say what is wrong with it.

    ``front_ends``: whose features are computed already now (others are when they are first asked for).  ``detector``
    finds the faces whose crop is ``detect``: its name, which stands in the key of the cache, and the callable; without
    one these faces are left out, and the report says so.
    ``workers`` threads decode at the same time (default: one per core); neither their number nor an interruption
    changes what is stored.  ``progress`` is called with what is being done, how many are done, and of how many.
    ``seed`` draws the faces of the contact sheet.  A damaged shard is a fault and made again; ``prune`` removes what
    was stored for other corpora, which nobody may be reading then.  ValueError where ``out`` cannot be written or
    nothing of the corpus can be used.
    """
    out = Path(out)
    for front_end in front_ends:
        if front_end.sampling_rate != SAMPLING_RATE:
            raise ValueError(
                f"{out}: expected front ends at {SAMPLING_RATE} Hz, got one at {front_end.sampling_rate} Hz"
            )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink(missing_ok=True)  # another process may be doing the same
        return _prepare(corpus, out, front_ends, detector, workers, seed, prune, progress)


def _prepare(
    corpus: Corpus,
    out: Path,
    front_ends: Sequence[FrontEnd],
    detector: tuple[str, Detector] | None,
    workers: int | None,
    seed: int,
    prune: bool,
    progress: Callable[[str, int, int], None] | None,
) -> Prepared:
    remove_unfinished(out)
    damaged = [
        Fault("damaged-shard", str(path), message) for folder in _stores(out) for path, message in mend(folder).items()
    ]
    left_out = sum(u.face is not None and u.face.crop == "detect" for u in corpus.utterances) if detector is None else 0
    if left_out:
        corpus = without_faces(corpus, keep=("whole", "box"))
    workers = workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else workers or os.cpu_count()
    workers = workers or 1
    with ThreadPoolExecutor(workers) as pool:
        sounds, audio_faults = _store_sounds(corpus, out, front_ends, pool, workers, progress)
        faces, face_faults = _store_faces(corpus, out, detector, pool, workers, progress)
    faults = [*corpus.faults, *damaged, *audio_faults, *face_faults]
    utterances = [u for u in corpus.utterances if u.key in sounds or u.key in faces]
    if not utterances:
        shown = f"; {_left_out(left_out)}" if left_out else ""
        shown += f"; the first of {len(faults)} faults: {faults[0]}" if faults else ""
        raise ValueError(f"{corpus.name}: expected at least one utterance that can be used, found none{shown}")
    faults += _duplicates(utterances, sounds, corpus.labels)
    samples = {key: sound.samples for key, sound in sounds.items()}
    rates = {key: sound.rate for key, sound in sounds.items()}
    report = corpus_report(corpus, utterances, samples, rates, set(faces), faults)
    if left_out:
        report["faces_left_out"] = _left_out(left_out)
    usage = _usage(out, {sound.key for sound in sounds.values()}, set(faces.values()), detector)
    report["unused"] = {"bytes": sum(store.unused_bytes(used) for store, used in usage), "removed": prune}
    lines = []
    for u in utterances:
        stored: dict[str, Any] = {}
        if u.key in sounds:
            stored.update(waveform=sounds[u.key].key, samples=samples[u.key])
        if u.key in faces:
            stored["faces"] = faces[u.key]
        lines.append(json.dumps({**entry_of(u, corpus.labels), **stored}, ensure_ascii=False))
    manifest = _encoded("\n".join(lines))
    write_bytes(out / "manifest.jsonl", manifest)
    write_bytes(out / "report.json", _encoded(json.dumps(report, indent=1, ensure_ascii=False)))
    if faces:
        _write_sheet(out, utterances, corpus.labels, faces, face_store(out, detector), seed)
    else:
        (out / "contact-sheet.png").unlink(missing_ok=True)  # of what was prepared here before
    header = {
        "format": FORMAT,
        "name": corpus.name,
        "labels": list(corpus.labels),
        "sampling_rate": SAMPLING_RATE,
        "utterances": len(utterances),
        "faces": face_store(out, detector).folder.name if faces else None,
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }
    write_bytes(out / "corpus.json", _encoded(json.dumps(header, indent=1)))
    if prune:
        for store, used in usage:
            store.prune(used)
    return Prepared(out, report, tuple(faults))


def _stores(out: Path) -> list[Path]:
    return [folder for what in ("waveforms", "features", "faces") for folder in sorted((out / what).glob("*"))]


def _usage(
    out: Path, sounds: set[str], faces: set[str], detector: tuple[str, Detector] | None
) -> list[tuple[Store, set[str]]]:
    """Every store of ``out`` with the keys of it that a corpus uses."""
    used = {waveform_store(out).folder: sounds, face_store(out, detector).folder: faces}
    used.update((folder, sounds) for folder in (out / "features").glob("*"))
    return [(Store(folder), used.get(folder, set())) for folder in _stores(out)]


def _left_out(count: int) -> str:
    return f"left out, {count} faces: pictures that show more than a face need crop boxes or a detector"


def _encoded(text: str) -> bytes:
    """JSON in UTF-8; what a file name has of other bytes becomes the escape that JSON has for it."""
    return (text + "\n").encode("utf-8", "backslashreplace")


# Sound


@dataclass(frozen=True)
class _Sound:
    key: str
    samples: int
    rate: int
    """Hertz of the file."""


def _store_sounds(
    corpus: Corpus,
    out: Path,
    front_ends: Sequence[FrontEnd],
    pool: ThreadPoolExecutor,
    workers: int,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[dict[str, _Sound], list[Fault]]:
    """The stored waveform of every utterance that has one, and the recordings that cannot be used."""
    waveforms = waveform_store(out)
    stores = [(f, feature_store(out, f)) for f in front_ends]
    with_sound = sorted((u for u in corpus.utterances if u.path is not None), key=lambda u: (str(u.path), u.key))
    jobs = [(Path(path), tuple(group)) for path, group in groupby(with_sound, key=lambda u: str(u.path))]

    def stored(key: str) -> bool:
        return key in waveforms and all(key in store for _, store in stores)

    def work(run: Sequence[tuple[Path, tuple[Utterance, ...]]]) -> list[Recording | Fault]:
        files = [(path, [(u.start, u.end) for u in utterances]) for path, utterances in run]
        return read_recordings(files, stored, front_ends)

    sounds: dict[str, _Sound] = {}
    faults: list[Fault] = []
    done = 0
    with contextlib.ExitStack() as stack:
        for store in (waveforms, *(s for _, s in stores)):
            stack.enter_context(store)
        for (_, utterances), found in in_order(pool, workers, work, jobs):
            if isinstance(found, Fault):
                faults += [Fault(found.kind, u.key, found.message) for u in utterances]
            else:
                for utterance, new in zip(utterances, found.made):
                    key = span_key(found.digest, utterance.start, utterance.end)
                    if isinstance(new, InputError):
                        faults.append(Fault("unreadable-audio", utterance.key, str(new)))
                        continue
                    if new is not None:
                        waveforms.add(key, new[0], note=found.rate)
                        for (_, store), values in zip(stores, new[1]):
                            store.add(key, values)
                    sounds[utterance.key] = _Sound(key, waveforms.shape(key)[0], waveforms.notes[key])
            done += len(utterances)
            if progress is not None:
                progress("recordings", done, len(with_sound))
    return sounds, faults


def waveform_store(folder: Path) -> Store:
    """The waveforms of a prepared folder, as this version decodes and resamples them."""
    options = waveform_options()
    return Store(folder / "waveforms" / options_key(options), options)


def feature_store(folder: Path, front_end: FrontEnd, speed: float = 1.0) -> Store:
    """The features of a prepared folder that were made with these options."""
    options = feature_options(front_end, speed)
    return Store(folder / "features" / options_key(options), options)


def _duplicates(utterances: Sequence[Utterance], sounds: dict[str, _Sound], labels: Sequence[str]) -> list[Fault]:
    first: dict[str, Utterance] = {}
    faults = []
    for u in utterances:
        if u.key not in sounds:
            continue
        other = first.setdefault(sounds[u.key].key, u)
        if other is u:
            continue
        compared = (("speaker", other.speaker, u.speaker), ("label", labels[other.label], labels[u.label]))
        differ = [f"{what} ({a or 'unknown'}, {b or 'unknown'})" for what, a, b in compared if a != b]
        also = f", though {' and '.join(differ)} differ" if differ else ""
        message = f"expected a recording of its own, got the same bytes as {other.key}{also}"
        faults.append(Fault("duplicate", u.key, message))
    return faults


# Faces


def face_store(folder: Path, detector: tuple[str, Detector] | None) -> Store:
    """The faces of a prepared folder that were found with this detector."""
    name = detector and detector[0]
    options = {"revision": 1, "frames": FRAMES, "height": HEIGHT, "width": WIDTH, "detector": name}
    return Store(folder / "faces" / options_key(options), options)


def _face_key(digest: str, face: FaceSource) -> str:
    where = "" if face.box is None else f":{'x'.join(map(str, face.box))}"
    return f"{span_key(digest, face.start, face.end)}:{face.crop}{where}"


def _store_faces(
    corpus: Corpus,
    out: Path,
    detector: tuple[str, Detector] | None,
    pool: ThreadPoolExecutor,
    workers: int,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[dict[str, str], list[Fault]]:
    """The key of the stored frames of every utterance with a face, and the faces that cannot be used."""
    store = face_store(out, detector)
    with_face = [(u, u.face) for u in corpus.utterances if u.face is not None]
    with_face.sort(key=lambda pair: (str(pair[1].video or ""), pair[1].images, pair[0].key))
    # One job reads one video from its beginning to its end, whoever wants frames of it.
    jobs = [
        tuple(group) for _, group in groupby(with_face, key=lambda pair: (str(pair[1].video or ""), pair[1].images))
    ]

    def work(job: tuple[tuple[Utterance, FaceSource], ...]) -> list[tuple[str, Any]]:
        """For each face of a video its key and what is new of it: frames or a FaceError."""
        face = job[0][1]
        files = [face.video] if face.video is not None else list(face.images)
        try:
            digest = "".join(file_digest(f) for f in files if f is not None)
        except FileNotFoundError as error:
            raise FaceError("missing-video", f"expected {error.filename}, found no such file") from None
        except OSError as error:
            raise FaceError("unreadable-video", f"expected a readable file, got {error}") from error
        if len(files) > 1:
            digest = hashlib.sha256(digest.encode()).hexdigest()
        keys = [_face_key(digest, f) for _, f in job]
        made: list[Any] = [None] * len(job)
        new = [i for i, key in enumerate(keys) if key not in store]
        for place, frames in read_faces([job[i][1] for i in new], detector and detector[1]):
            made[new[place]] = frames
        return list(zip(keys, made))

    def safely(job: tuple[tuple[Utterance, FaceSource], ...]) -> list[tuple[str, Any]]:
        try:
            return work(job)
        except FaceError as error:
            return [("", error)] * len(job)

    def all_of(run: Sequence[tuple[tuple[Utterance, FaceSource], ...]]) -> list[list[tuple[str, Any]]]:
        return [safely(job) for job in run]

    faces: dict[str, str] = {}
    faults: list[Fault] = []
    done = 0
    with store:
        for job, results in in_order(pool, workers, all_of, jobs):
            for (utterance, _), (key, new) in zip(job, results):
                if isinstance(new, FaceError):
                    faults.append(Fault(new.kind, utterance.key, str(new)))
                    continue
                if new is not None:
                    store.add(key, new)
                faces[utterance.key] = key
            done += len(job)
            if progress is not None:
                progress("faces", done, len(with_face))
    return faces, faults


def _write_sheet(
    out: Path,
    utterances: Sequence[Utterance],
    labels: Sequence[str],
    faces: dict[str, str],
    store: Store,
    seed: int,
) -> None:
    """Random faces with their labels: a wrong crop box is seen, not computed."""
    shown = [u for u in utterances if u.key in faces]
    chosen = np.random.default_rng(seed).permutation(len(shown))[:_SHEET_FACES]
    drawn = [shown[i] for i in sorted(chosen)]
    pictures = [store[faces[u.key]][FRAMES // 2] for u in drawn]
    contact_sheet(pictures, [f"{labels[u.label]}\n{u.key}" for u in drawn], out / "contact-sheet.png")
