"""A saved model on a prepared corpus, summarised as the folds of a protocol are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from avser_fast.inference.recognizer import Recognizer

from .data.prepared import PreparedCorpus
from .evaluation import fold_result, summarize
from .protocols import SAVED, Split, map_labels, relabelled

#: What the model of a file is called in a summary, by its kind.
_MODEL = {"mdscm": "mdscm", "avre": "avdal", "system": "fusion"}


def evaluate_saved(
    recognizer: Recognizer,
    corpus: PreparedCorpus,
    name: str,
    mapping: Mapping[str, str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """The summary of all utterances with speech whose label is one of the model's, or counts as one by ``mapping``.

    ValueError where there is none.
    """
    info = recognizer.info()
    labels = list(info["labels"])
    found, notes = map_labels(labels, corpus.labels, mapping)
    if not mapping and set(labels) == set(corpus.labels):
        notes = []
    rows = corpus.spoken(found)
    if not rows:
        raise ValueError(f"{corpus.folder}: expected speech of the classes {', '.join(labels)}, got none")
    tested = relabelled([corpus.utterances[i] for i in rows], found)
    probabilities = []
    for i in rows:
        (result,) = recognizer.infer([corpus.item(i)])
        probabilities.append([result.scores[label] for label in labels])
        if progress is not None:
            progress(name, len(probabilities), len(rows))
    leakage = _leakage(info, corpus.name, {u.speaker for u in tested})
    test = tuple(range(len(tested)))
    split = Split(SAVED, name, 0, (), (), test, f"all of {corpus.name}", "unknown", bool(leakage), leakage)
    return summarize([fold_result(split, tested, labels, {_MODEL[info["kind"]]: probabilities}, {}, notes=notes)])


def _leakage(info: Mapping[str, Any], corpus: str, tested: set[str]) -> str:
    """What the card says of the speakers under test: who trained the model and who picked its epoch."""
    protocol, data = info["protocol"] or {}, info["card"].get("data") or {}
    trained = set(protocol.get("training_speakers", []))
    picked = set(protocol.get("validation_speakers", [])) - trained
    unknown, learnt = "NOT known to be speaker-independent: ", data.get("name", data.get("corpus", corpus))
    said = []
    for speakers, what in ((trained, "trained"), (picked, "picked by its score")):
        seen = ", ".join(sorted((speakers & tested) - {""}))
        if seen and learnt != corpus:
            said.append(
                f"NOT speaker-independent unless these are other people: the model was {what} on speakers of these "
                f"names, of {learnt}: {seen}"
            )
        elif seen:
            said.append(f"NOT speaker-independent: the model was {what} on the speakers {seen}")
    if not trained or "" in trained:
        said.append(f"{unknown}the model file does not name the speakers on which it was trained")
    elif "" in tested:
        said.append(f"{unknown}speakers of {corpus} are unknown")
    return "; ".join(said)
