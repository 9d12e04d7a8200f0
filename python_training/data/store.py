"""Arrays on disk, found by a key of their content and read by memory map.

A store is a folder of shards.  A shard is a safetensors file that is written whole or not at all and never changed;
its tensors are named by the keys, its metadata says with which options they were made.  So a store can be extended
while others read it, an interruption costs at most the shard that was being filled, and any program that reads
safetensors reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from avser_fast.inference.weights import write_bytes

#: A shard is written once this many bytes are waiting: what a writer holds at most, and what an interruption may cost.
#: Each shard that is read holds a file descriptor, of which a process often has 1024: these are 64 GB.
SHARD_BYTES = 32 << 20

_DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "I16": np.dtype("<i2"), "F32": np.dtype("<f4")}
_SUFFIX = ".safetensors"
_METADATA = "avser_fast_store"
_MAX_HEADER = 100 << 20  # what safetensors itself reads at most


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


class _Place(NamedTuple):
    shard: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and its header; ValueError when it is not whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(
                f"{path}: expected a whole safetensors file, got {size} bytes of something else; delete it"
            )
        try:
            header = json.loads(file.read(length))
            last = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: expected the header of a safetensors file, got something else") from error
    if 8 + length + last != size:
        raise ValueError(f"{path}: expected a safetensors file of {8 + length + last} bytes, got {size}; delete it")
    return 8 + length, header


class Store:
    """The arrays under ``folder``, which need not exist yet.  Threads may read and add at the same time as other
    processes do; one thread adds at a time.  Within a ``with`` statement shards are written by a thread of their own.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        self.options = dict(options or {})
        self.notes: dict[str, Any] = {}
        self._places: dict[str, _Place] = {}
        self._maps: dict[Path, np.memmap] = {}
        self._waiting: dict[str, np.ndarray] = {}
        self._waiting_bytes = 0
        self._writing: dict[str, np.ndarray] = {}
        self._written: Future[Path] | None = None
        self._writer: ThreadPoolExecutor | None = None
        for path in sorted(self.folder.glob("*" + _SUFFIX)):
            self._index(path)

    def _index(self, path: Path) -> None:
        begin, header = _read_header(path)
        metadata = header.pop("__metadata__", {})
        self.notes.update(json.loads(metadata.get(_METADATA, "{}")).get("notes", {}))
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise ValueError(f"{path}: expected arrays of {', '.join(_DTYPES)}, got {entry['dtype']}")
            shape = tuple(entry["shape"])
            self._places[name] = _Place(path, _DTYPES[entry["dtype"]], shape, begin + entry["data_offsets"][0])

    def __contains__(self, key: str) -> bool:
        return key in self._waiting or key in self._writing or key in self._places

    def __len__(self) -> int:
        return sum(1 for _ in self.keys())

    def __getitem__(self, key: str) -> np.ndarray:
        """The array of a key, a view of the file that reads no more than what is touched; KeyError without one.

        Writing to it changes this process' copy of a page alone, never the file.
        """
        held = self._held(key)
        if held is not None:
            return held.copy()
        place = self._places[key]
        pages = self._maps.get(place.shard)
        if pages is None:
            pages = self._maps[place.shard] = np.memmap(place.shard, np.uint8, mode="c")
        size = place.dtype.itemsize * int(np.prod(place.shape, dtype=np.int64))
        return np.asarray(pages[place.offset : place.offset + size]).view(place.dtype).reshape(place.shape)

    def _held(self, key: str) -> np.ndarray | None:
        """The array of a key while it is still in memory."""
        return self._waiting.get(key, self._writing.get(key))

    def shape(self, key: str) -> tuple[int, ...]:
        held = self._held(key)
        return self._places[key].shape if held is None else held.shape

    def add(self, key: str, array: np.ndarray, note: Any = None) -> None:
        """Keep an array (uint8, int16 or float32) under a key; a shard is written when enough of them wait."""
        if key in self:
            return
        if array.dtype not in _DTYPES.values():
            raise TypeError(f"store: expected {', '.join(map(str, _DTYPES.values()))}, got {array.dtype}")
        self._waiting[key] = np.array(array, order="C")
        self._waiting_bytes += array.nbytes
        if note is not None:
            self.notes[key] = note
        if self._waiting_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits as one shard; one shard at a time is being written while others are made."""
        self._settle()
        if not self._waiting:
            return
        self._writing, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        notes = {k: self.notes[k] for k in self._writing if k in self.notes}
        if self._writer is not None:
            self._written = self._writer.submit(self._write, self._writing, notes)
        else:
            self._index(self._write(self._writing, notes))
            self._writing = {}

    def _settle(self) -> None:
        """Wait for the shard that is being written; OSError naming its file where it could not be."""
        written, self._written = self._written, None
        if written is not None:
            self._index(written.result())
            self._writing = {}

    def _write(self, arrays: dict[str, np.ndarray], notes: dict[str, Any]) -> Path:
        from safetensors.numpy import save

        self.folder.mkdir(parents=True, exist_ok=True)
        # The name follows from the keys: whoever makes the same arrays at the same time writes the same file.
        name = hashlib.sha256("\n".join(sorted(arrays)).encode()).hexdigest()[:16]
        path = self.folder / (name + _SUFFIX)
        # One entry alone: safetensors writes several in no fixed order.
        metadata = json.dumps({"options": self.options, "notes": notes}, sort_keys=True)
        write_bytes(path, save(arrays, {_METADATA: metadata}))
        return path

    def keys(self) -> Iterator[str]:
        yield from {**self._places, **self._writing, **self._waiting}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}, "_writer": None}  # another process maps the files itself

    def __enter__(self) -> Store:
        self._writer = ThreadPoolExecutor(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()  # an interruption keeps what was made before it
            self._settle()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None
