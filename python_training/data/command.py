"""The commands ``avser-fast prepare`` and ``python -m python_training synthesize``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from avser_fast.cli import count, whole_number

from ..progress import Bars
from .boxes import Boxes, with_boxes, with_face_clips, without_faces
from .corpora import CORPORA, read_corpus
from .corpus import LABELS, Classes, Corpus
from .faces import Detector, parse_detector
from .files import file_digest
from .iemocap import CLASSES as IEMOCAP_CLASSES
from .prepare import prepare
from .report import report_text

OK, FAILED, SOME_FAILED = 0, 1, 3


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected different names separated by commas, got {text!r}")
    return names


def pair(text: str) -> tuple[str, str]:
    name, equals, target = text.partition("=")
    if not (name and equals and target):
        raise argparse.ArgumentTypeError(f"expected FROM=TO, for example exc=hap, got {text!r}")
    return name, target


def corpus_name(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"expected a name of printable characters, got {text!r}")
    return text.strip()


def add_parsers(commands: Any) -> None:
    """Add ``prepare`` and ``synthesize`` to the subcommands of a parser."""
    command = commands.add_parser(
        "prepare",
        help="check a corpus and turn it into what training reads",
        description="Check a corpus, name every fault in it, and store its waveforms, features and faces for training.",
        epilog="A corpus is: "
        + "; ".join(f"{name}, ROOT is {what}" for name, (_, what) in CORPORA.items())
        + ". What cannot be used is reported and left out, the rest is stored; the exit code is then 3.",
    )
    command.set_defaults(run=run_prepare)
    command.add_argument("corpus", choices=CORPORA, metavar="CORPUS", help=", ".join(CORPORA))
    command.add_argument("root", type=Path, metavar="ROOT", help="where the corpus is")
    command.add_argument(
        "out", type=Path, metavar="OUT", help="folder to write; what is there already is not made again"
    )
    command.add_argument(
        "--name",
        type=corpus_name,
        help="what a manifest's corpus is called (default: as its file, without the suffix); speakers of one name in "
        "corpora of one name are the same people",
    )
    command.add_argument(
        "--labels", type=_names, default=LABELS, metavar="A,B", help=f"classes in order (default: {','.join(LABELS)})"
    )
    command.add_argument(
        "--merge",
        type=pair,
        action="append",
        metavar="FROM=TO",
        help="count one emotion as another (default for iemocap: exc=hap)",
    )
    command.add_argument(
        "--boxes",
        type=Path,
        metavar="FILE",
        help="JSON: crop boxes of faces in video, see python_training/data/boxes.py",
    )
    command.add_argument(
        "--face-clips", type=Path, metavar="DIR", help="videos or images of faces, cropped already, named by key"
    )
    command.add_argument(
        "--detector", metavar="D", help="find faces with yunet:MODEL.onnx, haar or haar:CASCADE.xml (OpenCV)"
    )
    command.add_argument("--no-faces", action="store_true", help="speech alone")
    command.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="C",
        help="settings whose features are computed already now (default: mdscm-small)",
    )
    command.add_argument("--workers", type=count, metavar="N", help="threads that decode (default: one per core)")
    command.add_argument(
        "--prune", action="store_true", help="remove from OUT what this corpus does not use; nobody may be reading it"
    )
    command.add_argument("--strict", action="store_true", help="any fault at all ends with exit code 1")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.add_argument("--quiet", action="store_true", help="no progress bar")

    command = commands.add_parser(
        "synthesize",
        help="write a small artificial corpus in IEMOCAP's layout",
        description="Write a small artificial corpus in IEMOCAP's layout, to try things on: no speech and no face of a "
        "person is in it, and no accuracy on it means anything.",
    )
    command.set_defaults(run=run_synthesize)
    command.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    command.add_argument("--dialogs", type=count, default=2, help="of each session (default: %(default)s)")
    command.add_argument("--turns", type=count, default=8, help="of each dialog (default: %(default)s)")
    command.add_argument("--seed", type=whole_number, default=0)


def _classes(arguments: argparse.Namespace) -> Classes:
    merged: Mapping[str, str] = dict(arguments.merge or {})
    if arguments.merge is None and arguments.corpus == "iemocap":
        merged = {
            a: b for a, b in IEMOCAP_CLASSES.merged.items() if b in arguments.labels and a not in arguments.labels
        }
    return Classes(arguments.labels, merged)


def _with_faces(corpus: Corpus, arguments: argparse.Namespace) -> Corpus:
    if arguments.no_faces:
        return without_faces(corpus)
    if arguments.face_clips is not None:
        corpus = with_face_clips(corpus, arguments.face_clips)
    if arguments.boxes is not None:
        corpus = with_boxes(corpus, Boxes.read(arguments.boxes), detect=arguments.detector is not None)
    if arguments.corpus == "faces" and arguments.detector is not None:
        utterances = tuple(
            dataclasses.replace(u, face=dataclasses.replace(u.face, crop="detect")) if u.face else u
            for u in corpus.utterances
        )
        corpus = dataclasses.replace(corpus, utterances=utterances)
    return corpus


def named_detector(text: str) -> tuple[str, Detector]:
    """A detector, and for the cache its kind with the digest of its file: another file is another detector."""
    detector = parse_detector(text)
    kind, _, file = text.partition(":")
    return f"{kind}:{file_digest(Path(file))[:16]}" if file else kind, detector


def run_prepare(arguments: argparse.Namespace) -> int:
    """Check a corpus and turn it into what training reads."""
    from ..settings import load_settings

    given = [name for name in ("boxes", "face_clips", "detector") if getattr(arguments, name) is not None]
    if arguments.no_faces and given:
        raise ValueError(f"--no-faces: expected no other option about faces, got --{given[0].replace('_', '-')}")
    if "boxes" in given and "face_clips" in given:
        raise ValueError("--face-clips: expected no --boxes, because these faces are cropped already, got both")
    if arguments.name is not None and arguments.corpus != "manifest":
        raise ValueError(f"--name: expected the corpus manifest, got {arguments.corpus}, which has a name")
    detector = None if arguments.detector is None else named_detector(arguments.detector)
    front_ends = [load_settings(name).front_end.front_end() for name in arguments.config or ["mdscm-small"]]
    corpus = _with_faces(read_corpus(arguments.corpus, arguments.root, _classes(arguments)), arguments)
    if arguments.name is not None:
        corpus = dataclasses.replace(corpus, name=arguments.name)
    if arguments.strict and corpus.faults:
        first = corpus.faults[0]
        raise ValueError(f"--strict: expected a corpus without faults, found {len(corpus.faults)}; the first: {first}")
    with ExitStack() as stack:
        progress = Bars(stack, arguments.quiet)
        prepared = prepare(
            corpus,
            arguments.out,
            front_ends=front_ends,
            detector=detector,
            workers=arguments.workers,
            prune=arguments.prune,
            progress=progress,
        )
    if arguments.json:
        print(json.dumps(prepared.report, indent=1, ensure_ascii=False))
    else:
        print(report_text(prepared.report))
        print(f"\nwrote {prepared.folder}")
    if arguments.strict and prepared.faults:
        return FAILED
    return SOME_FAILED if any(f.lost for f in prepared.faults) else OK


def run_synthesize(arguments: argparse.Namespace) -> int:
    """Write a small artificial corpus in IEMOCAP's layout."""
    from .synthetic import write_iemocap

    write_iemocap(arguments.out, dialogs=arguments.dialogs, turns=arguments.turns, seed=arguments.seed)
    print(
        f"wrote {arguments.out}: artificial, for trying things on; boxes of its faces in {arguments.out / 'boxes.json'}"
    )
    return OK
