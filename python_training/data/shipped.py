"""The corpora that come with the project."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .emodb import read_emodb
from .prepare import prepare
from .prepared import PreparedCorpus

SHIPPED = {"emodb4": read_emodb}
#: Where a checkout keeps what it has prepared.
FOLDER = Path("runs/prepared")


def shipped_corpus(
    name: str,
    folder: Path = FOLDER,
    data: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> PreparedCorpus:
    """A shipped corpus, prepared in ``folder/name`` unless it is already; ``data``: its recordings, where they are
    elsewhere.  ValueError for any fault: what evaluation is compared on must be whole."""
    prepared = prepare(SHIPPED[name](data), folder / name, progress=progress)
    if prepared.faults:
        raise ValueError(f"{name}: expected no fault, found {len(prepared.faults)}; the first: {prepared.faults[0]}")
    return PreparedCorpus(prepared.folder)
