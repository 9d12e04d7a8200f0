"""The made-up corpus in IEMOCAP's layout: its layout, its sound, its pictures, and that it says what it is."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path

import cv2
import numpy as np
import pytest

from python_training.data import synthetic
from python_training.data.synthetic import SyntheticCorpus, SyntheticTurn, write_iemocap

WIDTH, HEIGHT, FPS = 192, 96, 10.0
HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]"
LINE = re.compile(
    r"\[(\d+\.\d{4}) - (\d+\.\d{4})\]\t(Ses0[1-5][FM]_(?:impro|script)\d\d(?:_\d)?_[FM]\d{3})\t"
    r"(ang|hap|exc|neu|sad|sur|fru|fea|dis|oth|xxx)\t\[([1-5]\.\d{4}), ([1-5]\.\d{4}), ([1-5]\.\d{4})\]"
)
RATER = re.compile(r"C-[EFM]\d:\t[A-Z][a-z]+;\t\(\)|A-[EFM]\d:\tval [1-5]; act [1-5]; dom  [1-5];\t\(\)")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCorpus:
    return write_iemocap(tmp_path_factory.mktemp("small") / "corpus", sessions=2, dialogs=1, turns=4)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCorpus:
    """The corpus that the defaults write, without its videos."""
    return write_iemocap(tmp_path_factory.mktemp("spoken"), video=False)


def sound(path: Path, channels: int = 1) -> np.ndarray:
    """Samples (n, channels) of a wav file in full scale."""
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (channels, 16000, 2)
        data = file.readframes(file.getnframes())
    return np.frombuffer(data, "<i2").reshape(-1, channels) / 32768


def frames(path: Path) -> np.ndarray:
    """Pictures (n, height, width, 3) of a video."""
    capture = cv2.VideoCapture(str(path))
    pictures = []
    while (read := capture.read())[0]:
        pictures.append(read[1])
    assert capture.get(cv2.CAP_PROP_FPS) == FPS
    capture.release()
    return np.stack(pictures)


def level(turn: SyntheticTurn) -> float:
    return float(10 * np.log10(np.mean(sound(turn.wav) ** 2)))


def pitch(turn: SyntheticTurn) -> float:
    """Median over loud frames of the lag at which the sound is most like itself, in Hz."""
    samples = sound(turn.wav)[:, 0]
    pieces = np.lib.stride_tricks.sliding_window_view(samples, 800)[::400]
    power = (pieces**2).mean(1)
    pieces = pieces[power > 0.3 * power.max()]
    spectrum = np.abs(np.fft.rfft(pieces * np.hanning(800), 2048)) ** 2
    likeness = np.fft.irfft(spectrum)[:, 32:230]  # 500 to 70 Hz
    return float(np.median(16000 / (32 + likeness.argmax(1))))


def box_of(corpus: SyntheticCorpus, turn: SyntheticTurn, sex: str) -> tuple[slice, slice]:
    x, y, width, height = corpus.boxes[turn.session][sex]
    return slice(y, y + height), slice(x, x + width)


def test_it_says_that_it_is_synthetic(small: SyntheticCorpus) -> None:
    text = " ".join((small.root / "SYNTHETIC.txt").read_text(encoding="ascii").split())
    assert "SYNTHETIC" in text and "nothing in it is speech of a person or the face of a person" in text
    assert "No accuracy on it means anything" in text
    assert "made-up" in (synthetic.__doc__ or "") and "SYNTHETIC.txt" in (write_iemocap.__doc__ or "")


@pytest.mark.parametrize("name", ["small", "spoken"])
def test_layout(name: str, request: pytest.FixtureRequest) -> None:
    corpus: SyntheticCorpus = request.getfixturevalue(name)
    expected = {corpus.root / "SYNTHETIC.txt", corpus.root / "boxes.json"}
    for turn in corpus.turns:
        match = re.fullmatch(r"(Ses0(\d))([FM])_(impro\d\d|script\d\d_\d)_([FM])\d{3}", turn.name)
        assert match is not None and turn.session == match[1] and turn.speaker == match[1] + match[5]
        dialog, folder = turn.name[:-5], corpus.root / f"Session{match[2]}"
        assert turn.dialog == dialog
        assert turn.wav == folder / "sentences" / "wav" / dialog / f"{turn.name}.wav"
        assert turn.dialog_wav == folder / "dialog" / "wav" / f"{dialog}.wav"
        assert turn.video == (folder / "dialog" / "avi" / "DivX" / f"{dialog}.avi" if name == "small" else None)
        labels = folder / "dialog" / "EmoEvaluation" / f"{dialog}.txt"
        expected |= {turn.wav, turn.dialog_wav, labels} | ({turn.video} if turn.video else set())
    files = {path for path in corpus.root.rglob("*") if path.is_file()}
    assert expected <= files
    decoys = {path.relative_to(corpus.root).as_posix() for path in files - expected}
    inside = "dialog/EmoEvaluation"
    for session, dialog in [("Session1", "Ses01F_impro01"), ("Session2", "Ses02F_impro01")]:
        assert f"{session}/{inside}/._{dialog}.txt" in decoys
        for folder in ("Attribute", "Categorical", "Self-evaluation"):
            assert any(decoy.startswith(f"{session}/{inside}/{folder}/{dialog}_") for decoy in decoys)
    assert len(decoys) == 4 * len(corpus.boxes)


def test_no_decoys_and_more_dialogs(tmp_path: Path) -> None:
    corpus = write_iemocap(tmp_path, sessions=1, dialogs=5, turns=1, video=False, decoys=False)
    assert [turn.name for turn in corpus.turns] == [
        "Ses01F_impro01_F000",
        "Ses01M_script01_1_M000",
        "Ses01F_script01_1_F000",
        "Ses01M_impro01_M000",
        "Ses01F_impro02_F000",
    ]
    labels = tmp_path / "Session1" / "dialog" / "EmoEvaluation"
    assert sorted(path.stem for path in labels.rglob("*")) == sorted(turn.dialog for turn in corpus.turns)


def test_label_files(spoken: SyntheticCorpus) -> None:
    turns = {turn.name: turn for turn in spoken.turns}
    found = []
    for path in sorted(spoken.root.glob("Session*/dialog/EmoEvaluation/Ses*.txt")):
        content = path.read_bytes().decode("ascii")
        assert "\r" not in content and content.endswith("\n\n")
        header, empty, *lines = content.split("\n")
        assert header == HEADER and empty == ""
        previous = 0.0
        for block in "\n".join(lines).strip("\n").split("\n\n"):
            first, *raters = block.split("\n")
            match = LINE.fullmatch(first)
            assert match is not None, first
            turn = turns[match[3]]
            assert turn.emotion == match[4] and turn.dialog == path.stem
            assert (float(match[1]), float(match[2])) == (turn.start, turn.end) and previous < turn.start < turn.end
            assert len(raters) == 7 and all(RATER.fullmatch(rater) for rater in raters)
            given = [re.findall(r"(?:val|act|dom) +(\d)", rater) for rater in raters if rater.startswith("A-E")]
            assert np.allclose(np.array(given, float).mean(0), [float(match[i]) for i in (5, 6, 7)])
            own = [rater[:4] for rater in raters if rater[2] in "FM"]
            assert own == [f"C-{turn.speaker[-1]}1", f"A-{turn.speaker[-1]}1"]
            words = {rater.split("\t")[1] for rater in raters if rater.startswith("C-E")}
            assert (len(words) == 3) == (turn.emotion == "xxx")
            previous = turn.end
            found.append(turn.name)
    assert sorted(found) == sorted(turns) and len(turns) == 80


def test_every_emotion_occurs(small: SyntheticCorpus, spoken: SyntheticCorpus) -> None:
    common = {"ang", "hap", "exc", "neu", "sad", "fru", "xxx", "oth"}
    assert {turn.emotion for turn in small.turns} == common
    assert {turn.emotion for turn in spoken.turns} == common | {"sur", "fea", "dis"}
    for speaker in {turn.speaker for turn in spoken.turns}:
        assert common - {"oth"} <= {turn.emotion for turn in spoken.turns if turn.speaker == speaker}


def test_recordings(small: SyntheticCorpus) -> None:
    for turn in small.turns:
        samples = sound(turn.wav)[:, 0]
        assert len(samples) == round((turn.end - turn.start) * 16000) and 1.0 <= turn.end - turn.start <= 4.0
        assert 0.01 < np.abs(samples).max() < 0.95
        dialog = sound(turn.dialog_wav, channels=2)
        first = round(turn.start * 16000)
        here = dialog[first : first + len(samples)]
        boxes = small.boxes[turn.session]
        own = int(boxes[turn.speaker[-1]][0] >= WIDTH // 2)
        assert np.array_equal(here[:, own], samples)
        assert (here[:, 1 - own] ** 2).mean() < 0.1 * (samples**2).mean()
        assert np.abs(dialog[first - 3000 : first]).max() < 0.01  # nobody speaks between two turns


def test_emotions_sound_different(spoken: SyntheticCorpus) -> None:
    rise: dict[str, list[float]] = {"ang": [], "exc": [], "neu": []}
    for speaker in {turn.speaker for turn in spoken.turns}:
        by = {turn.emotion: turn for turn in spoken.turns if turn.speaker == speaker}
        assert level(by["ang"]) > level(by["neu"]) + 2 > level(by["sad"]) + 4
        for emotion, semitones in rise.items():
            semitones.append(12 * np.log2(pitch(by[emotion]) / pitch(by["sad"])))
    assert np.mean(rise["exc"]) > 7 and np.mean(rise["ang"]) > 4 > np.mean(rise["neu"]) > 1
    neutral = [(turn.speaker[-1], pitch(turn)) for turn in spoken.turns if turn.emotion == "neu"]
    assert min(p for sex, p in neutral if sex == "F") > max(p for sex, p in neutral if sex == "M")


def test_videos(small: SyntheticCorpus) -> None:
    assert json.loads((small.root / "boxes.json").read_text()) == small.boxes
    sides = set()
    for session, boxes in small.boxes.items():
        turn = next(turn for turn in small.turns if turn.session == session)
        assert turn.video is not None
        pictures = frames(turn.video)
        seconds = len(sound(turn.dialog_wav, channels=2)) / 16000
        assert pictures.shape == (int(np.ceil(seconds * FPS)), HEIGHT, WIDTH, 3)
        outside = np.ones((HEIGHT, WIDTH), bool)
        for sex in "FM":
            outside[box_of(small, turn, sex)] = False
        wall = pictures[:, outside]
        for sex, (x, y, width, height) in boxes.items():
            assert 0 <= y and y + height <= HEIGHT and x // (WIDTH // 2) == (x + width - 1) // (WIDTH // 2)
            face = pictures[(slice(None), *box_of(small, turn, sex))]
            assert face.mean() > wall.mean() + 15 and face.std() > 30
            assert face.std(0).mean() > 1.5 * wall.std(0).mean()  # it moves, the wall does not
        sides.add(boxes["F"][0] < boxes["M"][0])
    assert sides == {True, False}


@pytest.mark.parametrize("seed", range(4))
def test_the_mouth_follows_the_sound(seed: int, tmp_path: Path) -> None:
    corpus = write_iemocap(tmp_path, sessions=2, dialogs=1, turns=4, seed=seed)
    for turn in corpus.turns:
        assert turn.video is not None
        shown = range(round(turn.start * FPS), int(turn.end * FPS))
        pictures = frames(turn.video)[shown.start : shown.stop, :, :, 2]
        area = {}
        for sex, (x, y, side, _) in corpus.boxes[turn.session].items():
            # Between nose and chin, and within the cheeks, nothing but the inside of an open mouth is dark.
            rows = slice(y + round(0.63 * side), y + round(0.82 * side))
            columns = slice(x + round(0.4 * side), x + round(0.6 * side))
            area[sex] = (pictures[:, rows, columns] < 110).sum((1, 2))
        own = turn.speaker[-1]
        loud = sound(turn.wav)[:, 0]
        edges = [round(i / FPS * 16000) - round(turn.start * 16000) for i in (*shown, shown.stop)]
        power = [np.sqrt((loud[max(i, 0) : j] ** 2).mean()) for i, j in zip(edges, edges[1:])]
        assert np.corrcoef(area[own], power)[0, 1] > 0.75
        assert area[own].max() > 10 and area["FM".replace(own, "")].max() <= 2  # the listener's mouth is shut


def test_same_seed_same_files(small: SyntheticCorpus, tmp_path: Path) -> None:
    again = write_iemocap(tmp_path / "again", sessions=2, dialogs=1, turns=4)
    other = write_iemocap(tmp_path / "other", sessions=2, dialogs=1, turns=4, seed=1)
    for path in small.root.rglob("*"):
        inside = path.relative_to(small.root)
        if path.suffix in (".wav", ".txt", ".json"):
            assert path.read_bytes() == (again.root / inside).read_bytes(), inside
        elif path.suffix == ".avi":
            assert np.array_equal(frames(path), frames(again.root / inside)), inside
    for mine, changed in zip(small.turns, other.turns):
        assert mine.name == changed.name and mine.wav.read_bytes() != changed.wav.read_bytes()
    assert [t.emotion for t in small.turns] != [t.emotion for t in other.turns]


def test_a_turn_does_not_depend_on_the_videos(small: SyntheticCorpus, tmp_path: Path) -> None:
    silent = write_iemocap(tmp_path, sessions=2, dialogs=1, turns=4, video=False)
    assert not list(tmp_path.rglob("*.avi"))
    for with_video, without in zip(small.turns, silent.turns):
        assert with_video.wav.read_bytes() == without.wav.read_bytes()


@pytest.mark.parametrize("size, fps", [((64, 32), 5.0), ((320, 240), 29.97), ((128, 200), 8.0)])
def test_other_sizes(size: tuple[int, int], fps: float, tmp_path: Path) -> None:
    corpus = write_iemocap(tmp_path, sessions=1, dialogs=1, turns=1, frame_size=size, fps=fps)
    video = corpus.turns[0].video
    assert video is not None
    capture = cv2.VideoCapture(str(video))
    assert (capture.get(cv2.CAP_PROP_FRAME_WIDTH), capture.get(cv2.CAP_PROP_FRAME_HEIGHT)) == size
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(fps, rel=1e-3)
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) >= corpus.turns[0].end * fps
    capture.release()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sessions": 6}, "sessions: expected 1 to 5, got 6"),
        ({"dialogs": 0}, "dialogs: expected 1 to 28, got 0"),
        ({"turns": 0}, "turns: expected 1 to 1000, got 0"),
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"frame_size": (97, 96)}, "frame_size: expected an even width from 64 and a height from 32, got 97x96"),
        ({"fps": 0}, "fps: expected 1 to 60, got 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        write_iemocap(tmp_path / "corpus", **arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message and not (tmp_path / "corpus").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        write_iemocap(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_writer_that_does_not_open_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def __init__(self, *_: object) -> None: ...

        fourcc = staticmethod(cv2.VideoWriter.fourcc)

        def isOpened(self) -> bool:
            return False

    monkeypatch.setattr(cv2, "VideoWriter", Closed)
    with pytest.raises(RuntimeError, match=r"Ses01F_impro01\.avi: expected OpenCV to write MJPG in AVI"):
        write_iemocap(tmp_path, sessions=1, dialogs=1, turns=1)
