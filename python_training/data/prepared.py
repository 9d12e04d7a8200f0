"""Reading a prepared folder: utterances, and their waveforms, features and faces by memory map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from avser_fast.config import INT16_SCALE, FrontEnd

from .corpus import Classes, Utterance
from .features import compute_features
from .in_order import in_order
from .manifest import read_manifest
from .prepare import FORMAT, feature_store, waveform_store
from .store import Store, writing


class PreparedCorpus:
    """A folder that ``prepare`` wrote.  ``utterances`` are sorted by key; item i of every method is utterance i.

    ValueError naming the folder where it is none, not whole, or of a later version.
    """

    def __init__(self, folder: Path):
        self.folder = folder = Path(folder)
        try:
            header = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
            manifest = (folder / "manifest.jsonl").read_bytes()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder}: expected a folder written by `avser-fast prepare`, which has corpus.json and "
                f"manifest.jsonl, got {error}"
            ) from error
        version = header.get("format") if isinstance(header, dict) else None
        if version != FORMAT:
            raise ValueError(
                f"{folder}: expected a prepared corpus of format {FORMAT}, got {version}; prepare it again"
            )
        self.manifest_sha256 = hashlib.sha256(manifest).hexdigest()
        if self.manifest_sha256 != header["manifest_sha256"]:
            raise ValueError(f"{folder}: expected the manifest that corpus.json names, got another; prepare it again")
        self.name: str = header["name"]
        self.labels: tuple[str, ...] = tuple(header["labels"])
        self.sampling_rate: int = header["sampling_rate"]
        entries = [json.loads(line) for line in manifest.decode().split("\n") if line]
        of = {entry["key"]: entry for entry in entries}
        # The keys of arrays are no fields of a user's manifest: their faults are none.
        corpus = read_manifest(folder / "manifest.jsonl", Classes(self.labels))
        self.utterances: tuple[Utterance, ...] = corpus.utterances
        self._waveform_keys: list[str | None] = [of[u.key].get("waveform") for u in self.utterances]
        self._face_keys: list[str | None] = [of[u.key].get("faces") for u in self.utterances]
        self._waveforms = waveform_store(folder)
        self._faces = Store(folder / "faces" / header["faces"]) if header["faces"] else None
        for what, keys, store in (
            ("sound", self._waveform_keys, self._waveforms),
            ("face", self._face_keys, self._faces),
        ):
            named = [(u.key, key) for u, key in zip(self.utterances, keys) if key is not None]
            lost = [name for name, key in named if store is None or key not in store]
            if lost:
                raise ValueError(
                    f"{folder}: expected the {what} of every utterance that has one, found none of {len(lost)} (the "
                    f"first is {lost[0]}); prepare it again"
                )

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def with_speech(self) -> list[int]:
        return [i for i, key in enumerate(self._waveform_keys) if key is not None]

    @property
    def with_face(self) -> list[int]:
        return [i for i, key in enumerate(self._face_keys) if key is not None]

    @property
    def speakers(self) -> list[str]:
        return sorted({u.speaker for u in self.utterances})

    def spoken(self, labels: Container[int]) -> list[int]:
        """Items with speech whose label is one of ``labels``."""
        return [i for i in self.with_speech if self.utterances[i].label in labels]

    def parts(self, i: int) -> tuple[str, ...]:
        """Keys of the sound and the face of utterance i by their content: digest of a file, and which part of it."""
        return tuple(key for key in (self._waveform_keys[i], self._face_keys[i]) if key is not None)

    def recordings(self, i: int) -> tuple[str, ...]:
        """Digests of the files of sound and face that hold utterance i, wherever they are and whatever it is called."""
        return tuple(key.split(":")[0] for key in self.parts(i))

    def all_recordings(self) -> set[str]:
        return {digest for i in range(len(self)) for digest in self.recordings(i)}

    def same_people(self, other: PreparedCorpus) -> bool:
        """Whether speakers of one name are one person: in parts of one corpus, and where recordings are in both."""
        return self.name == other.name or not self.all_recordings().isdisjoint(other.all_recordings())

    def waveform(self, i: int) -> np.ndarray:
        """(n,) int16 or float32 at int16 scale and ``sampling_rate``."""
        key = self._waveform_keys[i]
        if key is None:
            raise ValueError(f"{self.utterances[i].key}: expected speech, this utterance of {self.folder} has none")
        return self._waveforms[key]

    def item(self, i: int) -> dict[str, Any]:
        """The speech of an utterance as ``infer`` takes it."""
        waveform = self.waveform(i)
        array = waveform if waveform.dtype == np.int16 else waveform / np.float32(INT16_SCALE)
        return {"array": array, "sampling_rate": self.sampling_rate}

    def face(self, i: int) -> np.ndarray:
        """(frames, height, width) uint8, grey."""
        key = self._face_keys[i]
        if key is None or self._faces is None:
            raise ValueError(f"{self.utterances[i].key}: expected a face, this utterance of {self.folder} has none")
        return self._faces[key]

    def features(
        self,
        front_end: FrontEnd,
        speed: float = 1.0,
        *,
        workers: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[np.ndarray | None]:
        """Unnormalised features (planes, frames, bands) float32 of every utterance, None without speech.

        Computed by the front end of inference the first time, kept in the folder, and read by memory map afterwards.
        """
        if front_end.sampling_rate != self.sampling_rate:
            raise ValueError(
                f"{self.folder}: expected a front end at {self.sampling_rate} Hz, got {front_end.sampling_rate} Hz"
            )
        store = feature_store(self.folder, front_end, speed)
        keys = [key for key in self._waveform_keys if key is not None]
        new = [key for key in dict.fromkeys(keys) if key not in store]

        def work(run: Sequence[str]) -> list[np.ndarray]:
            return compute_features([self._waveforms[key] for key in run], front_end, speed)

        with (
            writing(store.folder, ", for features that are not there yet"),
            store,
            ThreadPoolExecutor(workers) as pool,
        ):
            for done, (key, values) in enumerate(in_order(pool, workers, work, new), start=1):
                store.add(key, values)
                if progress is not None:
                    progress(done, len(new))
        return [None if key is None else store[key] for key in self._waveform_keys]
