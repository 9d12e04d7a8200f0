"""Files that are there whole or not at all, even where their writer is killed."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path
from typing import BinaryIO

#: What ``_begin`` calls a file that is being written.
_UNFINISHED = re.compile(r"\..+\.\d+\.[0-9a-f]{8}", re.DOTALL)


def write_bytes(path: str | os.PathLike[str], *parts: bytes | memoryview) -> None:
    """Write a whole file, one part after the other, under a temporary name in the same folder, then rename it."""
    path = Path(path)
    temporary = None
    try:
        temporary, file = _begin(path)
        with file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # name the file that was asked for, not the temporary one
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise


def _begin(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside ``path``, locked for as long as it is open: that is how ``remove_unfinished`` knows a living
    writer, on whatever machine it runs."""
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        file = open(temporary, "xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: nobody gets one, and nothing is removed
        if temporary.exists():
            return temporary, file
        file.close()  # taken for a leftover in the moment before it was locked


def remove_unfinished(folder: Path) -> None:
    """Remove what writers that were killed have left in ``folder``; files of living ones stay."""
    for path in Path(folder).glob(".*"):
        if not _UNFINISHED.fullmatch(path.name):
            continue
        try:
            with open(path, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except OSError:
            continue  # somebody is writing it, or has just finished, or may not be disturbed
