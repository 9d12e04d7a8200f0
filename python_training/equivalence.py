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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from avser_fast import __version__
from avser_fast.config import MDSCM, ClipRule

from .data.prepared import PreparedCorpus
from .data.shipped import FOLDER, shipped_corpus
from .distributed import Processes
from .log import RunLog
from .loop import Stop, Stopped, fit
from .metrics import confusion_matrix, unweighted_accuracy
from .run_folder import write_json
from .settings import Settings, load_settings
from .stages import Data, stage_of
from .system import System, measured_front_end, score

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
        small,
        name="mdscm-attentive",
        network=network,
        front_end=dataclasses.replace(small.front_end, voice=False),
        clip_rule=ClipRule("even", None, network.clip_frames),
    )
    return {s.name: s for s in (small, attentive)}


@contextmanager
def _convolving(onednn: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the switch sets a flag of Intel's GPUs too and warns where there is none
        with nullcontext() if onednn else torch.backends.mkldnn.flags(enabled=False):
            yield


class _Losses(RunLog):
    """The loss of every step instead of files."""

    def __init__(self) -> None:
        super().__init__(None)
        self.losses: list[float] = []

    def step(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.losses += [record["loss"] for record in records]


def train_steps(
    settings: Settings,
    corpus: PreparedCorpus,
    training: Sequence[int],
    held_out: Sequence[int],
    steps: int,
    *,
    fused: bool,
    layout: torch.memory_format = torch.channels_last,
    onednn: bool = True,
    seed: int = SEED,
) -> dict[str, Any]:
    """Loss of every step of the stage ``mdscm``, and UA and loss on ``held_out`` after the last."""
    front_end = measured_front_end(corpus, training, settings)
    stop, log = Stop(), _Losses()

    def progress(stage: str, done: int, total: int, record: Mapping[str, Any]) -> None:
        stop.asked = done == steps

    with torch.random.fork_rng(devices=[]), _convolving(onednn):
        torch.manual_seed(seed)
        system = System(settings, "auto" if fused else "reference").to(memory_format=layout)
        stage = stage_of("mdscm", system, settings, Data(corpus, training, (), front_end), Processes(), seed)
        if steps >= settings.optimisation.epochs * stage.steps_per_epoch:
            raise ValueError(f"steps: expected fewer than the schedule of {settings.name!r} has, got {steps}")
        try:
            fit(stage, settings.optimisation, seed=seed, processes=Processes(), log=log, stop=stop, progress=progress)
        except Stopped:  # with the weights of that step
            pass
        logits = score(system, "mdscm", corpus, held_out, front_end, settings.clip_rule)
    truth = torch.tensor([corpus.utterances[i].label for i in held_out])
    matrix = confusion_matrix(truth.tolist(), logits.argmax(1).tolist(), settings.network.classes)
    return {
        "losses": log.losses,
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
    settings: Settings,
    corpus: PreparedCorpus,
    training: Sequence[int],
    held_out: Sequence[int],
    steps: int = STEPS,
    seed: int = SEED,
) -> dict[str, Any]:
    """All runs of one network and what their curves say."""
    parts = (settings, corpus, training, held_out, steps)
    runs = {FUSED: train_steps(*parts, fused=True, seed=seed)}
    for name, (layout, onednn) in REFERENCES.items():
        runs[name] = train_steps(*parts, fused=False, layout=layout, onednn=onednn, seed=seed)
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
    corpus = shipped_corpus("emodb4", given.prepared)
    held_out = [i for i, u in enumerate(corpus.utterances) if u.speaker == given.speaker]
    training = [i for i in range(len(corpus)) if i not in held_out]
    for name, settings in members().items():
        results[name] = compare(settings, corpus, training, held_out, given.steps, given.seed)
        print(report(name, results[name]), flush=True)
    about = {"avser_fast": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    asked = {"steps": given.steps, "speaker": given.speaker, "seed": given.seed, "window": WINDOW, "times": TIMES}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_json({**about, **asked, "networks": results}, given.output)
    return 0 if all(result["within"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
