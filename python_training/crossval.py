"""Leave one speaker out: every speaker is tested by models that never heard it.

Within a fold one more speaker is set aside, the validation speaker, who picks the epoch; with ``refit`` the network is
then trained again on all remaining speakers for as many epochs.  Nothing is chosen on the test speaker.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from avser_fast import nn
from avser_fast.inference.weights import write_bytes

from .data.feature_set import FeatureSet
from .precisions import low_precisions
from .settings import Settings
from .train import halves, score, train


@dataclass(frozen=True)
class Fold:
    """One training of the protocol, the unit of resumption: its result is one JSON file."""

    seed: int
    test: str
    validation: str

    @property
    def name(self) -> str:
        return f"seed{self.seed}-speaker{self.test}"


def folds(speakers: list[str], seeds: list[int]) -> list[Fold]:
    """One fold per seed and speaker; the validation speaker is the next one in sorted order (cyclic)."""
    if len(speakers) < 3:
        raise ValueError(f"leave one speaker out: expected at least 3 speakers, got {len(speakers)}")
    ring = sorted(speakers)
    return [Fold(seed, ring[i], ring[(i + 1) % len(ring)]) for seed in seeds for i in range(len(ring))]


def write_json(value: Any, path: Path) -> None:
    """Write ``path`` whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def run_fold(
    settings: Settings,
    corpus: FeatureSet,
    fold: Fold,
    folder: Path,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train and test one fold; its checkpoint in ``folder`` lets an interrupted fold go on where it was.

    ``paths`` of the result are the answers of a network with a statistics path from either of its paths alone.
    """
    test = corpus.subset(lambda u: u.speaker == fold.test)
    validation = corpus.subset(lambda u: u.speaker == fold.validation)
    training = corpus.subset(lambda u: u.speaker not in (fold.test, fold.validation))
    checkpoints = [folder / f"{fold.name}.pick.pt", folder / f"{fold.name}.refit.pt"]
    trained = train(settings, training, validation, seed=fold.seed, checkpoint=checkpoints[0], progress=progress)
    picked, history = trained.epoch, trained.history
    if settings.optimisation.refit:
        training = corpus.subset(lambda u: u.speaker != fold.test)
        trained = train(
            settings, training, None, seed=fold.seed, epochs=picked, checkpoint=checkpoints[1], progress=progress
        )
    model = nn.MDSCM(settings.network)
    heard = test.normalized(trained.spec.front_end)

    def probabilities(state: dict[str, Tensor]) -> list[list[float]]:
        model.load_state_dict(state)
        return [[round(float(p), 6) for p in row] for row in score(model, heard, trained.spec).softmax(1)]

    paths = halves(trained.state, settings.network)
    result = {
        "seed": fold.seed,
        "test": fold.test,
        "validation": fold.validation,
        "epoch": picked,
        "validation_ua": history[picked - 1]["validation_ua"],
        "history": history,
        "keys": [u.key for u in test.utterances],
        "truth": [u.label for u in test.utterances],
        "probabilities": probabilities(trained.state),
        "precisions": low_precisions(trained.spec, trained.state, training, test),
    }
    if paths:
        result["paths"] = {name: probabilities(state) for name, state in paths.items()}
    write_json(result, folder / f"{fold.name}.json")
    for checkpoint in checkpoints:
        checkpoint.unlink(missing_ok=True)
    return result


def _worker(settings: Settings, corpus: FeatureSet, fold: Fold, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run_fold(settings, corpus, fold, folder)


def _fingerprint(settings: Settings, corpus: FeatureSet) -> dict[str, Any]:
    plain = json.loads(json.dumps(settings.to_dict()))
    return {"settings": plain, "labels": list(corpus.labels), "utterances": len(corpus.utterances)}


def cross_validate(
    settings: Settings,
    corpus: FeatureSet,
    seeds: list[int],
    folder: Path,
    *,
    jobs: int = 1,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Iterator[tuple[Fold, dict[str, Any]]]:
    """Yield (fold, result) as folds finish; finished folds found in ``folder`` are read, not run again.

    ``jobs`` folds run side by side, one thread each.  ``progress`` is told of epochs when jobs = 1.  Raises ValueError
    when ``folder`` holds folds of other settings or of another corpus.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / "settings.json"
    fingerprint = _fingerprint(settings, corpus)
    if mark.exists() and json.loads(mark.read_text(encoding="utf-8")) != fingerprint:
        raise ValueError(
            f"{folder}: expected folds of the settings {settings.name!r} as they are now, got others in settings.json"
        )
    write_json(fingerprint, mark)
    waiting = []
    for fold in folds(corpus.speakers, seeds):
        path = folder / f"{fold.name}.json"
        if path.exists():
            yield fold, json.loads(path.read_text(encoding="utf-8"))
        else:
            waiting.append(fold)
    if jobs <= 1:
        for fold in waiting:
            yield fold, run_fold(settings, corpus, fold, folder, progress)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running = {pool.submit(_worker, settings, corpus, fold, folder): fold for fold in waiting}
        for future in as_completed(running):
            yield running[future], future.result()
