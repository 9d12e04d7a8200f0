"""``python -m python_training prepare|synthesize|train|evaluate|reproduce|release|report|page``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from avser_fast.errors import AvserError

from .data.command import add_parsers, count, named_detector, pair, whole_number
from .data.shipped import FOLDER, SHIPPED
from .progress import Bars
from .protocols import PROTOCOLS, SPEAKER
from .train_command import add_stage_options


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    overrides = {}
    for given in pairs:
        key, equals, value = given.partition("=")
        if not equals or "." not in key:
            raise AvserError(f"--set {given}: expected SECTION.KEY=VALUE, for example optimisation.epochs=20")
        overrides[key] = _value(value)
    return overrides


def _seeds(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(whole_number(part.strip()) for part in text.split(",")))
    except argparse.ArgumentTypeError:
        message = f"expected whole numbers of at least 0 separated by commas, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _protocols(text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in PROTOCOLS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(PROTOCOLS)}, got {name!r}")
    return names


def _prepared(arguments: argparse.Namespace) -> Any:
    """The corpus of --dataset: a folder that `prepare` wrote, or one that comes with the project, prepared now."""
    from .data import PreparedCorpus
    from .data.shipped import shipped_corpus

    if arguments.dataset in SHIPPED:
        with ExitStack() as stack:
            bars = Bars(stack, arguments.quiet)
            return shipped_corpus(arguments.dataset, arguments.prepared, arguments.data, bars)
    if arguments.data is not None:
        raise AvserError(f"--data: expected one of {', '.join(SHIPPED)} as --dataset, got {arguments.dataset}")
    return PreparedCorpus(Path(arguments.dataset))


def evaluate(arguments: argparse.Namespace) -> int:
    """Every fold of a protocol with the given settings, or a saved model on the corpus."""
    from .data import PreparedCorpus
    from .protocol_command import evaluate_protocol
    from .protocols import CROSS_CORPUS
    from .settings import load_settings
    from .tables import show
    from .train_command import stages_of

    _together(arguments)
    if arguments.model is not None:
        return _evaluate_model(arguments)
    settings = load_settings(arguments.config, _overrides(arguments.set))
    speech = _prepared(arguments)
    out = arguments.out or Path("runs/evaluate")
    target = None if arguments.test_dataset is None else PreparedCorpus(arguments.test_dataset)
    with ExitStack() as stack:
        summary = evaluate_protocol(
            settings,
            speech,
            out,
            protocol=CROSS_CORPUS if target is not None else arguments.protocol or SPEAKER,
            seeds=arguments.seeds or [0],
            stages=stages_of(arguments.stages, settings),
            faces=_faces(arguments, settings, speech),
            target=target,
            mapping=dict(arguments.map),
            allow_leakage=arguments.allow_leakage,
            options=_options(arguments),
            device=arguments.device,
            jobs=arguments.jobs,
            progress=Bars(stack, arguments.quiet, "step"),
        )
    on, where = f"on {speech.name}", speech.name
    if target is not None:
        on, where = f"trained on {speech.name}, tested on {target.name}", f"{speech.name}, tested on {target.name}"
    print(show(summary, f"{settings.name} {on}", where))
    print(f"\nwrote {out / 'report.html'}")
    return 0


def _options(arguments: argparse.Namespace, resume: bool = False) -> Any:
    from .run import Options

    skip, board = arguments.skip_bad_samples, arguments.tensorboard
    return Options(arguments.backend, arguments.every, resume, skip, board)


def _faces(arguments: argparse.Namespace, settings: Any, speech: Any) -> Any:
    """The corpus whose faces are shown, None for a recipe of speech alone."""
    from .data import PreparedCorpus

    if settings.encoder is None:
        return None
    return speech if arguments.faces is None else PreparedCorpus(arguments.faces)


def _together(arguments: argparse.Namespace) -> None:
    """End with a usage error where options of `evaluate` would be ignored beside others."""

    def given(*names: str) -> list[str]:
        return [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]

    refused = given("test_dataset", "protocol", "seeds", "stages", "faces", "allow_leakage")
    if arguments.model is not None and refused:
        arguments.usage(f"{refused[0]}: expected no --model, which trains nothing and is tested on --dataset, got both")
    if arguments.test_dataset is not None and arguments.protocol is not None:
        arguments.usage("--protocol: expected no --test-dataset, which is tested as a whole, got both")
    if arguments.map and arguments.model is None and arguments.test_dataset is None:
        arguments.usage("--map: expected --test-dataset or --model, whose test has other labels, got neither")


def _evaluate_model(arguments: argparse.Namespace) -> int:
    import avser_fast

    from .run_folder import write_json
    from .saved_model import evaluate_saved
    from .tables import show

    if arguments.out is not None and (arguments.out / "settings.json").exists():
        raise AvserError(f"{arguments.out}: expected a folder of no other run, got one that has settings.json")
    recognizer = avser_fast.load(arguments.model)
    corpus, name = _prepared(arguments), Path(arguments.model).stem
    with ExitStack() as stack:
        bars = Bars(stack, arguments.quiet, "utterance")
        summary = evaluate_saved(recognizer, corpus, name, dict(arguments.map), bars)
    on = f"{name} on {corpus.name}"
    print(show(summary, on, on))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(summary, arguments.out / "summary.json")
        print(f"\nwrote {arguments.out / 'summary.json'}")
    return 0


def train(arguments: argparse.Namespace) -> int:
    """The stages of a recipe on a prepared corpus, in a run folder."""
    from .settings import load_settings
    from .train_command import train as train_run

    settings = load_settings(arguments.config, _overrides(arguments.set))
    speech = _prepared(arguments)
    options = _options(arguments, arguments.resume)
    return train_run(arguments, settings, speech, _faces(arguments, settings, speech), options)


def page(arguments: argparse.Namespace) -> int:
    """Write a run folder as one HTML page."""
    from .html_report import write_report

    print(f"wrote {write_report(arguments.run_folder)}")
    return 0


def reproduce(arguments: argparse.Namespace) -> int:
    """Prepare IEMOCAP, train all stages under each protocol, and print the paper's table beside the published one."""
    from .data import PreparedCorpus, prepare, read_corpus
    from .data.boxes import Boxes, with_boxes, with_face_clips
    from .data.report import report_text
    from .protocol_command import evaluate_protocol
    from .settings import load_settings
    from .tables import show
    from .train_command import stages_of

    settings = load_settings(arguments.config, _overrides(arguments.set))
    corpus = read_corpus("iemocap", arguments.root)
    if arguments.face_clips is not None:
        corpus = with_face_clips(corpus, arguments.face_clips)
    elif arguments.boxes is not None:
        corpus = with_boxes(corpus, Boxes.read(arguments.boxes), detect=arguments.detector is not None)
    detector = None if arguments.detector is None else named_detector(arguments.detector)
    folder = arguments.out / "prepared"
    with ExitStack() as stack:
        prepared = prepare(corpus, folder, detector=detector, progress=Bars(stack, arguments.quiet))
    print(report_text(prepared.report), "", sep="\n")
    speech = PreparedCorpus(folder)
    stages = stages_of(arguments.stages, settings)
    # A tree that is not the release must not stand beside figures of the release.
    partial = ("wrong-totals", "missing-wav", "bad-label", "unreadable-audio")
    whole = not any(f.kind in partial for f in prepared.faults)
    name = "iemocap" if whole else "iemocap (not the whole release)"
    for protocol in arguments.protocols:
        with ExitStack() as stack:
            summary = evaluate_protocol(
                settings,
                speech,
                arguments.out / protocol,
                protocol=protocol,
                seeds=arguments.seeds,
                stages=stages,
                faces=_faces(arguments, settings, speech),
                options=_options(arguments),
                device=arguments.device,
                jobs=arguments.jobs,
                progress=Bars(stack, arguments.quiet, "step"),
            )
        print(show(summary, f"{settings.name} on {name}", name), "", sep="\n")
    return 0


def release(arguments: argparse.Namespace) -> int:
    """One MDSCM on all speakers of the corpus, written as a model file with its card."""
    from .release import release as release_model
    from .run import Options
    from .settings import load_settings

    settings = load_settings(arguments.config, _overrides(arguments.set))
    with ExitStack() as stack:
        path = release_model(
            settings,
            _prepared(arguments),
            seed=arguments.seed,
            out=arguments.out,
            dataset=arguments.dataset,
            evaluation=arguments.evaluation,
            compared=arguments.compared,
            epochs=arguments.epochs,
            options=Options(resume=True),
            progress=Bars(stack, arguments.quiet, "step"),
        )
    print(f"wrote {path}")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Compare evaluations as a Markdown table."""
    from .comparison import collect, compare
    from .tables import compare_table

    if arguments.collect is not None:
        for run in arguments.runs:
            collect(run, arguments.collect / f"{run.name}.json")
    print(compare_table(compare(arguments.runs, arguments.model)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m python_training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def common(name: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(run=function)
        command.add_argument(
            "--dataset", required=True, help=f"{', '.join(SHIPPED)} (shipped), or a folder that `prepare` wrote"
        )
        command.add_argument("--data", type=Path, help="recordings of a shipped corpus (default: the project's)")
        command.add_argument("--prepared", type=Path, default=FOLDER, help="where a shipped corpus is prepared")
        command.add_argument("--config", default="mdscm-small", help="name in configs/ or path of a TOML file")
        command.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting"
        )
        command.add_argument(
            "--threads", type=count, default=None, help="threads of torch (default: torch's own choice)"
        )
        command.add_argument("--quiet", action="store_true", help="no progress bar")
        return command

    add_parsers(commands)
    command = common("train", train)
    add_stage_options(command)
    command.add_argument("--seed", type=whole_number, default=0)
    command.add_argument(
        "--validation",
        type=lambda text: text.split(","),
        default=[],
        metavar="A,B",
        help="speakers that pick the epoch",
    )
    command.add_argument("--resume", action="store_true", help="go on where an interrupted run was")
    command.add_argument("--out", type=Path, required=True, help="folder of the run")
    command = common("release", release)
    command.add_argument("--seed", type=whole_number, default=0)
    command.add_argument(
        "--epochs", type=count, help="stop after so many epochs (default: the evaluation's median, else all)"
    )
    command.add_argument("--evaluation", type=Path, help="an `evaluate` run with these settings, for the card")
    command.add_argument("--compared", nargs="+", type=Path, default=[], help="other runs that the card should list")
    command.add_argument("--out", type=Path, required=True, help="model file to write (.safetensors)")
    command = common("evaluate", evaluate)
    command.set_defaults(usage=command.error)
    command.add_argument("--seeds", type=_seeds, help="comma-separated (default: 0)")
    command.add_argument("--jobs", type=count, default=1, help="folds side by side, one thread each")
    command.add_argument(
        "--out", type=Path, help="folder of the results (default: runs/evaluate; with --model none are written)"
    )
    command.add_argument("--model", help="score this model file or shipped model instead of training folds")
    add_stage_options(command)
    command.add_argument("--protocol", choices=PROTOCOLS, help=f"who is tested by whom (default: {SPEAKER})")
    command.add_argument("--test-dataset", type=Path, metavar="DIR", help="test on another prepared corpus instead")
    command.add_argument(
        "--map",
        type=pair,
        action="append",
        default=[],
        metavar="FROM=TO",
        help="what a label there counts as",
    )
    command.add_argument(
        "--allow-leakage", action="store_true", help="let speakers be in training and under test; every output says so"
    )
    command = commands.add_parser("reproduce", help=reproduce.__doc__, description=reproduce.__doc__)
    command.set_defaults(run=reproduce)
    command.add_argument("corpus", choices=("iemocap",))
    command.add_argument("--root", type=Path, required=True, help="the folder IEMOCAP_full_release")
    command.add_argument("--out", type=Path, required=True, help="folder of everything; interrupted, it goes on")
    command.add_argument("--config", default="avdal-published", help="name in configs/ or path of a TOML file")
    command.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting")
    command.add_argument("--boxes", type=Path, metavar="FILE", help="JSON: crop boxes of the faces")
    command.add_argument("--face-clips", type=Path, metavar="DIR", help="face clips, cropped already, named by turn")
    command.add_argument("--detector", metavar="D", help="yunet:MODEL.onnx, haar or haar:CASCADE.xml")
    command.add_argument("--seeds", type=_seeds, default=[0], help="comma-separated (default: 0)")
    command.add_argument(
        "--protocols",
        type=_protocols,
        default=list(PROTOCOLS),
        help=f"default: {','.join(PROTOCOLS)}",
    )
    command.add_argument("--jobs", type=count, default=1, help="folds side by side, one thread each")
    command.add_argument("--threads", type=count, default=None, help="threads of torch (default: torch's own choice)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")
    add_stage_options(command)
    command = commands.add_parser("page", help=page.__doc__, description=page.__doc__)
    command.set_defaults(run=page)
    command.add_argument("run_folder", type=Path, metavar="RUN")
    command = commands.add_parser("report", help=report.__doc__, description=report.__doc__)
    command.set_defaults(run=report)
    command.add_argument("runs", nargs="+", type=Path, help="folders of `evaluate` runs, or files made by --collect")
    command.add_argument("--model", default="mdscm", help="whose rates (default: %(default)s)")
    command.add_argument("--collect", type=Path, metavar="FOLDER", help="also write each run there as one file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "threads", None):
        import torch

        torch.set_num_threads(arguments.threads)
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()  # here a closed pipe is still caught
        return code
    except BrokenPipeError:  # an OSError, but nobody is left who would read it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AvserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
