"""What files this process has mapped and holds open, and a limit on them."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def mapped(folder: Path) -> int:
    """How many files below a folder this process has in its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if str(folder) in line})


def held(folder: Path) -> list[str]:
    """The files below a folder that this process holds descriptors of."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:  # that of the listing
            pass
    return [path for path in found if path.startswith(str(folder))]


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """No more descriptors than those that are open and some ``more``."""
    in_use = set(map(int, os.listdir("/proc/self/fd")))
    free = [number for number in range(len(in_use) + more) if number not in in_use]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[more - 1] + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
