"""What bf16 and int8 make of a trained network, measured with the engine that will run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from avser_fast.config import ModelSpec
from avser_fast.inference.backends import Engine
from avser_fast.inference.convert import agreement, calibrate
from avser_fast.inference.features import clips_and_table
from avser_fast.inference.recognizer import CLIPS_AT_ONCE
from avser_fast.precision import PRECISIONS

from .data.feature_set import FeatureSet

LOW = PRECISIONS[1:]


def _clips(features: FeatureSet, spec: ModelSpec) -> list[np.ndarray]:
    return [clips_and_table(f.numpy(), spec.clip_rule)[0] for f in features.normalized(spec.front_end)]


def _engine(spec: ModelSpec, state: Mapping[str, Tensor], precision: str, ranges: Any = None) -> Engine:
    arrays = {name: t.numpy() for name, t in state.items() if not name.endswith(".num_batches_tracked")}
    return Engine(spec, arrays, 1, precision, {}, ranges)


def ranges_of(spec: ModelSpec, state: Mapping[str, Tensor], training: FeatureSet) -> dict[str, np.ndarray]:
    """The ranges that int8 needs, measured on the utterances that trained the network."""
    return calibrate(_engine(spec, state, "float32"), _clips(training, spec))


def low_precisions(
    spec: ModelSpec, state: Mapping[str, Tensor], training: FeatureSet, test: FeatureSet
) -> dict[str, list[list[float]]]:
    """Probabilities of the test utterances in bf16 and int8, whose ranges come from the training utterances."""
    clips = _clips(test, spec)
    probabilities = {}
    for name in LOW:
        engine = _engine(spec, state, name, ranges_of(spec, state, training) if name == "int8" else None)
        rows = []
        for clip_logits, _ in engine.score(clips, CLIPS_AT_ONCE, False):
            logits = clip_logits.astype(np.float64).mean(0)
            exponents = np.exp(logits - logits.max())
            rows.append([round(float(p), 6) for p in exponents / exponents.sum()])
        probabilities[name] = rows
    return probabilities


def measured(folds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The folds of the seeds of which every fold was scored in bf16 and int8, too."""
    missing = {fold["seed"] for fold in folds if "precisions" not in fold}
    return [fold for fold in folds if fold["seed"] not in missing]


def compare_precisions(folds: Sequence[dict[str, Any]], protocol: str) -> dict[str, dict[str, Any]] | None:
    """Agreement with float32 of each precision over the seeds that were measured, as the card says it; None without."""
    folds = measured(folds)
    if not folds:
        return None
    whole = np.array([row for fold in folds for row in fold["probabilities"]])
    entries = {}
    for name in LOW:
        found = agreement(whole, np.array([row for fold in folds for row in fold["precisions"][name]]))
        entries[name] = {**found, "protocol": protocol, "seeds": sorted({fold["seed"] for fold in folds})}
    return entries


def precision_table(precisions: Mapping[str, Any] | None) -> str:
    """The card's entries as a Markdown table with the seeds they hold for, or one sentence when nothing was measured.

    The UA of float32 is that of the same seeds.
    """
    if not precisions or not any("agreement" in entry for entry in precisions.values()):
        return "bf16 and int8 were not measured under this protocol."
    lines = [
        "| precision | UA % | same decision as float32 % | largest difference of a score |",
        "|---|---|---|---|",
    ]
    entries = [entry for entry in precisions.values() if "agreement" in entry]
    whole = format(entries[0]["float32_ua"], ".1f") if "float32_ua" in entries[0] else ""
    lines.append(f"| float32 | {whole} | 100.0 | 0 |")
    for name, entry in precisions.items():
        if "agreement" in entry:
            rate = format(entry["ua"], ".1f") if "ua" in entry else ""
            lines.append(f"| {name} | {rate} | {100 * entry['agreement']:.1f} | {entry['largest_difference']:.4f} |")
    seeds = ", ".join(map(str, entries[0].get("seeds", ())))
    return "\n".join([*lines, *(["", f"Seeds: {seeds}."] if seeds else [])])
