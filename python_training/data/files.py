"""Finding files: in a fixed order, through symbolic links, past the droppings of other systems."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

AUDIO = (".wav", ".flac", ".ogg", ".mp3")
VIDEO = (".avi", ".mp4", ".mkv", ".mov", ".flv", ".webm", ".mpg", ".m4v")
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".tif", ".tiff")


def existing_folder(root: Path, what: str) -> Path:
    """``root`` if it is a folder that can be listed, else a ValueError that says what should be there."""
    root = Path(root)
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise ValueError(f"{root}: expected the folder of {what}, found {found}")
    try:
        next(os.scandir(root), None)
    except OSError as error:
        raise ValueError(f"{root}: expected a readable folder of {what}, got an error ({error.strerror})") from error
    return root


def files_under(root: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Files below ``root`` whose suffix (in any case) is one of ``suffixes``, sorted folder by folder.

    Links to folders are followed, each folder once; names that begin with a dot are left out (``._x.wav`` holds
    what macOS knows about ``x.wav``).  A folder that cannot be listed raises its OSError: it must not look empty.
    """
    seen: set[str] = set()

    def walk(folder: Path) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in seen:
            return
        seen.add(real)
        for entry in sorted(folder.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(entry)
            elif entry.suffix.lower() in suffixes:
                yield entry

    return walk(Path(root))


def file_digest(path: Path) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal; OSError for what has none to read twice (a pipe, a folder)."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for somebody to write into it
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
