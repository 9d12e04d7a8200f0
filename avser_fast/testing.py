"""How two results are compared, in tests and before any benchmark is timed (NumPy only)."""

from __future__ import annotations

from typing import Any

import numpy as np


def _array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    return np.asarray(value, dtype=np.float64)


def max_error(actual: Any, expected: Any) -> float:
    """Largest absolute difference, relative to the expected output's scale (its largest magnitude).

    Infinite when shapes differ or when ``actual`` is not finite where ``expected`` is; equal non-finite values count as
    equal.  0.0 for two empty arrays of the same shape.
    """
    a, e = _array(actual), _array(expected)
    if a.shape != e.shape:
        return float("inf")
    if a.size == 0:
        return 0.0
    finite = np.isfinite(e)
    same = (a == e) | (np.isnan(a) & np.isnan(e))
    if not np.all(same[~finite]) or not np.all(np.isfinite(a[finite])):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.max(np.abs(e[finite])))
    worst = float(np.max(np.abs(a[finite] - e[finite])))
    return worst / scale if scale > 0 else (0.0 if worst == 0 else float("inf"))


def assert_close(actual: Any, expected: Any, tolerance: float, what: str = "output") -> None:
    """Raise AssertionError naming ``what``, the worst element and both values when max_error exceeds ``tolerance``."""
    error = max_error(actual, expected)
    if error <= tolerance:
        return
    a, e = _array(actual), _array(expected)
    if a.shape != e.shape:
        raise AssertionError(f"{what}: expected shape {e.shape}, got {a.shape}")
    same = (a == e) | (np.isnan(a) & np.isnan(e))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - e))
    difference = np.where(np.isnan(difference), np.inf, difference)
    worst = np.unravel_index(int(np.argmax(difference)), a.shape)
    place = tuple(int(i) for i in worst)
    raise AssertionError(
        f"{what}: scaled error {error:.3g} exceeds {tolerance:.3g}; "
        f"worst at {place}: expected {e[worst]!r}, got {a[worst]!r}"
    )
