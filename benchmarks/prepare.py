"""``python -m benchmarks.prepare FOLDER``: preparing a corpus of 10,000 utterances, as ``FOLDER/prepare.json``.

The corpus is the shipped recordings over and over, each time with other noise in the last bit, so that no two files
are the same.  Measured, each in a fresh process: the whole of ``prepare`` (decoding, checks, digests, waveforms and
features to disk) and what its processor time goes to, the same number of threads that only decode, preparing again
when everything is cached, opening the prepared folder with all of its features, and the largest resident memory for
the whole corpus and for a tenth of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .harness import device
from .startup import resident_mb

UTTERANCES = 10_000
CONFIG = "mdscm-small"


def write_corpus(folder: Path, utterances: int, kind: str) -> None:
    """``utterances`` files of ``kind`` (``flac``, ``wav``) with names of EMO-DB, and a manifest of them."""
    import numpy as np
    import soundfile

    from python_training.data.emodb import read_emodb

    corpus = read_emodb()
    sounds = [(u, soundfile.read(u.path, dtype="int16")) for u in corpus.utterances]
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    lines = []
    for i in range(utterances):
        u, (samples, rate) = sounds[i % len(sounds)]
        path = folder / f"{i:05d}-{u.key}.{kind}"
        soundfile.write(path, samples ^ rng.integers(0, 2, len(samples), dtype=np.int16), rate)
        entry = {"key": path.stem, "wav": path.name, "emo": corpus.labels[u.label], "speaker": u.speaker}
        lines.append(json.dumps(entry))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


class Parts:
    """Processor seconds of the parts of ``prepare``, each measured around the calls that are all of it, in whichever
    thread makes them.  What is left of the process's time is Python's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = threading.Lock()

    def of(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **keywords: Any) -> Any:
            before = time.thread_time()
            try:
                return work(*arguments, **keywords)
            finally:
                spent = time.thread_time() - before
                with self._lock:
                    self.seconds[part] = self.seconds.get(part, 0.0) + spent

        return measured

    def watch(self) -> None:
        """From now on, in this process."""
        from avser_fast import _engine
        from python_training.data import recordings, shards

        decoder = recordings.sndfile_decoder()
        decode = self.of("decoding", decoder.decode)
        recordings.sndfile_decoder = lambda: SimpleNamespace(decode=decode)
        recordings.read_spans = self.of("decoding", recordings.read_spans)
        hashlib.sha256 = self.of("digests", hashlib.sha256)
        _engine.read_files = self.of("reading", _engine.read_files)
        _engine.front_end = self.of("features", _engine.front_end)
        shards.write_bytes = self.of("writing", shards.write_bytes)


def _decode(manifest: Path, workers: int) -> None:
    """Every file read and decoded by as many threads as prepare has, and nothing else."""
    from concurrent.futures import ThreadPoolExecutor

    from avser_fast import _engine
    from python_training.data import read_corpus
    from python_training.data.in_order import in_order
    from python_training.data.recordings import sndfile_decoder

    def work(run: Sequence[Path]) -> Sequence[Path]:
        files = _engine.read_files([os.fsencode(path) for path in run], 1 << 30)
        assert all(sndfile_decoder().decode(files, 16000))
        return run

    paths = [u.path for u in read_corpus("manifest", manifest).utterances if u.path is not None]
    with ThreadPoolExecutor(workers) as pool:
        for _ in in_order(pool, workers, work, paths):
            pass


def _hit(prepared: Path) -> None:
    """Every feature of a prepared folder, by memory map."""
    from python_training.data import PreparedCorpus
    from python_training.settings import load_settings

    PreparedCorpus(prepared).features(load_settings(CONFIG).front_end.front_end())


def _prepare(manifest: Path, workers: int, out: Path) -> None:
    from python_training.data import prepare, read_corpus
    from python_training.settings import load_settings

    front_end = load_settings(CONFIG).front_end.front_end()
    prepared = prepare(read_corpus("manifest", manifest), out, front_ends=[front_end], workers=workers)
    assert not prepared.faults


def one(what: str, manifest: Path, workers: int, out: Path) -> dict[str, Any]:
    """Seconds, processor seconds and resident memory of one of the measured things, in this process."""
    begin, before = time.perf_counter(), time.process_time()
    parts = Parts()
    if what == "prepare":
        parts.watch()
    if what == "hit":
        _hit(out)
    elif what == "decode":
        _decode(manifest, workers)
    else:
        _prepare(manifest, workers, out)
    seconds, processor = time.perf_counter() - begin, time.process_time() - before
    found: dict[str, Any] = {"seconds": seconds, "processor_seconds": processor, "resident_mb": resident_mb()}
    if parts.seconds:
        parts.seconds["Python"] = processor - sum(parts.seconds.values())
        found["parts"] = dict(sorted(parts.seconds.items(), key=lambda part: -part[1]))
    return found


def fresh(what: str, manifest: Path, workers: int, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.prepare", "--one", what, str(manifest), str(workers), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(folder: Path, utterances: int, workers: int, kinds: tuple[str, ...] = ("flac", "wav")) -> dict[str, Any]:
    """Figures of corpora written below ``folder``, which is left empty."""
    results: dict[str, Any] = {}
    for kind in kinds:
        write_corpus(folder / kind, utterances, kind)
        write_corpus(folder / "tenth", utterances // 10, kind)
        manifest, out = folder / kind / "manifest.jsonl", folder / "out"
        fresh("decode", manifest, workers, out)  # the files are in the memory of the system afterwards
        # In turns, so that a noisy machine is noisy for both.
        turns = []
        for _ in range(5):
            shutil.rmtree(out, ignore_errors=True)
            turns.append((fresh("decode", manifest, workers, out), fresh("prepare", manifest, workers, out)))
        again = fresh("prepare", manifest, workers, out)
        hit = fresh("hit", manifest, workers, out)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        shutil.rmtree(out)
        tenth = fresh("prepare", folder / "tenth" / "manifest.jsonl", workers, out)
        for path in (out, folder / kind, folder / "tenth"):
            shutil.rmtree(path)
        decode, whole = min((d for d, _ in turns), key=_seconds), min((p for _, p in turns), key=_seconds)
        hours = report["duration"]["hours"]
        results[kind] = {
            "hours": hours,
            "prepare": whole,
            "decode_alone": decode,
            "again": again,
            "hit": hit,
            "hours_per_second": hours / whole["seconds"],
            "cores_busy": whole["processor_seconds"] / whole["seconds"],
            "hours_per_second_decoding_alone": hours / decode["seconds"],
            "shares": {part: seconds / whole["processor_seconds"] for part, seconds in whole["parts"].items()},
            "resident_mb": whole["resident_mb"],
            "resident_mb_of_a_tenth": tenth["resident_mb"],
        }
    return {"utterances": utterances, "workers": workers, "config": CONFIG, "device": device(), "kinds": results}


def _seconds(found: dict[str, float]) -> float:
    return found["seconds"]


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--one"]:
        what, manifest, workers, out = arguments[1:]
        print(json.dumps(one(what, Path(manifest), int(workers), Path(out))))
        return 0
    (results,) = arguments
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), UTTERANCES, workers)
    Path(results, "prepare.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for kind, figures in found["kinds"].items():
        shares = ", ".join(f"{100 * share:.0f} % {part}" for part, share in figures["shares"].items())
        print(
            f"{kind}: {figures['hours_per_second']:.2f} hours of audio per second (decoding alone "
            f"{figures['hours_per_second_decoding_alone']:.2f}), {figures['cores_busy']:.2f} cores busy, {shares}, "
            f"again {figures['again']['seconds']:.1f} s, "
            f"mapped {figures['hit']['seconds']:.1f} s, {figures['resident_mb']:.0f} MB "
            f"(a tenth of the corpus: {figures['resident_mb_of_a_tenth']:.0f} MB)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
