"""Progress bars, off where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any


class Bars:
    """One progress bar for each thing that is counted; none where ``quiet`` or where nobody watches."""

    def __init__(self, stack: ExitStack, quiet: bool, unit: str = ""):
        self._stack, self._quiet, self._unit = stack, quiet, unit
        self._bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int, record: Mapping[str, Any] | None = None) -> None:
        """``done`` of ``total``; of ``record`` (a step or epoch of training) what is worth a look."""
        from tqdm import tqdm

        if what not in self._bars:
            hidden = True if self._quiet else None  # None: tqdm's own "off unless a terminal"
            bar = tqdm(total=total, desc=what, unit=self._unit, disable=hidden, file=sys.stderr)
            self._bars[what] = self._stack.enter_context(bar)
        bar = self._bars[what]
        if done < bar.n:  # it begins again, as a refit does
            bar.reset(total)
        bar.update(done - bar.n)
        if record is not None:
            shown = {"loss": f"{record['loss']:.3f}"}
            for name, title in (("domain_accuracy", "domain"), ("validation_ua", "val UA")):
                if record.get(name) is not None:
                    shown[title] = f"{100 * record[name]:.0f}%"
            bar.set_postfix(shown, refresh=False)
