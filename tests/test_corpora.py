"""Readers of corpora: what they find in generated trees, and the fault that each planted fault becomes."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from python_training.data import Classes, Corpus, FaceSource, Fault, Utterance, read_corpus
from python_training.data.boxes import Boxes, with_boxes, with_face_clips
from python_training.data.iemocap import CLASSES, EMOTIONS, SESSION_TOTALS, TOTALS, read_labels
from python_training.data.manifest import entry_of
from python_training.data.synthetic import SyntheticCorpus, write_iemocap

EIGHT = Classes(("ang", "hap", "neu", "sad", "cal", "fea", "dis", "sur"))


def faults_of(corpus: Corpus, kind: str) -> list[str]:
    return [str(f) for f in corpus.faults if f.kind == kind]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCorpus:
    return write_iemocap(tmp_path_factory.mktemp("corpora") / "IEMOCAP_full_release", turns=6, video=False)


@pytest.fixture
def tree(written: SyntheticCorpus, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(written.root, tmp_path / "IEMOCAP_full_release"))


def labels_of(tree: Path, session: int = 1) -> Path:
    folder = tree / f"Session{session}" / "dialog" / "EmoEvaluation"
    return sorted(p for p in folder.glob("*.txt") if not p.name.startswith("."))[0]


# IEMOCAP


def test_iemocap(written: SyntheticCorpus) -> None:
    corpus = read_corpus("iemocap", written.root)
    kept = {t.name: t for t in written.turns if t.emotion in ("ang", "hap", "exc", "neu", "sad")}
    assert [u.key for u in corpus.utterances] == sorted(kept)
    merged = {"exc": "hap"}
    for u in corpus.utterances:
        turn = kept[u.key]
        assert corpus.labels[u.label] == merged.get(turn.emotion, turn.emotion)
        assert u.speaker == turn.speaker and u.speaker[-1] == u.key.rpartition("_")[2][0]
        assert u.path == turn.wav and u.session == u.key[:5]
        assert u.face is not None and u.face.crop == "detect" and u.face.video is not None
        assert (u.face.start, u.face.end) == pytest.approx((turn.start, turn.end), abs=1e-4)
        assert u.face.video.parts[-4:-1] == ("dialog", "avi", "DivX")
        assert (u.start, u.end) == (0.0, None), "the recording is cut already"
    assert any(u.key[5] != u.speaker[-1] for u in corpus.utterances), "the letter of the dialog is not the speaker"
    assert corpus.dropped == Counter(t.emotion for t in written.turns if t.name not in kept)
    assert corpus.dropped["xxx"] and corpus.dropped["oth"]
    assert {f.kind for f in corpus.faults} == {"wrong-totals"}, "the decoys of other systems are no labels"


def test_iemocap_totals_are_named(written: SyntheticCorpus) -> None:
    found = Counter(t.emotion for t in written.turns)
    numbers = [found["neu"], found["hap"] + found["exc"], found["ang"], found["sad"]]
    assert sum(TOTALS.values()) == sum(SESSION_TOTALS.values()) == 5531
    faults = faults_of(read_corpus("iemocap", written.root), "wrong-totals")
    assert faults[0] == (
        "iemocap: expected 5531 = 1708/1636/1103/1084 utterances (neu/hap/ang/sad), "
        f"found {sum(numbers)} = {'/'.join(map(str, numbers))}"
    )
    assert len(faults) == 6 and faults[5].startswith("Session5: expected 1241 utterances, found ")
    assert faults_of(read_corpus("iemocap", written.root, Classes(("ang", "neu"))), "wrong-totals") == []


def test_iemocap_with_the_release_s_totals_has_no_fault(tmp_path: Path) -> None:
    """A tree of empty recordings with exactly the published counts, to see that the sum can come out."""
    emotions = [e for e, n in TOTALS.items() for _ in range(n)]
    for session, count in SESSION_TOTALS.items():
        name = f"Ses{session:02d}F_impro01"
        folder = tmp_path / f"Session{session}"
        (folder / "sentences" / "wav" / name).mkdir(parents=True)
        (folder / "dialog" / "EmoEvaluation").mkdir(parents=True)
        lines = []
        for i in range(count):
            turn = f"{name}_F{i:04d}"
            lines.append(f"[{i}.0000 - {i}.5000]\t{turn}\t{emotions.pop()}\t[2.5000, 2.5000, 2.5000]\n")
            (folder / "sentences" / "wav" / name / f"{turn}.wav").touch()
        (folder / "dialog" / "EmoEvaluation" / f"{name}.txt").write_text("".join(lines))
    corpus = read_corpus("iemocap", tmp_path)
    assert not emotions and len(corpus.utterances) == 5531 and corpus.faults == ()


def test_iemocap_the_folder_above_will_do(written: SyntheticCorpus) -> None:
    assert read_corpus("iemocap", written.root.parent).utterances == read_corpus("iemocap", written.root).utterances


def test_iemocap_missing_recordings_and_labels_are_named(tree: Path) -> None:
    before = read_corpus("iemocap", tree)
    first, second = before.utterances[0], before.utterances[1]
    assert first.path is not None and second.path is not None
    first.path.unlink()
    second.path.rename(second.path.with_name(second.key.replace("_F", "_X") + "9.wav"))
    corpus = read_corpus("iemocap", tree)
    assert faults_of(corpus, "missing-wav") == [
        f"{u.key}: expected the recording {u.path}, found none" for u in (first, second)
    ]
    (left_over,) = faults_of(corpus, "missing-label")
    assert "9.wav: expected a line of labels for " in left_over
    assert len(corpus.utterances) == len(before.utterances) - 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "[1.0 - 2.0] Ses01F_impro01_F000 ang [1.0, 2.0, 3.0]",
            "expected [START - END] TURN_NAME EMOTION [V, A, D], got",
        ),
        ("[1.0 - 2.0]\tSes01F_impro01_F900\tjoy\t[1.0, 2.0, 3.0]", "expected an emotion out of ang, hap, exc, "),
        (
            "[2.0 - 1.0]\tSes01F_impro01_F900\tang\t[1.0, 2.0, 3.0]",
            "expected a turn that ends after it starts, got 2.0 to 1.0",
        ),
        (
            "[1.0 - 2.0]\tSes01F_impro02_F900\tang\t[1.0, 2.0, 3.0]",
            "expected a turn of Ses01F_impro01, got Ses01F_impro02_F900",
        ),
        ("[1.0 - 2.0]\tsomebody\tang\t[1.0, 2.0, 3.0]", "expected a turn such as Ses01F_x_F001, got 'somebody'"),
        ("what is this", "expected [START - END] TURN_NAME EMOTION [V, A, D], got 'what is this'"),
    ],
)
def test_iemocap_lines_that_are_no_labels_are_named(tree: Path, line: str, message: str) -> None:
    path = labels_of(tree)
    assert path.stem == "Ses01F_impro01"
    before = read_corpus("iemocap", tree)
    number = len(path.read_text().splitlines()) + 1
    path.write_text(path.read_text() + line + "\n")
    corpus = read_corpus("iemocap", tree)
    (fault,) = faults_of(corpus, "bad-label")
    assert fault.startswith(f"{path}, line {number}: {message}")
    assert corpus.utterances == before.utterances


def test_iemocap_header_and_raters_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "Ses03M_script01_1b.txt"
    path.write_text(
        "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        "[6.2901 - 8.2357]\tSes03M_script01_1b_F000\tneu\t[2.5000, 2.5000, 2.5000]\n"
        "C-E2:\tNeutral;\t()\nC-E3:\tNeutral; Sadness;\t(a little)\nC-F1:\tNeutral;\t()\n"
        "A-E3:\tval 3; act 2; dom  2;\t()\nA-F1:\tval 3; act 3; dom  2;\t()\n\n"
        "[10.0100 - 11.3925]\tSes03M_script01_1b_MXX0\txxx\t[2.5000, 3.0000, 2.5000]\n"
        "C-E2:\tFrustration;\t()\n"
    )
    turns, faults = read_labels(path)
    assert faults == [] and [(t.name, t.emotion, t.speaker, t.session, t.start, t.end) for t in turns] == [
        ("Ses03M_script01_1b_F000", "neu", "Ses03F", 3, 6.2901, 8.2357),
        ("Ses03M_script01_1b_MXX0", "xxx", "Ses03M", 3, 10.01, 11.3925),
    ]
    assert {CLASSES.index(e) for e in EMOTIONS} == {0, 1, 2, 3, None} and CLASSES.index("exc") == CLASSES.index("hap")


def test_iemocap_a_session_that_is_missing_is_counted(tree: Path) -> None:
    shutil.rmtree(tree / "Session4")
    assert "Session4: expected 1031 utterances, found 0" in faults_of(read_corpus("iemocap", tree), "wrong-totals")
    with pytest.raises(ValueError, match="expected the folders Session1 to Session5 of IEMOCAP, found none"):
        read_corpus("iemocap", tree / "Session1")


def test_iemocap_labels_that_passed_through_windows(tree: Path) -> None:
    before = read_corpus("iemocap", tree)
    for path in (tree / "Session1" / "dialog" / "EmoEvaluation").glob("Ses*.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_corpus("iemocap", tree) == before


def test_iemocap_labels_of_another_session_and_turns_named_twice_are_faults(tree: Path) -> None:
    before = read_corpus("iemocap", tree)
    own, other = labels_of(tree, 1), labels_of(tree, 2)
    shutil.copy(other, own.parent)
    wavs = Path("sentences", "wav", other.stem)
    shutil.copytree(tree / "Session2" / wavs, tree / "Session1" / wavs)
    turn = next(line for line in own.read_text().splitlines() if line.startswith("["))
    first, again = own.read_text().splitlines().index(turn) + 1, len(own.read_text().splitlines()) + 1
    own.write_text(own.read_text() + turn + "\n")
    corpus = read_corpus("iemocap", tree)
    name = turn.split("\t")[1]
    assert faults_of(corpus, "bad-label") == [
        f"{own}, line {again}: expected one line for each turn, got {name} of line {first} again",
        f"{own.parent / other.name}: expected a dialog of Session1, got {other.stem}",
    ]
    assert corpus.utterances == before.utterances and corpus.dropped == before.dropped


# EMO-DB


def test_emodb_is_whole(emodb: Path) -> None:
    corpus = read_corpus("emodb", emodb)
    counts = {
        s: [sum(u.speaker == s and u.label == c for u in corpus.utterances) for c in range(4)]
        for s in {u.speaker for u in corpus.utterances}
    }
    assert counts == {
        "03": [14, 7, 11, 7], "08": [12, 11, 10, 9], "09": [13, 4, 9, 4], "10": [10, 4, 4, 3], "11": [11, 8, 9, 7],
        "12": [12, 2, 4, 4], "13": [12, 10, 9, 5], "14": [16, 8, 7, 10], "15": [13, 6, 11, 4], "16": [14, 11, 5, 9],
    }  # fmt: skip
    assert len(corpus.utterances) == 339 and corpus.faults == () and corpus.dropped == {}


def test_emodb_names(tmp_path: Path) -> None:
    for name in ("03a01Fa.wav", "03a01La.wav", "08b02Ta.FLAC", "hello.wav", "03a01Xa.wav", "._03a01Na.wav", "a.txt"):
        (tmp_path / name).touch()
    corpus = read_corpus("emodb", tmp_path)
    assert [(u.key, corpus.labels[u.label], u.speaker) for u in corpus.utterances] == [
        ("03a01Fa", "hap", "03"),
        ("08b02Ta", "sad", "08"),
    ]
    assert corpus.dropped == {"bor": 1}
    faults = faults_of(corpus, "bad-name")
    assert len(faults) == 2 and "hello.wav: expected an EMO-DB name such as 03a01Fa" in faults[1]
    assert [u.key for u in read_corpus("emodb", tmp_path, Classes(("bor",))).utterances] == ["03a01La"]


def test_emodb_that_is_there_twice_is_read_once(tmp_path: Path) -> None:
    touch(tmp_path, "flac/03a01Fa.flac", "wav/03a01Fa.wav", "wav2/03a01Fa.wav", "flac/03a01La.flac", "wav/03a01La.wav")
    corpus = read_corpus("emodb", tmp_path)
    assert [(u.key, u.path) for u in corpus.utterances] == [("03a01Fa", tmp_path / "wav/03a01Fa.wav")]
    assert corpus.dropped == {"bor": 1}


# RAVDESS, CREMA-D


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_ravdess(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "Actor_12/03-01-06-01-02-01-12.wav",  # fear
        "Actor_12/03-01-05-02-02-01-12.wav",  # anger, with both videos
        "Video/Actor_12/01-01-05-02-02-01-12.mp4",
        "Video/Actor_12/02-01-05-02-02-01-12.mp4",
        "Actor_01/03-01-01-01-01-01-01.wav",  # neutral, no video
        "Actor_01/03-01-02-01-01-01-01.wav",  # calm
        "Video/Actor_02/02-01-04-01-01-01-02.mp4",  # sad, no sound
        "Song/03-02-03-01-01-01-01.wav",
        "Actor_01/03-01-09-01-01-01-01.wav",
    )
    corpus = read_corpus("ravdess", tmp_path)
    found = {u.key: (corpus.labels[u.label], u.speaker, u.path, u.face and u.face.video) for u in corpus.utterances}
    assert found == {
        "01-01-01-01-01-01": ("neu", "01", tmp_path / "Actor_01/03-01-01-01-01-01-01.wav", None),
        "01-04-01-01-01-02": ("sad", "02", None, tmp_path / "Video/Actor_02/02-01-04-01-01-01-02.mp4"),
        "01-05-02-02-01-12": (
            "ang",
            "12",
            tmp_path / "Actor_12/03-01-05-02-02-01-12.wav",
            tmp_path / "Video/Actor_12/02-01-05-02-02-01-12.mp4",
        ),
    }
    assert corpus.dropped == {"fea": 1, "cal": 1, "song": 1}
    assert [f.partition(": ")[0] for f in faults_of(corpus, "missing-wav")] == ["01-04-01-01-01-02"]
    assert [f.partition(": ")[0] for f in faults_of(corpus, "missing-video")] == ["01-01-01-01-01-01"]
    assert "expected a RAVDESS name such as 03-01-06-01-02-01-12" in faults_of(corpus, "bad-name")[0]
    assert len(read_corpus("ravdess", tmp_path, EIGHT).utterances) == 5


def test_ravdess_of_sound_alone_misses_no_video(tmp_path: Path) -> None:
    touch(tmp_path, "Actor_01/03-01-01-01-01-01-01.wav")
    assert read_corpus("ravdess", tmp_path).faults == ()


def test_cremad(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "AudioWAV/1001_DFA_ANG_XX.wav",
        "AudioMP3/1001_DFA_ANG_XX.mp3",
        "VideoFlash/1001_DFA_ANG_XX.flv",
        "AudioWAV/1040_ITH_SAD_X.wav",
        "VideoFlash/1040_ITH_SAD_X.flv",
        "AudioWAV/1002_IEO_DIS_HI.wav",
        "VideoFlash/1002_IEO_DIS_HI.flv",
        "AudioWAV/1002_IEO_JOY_HI.wav",
    )
    corpus = read_corpus("cremad", tmp_path)
    assert [(u.key, corpus.labels[u.label], u.speaker) for u in corpus.utterances] == [
        ("1001_DFA_ANG_XX", "ang", "1001"),
        ("1040_ITH_SAD_X", "sad", "1040"),
    ]
    assert corpus.utterances[0].path == tmp_path / "AudioWAV/1001_DFA_ANG_XX.wav"
    assert corpus.utterances[0].face == FaceSource(video=tmp_path / "VideoFlash/1001_DFA_ANG_XX.flv", crop="detect")
    assert corpus.dropped == {"dis": 1} and [f.kind for f in corpus.faults] == ["bad-name"]


# Manifests


def manifest(folder: Path, *entries: Any) -> Path:
    path = folder / "corpus.jsonl"
    lines = [e if isinstance(e, str) else json.dumps(e, ensure_ascii=False) for e in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_manifest(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        {"key": "b", "wav": "sub/b.wav", "emo": "sad", "speaker": "s1", "session": "1"},
        {
            "key": "a",
            "wav": "/a.wav",
            "emo": "ang",
            "video": "d.avi",
            "start": 1.5,
            "end": 3,
            "box": [0, 1, 20, 30],
        },
        "",
        {"key": "c", "wav": "c.wav", "emo": "hap", "video": "d.avi", "start": 2, "end": 3, "span": "video"},
        {"key": "d", "emo": "neu", "image": ["1.png", "2.png"], "speaker": None},
        {"key": "é ö", "emo": "fru", "wav": "x.wav"},
        {"key": "f", "emo": "neu", "image": "3.png", "face": "detect", "box": [0, 0, 5, 5]},
    )
    corpus = read_corpus("manifest", path)
    face = {u.key: u.face for u in corpus.utterances}
    assert corpus.utterances[0] == Utterance(
        "a", Path("/a.wav"), "", 0, "", 1.5, 3, FaceSource(tmp_path / "d.avi", (), 1.5, 3, "box", (0, 1, 20, 30))
    )
    assert corpus.utterances[1] == Utterance("b", tmp_path / "sub/b.wav", "s1", 3, "1")
    assert corpus.utterances[2].end is None and face["c"] == FaceSource(tmp_path / "d.avi", (), 2, 3, "detect")
    assert face["d"] == FaceSource(images=(tmp_path / "1.png", tmp_path / "2.png"))
    assert face["f"] == FaceSource(images=(tmp_path / "3.png",), crop="detect", box=(0, 0, 5, 5))
    assert corpus.faults == () and corpus.dropped == {"fru": 1}
    again = manifest(tmp_path, *(entry_of(u, corpus.labels) for u in corpus.utterances))
    assert read_corpus("manifest", again).utterances == corpus.utterances


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"key": "x", "wav": "x.wav", "emo": "joy"},
            "field 'emo': expected one of ang, hap, neu, sad, exc, .*, got 'joy'",
        ),
        ({"key": "x", "wav": "x.wav"}, "expected the field 'emo', got key, wav"),
        ({"wav": "x.wav", "emo": "ang"}, "expected the field 'key', got wav, emo"),
        ({"key": 3, "wav": "x.wav", "emo": "ang"}, "field 'key': expected a string that is not empty, got 3"),
        ({"key": "x", "wav": ["x.wav"], "emo": "ang"}, r"field 'wav': expected a path, got \[\"x.wav\"\]"),
        (
            {"key": "x", "wav": "x.wav", "emo": "ang", "start": "1"},
            "field 'start': expected seconds, 0 or more, got \"1\"",
        ),
        (
            {"key": "x", "wav": "x.wav", "emo": "ang", "start": True},
            "field 'start': expected seconds, 0 or more, got true",
        ),
        (
            {"key": "x", "wav": "x.wav", "emo": "ang", "start": 3, "end": 2},
            "expected an end after the start, got 3 to 2",
        ),
        (
            {"key": "x", "wav": "x.wav", "emo": "ang", "box": [1, 2, 3]},
            r"field 'box': expected \[x, y, width, height\]",
        ),
        ({"key": "x", "wav": "x.wav", "emo": "ang", "speaker": 7}, "field 'speaker': expected a string, got 7"),
        ({"key": "x", "emo": "ang"}, "expected 'wav', 'video' or 'image', got none of them"),
        ({"key": "x", "emo": "ang", "video": "a", "image": "b"}, "expected 'video' or 'image', got both"),
        (
            {"key": "x", "emo": "ang", "video": "a", "face": "box"},
            "field 'face': expected a field 'box' for it, got none",
        ),
        ({"key": "a", "wav": "x.wav", "emo": "ang"}, "expected a key of its own, got 'a' of line 1"),
        ("{not json", "expected a JSON object, got '{not json'"),
        ("[1, 2]", r"expected a JSON object, got '\[1, 2\]'"),
        ('{"key": "x", "emo": "ang", "wav": "\\ud800"}', r"field 'wav': expected a path, got \"\\ud800\""),
        ('{"key": "x", "emo": "ang", "wav": "x", "start": NaN}', "field 'start': expected seconds, 0 or more, got NaN"),
        ('{"key": "x", "emo": "ang", "wav": "x", "end": 1e400}', "field 'end': expected seconds, .*, got Infinity"),
    ],
)
def test_manifest_lines_that_cannot_be_used_are_named(tmp_path: Path, line: Any, message: str) -> None:
    good = [{"key": k, "wav": f"{k}.wav", "emo": "ang"} for k in "ab"]
    path = manifest(tmp_path, good[0], line, good[1])
    corpus = read_corpus("manifest", path)
    (fault,) = corpus.faults
    assert fault.kind == "bad-manifest" and fault.lost and fault.item == f"{path}, line 2"
    with pytest.raises(ValueError, match=message):
        raise ValueError(fault.message)
    assert [u.key for u in corpus.utterances] == ["a", "b"], "the other lines are read"


def test_manifest_unknown_fields_are_named_once(tmp_path: Path) -> None:
    entries = [{"key": k, "wav": f"{k}.wav", "emo": "ang", "speeker": "1"} for k in "abc"]
    corpus = read_corpus("manifest", manifest(tmp_path, *entries))
    (fault,) = corpus.faults
    assert fault.kind == "unknown-field" and not fault.lost and len(corpus.utterances) == 3
    assert fault.item.endswith("line 1 and 2 more") and "got 'speeker' too, which is ignored" in fault.message


def test_manifest_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing.jsonl: expected a readable manifest, got an error"):
        read_corpus("manifest", tmp_path / "nothing.jsonl")
    (tmp_path / "a").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected a manifest in UTF-8"):
        read_corpus("manifest", tmp_path / "a")
    (tmp_path / "b").write_text("\n\n")
    with pytest.raises(ValueError, match="expected a manifest of one JSON object per line, got an empty file"):
        read_corpus("manifest", tmp_path / "b")


# Still images


def test_stills(tmp_path: Path) -> None:
    touch(tmp_path, "hap/anna/1.PNG", "hap/2.jpg", "sad/é ö.png", "fear/3.png", "loose.png", "hap/notes.txt")
    corpus = read_corpus("faces", tmp_path)
    assert [(u.key, corpus.labels[u.label], u.speaker, u.path) for u in corpus.utterances] == [
        ("hap/2.jpg", "hap", "", None),
        ("hap/anna/1.PNG", "hap", "anna", None),
        ("sad/é ö.png", "sad", "", None),
    ]
    assert corpus.dropped == {"fear": 1, "(no folder)": 1}
    with pytest.raises(ValueError, match=r"in folders named joy, found \(no folder\) \(1\), fear \(1\)"):
        read_corpus("faces", tmp_path, Classes(("joy",)))


# Faces of other places


def test_boxes_by_the_longest_beginning_and_the_speaker(tmp_path: Path) -> None:
    path = tmp_path / "boxes.json"
    entries = {
        "Ses01": {"F": [0, 0, 10, 20], "M": [10, 0, 10, 20]},
        "Ses01F_impro01": [1, 2, 3, 4],
        "Ses02": {"F": [5, 5, 5, 5]},
    }
    path.write_text(json.dumps(entries))
    video = FaceSource(video=Path("d.avi"), crop="detect")
    utterances = tuple(
        Utterance(key, None, speaker, 0, face=video)
        for key, speaker in (
            ("Ses01F_impro01_F000", "Ses01F"),
            ("Ses01F_impro02_F000", "Ses01F"),
            ("Ses01F_impro02_M000", "Ses01M"),
            ("Ses02F_impro01_M000", "Ses02M"),
        )
    )
    corpus = with_boxes(Corpus("x", ("ang",), utterances), Boxes.read(path), detect=False)
    boxes = [u.face and u.face.box for u in corpus.utterances]
    assert boxes == [(1, 2, 3, 4), (0, 0, 10, 20), (10, 0, 10, 20), None]
    assert corpus.faults == (
        Fault("missing-box", "Ses02F_impro01_M000", "expected a crop box for speaker Ses02M of this key, found none"),
    )
    assert [u.face.crop for u in corpus.utterances if u.face] == ["box"] * 3
    within = with_boxes(Corpus("x", ("ang",), utterances[:1]), Boxes.read(path), detect=True).utterances[0].face
    assert within is not None and (within.crop, within.box) == ("detect", (1, 2, 3, 4))


def test_the_beginning_of_a_key_does_not_end_within_a_number() -> None:
    boxes = Boxes({"a1": [0, 0, 1, 1], "a10": [0, 0, 2, 2], "b": [0, 0, 3, 3]})
    keys = ("a1", "a1b", "a1_0", "a10", "a10x", "a11", "a", "b5", "ab")
    found = [boxes.of(Utterance(key, None, "", 0)) for key in keys]
    assert [box and box[2] for box in found] == [1, 1, 1, 2, 2, None, None, 3, None]
    assert Boxes({"": [0, 0, 1, 1]}).of(Utterance("1", None, "", 0)) == (0, 0, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"Ses01": [1, 2, 3]}',
            r"boxes.json: Ses01: expected \[x, y, width, height\] .*, got \[1, 2, 3\]",
        ),
        ('{"Ses01": {"F": [0, 0, 0, 5]}}', r"boxes.json: Ses01 F: expected \[x, y, width, height\]"),
        ("[]", "boxes.json: expected boxes as a JSON object, got list"),
        ("{", "boxes.json: expected boxes as a JSON object, got something else"),
    ],
)
def test_boxes_that_are_none_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "boxes.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Boxes.read(tmp_path / "boxes.json")


def test_face_clips_by_key(tmp_path: Path) -> None:
    touch(tmp_path, "a/a1.avi", "a2/1.png", "a2/2.png", "a3.jpg")
    utterances = tuple(Utterance(f"a{i}", Path("a.wav"), "", 0) for i in range(1, 5))
    corpus = with_face_clips(Corpus("x", ("ang",), utterances), tmp_path)
    assert [u.face for u in corpus.utterances] == [
        FaceSource(video=tmp_path / "a/a1.avi"),
        FaceSource(images=(tmp_path / "a2/1.png", tmp_path / "a2/2.png")),
        FaceSource(images=(tmp_path / "a3.jpg",)),
        None,
    ]
    assert [str(f) for f in corpus.faults] == [f"a4: expected a face clip a4.* in {tmp_path}, found none"]


def test_face_clips_of_one_name_in_several_folders_are_not_guessed(tmp_path: Path) -> None:
    touch(
        tmp_path, "train/u1.mp4", "test/u1.mp4", "train/u2.avi", "a/1.png", "a/2.png", "1/1.png", "x/b.png", "y/b.png"
    )
    keys = ("1", "a", "b", "test/u1", "u1", "u2", "x")
    corpus = with_face_clips(Corpus("x", ("ang",), tuple(Utterance(k, Path("a.wav"), "", 0) for k in keys)), tmp_path)
    face = {u.key: u.face for u in corpus.utterances}
    assert face["1"] == FaceSource(images=(tmp_path / "1/1.png",)), "not the frames of a"
    assert face["a"] == FaceSource(images=(tmp_path / "a/1.png", tmp_path / "a/2.png"))
    assert face["test/u1"] == FaceSource(video=tmp_path / "test/u1.mp4") and face["u1"] is None
    assert face["u2"] == FaceSource(video=tmp_path / "train/u2.avi")
    assert face["x"] == FaceSource(images=(tmp_path / "x/b.png",))
    (fault,) = faults_of(corpus, "missing-video")
    two = f"{tmp_path / 'test/u1.mp4'} and {tmp_path / 'train/u1.mp4'}"
    assert fault == f"u1: expected a face clip u1.* in {tmp_path}, got 2: {two}"


def test_a_box_for_each_of_many_utterances_takes_no_time() -> None:
    keys = [f"utterance{i:06d}" for i in range(20_000)]
    video = FaceSource(video=Path("d.avi"), crop="detect")
    utterances = tuple(Utterance(key, None, "s", 0, face=video) for key in keys)
    started = time.perf_counter()
    corpus = with_boxes(Corpus("x", ("ang",), utterances), Boxes({k: [0, 0, 5, 5] for k in keys}), detect=False)
    assert corpus.faults == () and time.perf_counter() - started < 10


# All of them


READ: dict[str, Callable[[Path], Path]] = {
    "iemocap": lambda root: root,
    "emodb": lambda root: root,
    "ravdess": lambda root: root,
    "cremad": lambda root: root,
    "faces": lambda root: root,
}


@pytest.mark.parametrize("name", READ)
def test_folders_that_are_none_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path / 'nothing'}: expected the folder of .*, found nothing"):
        read_corpus(name, tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: expected the folder of .*, found a file"):
        read_corpus(name, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected "):
        read_corpus(name, tmp_path / "empty")


def test_links_are_followed_once(tmp_path: Path) -> None:
    real = tmp_path / "real ö"
    real.mkdir()
    (real / "03a01Fa.wav").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(real)
    (real / "loop").symlink_to(root)
    assert [u.path for u in read_corpus("emodb", root).utterances] == [root / "linked" / "03a01Fa.wav"]


def test_two_utterances_of_one_key_are_no_corpus() -> None:
    utterances = (Utterance("a", Path("1.wav"), "1", 0), Utterance("a", Path("2.wav"), "2", 0))
    with pytest.raises(ValueError, match="x: expected a key of its own for every utterance, got 'a' more than once"):
        Corpus("x", ("ang",), utterances)


def test_wrong_classes_are_named() -> None:
    with pytest.raises(ValueError, match="labels: expected different names, got ang, ang"):
        Classes(("ang", "ang"))
    with pytest.raises(ValueError, match="labels: expected exc to count as one of ang, got hap"):
        Classes(("ang",), {"exc": "hap"})
    with pytest.raises(ValueError, match="corpus: expected one of iemocap, .*, got 'x'"):
        read_corpus("x", Path("."))
