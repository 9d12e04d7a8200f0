"""The command ``avser-fast``.  Exit codes: 0 ok, 1 failed, 2 usage, 3 some inputs failed; 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from .errors import AvserError, BackendError, InputError

if TYPE_CHECKING:
    from .inference.recognizer import Recognizer
    from .inference.result import EmotionResult

OK, FAILED, USAGE, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130
PROGRAM = "avser-fast"
#: Commands of the training package, which is part of a source checkout and not of a slim installation.
TRAINING = {
    "prepare": "check a corpus and turn it into what training reads",
    "train": "train a model on a corpus",
    "evaluate": "evaluate a training protocol on a corpus",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name that the terminal cannot show must not stop the others
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has gone (``| head``).  Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (AvserError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return FAILED


def _run(arguments: list[str]) -> int:
    if arguments and arguments[0] in TRAINING:
        return _training(arguments)
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed help (0) or what is wrong (2)
        return int(stop.code or 0)
    if options.command is None:
        parser.print_usage(sys.stderr)
        print(f"{PROGRAM}: expected a command, see {PROGRAM} --help", file=sys.stderr)
        return USAGE
    code: int = options.run(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Speech emotion recognition with the MDSCM/AVDAL system.",
        epilog="exit codes: 0 ok, 1 failed, 2 usage, 3 some inputs failed",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    infer = commands.add_parser(
        "infer",
        help="the emotion of each audio file",
        description="Print the emotion of each audio file (wav, flac, ogg, mp3, ...).",
        epilog="Files that cannot be used are reported on stderr, the others are printed; the exit code is then 3.",
    )
    infer.add_argument("files", nargs="+", metavar="FILE", help="audio file, or - for one on the standard input")
    form = infer.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON array, one object per line and file")
    form.add_argument("--csv", action="store_true", help="comma-separated values with a header line")
    infer.add_argument(
        "--model", default="default", metavar="M", help="shipped name or safetensors file (default: %(default)s)"
    )
    infer.add_argument("--top-k", type=count, metavar="K", help="show only the K most probable emotions")
    infer.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    infer.add_argument(
        "--precision",
        default="auto",
        metavar="P",
        help="auto, float32, bf16, int8 on a CPU, tf32, fp16 on a GPU (default: %(default)s)",
    )
    infer.add_argument(
        "--backend", default="auto", metavar="B", help="auto, engine, triton or reference (default: %(default)s)"
    )
    infer.add_argument("--batch-size", type=count, metavar="N", help="files scored together; changes memory, no result")
    infer.add_argument(
        "--output", metavar="FILE", help="write here, whole or not at all, instead of the standard output"
    )
    infer.set_defaults(run=_infer)

    convert = commands.add_parser(
        "convert",
        help="make a model file for another precision, or from a published checkpoint",
        description="Write a model file that can run in another precision, with its measured agreement with float32 in "
        "the card; or make one from a published checkpoint (.pth, needs torch).",
        epilog="Recordings that cannot be used are reported on stderr and left out; the exit code is then 3.",
    )
    convert.add_argument("model", metavar="MODEL", help="shipped name, safetensors file or published .pth")
    convert.add_argument("--precision", choices=("bf16", "int8"), help="what the file is to run in besides float32")
    convert.add_argument("--calibrate", metavar="DIR", help="int8: recordings whose ranges are measured")
    convert.add_argument(
        "--measure", metavar="DIR", help="recordings to compare with float32 on (int8: those of --calibrate)"
    )
    convert.add_argument(
        "--output", metavar="FILE", help="file to write (default: MODEL-PRECISION.safetensors in this folder)"
    )
    convert.add_argument("--limit", type=count, metavar="N", help="only N recordings of each folder, evenly spread")
    convert.set_defaults(run=_convert)

    doctor = commands.add_parser(
        "doctor",
        help="what was built, what runs here, and why",
        description="Say what was built, what runs on this machine, and why.",
    )
    doctor.add_argument("--json", action="store_true", help="as one JSON object")
    doctor.set_defaults(run=_doctor)

    if importlib.util.find_spec("python_training") is not None:
        for name, what in TRAINING.items():
            commands.add_parser(name, help=what, add_help=False)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import avser_fast

        print(f"{PROGRAM} {avser_fast.__version__}")
        parser.exit()


def whole_number(text: str, least: int = 0) -> int:
    """An option's whole number of at least ``least``."""
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """An option's whole number of at least 1."""
    return whole_number(text, 1)


# infer


def _infer(options: argparse.Namespace) -> int:
    if options.files.count("-") > 1:
        print(f"{PROGRAM} infer: expected - at most once: there is one standard input", file=sys.stderr)
        return USAGE
    from .inference.recognizer import load

    recognizer = load(options.model, device=options.device, precision=options.precision, backend=options.backend)
    failed = 0

    def results() -> Iterator[tuple[str, EmotionResult]]:
        nonlocal failed
        items = (sys.stdin.buffer if file == "-" else file for file in options.files)
        found = recognizer.iter_infer(items, batch_size=options.batch_size, top_k=options.top_k, on_error="return")
        for file, result in zip(options.files, found):
            if result.error is not None:
                failed += 1
                print(f"{PROGRAM}: {result.error}", file=sys.stderr)
            yield file, result

    write: Callable[[Iterable[tuple[str, EmotionResult]], Recognizer, list[str], IO[str]], None]
    write = _write_json if options.json else _write_csv if options.csv else _write_table
    if options.output is None:
        write(results(), recognizer, options.files, sys.stdout)
    else:
        from .inference.whole_files import write_bytes

        text = io.StringIO(newline="")
        write(results(), recognizer, options.files, text)
        write_bytes(options.output, text.getvalue().encode("utf-8", "backslashreplace"))
    return SOME_FAILED if failed else OK


def _write_json(
    results: Iterable[tuple[str, EmotionResult]], recognizer: Recognizer, files: list[str], out: IO[str]
) -> None:
    separator = "[\n"
    for file, result in results:
        out.write(separator + json.dumps({"file": file, **result.to_dict()}))
        separator = ",\n"
    out.write("\n]\n")


def _write_csv(
    results: Iterable[tuple[str, EmotionResult]], recognizer: Recognizer, files: list[str], out: IO[str]
) -> None:
    labels = recognizer.spec.labels
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["file", "label", "score", *labels, "duration_s", "padded_fraction", "backend", "error"])
    for file, result in results:
        scores = [_number(result.scores.get(label)) for label in labels]
        length = ["", ""] if result.error else [_number(result.duration_s), _number(result.padded_fraction)]
        row = [file, result.label or "", _number(result.score), *scores, *length, result.backend, result.error or ""]
        writer.writerow(row)


def _write_table(
    results: Iterable[tuple[str, EmotionResult]], recognizer: Recognizer, files: list[str], out: IO[str]
) -> None:
    width = max(map(len, [*files, "file"]))
    narrow = max(map(len, [*recognizer.spec.labels, "label"]))
    header = f"{'file':<{width}}  {'label':<{narrow}}  score  seconds  scores"
    for file, result in results:
        if result.error is not None:
            continue
        if header:
            out.write(header + "\n")
            header = ""
        scores = "  ".join(f"{label} {p:.3f}" for label, p in result.scores.items())
        answer = f"{result.label:<{narrow}}  {result.score:.3f}  {result.duration_s:7.2f}"
        out.write(f"{file:<{width}}  {answer}  {scores}\n")


def _number(value: float | None) -> str:
    return "" if value is None else repr(float(value))


# convert


def _convert(options: argparse.Namespace) -> int:
    published = options.model.lower().endswith((".pth", ".pt"))
    wrong = ""
    if options.precision is None and not published:
        wrong = "expected --precision bf16 or int8: a model file is float32 already"
    elif options.precision is None and (options.calibrate or options.measure):
        wrong = "expected --precision with --calibrate or --measure"
    elif options.precision == "int8" and not options.calibrate:
        wrong = "expected --calibrate DIR with --precision int8, recordings on which the ranges are measured"
    elif options.precision == "bf16" and options.calibrate:
        wrong = "expected no --calibrate with --precision bf16, which has no ranges; --measure DIR compares it"
    elif options.precision == "bf16" and not options.measure:
        wrong = "expected --measure DIR with --precision bf16: all that a file can say of bf16 is its agreement"
    if wrong:
        print(f"{PROGRAM} convert: {wrong}", file=sys.stderr)
        return USAGE
    output = options.output
    if output is None:
        stem = os.path.splitext(os.path.basename(options.model))[0]
        output = f"{stem}-{options.precision or 'float32'}.safetensors"
        if os.path.exists(output):
            raise InputError(f"--output: expected a name, because the file {output!r} is there already")
    if not published:
        return _convert_precision(options, options.model, output)
    if options.precision is None:
        print(f"wrote {output}: {_import_published(options.model, output)}, float32")
        return OK
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        imported = os.path.join(folder, os.path.splitext(os.path.basename(options.model))[0] + ".safetensors")
        _import_published(options.model, imported)
        return _convert_precision(options, imported, output)


def _import_published(path: str, output: str) -> str:
    """Make a model file from a published checkpoint and return its kind."""
    if importlib.util.find_spec("torch") is None:
        raise BackendError(f"convert: {path!r}: reading a published checkpoint needs torch; pip install torch")
    from .av4ser import import_av4ser, load_av4ser

    kind, _ = load_av4ser(path, "convert")
    source: dict[str, Any] = {kind if kind in ("mdscm", "fusion") else "avdal": path}
    import_av4ser(out=output, **source)
    return kind


def _convert_precision(options: argparse.Namespace, model: str, output: str) -> int:
    from .inference.convert import convert_model
    from .precision import LEAST_AGREEMENT

    bar = sys.stderr.isatty()

    def progress(doing: str, done: int, total: int) -> None:
        print(f"\r{doing}: {done}/{total} files", end="\n" if done == total else "", file=sys.stderr, flush=True)

    def report(error: str) -> None:
        print(f"{chr(10) if bar else ''}{PROGRAM}: {error}", file=sys.stderr)

    done = convert_model(
        model,
        output,
        precision=options.precision,
        calibrate_on=options.calibrate,
        measure_on=options.measure,
        limit=options.limit,
        progress=progress if bar else None,
        on_bad_file=report,
    )
    print(f"wrote {output}" + (f": ranges of {done.calibrated_on} recordings" if done.calibrated_on else ""))
    print("precision  recordings  same decision as float32  largest difference of a score")
    for name, entry in done.measured.items():
        share = 100 * entry["agreement"]
        below = f"  (below {100 * LEAST_AGREEMENT[name]:.0f} %)" if entry["agreement"] < LEAST_AGREEMENT[name] else ""
        print(f"{name:<9}  {entry['utterances']:>10}  {share:>22.1f} %  {entry['largest_difference']:>29.4f}{below}")
    if options.measure is None:
        print("Compared on the recordings that calibrated it: others may differ more (--measure DIR).")
    return SOME_FAILED if done.bad else OK


# doctor, training


def _doctor(options: argparse.Namespace) -> int:
    from . import info

    report = info.report()
    print(json.dumps(report, indent=2, sort_keys=True, default=str) if options.json else info.doctor(report))
    return FAILED if "error" in report["engine"] else OK


def _training(arguments: list[str]) -> int:
    """Hand the command line to ``python -m python_training``."""
    if importlib.util.find_spec("python_training") is None:
        print(
            f"{PROGRAM} {arguments[0]}: expected the package python_training, which comes with a source checkout and "
            "not with this installation",
            file=sys.stderr,
        )
        return USAGE
    import runpy

    before = sys.argv
    sys.argv = [f"{PROGRAM}", *arguments]
    try:
        runpy.run_module("python_training", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return int(stop.code or 0)
        print(stop.code, file=sys.stderr)
        return FAILED
    finally:
        sys.argv = before
    return OK
