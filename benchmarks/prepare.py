"""``python -m benchmarks.prepare FOLDER``: preparing a corpus of 10,000 utterances, as ``FOLDER/prepare.json``.

The corpus is the shipped recordings over and over, each time with other noise in the last bit, so that no two files
are the same.  Measured, each in a fresh process: the whole of ``prepare`` (decoding, checks, digests, waveforms and
features to disk), the same number of threads that only decode, or decode and compute digests and features but store
nothing (all of it compiled code), writing as many bytes, preparing again when everything is
cached, opening the prepared folder with all of its features, and the largest resident memory for the whole corpus and
for a tenth of it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
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


def _compute(manifest: Path, workers: int, features: bool) -> None:
    """What preparing cannot do without, by as many threads: every file decoded; with ``features`` also its digest and
    its features."""
    from concurrent.futures import ThreadPoolExecutor

    from python_training.data import read_corpus
    from python_training.data.features import compute_features, read_spans
    from python_training.data.files import file_digest
    from python_training.data.in_order import in_order
    from python_training.settings import load_settings

    front_end = load_settings(CONFIG).front_end.front_end()

    def work(path: Path) -> None:
        (waveform,), _ = read_spans(path, [(0.0, None)])
        if features:
            file_digest(path)
            compute_features(waveform, front_end)

    paths = [u.path for u in read_corpus("manifest", manifest).utterances if u.path is not None]
    with ThreadPoolExecutor(workers) as pool:
        for _ in in_order(pool, 16 * workers, work, paths):
            pass


def _write(like: Path, out: Path) -> None:
    """As many bytes as the folder ``like`` holds, in files of the size of a shard."""
    from avser_fast.inference.whole_files import write_bytes
    from python_training.data.store import SHARD_BYTES

    out.mkdir()
    left = sum(p.stat().st_size for p in like.rglob("*") if p.is_file())
    block = os.urandom(SHARD_BYTES)
    for number in range(-(-left // SHARD_BYTES)):
        write_bytes(out / str(number), block)


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


def one(what: str, manifest: Path, workers: int, out: Path) -> dict[str, float]:
    """Seconds, processor seconds and resident memory of one of the measured things, in this process."""
    begin, before = time.perf_counter(), time.process_time()
    if what == "write":
        _write(manifest, out)
    elif what == "hit":
        _hit(out)
    elif what in ("decode", "compute"):
        _compute(manifest, workers, features=what == "compute")
    else:
        _prepare(manifest, workers, out)
    seconds, processor = time.perf_counter() - begin, time.process_time() - before
    return {"seconds": seconds, "processor_seconds": processor, "resident_mb": resident_mb()}


def fresh(what: str, manifest: Path, workers: int, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.prepare", "--one", what, str(manifest), str(workers), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).resolve().parents[1])
    found: dict[str, float] = json.loads(done.stdout)
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
        for _ in range(3):
            shutil.rmtree(out, ignore_errors=True)
            turns.append((fresh("decode", manifest, workers, out), fresh("prepare", manifest, workers, out)))
        again = fresh("prepare", manifest, workers, out)
        hit = fresh("hit", manifest, workers, out)
        compute = fresh("compute", manifest, workers, out)
        write = fresh("write", out, workers, folder / "written")
        shutil.rmtree(folder / "written")
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
            "compute_alone": compute,
            "write_alone": write,
            "share_of_decoding": decode["processor_seconds"] / whole["processor_seconds"],
            "share_of_compiled_code": compute["processor_seconds"] / whole["processor_seconds"],
            "share_of_writing": write["processor_seconds"] / whole["processor_seconds"],
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
        print(
            f"{kind}: {figures['hours_per_second']:.2f} hours of audio per second, {figures['cores_busy']:.2f} cores "
            f"busy, decoding {100 * figures['share_of_decoding']:.0f} % of the work (with digests and features "
            f"{100 * figures['share_of_compiled_code']:.0f} %, writing "
            f"{100 * figures['share_of_writing']:.0f} %), again {figures['again']['seconds']:.1f} s, "
            f"mapped {figures['hit']['seconds']:.1f} s, {figures['resident_mb']:.0f} MB "
            f"(a tenth of the corpus: {figures['resident_mb_of_a_tenth']:.0f} MB)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
