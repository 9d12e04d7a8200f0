"""Whether gradient reversal works: numbers that say so, and what they mean in plain words.

A domain classifier at 50 % has two explanations: the encoder hides the domain, or the classifier has given up.  A
fresh linear probe on frozen features tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

#: Items of each domain that the probe sees, and how hard its weights are held down, in units of the features.
PROBE_ITEMS, RIDGE = 400, 1.0


def linear_probe(speech: np.ndarray, faces: np.ndarray, seed: int = 0) -> float:
    """Accuracy, from 0 to 1, of a fresh linear classifier that tells features (n, D) of the domains apart.

    Ridge regression on features standardised over one half of the items, tested on the other half; both domains count
    the same.  ValueError for fewer than 4 items of a domain.
    """
    if min(len(speech), len(faces)) < 4:
        raise ValueError(f"probe: expected at least 4 items of each domain, got {len(speech)} and {len(faces)}")
    rng = np.random.default_rng(seed)
    halves: list[list[np.ndarray]] = [[], []]
    for values in (speech, faces):
        order = rng.permutation(len(values))
        halves[0].append(values[order[: len(order) // 2]].astype(np.float64))
        halves[1].append(values[order[len(order) // 2 :]].astype(np.float64))
    known = np.concatenate(halves[0])
    mean, deviation = known.mean(0), known.std(0) + 1e-9
    x = (known - mean) / deviation
    # +1 for faces, -1 for speech, weighted so that each domain has half of the say.
    y = np.concatenate([np.full(len(halves[0][0]), -1.0), np.full(len(halves[0][1]), 1.0)])
    ridge = RIDGE * len(known)  # as much as the features themselves, which have variance 1
    weight = np.concatenate([np.full(len(v), len(known) / (2.0 * len(v))) for v in halves[0]])
    if x.shape[1] <= len(x):
        w = np.linalg.solve((x * weight[:, None]).T @ x + ridge * np.eye(x.shape[1]), x.T @ (weight * y))
    else:  # fewer items than features: the same solution from the smaller system
        w = x.T @ np.linalg.solve(x @ x.T + ridge * np.diag(1.0 / weight), y)
    right = [float(((((v - mean) / deviation) @ w > 0) == bool(face)).mean()) for face, v in enumerate(halves[1])]
    return 0.5 * (right[0] + right[1])


def warnings_of(facts: Mapping[str, Any], classes: int) -> list[str]:
    """What is wrong with an epoch of adversarial training, in plain sentences; none when all is well.

    facts: ``lambda`` and, averaged over the epoch, ``domain_accuracy``, ``gradient_ratio`` (norm of the encoder's
    gradient of the reversed domain loss over that of the emotion losses), ``speech_accuracy`` and ``probe_accuracy``;
    missing ones are passed over.
    """
    found: list[str] = []
    lam = facts.get("lambda") or 0.0
    domain, probe = facts.get("domain_accuracy"), facts.get("probe_accuracy")
    ratio, speech = facts.get("gradient_ratio"), facts.get("speech_accuracy")
    if lam < 0.05:
        return found
    if domain is not None and domain >= 0.95:
        found.append(
            f"discriminator at {100 * domain:.0f} %: reversal too weak (lambda {lam:.2f}), "
            "the encoder still shows the domain"
        )
    if domain is not None and probe is not None and domain <= 0.65 and probe >= 0.85:
        found.append(
            f"probe still separates the domains ({100 * probe:.0f} %) while the discriminator is at "
            f"{100 * domain:.0f} %: the discriminator is dead; train it faster or with less lambda at first"
        )
    if ratio is not None and ratio > 10:
        found.append(f"the domain loss pulls the encoder {ratio:.0f} times as hard as the emotion losses: lower lambda")
    if ratio is not None and ratio < 0.01:
        found.append(f"the domain loss moves the encoder {1 / max(ratio, 1e-6):.0f} times less than the emotions do")
    if speech is not None and speech <= 1.2 / classes:
        found.append(f"speech accuracy {100 * speech:.0f} % is chance: adaptation has erased the emotions")
    return found
