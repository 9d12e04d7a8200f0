"""The comparison helper itself: it must fail when results differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avser_fast.testing import assert_close, max_error


def test_equal_values_have_no_error() -> None:
    x = np.array([[1.0, -3.0], [0.0, 2.0]])
    assert max_error(x, x) == 0.0
    assert max_error(torch.from_numpy(x), x.astype(np.float32)) == 0.0
    assert max_error(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0


def test_error_is_relative_to_the_largest_expected_value() -> None:
    assert max_error([1.0, 100.5], [1.0, 100.0]) == pytest.approx(0.005)
    assert max_error([1.5, 100.0], [1.0, 100.0]) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        ([1.0, np.nan], [1.0, 2.0]),
        ([1.0, np.inf], [1.0, 2.0]),
        ([1.0, 2.0], [1.0, np.nan]),
        ([1.0, np.inf], [1.0, -np.inf]),
        ([1.0, 2.0, 3.0], [1.0, 2.0]),
        ([[1.0, 2.0]], [1.0, 2.0]),
        ([1e-30], [0.0]),
    ],
)
def test_what_can_never_be_close(actual: list[float], expected: list[float]) -> None:
    assert max_error(actual, expected) == float("inf")
    with pytest.raises(AssertionError):
        assert_close(actual, expected, 1e30)


def test_same_non_finite_values_are_equal() -> None:
    assert max_error([np.nan, np.inf, 1.0], [np.nan, np.inf, 1.0]) == 0.0
    assert max_error([np.nan], [np.nan]) == 0.0


def test_the_message_names_the_output_the_place_and_both_values() -> None:
    with pytest.raises(
        AssertionError, match=r"logits: scaled error 0\.5 .* worst at \(1, 0\): expected .*2\.0.* got .*1\.0"
    ):
        assert_close([[0.0], [1.0]], [[0.0], [2.0]], 1e-3, "logits")
    with pytest.raises(AssertionError, match=r"logits: expected shape \(2,\), got \(3,\)"):
        assert_close([1.0, 2.0, 3.0], [1.0, 2.0], 1.0, "logits")


def test_bfloat16_tensors_are_compared_by_value() -> None:
    assert max_error(torch.tensor([1.0, 2.0], dtype=torch.bfloat16), [1.0, 2.0]) == 0.0
