"""The model that is shipped: trained on every speaker of the corpus, with a card that says what it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Callable

import avser_fast

from .data import FeatureSet
from .report import read_folds, summarize
from .settings import Settings
from .train import train

CORPORA: dict[str, dict[str, str]] = {
    "emodb4": {
        "corpus": "EMO-DB, classes ang, hap, neu, sad",
        "licence": "CC0-1.0",
        "citation": (
            "Burkhardt, Paeschke, Rolfes, Sendlmeier, Weiss: A Database of German Emotional Speech, Interspeech 2005"
        ),
    }
}


def train_final(
    settings: Settings,
    corpus: FeatureSet,
    *,
    seed: int,
    out: Path,
    dataset: str,
    evaluation: Path | None = None,
    epochs: int | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Path:
    """Train on all speakers and write ``out``; ``evaluation`` (a folder of ``evaluate``) gives the card its figures.

    Without ``epochs`` the median of the epochs that the evaluation picked is used, without an evaluation the whole
    schedule.  Raises ValueError when the evaluation was run with other settings.
    """
    metrics = None
    if evaluation is not None:
        recorded = json.loads((evaluation / "settings.json").read_text(encoding="utf-8"))["settings"]
        if recorded != json.loads(json.dumps(settings.to_dict())):
            raise ValueError(f"{evaluation}: expected an evaluation with the settings of {settings.name!r}, got others")
        metrics = summarize(read_folds(evaluation), corpus.labels)
        epochs = epochs or metrics["epochs"]["median"]
    checkpoint = out.with_name(f".{out.name}.training.pt")
    trained = train(settings, corpus, None, seed=seed, epochs=epochs, checkpoint=checkpoint, progress=progress)
    keys = "\n".join(u.key for u in corpus.utterances)
    card: dict[str, Any] = {
        "data": {**CORPORA[dataset], "utterances": len(corpus.utterances), "keys_sha256": hashlib.sha256(keys.encode()).hexdigest()},
        "protocol": {
            "training_speakers": corpus.speakers,
            "seed": seed,
            "epochs": trained.epoch,
            "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        },
        "metrics": metrics,
        "limits": "Acted German speech of ten actors in a studio, four emotions; other languages, channels, ages and "
        "spontaneous speech were not tested.",
        "avser_fast": avser_fast.__version__,
    }
    avser_fast.write_model(out, trained.spec, trained.state, card)
    checkpoint.unlink(missing_ok=True)
    return out
