"""One shard of a store: a safetensors file of arrays, written whole, checked, and read by memory map."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avser_fast.inference.whole_files import write_bytes

DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("u1"), "I16": np.dtype("<i2"), "F32": np.dtype("<f4")}
SUFFIX = ".safetensors"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "avser_fast_store"
_MAX_HEADER = 100 << 20  # what safetensors itself reads at most


class Place(NamedTuple):
    """Where an array is: ``nbytes`` bytes at ``offset`` of the file ``shard``."""

    shard: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def of(self, pages: np.ndarray) -> np.ndarray:
        """The array, a view of the bytes of its file."""
        return pages[self.offset : self.offset + self.nbytes].view(self.dtype).reshape(self.shape)


def write_shard(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> dict[str, Place]:
    """Write C-contiguous arrays and what JSON says of them under ``path``; where they are in it."""
    # The largest items first, so that every array is aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {_METADATA: json.dumps(metadata, sort_keys=True)}}
    end = 0
    for name in names:
        begin, end = end, end + arrays[name].nbytes
        entry = {"dtype": _NAMES[arrays[name].dtype], "shape": arrays[name].shape, "data_offsets": (begin, end)}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_bytes(path, len(text).to_bytes(8, "little"), text, *(arrays[name].data for name in names))
    data = 8 + len(text)
    return {n: Place(path, arrays[n].dtype, arrays[n].shape, data + header[n]["data_offsets"][0]) for n in names}


def read_shard(path: Path) -> tuple[dict[str, Place], dict[str, Any]]:
    """Where the arrays of a shard are, and its metadata; a ValueError says what it is when it is not whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(f"expected a whole safetensors file, got {size} bytes of something else")
        text = file.read(length)
    begin = end = 8 + length
    places = {}
    try:
        header = json.loads(text)
        metadata = json.loads(header.pop("__metadata__", {}).get(_METADATA, "{}"))
        for name, entry in header.items():
            first, last = (begin + int(offset) for offset in entry["data_offsets"])
            place = Place(path, DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), first)
            if first < begin or min(place.shape, default=0) < 0 or place.nbytes != last - first:
                raise ValueError(name)
            places[name], end = place, max(end, last)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"expected the header of a safetensors file of {', '.join(DTYPES)}, got something else"
        ) from error
    if end != size:
        raise ValueError(f"expected a safetensors file of {end} bytes, got {size}")
    return places, metadata


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, (n,) uint8, by a private memory map: who writes to them changes this process' pages alone.

    Mapped as long as an array of them lives.  No descriptor is held, of which a process may have few (Python's own
    ``mmap`` can do that from 3.13 on).
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, size, protection, mmap.MAP_PRIVATE, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    # Arrays that are cut out of it keep ``pages`` alive, not the array that is returned.
    pages = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(pages, _libc.munmap, address, size).atexit = False  # an array may outlive the interpreter's end
    return np.frombuffer(memoryview(pages), np.uint8)
