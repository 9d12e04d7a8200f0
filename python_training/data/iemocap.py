"""IEMOCAP (Busso et al., Language Resources and Evaluation 2008): its folders, its label files and its totals."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .corpus import Classes, Corpus, FaceSource, Fault, Utterance, sorted_utterances
from .files import existing_folder

SESSIONS = (1, 2, 3, 4, 5)
#: As published: excited counts as happy.
CLASSES = Classes(merged={"exc": "hap"})
#: Emotions of the label files; ``xxx`` is a turn on which the raters did not agree, ``oth`` another emotion.
EMOTIONS = ("ang", "hap", "exc", "neu", "sad", "fru", "sur", "fea", "dis", "oth", "xxx")
#: Turns of the full release, by emotion of the label file and by session (of the published classes).
TOTALS = {"neu": 1708, "hap": 595, "exc": 1041, "ang": 1103, "sad": 1084}
SESSION_TOTALS = {1: 1085, 2: 1023, 3: 1151, 4: 1031, 5: 1241}

_HEADER = re.compile(r"% \[START_TIME - END_TIME\]\s+TURN_NAME\s+EMOTION\s+\[V, A, D\]\s*")
_TURN = re.compile(
    r"\[(?P<start>\d+\.\d+) - (?P<end>\d+\.\d+)\]\t(?P<name>\S+)\t(?P<emotion>\w+)\t\[[\d.]+, [\d.]+, [\d.]+\]\s*"
)
#: What each rater wrote below a turn: categories (``C-E1:``) and attributes (``A-E3:``).
_RATER = re.compile(r"[CA]-\w+:.*")
#: The F or M of the last field is who speaks; the one after the session's number is who wears the markers.
_NAME = re.compile(r"(?P<dialog>Ses(?P<session>\d\d)[FM]_\w+)_(?P<speaker>[FM])\w+")


@dataclass(frozen=True)
class Turn:
    """One line of a label file; ``start`` and ``end`` are seconds of the dialog."""

    name: str
    dialog: str
    session: int
    speaker: str
    emotion: str
    start: float
    end: float


def read_labels(path: Path) -> tuple[list[Turn], list[Fault]]:
    """The turns of ``EmoEvaluation/<dialog>.txt``, and its lines that are neither header, turn nor rater."""
    turns: list[Turn] = []
    faults: list[Fault] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        if not line.strip() or _HEADER.fullmatch(line) or _RATER.fullmatch(line):
            continue
        match = _TURN.fullmatch(line)
        name = _NAME.fullmatch(match["name"]) if match else None
        if match is None or name is None:
            expected = "[START - END] TURN_NAME EMOTION [V, A, D]" if match is None else "a turn such as Ses01F_x_F001"
            shown = line if match is None else match["name"]
            faults.append(Fault("bad-label", f"{path}, line {number}", f"expected {expected}, got {shown[:80]!r}"))
            continue
        start, end = float(match["start"]), float(match["end"])
        emotion = match["emotion"]
        first = first_line.setdefault(match["name"], number)
        if emotion not in EMOTIONS or not start < end or name["dialog"] != path.stem or first < number:
            wrong = (
                f"an emotion out of {', '.join(EMOTIONS)}, got {emotion!r}"
                if emotion not in EMOTIONS
                else f"a turn that ends after it starts, got {start} to {end}"
                if not start < end
                else f"a turn of {path.stem}, got {match['name']}"
                if name["dialog"] != path.stem
                else f"one line for each turn, got {match['name']} of line {first} again"
            )
            faults.append(Fault("bad-label", f"{path}, line {number}", f"expected {wrong}"))
            continue
        session = int(name["session"])
        speaker = f"Ses{session:02d}{name['speaker']}"
        turns.append(Turn(match["name"], name["dialog"], session, speaker, emotion, start, end))
    return turns, faults


def read_iemocap(root: Path, classes: Classes = CLASSES) -> Corpus:
    """The turns under ``root`` (``IEMOCAP_full_release``, or the folder that holds it) whose emotion is in ``classes``.

    A turn's recording is ``Session{n}/sentences/wav/<dialog>/<turn>.wav``, its face a span of
    ``Session{n}/dialog/avi/DivX/<dialog>.avi``, which shows both actors and needs a box or a detector.  Everything
    that is missing, left over or not as in the release is a fault.  ValueError where no session is found.
    """
    root = existing_folder(root, "IEMOCAP (IEMOCAP_full_release)")
    if not (root / "Session1").is_dir() and (root / "IEMOCAP_full_release").is_dir():
        root = root / "IEMOCAP_full_release"
    present = [n for n in SESSIONS if (root / f"Session{n}").is_dir()]
    if not present:
        raise ValueError(f"{root}: expected the folders Session1 to Session5 of IEMOCAP, found none of them")
    utterances: list[Utterance] = []
    faults: list[Fault] = []
    dropped: Counter[str] = Counter()
    labelled: Counter[str] = Counter()
    for number in present:
        folder = root / f"Session{number}"
        known: set[str] = set()
        for path in sorted((folder / "dialog" / "EmoEvaluation").glob("*.txt")):
            if path.name.startswith("."):
                continue
            turns, wrong = read_labels(path)
            faults += wrong
            if turns and turns[0].session != number:
                faults.append(Fault("bad-label", str(path), f"expected a dialog of Session{number}, got {path.stem}"))
                continue
            for turn in turns:
                known.add(turn.name)
                label = classes.index(turn.emotion)
                if label is None:
                    dropped[turn.emotion] += 1
                    continue
                wav = folder / "sentences" / "wav" / turn.dialog / f"{turn.name}.wav"
                if not wav.is_file():
                    faults.append(Fault("missing-wav", turn.name, f"expected the recording {wav}, found none"))
                    continue
                labelled[turn.emotion] += 1
                video = folder / "dialog" / "avi" / "DivX" / f"{turn.dialog}.avi"
                face = FaceSource(video=video, start=turn.start, end=turn.end, crop="detect")
                session = f"Ses{number:02d}"
                utterances.append(Utterance(turn.name, wav, turn.speaker, label, session, face=face))
        faults += _without_label(folder / "sentences" / "wav", known)
    faults += _wrong_totals(classes, labelled, Counter(u.session for u in utterances))
    # An artificial tree of this layout says so of itself, and must not stand beside figures of the release.
    name = "iemocap, artificial" if (root / "SYNTHETIC.txt").exists() else "iemocap"
    return Corpus(name, classes.labels, sorted_utterances(utterances), tuple(faults), dict(dropped))


def _without_label(folder: Path, known: set[str]) -> list[Fault]:
    return [
        Fault("missing-label", str(path), f"expected a line of labels for {path.stem}, found none")
        for path in sorted(folder.glob("*/*.wav"))
        if not path.name.startswith(".") and path.stem not in known
    ]


def _wrong_totals(classes: Classes, found: Counter[str], sessions: Counter[str]) -> list[Fault]:
    """What differs from the full release; nothing is known about other classes than the published ones."""
    if any(classes.index(e) != CLASSES.index(e) for e in EMOTIONS):
        return []
    expected: Counter[str] = Counter()
    got: Counter[str] = Counter()
    for emotion, count in TOTALS.items():
        name = classes.labels[CLASSES.index(emotion) or 0]
        expected[name] += count
        got[name] += found[emotion]
    faults = []
    if expected != got:
        names = list(expected)
        faults.append(
            Fault(
                "wrong-totals",
                "iemocap",
                f"expected {sum(expected.values())} = {'/'.join(str(expected[n]) for n in names)} utterances "
                f"({'/'.join(names)}), found {sum(got.values())} = {'/'.join(str(got[n]) for n in names)}",
            )
        )
    for number, count in SESSION_TOTALS.items():
        name = f"Ses{number:02d}"
        if sessions[name] != count:
            faults.append(
                Fault("wrong-totals", f"Session{number}", f"expected {count} utterances, found {sessions[name]}")
            )
    return faults
