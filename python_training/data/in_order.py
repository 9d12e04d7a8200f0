"""Work for several threads whose results are taken in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    pool: ThreadPoolExecutor, window: int, work: Callable[[T], R], items: Sequence[T]
) -> Iterator[tuple[T, R]]:
    """``work`` of every item by the pool's threads, in the items' order, at most ``window`` ahead of the caller.

    Where there are many, a thread takes a few at once: handing them over one by one keeps the interpreter busy.
    """
    few = max(1, min(4, len(items) // window))

    def work_of(chunk: Sequence[T]) -> list[tuple[T, R]]:
        return [(item, work(item)) for item in chunk]

    pending: deque[Future[list[tuple[T, R]]]] = deque()
    try:
        for begin in range(0, len(items), few):
            pending.append(pool.submit(work_of, items[begin : begin + few]))
            if len(pending) * few >= window:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
