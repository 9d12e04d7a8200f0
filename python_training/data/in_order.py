"""Work for several threads whose results are taken in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: Items that a thread takes at once, where there are enough: handing them over one by one keeps the interpreter busy.
RUN = 16
#: Runs for each thread that may be begun before the caller has taken the first: enough to go on with while it is busy.
AHEAD = 2


def in_order(
    pool: ThreadPoolExecutor, workers: int, work: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]
) -> Iterator[tuple[T, R]]:
    """Every item with its result, in the items' order; few of them are made before they are taken.

    ``work`` makes the results of a run of items, one for each, in one of the ``workers`` threads of the pool.
    """
    length = max(1, min(RUN, len(items) // (2 * AHEAD * workers)))
    pending: deque[tuple[Sequence[T], Future[Sequence[R]]]] = deque()
    try:
        for begin in range(0, len(items), length):
            run = items[begin : begin + length]
            pending.append((run, pool.submit(work, run)))
            if len(pending) >= AHEAD * workers:
                yield from _taken(pending)
        while pending:
            yield from _taken(pending)
    finally:
        for _, future in pending:
            future.cancel()


def _taken(pending: deque[tuple[Sequence[T], Future[Sequence[R]]]]) -> Iterator[tuple[T, R]]:
    run, future = pending.popleft()
    return zip(run, future.result())
