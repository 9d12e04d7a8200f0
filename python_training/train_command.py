"""The command ``train``: the stages of a recipe on a prepared corpus, in a run folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .data.command import count
from .data.prepared import PreparedCorpus
from .progress import Bars
from .settings import STAGES, Settings


def add_stage_options(command: argparse.ArgumentParser) -> None:
    """Options of every command that trains stages."""
    command.add_argument(
        "--faces", type=Path, metavar="DIR", help="prepared corpus of the faces (default: those of --dataset)"
    )
    command.add_argument(
        "--stages",
        type=lambda text: text.split(","),
        metavar="A,B",
        help=f"some of {','.join(STAGES)} (default: all but joint; mdscm where the recipe has no encoder)",
    )
    command.add_argument("--backend", default="auto", help="auto, reference, cpu or triton: who computes the networks")
    command.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    command.add_argument(
        "--every", type=count, default=200, metavar="N", help="checkpoint every N steps (default: 200)"
    )
    command.add_argument(
        "--skip-bad-samples", action="store_true", help="another sample stands in for one that cannot be used; counted"
    )
    command.add_argument("--tensorboard", action="store_true", help="also write TensorBoard's files")


def stages_of(given: Sequence[str] | None, settings: Settings) -> list[str]:
    """The stages that are asked for, or those of the recipe."""
    if given:
        return list(given)
    return ["mdscm"] if settings.encoder is None else ["mdscm", "avdal", "fusion"]


def held_out(corpus: PreparedCorpus, names: Sequence[str]) -> list[int]:
    """Items of the named speakers; ValueError naming one without speech."""
    known = {corpus.utterances[i].speaker for i in corpus.with_speech}
    for name in names:
        if name not in known:
            silent = f"{name}, who has no speech" if name in corpus.speakers else name
            raise ValueError(f"--validation: expected speakers out of {', '.join(sorted(known))}, got {silent}")
    return [i for i, u in enumerate(corpus.utterances) if u.speaker in names]


def train(arguments: argparse.Namespace, settings: Settings, speech: Any, faces: Any, options: Any) -> int:
    """The stages of a recipe on a prepared corpus, in a run folder."""
    from .distributed import processes
    from .html_report import write_report
    from .loop import Stopped, stop_on_sigterm
    from .run import Division, shown_faces, taught, train_stages, usable, write_models

    stages = stages_of(arguments.stages, settings)
    utterances = speech.utterances
    held = held_out(speech, arguments.validation)
    validation = sorted(set(speech.with_speech) & set(held))
    training = sorted(set(speech.with_speech) - set(held))
    division = Division(training, validation, shown_faces(faces, speech, held, training))
    division = usable(division, speech, settings, options.skip_bad)
    with ExitStack() as stack:
        joined = stack.enter_context(processes(arguments.device))
        stop = stack.enter_context(stop_on_sigterm())
        try:
            system, spec, fitted = train_stages(
                settings,
                speech,
                division,
                stages,
                arguments.out,
                seed=arguments.seed,
                faces=faces,
                processes=joined,
                options=options,
                stop=stop,
                progress=Bars(stack, arguments.quiet, "step"),
            )
        except Stopped:
            if joined.first:
                print(f"stopped; --resume goes on from {arguments.out}", file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            if joined.first:
                print(f"interrupted; --resume goes on from {arguments.out}", file=sys.stderr)
            return 130
        if joined.first:
            for name, result in fitted.items():
                ua = result.kept.get("validation_ua")
                scored = "" if ua is None else f", validation UA {100 * ua:.1f} %"
                print(f"{name}: epoch {result.epoch} of {len(result.history)} kept{scored}")
                replaced = sum(r.get("skipped", 0) for r in result.history)
                if replaced:
                    print(f"  {replaced} rows: another sample stood in for a bad one")
                for warning in result.history[-1].get("warnings", []) if result.history else []:
                    print(f"  warning: {warning}")
            for sentence in division.left_out or ():
                print(f"left out: {sentence}")
            card = {
                "data": {"corpus": speech.name, "manifest_sha256": speech.manifest_sha256},
                "protocol": {
                    "training_speakers": sorted({utterances[i].speaker for i in taught(division, settings, stages)}),
                    "validation_speakers": list(arguments.validation),
                    "stages": stages,
                    "seed": arguments.seed,
                    "epochs": {name: result.epoch for name, result in fitted.items()},
                },
            }
            for path in write_models(arguments.out, system, spec, stages, card):
                print(f"wrote {path}")
            print(f"wrote {write_report(arguments.out)}")
    return 0
