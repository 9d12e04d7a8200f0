"""The model that is shipped: trained on every speaker of the corpus, with a card that says what it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import avser_fast
from avser_fast.inference.convert import HEADROOM
from avser_fast.inference.weights import write_bytes

from .data.feature_set import FeatureSet
from .precisions import precision_table, ranges_of
from .report import compare, compare_table, read_run, summarize, text_report
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
    compared: Sequence[Path] = (),
    epochs: int | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Path:
    """Train on all speakers and write ``out``; ``evaluation`` (a run of ``evaluate``) gives the card
    its figures, ``compared`` are further runs for its table.  The card is also written as a page beside the model.


    Without ``epochs`` the median of the epochs that the evaluation picked is used, without an evaluation the whole
    schedule.  Raises ValueError when the evaluation was run with other settings.
    """
    metrics = comparison = None
    if evaluation is not None:
        run = read_run(evaluation)
        if run.settings != json.loads(json.dumps(settings.to_dict())):
            raise ValueError(f"{evaluation}: expected an evaluation with the settings of {settings.name!r}, got others")
        metrics = summarize(run.folds, corpus.labels)
        epochs = epochs or metrics["epochs"]["median"]
        comparison = compare_table(compare([evaluation, *compared]))
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = out.with_name(f".{out.name}.training.pt")
    trained = train(settings, corpus, None, seed=seed, epochs=epochs, checkpoint=checkpoint, progress=progress)
    ranges = ranges_of(trained.spec, trained.state, corpus)
    precisions = (metrics.pop("precisions") if metrics else None) or {}
    measured_on = {"utterances": len(corpus.utterances), "headroom": HEADROOM}
    precisions["int8"] = {**precisions.get("int8", {}), "calibration": measured_on}
    keys = "\n".join(u.key for u in corpus.utterances)
    card: dict[str, Any] = {
        "data": {
            **CORPORA[dataset],
            "utterances": len(corpus.utterances),
            "keys_sha256": hashlib.sha256(keys.encode()).hexdigest(),
        },
        "protocol": {
            "training_speakers": corpus.speakers,
            "seed": seed,
            "epochs": trained.epoch,
            "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        },
        "metrics": metrics,
        "precisions": precisions,
        "limits": "Acted German speech of ten actors in a studio, four emotions; other languages, channels, ages and "
        "spontaneous speech were not tested.",
        "avser_fast": avser_fast.__version__,
    }
    avser_fast.write_model(out, trained.spec, trained.state, card, ranges)
    checkpoint.unlink(missing_ok=True)
    write_bytes(out.with_suffix(".md"), card_text(out.stem, card, comparison).encode())
    return out


def card_text(name: str, card: dict[str, Any], comparison: str | None) -> str:
    """The card as a page: what the model is, on what it was trained, how well it does and what it is not."""
    data, protocol, metrics = card["data"], card["protocol"], card["metrics"]
    settings = protocol["settings"]
    network, front_end = settings["network"], settings["front_end"]
    speakers = ", ".join(protocol["training_speakers"])
    beside = (
        f"; beside them a statistics path of {network['statistics']} values per channel and "
        f"{network['statistics_hidden']} hidden units"
        if network["statistics"]
        else ""
    )
    lines = [
        f"# {name}",
        "",
        f"An MDSCM with stem convolutions {network['stem']} wide, depthwise-separable blocks {network['blocks']} wide, "
        f"{network['encoder_layers']} encoder layers and {network['pooling']} pooling{beside}; "
        f"{front_end['mel_bands']} mel bands in frames of {front_end['frame_length']} samples, "
        f"{front_end['channels']} channel(s), normalisation {front_end['normalization']}, "
        f"clip rule {settings['clip_rule']['rule']}.",
        "",
        "## Data",
        f"{data['corpus']}: {data['utterances']} utterances of the speakers {speakers}. Licence {data['licence']}. "
        f"Please cite {data['citation']}.",
        "",
        "## What it is not",
        card["limits"],
        "",
        "## Training",
        f"All speakers, seed {protocol['seed']}, {protocol['epochs']} of {settings['optimisation']['epochs']} epochs. "
        "Every setting stands in the header of the model file.",
    ]
    if metrics is not None:
        lines += [
            "",
            "## How well it does",
            "Models of the same recipe that never heard the speaker under test. The weights in this file have heard "
            "all these speakers, so no figure on this corpus holds for the weights themselves.",
            "```",
            text_report(metrics, f"{settings['name']}, {len(metrics['seeds'])} seed(s)"),
            "```",
            "",
            "## Precisions",
            "The same models in each precision on the speaker they never heard; the ranges of int8 come from the "
            'speakers that trained the model. `precision="auto"` never runs int8, and bf16 only where the CPU has '
            "instructions for it and the agreement is at least 99 %.",
            "",
            precision_table(card.get("precisions")),
        ]
    if comparison is not None:
        lines += [
            "",
            "## Other choices, on the same folds",
            "Means over the seeds, pooled over the folds. The recipe was chosen by looking at such figures, so its own "
            "row is a little flattered; the row chosen per fold by its validation speaker is not.",
            "",
            comparison,
        ]
    return "\n".join(lines) + "\n"
