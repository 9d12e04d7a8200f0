"""Arrays on disk, found by a key of their content and read by memory map.

A store is a folder of shards.  A shard is a safetensors file that is written whole or not at all and never changed;
its tensors are named by the keys, its metadata says with which options they were made.  So a store can be extended
while others read it, an interruption costs at most the shard that was being filled, and any program that reads
safetensors reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from avser_fast.inference.whole_files import remove_unfinished

from .shards import DTYPES, SUFFIX, Place, map_file, read_shard, write_shard

#: A shard is written once this many bytes are waiting.
SHARD_BYTES = 8 << 20
#: Shards that are written at the same time, each by a thread that mostly waits for the disk, while another is filled.
#: All of them are what is held in memory and what an interruption may cost.
_WRITERS = 2


def options_key(options: Mapping[str, Any]) -> str:
    """A short name for what arrays were made with: equal for equal options, whatever their order."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def writing(folder: Path, what: str = "") -> Iterator[None]:
    """A ValueError that names ``folder``, and for what it is written, instead of an OSError."""
    try:
        yield
    except OSError as error:
        of = f", {error.filename}" if error.filename else ""
        raise ValueError(
            f"{folder}: expected a folder that can be written{what}, got an error ({error.strerror or error}{of})"
        ) from error


def mend(folder: Path) -> dict[Path, str]:
    """Delete the shards of a store that are not whole, so that they are made again; what was wrong with each.

    What writers that were killed have left is deleted, too.
    """
    remove_unfinished(folder)
    damaged = {}
    for path in _shards(folder):
        try:
            read_shard(path)
        except ValueError as error:
            damaged[path] = str(error)
            path.unlink(missing_ok=True)
    return damaged


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*" + SUFFIX))


class Store:
    """The arrays under ``folder``, which need not exist yet.  Threads may read and add at the same time as other
    processes do; one thread adds at a time.  Within a ``with`` statement shards are written by threads of their own.

    ValueError naming a shard that is not whole.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        self.options = dict(options or {})
        self.notes: dict[str, Any] = {}
        self._shards: dict[Path, dict[str, Place]] = {}
        """Every shard with what is in it."""
        self._places: dict[str, Place] = {}
        """Where an array is read from, whichever shards hold it."""
        self._maps: dict[Path, np.ndarray] = {}
        self._held: dict[str, np.ndarray] = {}
        """Arrays that are in no shard yet."""
        self._waiting: dict[str, np.ndarray] = {}
        """Those of them that the next shard will hold."""
        self._waiting_bytes = 0
        self._writers: ThreadPoolExecutor | None = None
        self._writing: deque[Future[None]] = deque()
        for path in _shards(self.folder):
            try:
                places, metadata = read_shard(path)
            except ValueError as error:
                raise ValueError(f"{path}: {error}; prepare it again") from error
            self._keep(path, places)
            self.notes.update(metadata.get("notes", {}))
            if options is None:
                self.options = metadata.get("options", {})

    def _keep(self, path: Path, places: dict[str, Place]) -> None:
        self._shards[path] = places
        self._places.update(places)

    def __contains__(self, key: str) -> bool:
        return key in self._held or key in self._places

    def keys(self) -> Iterator[str]:
        yield from {**self._places, **self._held}

    def __getitem__(self, key: str) -> np.ndarray:
        """The array of a key, a view of the file that reads no more than what is touched; KeyError without one.

        Writing to it changes this process' copy of a page alone, never the file.
        """
        held = self._held.get(key)
        if held is not None:
            return held.copy()
        place = self._places[key]
        pages = self._maps.get(place.shard)
        if pages is None:
            pages = self._maps[place.shard] = map_file(place.shard)
        return place.of(pages)

    def shape(self, key: str) -> tuple[int, ...]:
        held = self._held.get(key)
        return self._places[key].shape if held is None else held.shape

    def add(self, key: str, array: np.ndarray, note: Any = None) -> None:
        """Keep an array (uint8, int16 or float32) under a key; a shard is written when enough of them wait.

        The array is not copied: it belongs to the store from then on and can no longer be written to.
        """
        if key in self:
            return
        if array.dtype not in DTYPES.values():
            raise TypeError(f"store: expected {', '.join(map(str, DTYPES.values()))}, got {array.dtype}")
        array = np.asarray(array, order="C")
        array.flags.writeable = False
        self._held[key] = self._waiting[key] = array
        self._waiting_bytes += array.nbytes
        if note is not None:
            self.notes[key] = note
        if self._waiting_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one shard; OSError naming its file, or that of one before it, where it cannot be."""
        if not self._waiting:
            return
        arrays, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        if self._writers is None:
            self._write(arrays)
            return
        self._settle(_WRITERS - 1)
        self._writing.append(self._writers.submit(self._write, arrays))

    def _settle(self, left: int) -> None:
        """Wait until no more than ``left`` shards are still to be written."""
        while len(self._writing) > left:
            self._writing.popleft().result()

    def _write(self, arrays: dict[str, np.ndarray]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        # The name follows from the keys: whoever makes the same arrays at the same time writes the same file.
        name = hashlib.sha256("\n".join(sorted(arrays)).encode()).hexdigest()[:16]
        notes = {key: self.notes[key] for key in arrays if key in self.notes}
        metadata = {"options": self.options, "notes": notes}
        path = self.folder / (name + SUFFIX)
        self._keep(path, write_shard(path, arrays, metadata))
        for key in arrays:
            del self._held[key]

    def prune(self, used: Container[str]) -> None:
        """Remove every array but those that are ``used``; nobody else may be reading the store."""
        emptied = set()
        for path, kept, unused in list(self._usage(used)):
            if unused:
                emptied.add(path)
                arrays = {key: self[key] for key in kept}
                for key in kept:
                    del self._places[key]
                for key, array in arrays.items():
                    self.add(key, array)
        self.flush()
        self._places = {key: place for key, place in self._places.items() if key in used}
        for path in emptied - {place.shard for place in self._places.values()}:
            path.unlink(missing_ok=True)
            del self._shards[path]

    def unused_bytes(self, used: Container[str]) -> int:
        """Bytes of the arrays that are not ``used``."""
        return sum(unused for _, _, unused in self._usage(used))

    def _usage(self, used: Container[str]) -> Iterator[tuple[Path, list[str], int]]:
        """Of every shard the arrays that are ``used`` and read from it, and the bytes of the others."""
        for path, places in self._shards.items():
            kept = [key for key, place in places.items() if key in used and self._places.get(key) == place]
            yield path, kept, sum(places[key].nbytes for key in places.keys() - set(kept))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_writers": None}  # another process maps the files itself

    def __enter__(self) -> Store:
        self._writers = ThreadPoolExecutor(_WRITERS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()  # an interruption keeps what was made before it
            self._settle(0)
        finally:
            if self._writers is not None:
                self._writers.shutdown()
                self._writers = None
