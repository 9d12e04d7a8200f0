"""``python -m python_training.equivalence``: the fused ops train as the reference does.

The same network is trained from the same weights on the same batches by the fused ops and by several runs of the
reference that differ in nothing but the order of their sums.  Two runs in float32 drift apart whatever computes them;
the fused ops must drift no further from the reference than twice as far as the reference drifts from itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from avser_fast import __version__, nn
from avser_fast.config import MDSCM, ClipRule, ModelSpec

from .crossval import write_json
from .data.crops import CropSampler
from .data.feature_set import FeatureSet
from .data.shipped import FOLDER, shipped_corpus
from .loop import optimizer_of
from .losses import learning_rate
from .metrics import confusion_matrix, unweighted_accuracy
from .settings import Settings, load_settings
from .train import _class_weights, _loss, score

RESULT = Path(__file__).parent / "results" / "equivalence.json"
STEPS, SPEAKER, SEED = 200, "03", 0
#: Steps over which a difference is averaged.
WINDOW = 20
#: How far the fused ops may be from the reference, in spreads of the reference.
TIMES = 2.0
#: Losses are single numbers of float32: below this a difference is their own rounding.
ROUNDING = 4 * torch.finfo(torch.float32).eps
#: Runs of the reference: memory layout of maps and weights, and whether oneDNN convolves.
REFERENCES = {
    "reference, channels-last": (torch.channels_last, True),
    "reference, contiguous": (torch.contiguous_format, True),
    "reference, without oneDNN": (torch.contiguous_format, False),
}
FUSED = "fused"


def members() -> dict[str, Settings]:
    """The networks that are trained, without dropout: the reference draws its masks otherwise than the ops do."""
    nothing: dict[str, float] = {"block_dropout": 0.0, "encoder_dropout": 0.0, "statistics_dropout": 0.0}
    small = load_settings("mdscm-small", {f"network.{k}": v for k, v in nothing.items()})
    network = MDSCM(
        in_channels=3,
        stem=(8, 16),
        blocks=(24, 32),
        attention_reduction=8,
        encoder_layers=1,
        encoder_ff=64,
        block_dropout=0.0,
        encoder_dropout=0.0,
    )
    attentive = dataclasses.replace(
        small, name="mdscm-attentive", network=network, clip_rule=ClipRule("even", None, network.clip_frames)
    )
    return {s.name: s for s in (small, attentive)}


@contextmanager
def _convolving(onednn: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch sets a flag of Intel's GPUs too and warns where there is none
        with nullcontext() if onednn else torch.backends.mkldnn.flags(enabled=False):
            yield


def train_steps(
    settings: Settings,
    training: FeatureSet,
    held_out: FeatureSet,
    steps: int,
    *,
    fused: bool,
    layout: torch.memory_format = torch.channels_last,
    onednn: bool = True,
    seed: int = SEED,
) -> dict[str, Any]:
    """Loss of every step, and UA and loss on ``held_out`` after the last."""
    recipe = settings.optimisation
    spec = ModelSpec(
        training.labels, training.measured_front_end(settings.front_end.zero), settings.clip_rule, settings.network
    )
    with torch.random.fork_rng(devices=[]), _convolving(onednn):
        torch.manual_seed(seed)
        model = nn.MDSCM(settings.network, backend="auto" if fused else "reference").to(memory_format=layout)
        generator = torch.Generator().manual_seed(seed)
        optimizer = optimizer_of(model, settings.optimisation)
        sampler = CropSampler(
            training.normalized_copies(spec.front_end),
            training.targets(),
            spec.clip_rule.clip_frames,
            recipe.batch_size,
        )
        weights = _class_weights(training.targets(), settings.network.classes, recipe.class_weights)
        losses: list[float] = []
        model.train()
        while len(losses) < steps:
            for crops, targets in sampler.epoch(generator):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(len(losses), sampler.steps_per_epoch(), settings.optimisation)
                crops = crops.contiguous(memory_format=layout)
                loss = _loss(model, crops, targets, generator, settings, weights)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
                optimizer.step()
                losses.append(float(loss.detach()))
                if len(losses) == steps:
                    break
        logits = score(model, held_out.normalized(spec.front_end), spec)
    truth = held_out.targets()
    matrix = confusion_matrix(truth.tolist(), logits.argmax(1).tolist(), settings.network.classes)
    return {
        "losses": losses,
        "ua": unweighted_accuracy(matrix),
        "held_out_loss": float(torch.nn.functional.cross_entropy(logits, truth)),
    }


def difference(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Largest and mean absolute difference of two curves, and the mean of every window."""
    apart = [abs(x - y) for x, y in zip(a, b)]
    windows = [apart[i : i + WINDOW] for i in range(0, len(apart), WINDOW)]
    return {"max": max(apart), "mean": sum(apart) / len(apart), "windows": [sum(w) / len(w) for w in windows]}


def judge(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of every window: how far the fused curve is from the reference's curves (on average), how far these are from
    each other (the two that differ most), and whether the first is within ``TIMES`` the second."""
    curves = {name: run["losses"] for name, run in runs.items()}
    references = [name for name in curves if name != FUSED]
    ours = {name: difference(curves[FUSED], curves[name]) for name in references}
    theirs = {f"{a} | {b}": difference(curves[a], curves[b]) for a, b in combinations(references, 2)}
    scale = max(abs(x) for x in curves[references[0]])

    def within(found: list[float], spread: list[float]) -> bool:
        return sum(found) / len(found) <= TIMES * max(spread) + ROUNDING * scale

    windows = [
        {
            "fused": sum(w) / len(w),
            "reference": max(s),
            "within": within(list(w), list(s)),
        }
        for w, s in zip(zip(*(d["windows"] for d in ours.values())), zip(*(d["windows"] for d in theirs.values())))
    ]
    whole = within([d["mean"] for d in ours.values()], [d["mean"] for d in theirs.values()])
    return {
        "fused_and_reference": ours,
        "reference_and_reference": theirs,
        "windows": windows,
        "windows_within": sum(bool(w["within"]) for w in windows),
        "within": whole,
    }


def compare(
    settings: Settings, training: FeatureSet, held_out: FeatureSet, steps: int = STEPS, seed: int = SEED
) -> dict[str, Any]:
    """All runs of one network and what their curves say."""
    runs = {FUSED: train_steps(settings, training, held_out, steps, fused=True, seed=seed)}
    for name, (layout, onednn) in REFERENCES.items():
        runs[name] = train_steps(
            settings, training, held_out, steps, fused=False, layout=layout, onednn=onednn, seed=seed
        )
    return {"runs": runs, **judge(runs)}


def report(name: str, result: dict[str, Any]) -> str:
    """A few lines for a terminal."""
    lines = [f"{name}:"]
    for run, values in result["runs"].items():
        first, last = values["losses"][0], values["losses"][-1]
        lines.append(f"  {run:26} loss {first:.4f} -> {last:.4f}, held-out UA {100 * values['ua']:.1f} %")
    for title, pairs in (("fused and", result["fused_and_reference"]), ("", result["reference_and_reference"])):
        for pair, values in pairs.items():
            lines.append(
                f"  {title} {pair}: mean {values['mean']:.2e}, largest {values['max']:.2e}".replace("   ", "  ")
            )
    apart = ", ".join(f"{w['fused']:.1e}/{w['reference']:.1e}" for w in result["windows"])
    lines.append(f"  windows of {WINDOW} steps, fused/reference: {apart}")
    verdict = "within" if result["within"] else "NOT within"
    lines.append(
        f"  mean difference {verdict} {TIMES:g} spreads of the reference; so are {result['windows_within']} of "
        f"{len(result['windows'])} windows"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m python_training.equivalence", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--speaker", default=SPEAKER, help="held out")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--prepared", type=Path, default=FOLDER, help="where the corpus is prepared")
    given = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for name, settings in members().items():
        corpus = FeatureSet.of(shipped_corpus("emodb4", given.prepared), settings.front_end.front_end())
        results[name] = compare(
            settings,
            corpus.subset(lambda u: u.speaker != given.speaker),
            corpus.subset(lambda u: u.speaker == given.speaker),
            given.steps,
            given.seed,
        )
        print(report(name, results[name]), flush=True)
    about = {"avser_fast": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    asked = {"steps": given.steps, "speaker": given.speaker, "seed": given.seed, "window": WINDOW, "times": TIMES}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_json({**about, **asked, "networks": results}, given.output)
    return 0 if all(result["within"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
