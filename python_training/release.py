"""The model that is shipped: trained on every speaker of the corpus, with a card that says what it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import avser_fast
from avser_fast.inference.convert import HEADROOM
from avser_fast.inference.whole_files import write_bytes

from .comparison import compare, read_run
from .data.prepared import PreparedCorpus
from .evaluation import summarize
from .precisions import heard_clips, ranges_of
from .protocols import CROSS_CORPUS
from .run import Division, Options, train_stages, usable
from .settings import Settings
from .tables import compare_table, precision_table, text_report

#: What is known of the shipped corpora.
CORPORA: dict[str, dict[str, str]] = {
    "emodb4": {
        "corpus": "EMO-DB, classes ang, hap, neu, sad",
        "licence": "CC0-1.0",
        "citation": (
            "Burkhardt, Paeschke, Rolfes, Sendlmeier, Weiss: A Database of German Emotional Speech, Interspeech 2005"
        ),
        "limits": (
            "Acted German speech of ten actors in a studio, four emotions; other languages, channels, ages and "
            "spontaneous speech were not tested."
        ),
    }
}


def release(
    settings: Settings,
    corpus: PreparedCorpus,
    *,
    seed: int,
    out: Path,
    dataset: str,
    evaluation: Path | None = None,
    compared: Sequence[Path] = (),
    epochs: int | None = None,
    options: Options | None = None,
    progress: Callable[[str, int, int, Mapping[str, Any]], None] | None = None,
) -> Path:
    """Train an MDSCM on all speakers and write ``out``, and the card as a page beside it.

    ``dataset`` is the name of the corpus in ``CORPORA``; of another the card says that its licence is not known here.
    ``evaluation`` (a folder of ``evaluate`` or a collected file) gives the card its figures, ``compared`` are further
    runs for its table.  Without ``epochs`` the median of the epochs that the evaluation kept is used, without an
    evaluation the whole schedule.  An interrupted training goes on where it was.  ValueError when the evaluation is one
    of other settings or of another corpus.
    """
    summary = comparison = None
    if evaluation is not None:
        run = read_run(evaluation)
        asked = json.loads(json.dumps(settings.to_dict()))
        others = sorted(name for name, value in asked.items() if run.settings.get(name) != value)
        if others:
            raise ValueError(
                f"{evaluation}: expected an evaluation of {settings.name!r} as it is now, got other settings "
                f"({', '.join(others)})"
            )
        elsewhere = [f["test_of"] for f in run.folds if f["protocol"] == CROSS_CORPUS]
        if elsewhere:
            raise ValueError(f"{evaluation}: expected an evaluation on {corpus.folder}, got one on {elsewhere[0]}")
        known = {(u.key, u.label) for u in corpus.utterances}
        foreign = [key for f in run.folds for key, label in zip(f["keys"], f["truth"]) if (key, label) not in known]
        if foreign:
            raise ValueError(
                f"{evaluation}: expected an evaluation on {corpus.folder}, got {len(foreign)} utterances that are not "
                f"in it with that label (the first is {foreign[0]})"
            )
        if any("mdscm" not in f["models"] for f in run.folds):
            raise ValueError(f"{evaluation}: expected an evaluation with mdscm in every fold, got one without")
        summary = summarize([{**f, "models": {"mdscm": f["models"]["mdscm"], **_paths(f)}} for f in run.folds])
        kept = summary["epochs"].get("mdscm")
        if epochs is None and kept is None:
            raise ValueError(f"{evaluation}: expected an evaluation of the stage mdscm, or --epochs, got neither")
        epochs = epochs or kept["median"]
        comparison = compare_table(compare([evaluation, *compared]))
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.training")
    division = usable(Division(corpus.with_speech), corpus, settings, options is not None and options.skip_bad)
    system, spec, fitted = train_stages(
        settings, corpus, division, ["mdscm"], folder, seed=seed, epochs=epochs, options=options, progress=progress
    )
    state = {name: value.cpu() for name, value in system.mdscm.state_dict().items()}
    ranges = ranges_of(spec, state, heard_clips(corpus, division.training, spec))
    metrics = None if summary is None else _metrics(summary)
    precisions: dict[str, Any] = {} if metrics is None else metrics.pop("precisions")
    measured_on = {"utterances": len(division.training), "headroom": HEADROOM}
    precisions["int8"] = {**precisions.get("int8", {}), "calibration": measured_on}
    learnt = [corpus.utterances[i] for i in division.training]
    about = CORPORA.get(dataset) or {
        "corpus": corpus.name,
        "licence": "not known here",
        "limits": f"Nothing but the speech of {corpus.name} was tested: no other speakers, languages or channels.",
    }
    keys = "\n".join(u.key for u in learnt)
    card: dict[str, Any] = {
        "data": {
            **{name: text for name, text in about.items() if name != "limits"},
            "name": corpus.name,
            "utterances": len(learnt),
            "keys_sha256": hashlib.sha256(keys.encode()).hexdigest(),
        },
        "protocol": {
            "training_speakers": sorted({u.speaker for u in learnt}),
            "seed": seed,
            "epochs": fitted["mdscm"].epoch,
            "settings": json.loads(json.dumps(settings.to_dict())),
        },
        "metrics": metrics,
        "precisions": precisions,
        "limits": about["limits"],
        "avser_fast": avser_fast.__version__,
    }
    avser_fast.write_model(out, spec, state, card, ranges)
    write_bytes(out.with_suffix(".md"), card_text(out.stem, card, summary, comparison).encode())
    shutil.rmtree(folder)
    return out


def _paths(fold: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fold["models"][name] for name in ("convolutions", "statistics") if name in fold["models"]}


def _metrics(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary as far as it speaks of the MDSCM; ``paths`` is the UA of each of its paths alone."""
    models = summary["models"]
    about = {
        name: summary[name] for name in ("protocol", "labels", "seeds", "missing", "leakage", "bootstrap", "epochs")
    }
    return {**about, **models["mdscm"], "paths": {name: row["ua"] for name, row in models.items() if name != "mdscm"}}


def card_text(name: str, card: dict[str, Any], summary: dict[str, Any] | None, comparison: str | None) -> str:
    """The card as a page: what the model is, on what it was trained, how well it does and what it is not."""
    data, protocol = card["data"], card["protocol"]
    settings = protocol["settings"]
    network, front_end = settings["network"], settings["front_end"]
    speakers = ", ".join(protocol["training_speakers"])
    hears = ", which also hears pitch and voicing" if network.get("voice") else ""
    beside = (
        f"; beside them a statistics path of {network['statistics']} values per channel and "
        f"{network['statistics_hidden']} hidden units{hears}"
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
        f"{data['corpus']}: {data['utterances']} utterances of the speakers {speakers}. Licence {data['licence']}."
        + (f" Please cite {data['citation']}." if "citation" in data else ""),
        "",
        "## What it is not",
        card["limits"],
        "",
        "## Training",
        f"All speakers, seed {protocol['seed']}, {protocol['epochs']} of {settings['optimisation']['epochs']} epochs. "
        "Every setting stands in the header of the model file.",
    ]
    if summary is not None:
        models = (
            "Models of the same recipe that never heard the speaker under test; a further speaker picked the epoch."
        )
        tested = "the speaker they never heard"
        if summary["leakage"]:
            models = f"Models of the same recipe. {summary['leakage']}: no figure here holds for speakers that are new."
            tested = "the utterances of their test"
        lines += [
            "",
            "## How well it does",
            f"{models} The weights in this file have heard all these speakers, so no figure on this corpus holds for "
            "the weights themselves.",
            "```",
            text_report(summary, settings["name"]),
            "```",
            "",
            "## Precisions",
            f"The same models in each precision on {tested}; the ranges of int8 come from the utterances that trained "
            'the model. `precision="auto"` never runs int8, and bf16 only where the CPU has '
            "instructions for it and the agreement is at least 99 %.",
            "",
            precision_table(card["precisions"]),
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
