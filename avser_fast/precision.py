"""In what a model's products are computed, and which of it runs when nobody says.

float32: float operands.  bf16: bfloat16 operands, float sums.  int8: weights with one step per output channel,
activations in steps whose ranges were measured on recordings (calibration), integer sums.  Norms, softmax, attention
gates and the residual of the last block are float32 in all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRECISIONS = ("float32", "bf16", "int8")
#: Share of utterances on which a precision has to decide as float32 does.
LEAST_AGREEMENT = {"bf16": 0.99, "int8": 0.98}
#: A share of 99 % says nothing about fewer utterances.
LEAST_UTTERANCES = 100
#: Instruction sets with products of their own ("cuda": GPUs that we have kernels for); others get the same numbers, up
#: to rounding, from wider products.
_NATIVE = {"bf16": ("avx512_bf16", "amx", "cuda"), "int8": ("avx512_vnni", "avx512_bf16", "amx")}


def is_native(precision: str, isa: str) -> bool:
    """Whether ``isa`` has instructions for the products of ``precision``."""
    return isa in _NATIVE.get(precision, (isa,))


def measured(card: Mapping[str, Any], precision: str) -> dict[str, Any] | None:
    """The card's measurement of ``precision``: at least ``agreement`` (share of the decisions of float32, 0 to 1) and
    ``utterances``; None where the card has none that can be read."""
    precisions = card.get("precisions")
    found = precisions.get(precision) if isinstance(precisions, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    agreement, utterances = found.get("agreement"), found.get("utterances")
    if isinstance(agreement, bool) or not isinstance(agreement, (int, float)) or not 0 <= agreement <= 1:
        return None
    if isinstance(utterances, bool) or not isinstance(utterances, int) or utterances < 1:
        return None
    return dict(found)


def automatic(card: Mapping[str, Any], isa: str) -> tuple[str, str]:
    """What ``precision='auto'`` runs on ``isa``, and why: bf16 where the instruction set has it and the card shows that
    it decides as float32 does, else float32; never int8."""
    found = measured(card, "bf16")
    least = LEAST_AGREEMENT["bf16"]
    if not is_native("bf16", isa):
        return "float32", f"auto: {isa} has no instructions for bf16"
    if found is None:
        return "float32", "auto: the model's card has no measured agreement of bf16"
    shown = f"{100 * found['agreement']:.1f} % of {found['utterances']} utterances"
    if found["utterances"] < LEAST_UTTERANCES:
        return "float32", f"auto: the card's agreement of bf16, {shown}, is of fewer than {LEAST_UTTERANCES}"
    if found["agreement"] < least:
        return "float32", f"auto: the card's agreement of bf16, {shown}, is below {100 * least:.0f} %"
    where = " (measured on a CPU)" if isa == "cuda" else ""
    return "bf16", f"auto: {isa} has instructions for bf16, which decides as float32 does on {shown}{where}"
