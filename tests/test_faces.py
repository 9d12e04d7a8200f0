"""Frames of faces from videos and images that are made here: each picture carries its number, read back from the crop.

``tests/data/bright_faces.onnx`` is what ``python tests/test_faces.py`` writes (it needs the package onnx): a network
with the outputs of YuNet that takes every white cell of 8 x 8 pixels for the middle of a face of 32 x 40.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avser_fast.errors import AvserError, BackendError, ConfigError, InputError, ModelError
from python_training.data import contact_sheet as sheets
from python_training.data import faces
from python_training.data.contact_sheet import contact_sheet
from python_training.data.corpus import FAULTS, FaceSource
from python_training.data.faces import FRAMES, HEIGHT, WIDTH, FaceError, frame_numbers, read_faces

cv2 = pytest.importorskip("cv2")

BRIGHT_FACES = Path(__file__).parent / "data" / "bright_faces.onnx"
FPS = 25
GREY = 110  # what surrounds a patch
MODERN = int(cv2.__version__.split(".")[0]) >= 5


def coded(number: int, width: int = 80, height: int = 64) -> np.ndarray:
    """BGR picture of eight bars, white or black as the bits of ``number`` above, the reverse below."""
    bits = [number >> k & 1 for k in range(8)]
    bars = np.repeat(np.array([bits, [1 - b for b in bits]], np.uint8) * 255, width // 8, axis=1)
    return np.repeat(np.repeat(bars, height // 2, axis=0)[..., None], 3, axis=2)


def number_of(face: np.ndarray) -> int:
    """What ``coded`` wrote, from a crop (HEIGHT, WIDTH); fails where the crop does not show all of it and nothing
    else."""
    assert face.shape == (HEIGHT, WIDTH) and face.dtype == np.uint8
    bars = face.reshape(2, HEIGHT // 2, 8, WIDTH // 8)
    levels = bars[:, 4:-4, :, 1:-1].mean((1, 3))
    assert (np.abs(levels - 127.5) > 90).all(), levels.round()
    assert ((levels[0] > 127) != (levels[1] > 127)).all()
    edges = np.abs(bars[:, [0, -1]].mean((1, 3)) - 127.5)
    assert (edges > 70).all(), edges.round()
    return sum(int(level > 127) << k for k, level in enumerate(levels[0]))


def numbers(result: np.ndarray | FaceError) -> list[int]:
    assert isinstance(result, np.ndarray), result
    assert result.shape == (FRAMES, HEIGHT, WIDTH)
    return [number_of(face) for face in result]


def patched(number: int | None, at: tuple[int, int] = (48, 32), size: tuple[int, int] = (160, 128)) -> np.ndarray:
    """A dim picture with ``coded(number)`` at ``at``, or without it."""
    picture = np.full((size[1], size[0], 3), GREY, np.uint8)
    picture[:, ::16] = GREY - 30  # not blank
    if number is not None:
        x, y = at
        picture[y : y + 64, x : x + 80] = coded(number)
    return picture


def find_patch(picture: np.ndarray) -> list[tuple[int, int, int, int]]:
    """A face detector for ``patched``."""
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.flags.c_contiguous
    rows, columns = np.nonzero(np.abs(picture[..., 0].astype(int) - GREY) > 70)
    if not rows.size:
        return []
    x, y = int(columns.min()), int(rows.min())
    return [(x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y)]


def write_video(path: Path, pictures: Sequence[np.ndarray], fps: float = FPS) -> Path:
    height, width = pictures[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, (width, height))
    assert writer.isOpened()
    for picture in pictures:
        writer.write(picture)
    writer.release()
    return path


def read_one(source: FaceSource, detector: faces.Detector | None = None) -> np.ndarray | FaceError:
    [(index, result)] = read_faces([source], detector)
    assert index == 0
    return result


def failure(source: FaceSource, detector: faces.Detector | None = None) -> FaceError:
    error = read_one(source, detector)
    assert isinstance(error, FaceError)
    assert error.kind in FAULTS and "\n" not in str(error)
    return error


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "hundred.avi", [coded(n) for n in range(100)])


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every cv2.VideoCapture that is opened, with its grabs and retrieves counted."""
    opened: list[Any] = []
    plain = cv2.VideoCapture

    class Counting:
        def __init__(self, *arguments: Any) -> None:
            self.capture = plain(*arguments)
            self.grabs = self.retrieves = self.releases = 0
            opened.append(self)

        def isOpened(self) -> bool:
            return bool(self.capture.isOpened())

        def get(self, what: int) -> float:
            return float(self.capture.get(what))

        def grab(self) -> bool:
            self.grabs += 1
            return bool(self.capture.grab())

        def retrieve(self) -> Any:
            self.retrieves += 1
            return self.capture.retrieve()

        def release(self) -> None:
            self.releases += 1
            self.capture.release()

    monkeypatch.setattr(cv2, "VideoCapture", Counting)
    return opened


def test_importing_the_modules_does_not_load_opencv() -> None:
    code = "import sys, python_training.data.faces, python_training.data.contact_sheet; print('cv2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_without_opencv(hundred: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BackendError, match=r"expected OpenCV \(pip install opencv-python-headless\), got .*cv2"):
        read_faces([FaceSource(video=hundred)])


def test_to_unit() -> None:
    unit = faces.to_unit(np.array([[0, 255], [127, 128]], np.uint8))
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, np.array([[-255, 255], [-1, 1]]) / 255, atol=1e-6)


@pytest.mark.parametrize("first, last", [(0, 100), (0, 5), (0, 1), (3, 5), (17, 24), (10**7, 10**7 + 33)])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_frame_numbers(first: int, last: int, count: int) -> None:
    got = frame_numbers(first, last, count)
    assert got == [first + int(np.floor((i + 0.5) * (last - first) / count)) for i in range(count)]
    assert got == sorted(got) and first <= got[0] and got[-1] < last
    if last - first >= count:
        assert len(set(got)) == count


@pytest.mark.parametrize("arguments", [(5, 5), (5, 4), (-1, 3), (0, 3, 0)])
def test_frame_numbers_of_nothing(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= first < last and a count from 1"):
        frame_numbers(*arguments)


def test_the_error_knows_its_kind_and_survives_a_process() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(FaceError("no-face", "a.avi: expected a face")))
    assert (error.kind, str(error)) == ("no-face", "a.avi: expected a face")
    assert isinstance(error, AvserError) and isinstance(error, ValueError)
    with pytest.raises(ValueError, match="kind of a fault: expected one of"):
        FaceError("ugly", "a.avi")


# Which frames of a video


def test_frames_of_a_whole_video(hundred: Path) -> None:
    assert numbers(read_one(FaceSource(video=hundred))) == [10, 30, 50, 70, 90]


@pytest.mark.parametrize(
    "start, end, first, last",
    [(1, 2, 25, 50), (0, 0.4, 0, 10), (3, None, 75, 100), (1.5, 1.51, 38, 39), (0, 0.08, 0, 2), (3.96, 4, 99, 100)],
)
def test_frames_of_a_span(hundred: Path, start: float, end: float | None, first: int, last: int) -> None:
    got = numbers(read_one(FaceSource(video=hundred, start=start, end=end)))
    assert got == frame_numbers(first, last)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6])
def test_short_videos_repeat_frames(tmp_path: Path, count: int) -> None:
    video = write_video(tmp_path / "short.avi", [patched(20 + n) for n in range(count)])
    expected = [20 + n for n in frame_numbers(0, count)]
    box = (48, 32, 80, 64)
    assert numbers(read_one(FaceSource(video=video, crop="box", box=box))) == expected
    assert numbers(read_one(FaceSource(video=video, crop="detect"), find_patch)) == expected


def test_one_pass_serves_every_source(hundred: Path, captures: list[Any]) -> None:
    spans = [(2.0, 2.8), (0.0, 0.4), (0.2, 2.0), (0.4, 0.8)]
    got = list(read_faces([FaceSource(video=hundred, start=start, end=end) for start, end in spans]))
    for i, result in got:
        start, end = spans[i]
        assert numbers(result) == frame_numbers(round(start * FPS), round(end * FPS))
    assert [i for i, _ in got] == [1, 3, 2, 0]  # as soon as the last frame of each has come
    [capture] = captures
    assert capture.grabs == frame_numbers(50, 70)[-1] + 1  # no frame behind the last that is wanted
    wanted = {n for start, end in spans for n in frame_numbers(round(start * FPS), round(end * FPS))}
    assert capture.retrieves == len(wanted) < 20
    assert capture.releases == 1


def test_several_videos_and_images_are_each_read_once(hundred: Path, tmp_path: Path, captures: list[Any]) -> None:
    other = write_video(tmp_path / "other.avi", [coded(200 + n) for n in range(10)])
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), coded(77))
    sources = [
        FaceSource(video=hundred, end=1.0),
        FaceSource(video=other, end=0.4),
        FaceSource(video=hundred, start=1.0, end=2.0),
        FaceSource(images=(image,)),
    ]
    got = dict(read_faces(sources))
    assert numbers(got[0]) == frame_numbers(0, 25)
    assert numbers(got[1]) == [200 + n for n in frame_numbers(0, 10)]
    assert numbers(got[2]) == frame_numbers(25, 50)
    assert numbers(got[3]) == [77] * FRAMES
    assert len(captures) == 2


def test_a_reader_that_stops_early_closes_the_video(hundred: Path, captures: list[Any]) -> None:
    reading = read_faces([FaceSource(video=hundred, end=1.0), FaceSource(video=hundred, end=4.0)])
    assert next(reading)[0] == 0
    assert captures[0].releases == 0 and captures[0].grabs < 30
    reading.close()  # type: ignore[attr-defined]
    assert captures[0].releases == 1


def test_paths_beyond_ascii_and_links(hundred: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Ärger & Freude 怒"
    folder.mkdir()
    video = folder / "Größe 1 %02d.avi"
    video.write_bytes(hundred.read_bytes())
    link = folder / "link.avi"
    link.symlink_to(video)
    odd = write_video(folder / "concat:1.mkv", [coded(n) for n in range(25)])
    image = folder / "Gesicht 1.png"
    image.write_bytes(cv2.imencode(".png", coded(9))[1].tobytes())
    monkeypatch.chdir(folder)
    for path in (video, link, Path(video.name), Path("link.avi"), Path(odd.name)):
        assert numbers(read_one(FaceSource(video=path, end=1.0))) == frame_numbers(0, 25), path
    assert numbers(read_one(FaceSource(images=(image,)))) == [9] * FRAMES


# Crops


def test_box(tmp_path: Path) -> None:
    video = write_video(tmp_path / "box.avi", [patched(n) for n in range(20)])
    source = FaceSource(video=video, crop="box", box=(48, 32, 80, 64))
    assert numbers(read_one(source)) == frame_numbers(0, 20)
    whole = read_one(dataclasses.replace(source, crop="whole"))
    assert isinstance(whole, np.ndarray) and abs(float(whole[:, 200:, :4].mean()) - GREY) < 10


@pytest.mark.parametrize("box", [(90, 0, 80, 64), (0, 70, 80, 64), (-1, 0, 80, 64), (0, -8, 8, 64), (0, 0, 0, 64)])
@pytest.mark.parametrize("crop", ["box", "detect"])
def test_a_box_outside_the_picture(tmp_path: Path, box: tuple[int, int, int, int], crop: str) -> None:
    video = write_video(tmp_path / "box.avi", [patched(n) for n in range(10)])
    good = FaceSource(video=video, crop="box", box=(48, 32, 80, 64))
    got = dict(read_faces([FaceSource(video=video, crop=crop, box=box), good], find_patch))
    error = got[0]
    assert isinstance(error, FaceError) and error.kind == "unreadable-video"
    assert str(error) == (f"{video}: expected a box (x, y, width, height) within the picture of 160 x 128, got {box}")
    assert numbers(got[1]) == frame_numbers(0, 10)  # an error of one source is no error of another


def test_detect(tmp_path: Path, captures: list[Any]) -> None:
    where = [(48, 32), (0, 0), (80, 64), (16, 48), (64, 0)]
    video = write_video(tmp_path / "face.avi", [patched(n, where[n // 10]) for n in range(50)])
    calls = []

    def detector(picture: np.ndarray) -> list[tuple[int, int, int, int]]:
        calls.append(picture.shape)
        return find_patch(picture)

    assert numbers(read_one(FaceSource(video=video, crop="detect"), detector)) == [5, 15, 25, 35, 45]
    assert calls == [(128, 160, 3)] * 5  # other frames of a part are searched only where its centre shows no face
    assert captures[0].retrieves == 10 and captures[0].grabs == 51  # the centres and what is held until they come


def test_detect_within_a_box(tmp_path: Path) -> None:
    left, right = (0, 32), (160, 32)
    pictures = []
    for n in range(20):
        picture = patched(n, left, (240, 128))
        picture[32:96, 160:240] = coded(100 + n)
        pictures.append(picture)
    video = write_video(tmp_path / "two.avi", pictures)
    sources = [FaceSource(video=video, crop="detect", box=(x, 16, 80, 112)) for x, _ in (left, right)]
    got = dict(read_faces(sources, find_patch))
    assert numbers(got[0]) == frame_numbers(0, 20)
    assert numbers(got[1]) == [100 + n for n in frame_numbers(0, 20)]


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_faces_the_largest_within_the_picture_is_taken(tmp_path: Path, order: int) -> None:
    image = tmp_path / "several.png"
    cv2.imwrite(str(image), patched(33, (80, 64)))
    found = [(0, 0, 16, 16), (80, 64, 900, 900), (-500, -500, 510, 600), (160, 10, 50, 50), (0, 100, 500, -3)][::order]
    assert numbers(read_one(FaceSource(images=(image,), crop="detect"), lambda picture: found)) == [33] * FRAMES


def test_a_detector_may_answer_with_an_array(tmp_path: Path) -> None:
    image = tmp_path / "one.png"
    cv2.imwrite(str(image), patched(34))
    answers: list[Any] = [np.array(find_patch(patched(34)), kind) for kind in (np.int32, np.float32)]
    for answer in answers:
        detector = partial(lambda answer, picture: answer, answer)
        assert numbers(read_one(FaceSource(images=(image,), crop="detect"), detector)) == [34] * FRAMES


@pytest.mark.parametrize(
    "shown, expected",
    [
        ({12, 37}, [12, 12, 12, 37, 37]),  # a quarter into part 1, three quarters into part 3; part 2 takes the earlier
        ({45}, [45] * 5),
        ({5, 22, 27, 47}, [5, 5, 22, 22, 47]),  # the quarter is preferred to the three quarters
        ({2, 5, 7, 25}, [5, 5, 25, 25, 25]),  # the centre is preferred to both
    ],
)
def test_a_part_without_a_face(tmp_path: Path, shown: set[int], expected: list[int]) -> None:
    pictures = [patched(n if n in shown else None) for n in range(50)]
    video = write_video(tmp_path / "parts.avi", pictures)
    for end in (None, 2.0):
        source = FaceSource(video=video, crop="detect", end=end)
        assert numbers(read_one(source, find_patch)) == expected


def test_no_face_anywhere(tmp_path: Path) -> None:
    video = write_video(tmp_path / "nobody.avi", [patched(n if n in (0, 49) else None) for n in range(50)])
    error = failure(FaceSource(video=video, crop="detect"), find_patch)
    assert (error.kind, str(error)) == ("no-face", f"{video}: expected a face, found none in 15 frames")
    spanned = failure(FaceSource(video=video, crop="detect", start=1, end=1.12), find_patch)
    assert str(spanned) == f"{video}, 1 to 1.12 s: expected a face, found none in 3 frames"


def test_detect_without_a_detector(hundred: Path) -> None:
    with pytest.raises(ConfigError, match=r"face 1 \(.*hundred.avi\): expected a face detector, got none"):
        read_faces([FaceSource(video=hundred), FaceSource(video=hundred, crop="detect")])


# Blank pictures


@pytest.mark.parametrize("level", [0, 128, 255])
def test_blank_video(tmp_path: Path, level: int) -> None:
    video = write_video(tmp_path / "blank.avi", [np.full((64, 80, 3), level, np.uint8)] * 50)
    error = failure(FaceSource(video=video))
    assert error.kind == "blank-video"
    message, came = str(error).rsplit(" ", 1)
    assert message == f"{video}: expected a picture, got 5 blank frames of mean grey level"
    assert abs(int(came) - level) <= 2  # MJPEG

    def no_detector(picture: np.ndarray) -> list[tuple[int, int, int, int]]:
        raise AssertionError("a blank picture is not searched")

    assert "got 15 blank frames" in str(failure(FaceSource(video=video, crop="detect"), no_detector))


def test_blank_frames_take_the_nearest(tmp_path: Path) -> None:
    black = np.zeros((64, 80, 3), np.uint8)
    video = write_video(tmp_path / "gaps.avi", [coded(n) if 20 <= n < 40 else black for n in range(50)])
    assert numbers(read_one(FaceSource(video=video))) == [25, 25, 25, 35, 35]


def test_a_dim_picture_is_not_blank(tmp_path: Path) -> None:
    image = tmp_path / "dim.png"
    dim = coded(5) // 40  # grey levels 0 and 6
    cv2.imwrite(str(image), dim)
    assert isinstance(read_one(FaceSource(images=(image,))), np.ndarray)
    cv2.imwrite(str(image), dim // 3)  # 0 and 2
    assert failure(FaceSource(images=(image,))).kind == "blank-video"


def test_a_face_on_a_blank_place_is_none(tmp_path: Path) -> None:
    image = tmp_path / "wall.png"
    cv2.imwrite(str(image), patched(1))
    error = failure(FaceSource(images=(image,), crop="detect"), lambda picture: [(1, 100, 15, 20)])
    assert (error.kind, str(error)) == ("no-face", f"{image}: expected a face, found none in 1 frames")


# Videos that are not what they should be


def cut(video: Path, path: Path, share: float) -> Path:
    data = video.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def frames_that_come(video: Path) -> int:
    capture = cv2.VideoCapture(str(video))
    count = 0
    while capture.grab():
        count += 1
    return count


def test_truncated_video(hundred: Path, tmp_path: Path) -> None:
    video = cut(hundred, tmp_path / "cut.avi", 0.5)
    came = frames_that_come(video)
    assert 30 < came < 70
    got = dict(read_faces([FaceSource(video=video), FaceSource(video=video, end=1), FaceSource(video=video, end=4)]))
    assert all(isinstance(got[i], FaceError) and got[i].kind == "unreadable-video" for i in (0, 2))  # type: ignore[union-attr]
    ends = f"got {came} ({came / FPS:.2f} s)"
    assert str(got[0]) == f"{video}: expected the 100 frames (4.00 s) that its header claims, {ends}"
    assert str(got[2]) == f"{video}, 0 to 4 s: expected 100 frames (4.00 s) of the video, {ends}"
    assert numbers(got[1]) == frame_numbers(0, 25)


def test_a_few_frames_short_of_the_claim(hundred: Path, tmp_path: Path, captures: list[Any]) -> None:
    video = cut(hundred, tmp_path / "cut.avi", 0.93)
    came = frames_that_come(video)
    assert 90 <= came < 100 and frame_numbers(0, came) != frame_numbers(0, 100)
    captures.clear()
    got = dict(read_faces([FaceSource(video=video, start=1), FaceSource(video=video), FaceSource(video=video, end=4)]))
    assert numbers(got[0]) == frame_numbers(25, came)
    assert numbers(got[1]) == frame_numbers(0, came)
    assert numbers(got[2]) == frame_numbers(0, 100)  # every centre is there
    assert len(captures) == 2 and all(capture.releases == 1 for capture in captures)


@pytest.mark.parametrize("count", [45, 46, 47, 48, 50])
def test_a_video_that_ends_within_the_last_part(tmp_path: Path, count: int) -> None:
    """Frame 45 is the last centre of 50, frame 47 is looked at because the centre shows no face."""
    video = write_video(tmp_path / "ends.avi", [patched(n if n < 40 or n == 47 else None) for n in range(count)])
    source = FaceSource(video=video, end=2, crop="detect")
    if count == 45:
        expected = f"{video}, 0 to 2 s: expected 50 frames (2.00 s) of the video, got 45 (1.80 s)"
        assert str(failure(source, find_patch)) == expected
    else:
        assert numbers(read_one(source, find_patch)) == [5, 15, 25, 35, 47 if count > 47 else 35]


def claiming(video: Path, path: Path, offset: int, value: int) -> Path:
    """A copy of an AVI with a field of its stream header replaced: 24 is the rate, 32 the number of frames."""
    data = bytearray(video.read_bytes())
    at = data.find(b"strh") + 8 + offset
    data[at : at + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def test_a_header_without_a_number_of_frames(hundred: Path, tmp_path: Path) -> None:
    video = claiming(hundred, tmp_path / "none.avi", 32, 0)
    assert cv2.VideoCapture(str(video)).get(cv2.CAP_PROP_FRAME_COUNT) <= 0
    assert numbers(read_one(FaceSource(video=video))) == [10, 30, 50, 70, 90]
    assert numbers(read_one(FaceSource(video=video, start=2))) == frame_numbers(50, 100)


def test_a_header_that_claims_too_few_frames(hundred: Path, tmp_path: Path) -> None:
    video = claiming(hundred, tmp_path / "few.avi", 32, 40)
    came = 100 if MODERN else 41  # OpenCV 4 gives no more than one frame above the claim
    assert frames_that_come(video) == came
    got = dict(read_faces([FaceSource(video=video), FaceSource(video=video, start=0.4)]))
    assert numbers(got[0]) == frame_numbers(0, came)
    assert numbers(got[1]) == frame_numbers(10, came)


def test_a_header_that_claims_too_many_frames(hundred: Path, tmp_path: Path) -> None:
    video = claiming(hundred, tmp_path / "many.avi", 32, 130)
    error = failure(FaceSource(video=video))
    assert str(error) == f"{video}: expected the 130 frames (5.20 s) that its header claims, got 100 (4.00 s)"


def test_absurd_rate(hundred: Path, tmp_path: Path) -> None:
    video = claiming(hundred, tmp_path / "fast.avi", 24, 10**9)
    error = failure(FaceSource(video=video, end=1))
    assert (error.kind, str(error)) == ("unreadable-video", f"{video}: expected 1 to 1000 frames per second, got 1e+09")


@pytest.mark.parametrize("fps", [0.0, float("nan"), -25.0])
def test_no_rate(hundred: Path, captures: list[Any], monkeypatch: pytest.MonkeyPatch, fps: float) -> None:
    monkeypatch.setattr(cv2.VideoCapture, "get", lambda capture, what: fps)
    error = failure(FaceSource(video=hundred))
    assert (error.kind, str(error)) == (
        "unreadable-video",
        f"{hundred}: expected 1 to 1000 frames per second, got {fps:g}",
    )
    assert captures[0].releases == 1


def test_a_frame_that_cannot_be_decoded(hundred: Path, captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cv2.VideoCapture.retrieve
    monkeypatch.setattr(
        cv2.VideoCapture, "retrieve", lambda capture: (False, None) if capture.grabs == 31 else plain(capture)
    )
    got = dict(read_faces([FaceSource(video=hundred), FaceSource(video=hundred, start=2, end=3)]))
    assert str(got[0]) == f"{hundred}: expected a picture in frame 30 (1.20 s), got none"
    assert isinstance(got[0], FaceError) and got[0].kind == "unreadable-video"
    assert numbers(got[1]) == frame_numbers(50, 75)


@pytest.mark.parametrize(
    "start, end, message",
    [
        (2, 2, "2 to 2 s: expected a start from 0 s and a later end, got 2 and 2"),
        (3, 1, "3 to 1 s: expected a start from 0 s and a later end, got 3 and 1"),
        (-1, 1, "-1 to 1 s: expected a start from 0 s and a later end, got -1 and 1"),
        (float("nan"), 1, "nan to 1 s: expected a start from 0 s and a later end, got nan and 1"),
        (0, float("inf"), "0 to inf s: expected a start from 0 s and a later end, got 0 and inf"),
        (4, None, "from 4 s: expected a video that is longer, got 4.00 s"),
        (7, None, "from 7 s: expected a video that is longer, got 4.00 s"),
        (7, 8, "7 to 8 s: expected 200 frames (8.00 s) of the video, got 100 (4.00 s)"),
    ],
)
def test_spans_that_are_not_there(hundred: Path, start: float, end: float | None, message: str) -> None:
    error = failure(FaceSource(video=hundred, start=start, end=end))
    assert (error.kind, str(error)) == ("unreadable-video", f"{hundred}, {message}")


def test_not_a_video(tmp_path: Path) -> None:
    garbage, text, empty = tmp_path / "garbage.avi", tmp_path / "text.avi", tmp_path / "empty.avi"
    garbage.write_bytes(np.random.default_rng(0).bytes(5000))
    text.write_text("Ses01F_impro01\n" * 50)
    empty.write_bytes(b"")
    for video, size in ((garbage, 5000), (text, 750), (empty, 0)):
        got = list(read_faces([FaceSource(video=video), FaceSource(video=video, end=1)]))
        assert [i for i, _ in got] == [0, 1]
        for _, error in got:
            assert isinstance(error, FaceError) and error.kind == "unreadable-video"
            assert str(error) == f"{video}: expected a video that OpenCV can decode, got {size} bytes that it cannot"


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name, came in (("gone", "no such file"), ("link", "no such file"), (".", "a folder")):
        for what, source in (
            ("a video", FaceSource(video=tmp_path / name)),
            ("an image", FaceSource(images=(tmp_path / name,))),
        ):
            error = failure(source)
            assert (error.kind, str(error)) == ("missing-video", f"{tmp_path / name}: expected {what}, got {came}")


# Images


@pytest.mark.parametrize("count", [1, 2, 5, 12])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_images(tmp_path: Path, count: int, suffix: str) -> None:
    images = []
    for n in range(count):
        images.append(tmp_path / f"{n}.{suffix}")
        cv2.imwrite(str(images[-1]), patched(n))
    box = (48, 32, 80, 64)
    for source in (
        FaceSource(images=tuple(images), crop="box", box=box),
        FaceSource(images=tuple(images), crop="detect"),
    ):
        assert numbers(read_one(source, find_patch)) == frame_numbers(0, count)


def test_images_of_other_kinds(tmp_path: Path) -> None:
    grey, deep, clear = tmp_path / "grey.png", tmp_path / "deep.png", tmp_path / "clear.png"
    cv2.imwrite(str(grey), coded(3)[..., 0])
    cv2.imwrite(str(deep), coded(4).astype(np.uint16) * 257)
    cv2.imwrite(str(clear), np.dstack([coded(5), coded(5)[..., :1]]))
    for image, number in ((grey, 3), (deep, 4), (clear, 5)):
        assert numbers(read_one(FaceSource(images=(image,)))) == [number] * FRAMES


def test_a_path_that_opencv_cannot_take_is_named(tmp_path: Path, hundred: Path) -> None:
    """OpenCV dies of a path that is not UTF-8 (segmentation fault, 5.0.0)."""
    folder = tmp_path / os.fsdecode(b"f\xfcr")
    folder.mkdir()
    copy = Path(shutil.copy(hundred, folder))
    error = failure(FaceSource(video=copy))
    assert str(error) == f"{copy}: expected a path in UTF-8, as OpenCV wants it, got other bytes"
    with pytest.raises(ModelError, match="expected a path in UTF-8"):
        faces.yunet(copy)


def test_a_picture_that_a_detector_cannot_search_is_named(hundred: Path) -> None:
    def fussy(picture: np.ndarray) -> list[tuple[int, int, int, int]]:
        cv2.resize(picture, (0, 0))
        return []

    error = failure(FaceSource(video=hundred, crop="detect"), fussy)
    assert str(error).startswith(f"{hundred}: expected a picture that the detector can search, got one of 80 x 64 (")


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    good, bad, empty = tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "empty.png"
    cv2.imwrite(str(good), coded(3))
    bad.write_bytes(b"not an image")
    empty.write_bytes(b"")
    for image, size in ((bad, 12), (empty, 0)):
        error = failure(FaceSource(images=(good, image)))
        assert error.kind == "unreadable-video"
        assert str(error) == f"{image}: expected an image that OpenCV can decode, got {size} bytes that it cannot"


def test_the_box_names_its_image(tmp_path: Path) -> None:
    large, small = tmp_path / "large.png", tmp_path / "small.png"
    cv2.imwrite(str(large), patched(1))
    cv2.imwrite(str(small), coded(1))
    error = failure(FaceSource(images=(large, small), crop="box", box=(48, 32, 80, 64)))
    assert str(error).startswith(f"{small}: expected a box") and "80 x 64" in str(error)


def test_several_images_without_a_face(tmp_path: Path) -> None:
    images = tuple(tmp_path / f"{n}.png" for n in range(3))
    for image, picture in zip(images, (patched(None), patched(None), np.zeros((9, 9, 3), np.uint8))):
        cv2.imwrite(str(image), picture)
    error = failure(FaceSource(images=images, crop="detect"), find_patch)
    assert str(error) == f"{images[0]} and 2 more: expected a face, found none in 3 frames, 1 of them blank"


@pytest.mark.parametrize(
    "size", [(448, 80), (560, 160), (300, 200), (230, 60), (100, 100), (7, 3), (224, 40), (112, 320)]
)
def test_resize_takes_means_of_areas_where_a_side_shrinks(size: tuple[int, int]) -> None:
    """Against box filters of whole pixels where the sides divide; else the mean grey level stays."""
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, size, dtype=np.uint8)
    got = faces.resize(grey, HEIGHT, WIDTH)
    assert got.shape == (HEIGHT, WIDTH) and got.dtype == np.uint8
    height, width = size
    if height % HEIGHT == 0 and width % WIDTH == 0:
        blocks = grey.reshape(HEIGHT, height // HEIGHT, WIDTH, width // WIDTH).mean((1, 3))
        assert np.abs(got - blocks).max() <= 1
    if width >= 2 * WIDTH and height <= HEIGHT:  # noise of a row is averaged although the height grows
        assert got.std() < 0.8 * grey.std()
    assert abs(got.mean() - grey.mean()) < 0.06 * 255


# Detectors


def write_bright_faces(path: Path) -> None:
    from onnx import TensorProto, checker, helper, numpy_helper, save

    nodes, constants, outputs = [], [], []

    def constant(name: str, value: Any, dtype: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    for kind, channels in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for stride in (8, 16, 32):
            name = f"{kind}_{stride}"
            scores = kind in ("cls", "obj") and stride == 8
            # A score is the mean of a cell; a box lies on its centre and is 4 cells wide, 5 high (logarithms).
            bias = [0.5, 0.5, np.log(4), np.log(5)] if kind == "bbox" else np.zeros(channels)
            weight = np.full((channels, 3, 1, 1), 1 / (3 * 255) if scores else 0)
            parameters = [constant(f"{name}_w", weight, np.float32), constant(f"{name}_b", bias, np.float32)]
            shape = constant(f"{name}_s", [1, -1, channels], np.int64)
            if kind == "cls":
                size = [stride, stride]
                nodes.append(
                    helper.make_node("AveragePool", ["input"], [f"pool_{stride}"], kernel_shape=size, strides=size)
                )
            nodes += [
                helper.make_node("Conv", [f"pool_{stride}", *parameters], [f"{name}_c"], kernel_shape=[1, 1]),
                helper.make_node("Transpose", [f"{name}_c"], [f"{name}_t"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"{name}_t", shape], [name]),
            ]
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, f"cells_{stride}", channels]))
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "height", "width"])
    graph = helper.make_graph(nodes, "bright_faces", [picture], outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    checker.check_model(model)
    save(model, str(path))


def bright(width: int, height: int, *cells: tuple[int, int], size: int = 8) -> np.ndarray:
    """Black, with white cells of ``size`` pixels at column and row, in cells."""
    picture = np.zeros((height, width, 3), np.uint8)
    for column, row in cells:
        picture[row * size : (row + 1) * size, column * size : (column + 1) * size] = 255
    return picture


@pytest.fixture(params=["shipped", "rebuilt"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The tiny YuNet, at a path beyond ASCII."""
    path = tmp_path / "Modell ä.onnx"
    if request.param == "shipped":
        path.write_bytes(BRIGHT_FACES.read_bytes())
    else:
        pytest.importorskip("onnx")
        write_bright_faces(path)
    return path


def test_yunet_finds_bright_cells(model: Path) -> None:
    detect = faces.parse_detector(f"yunet:{model}")
    for width, height in ((320, 320), (101, 75), (640, 200), (64, 64), (320, 320)):
        assert detect(bright(width, height, (5, 3))) == [(28, 8, 32, 40)], (width, height)
        assert detect(bright(width, height)) == []
    assert sorted(detect(bright(320, 240, (5, 3), (20, 20)))) == [(28, 8, 32, 40), (148, 144, 32, 40)]
    assert detect(bright(320, 240, (0, 0))) == [(-12, -16, 32, 40)]  # as it comes: a reader clips it
    dim = bright(320, 240, (5, 3)) // 2
    assert detect(dim) == [] and faces.yunet(model, 0.4)(dim) == [(28, 8, 32, 40)]


def test_yunet_searches_large_pictures_at_a_smaller_size(model: Path) -> None:
    detect = faces.yunet(model)
    assert detect(bright(1280, 960, (5, 3), size=16)) == [(56, 16, 64, 80)]
    assert detect(bright(960, 1920, (5, 3), size=24)) == [(84, 24, 96, 120)]


def test_faces_through_yunet(tmp_path: Path) -> None:
    pictures = []
    for n in range(20):
        picture = bright(320, 240, (30, 20))
        picture[144 : 144 + 64, 40 : 40 + 80] = coded(n) // 3  # too dim to be found
        pictures.append(picture)
    video = write_video(tmp_path / "bright.avi", pictures)
    got = read_one(FaceSource(video=video, crop="detect"), faces.yunet(BRIGHT_FACES))
    assert isinstance(got, np.ndarray)
    # 8 of 32 columns are white, from 12 on; 8 of 40 rows, from 16 on.
    white = got[0] > 127
    assert abs(white.any(0).argmax() - 15) <= 1 and abs(white.any(0).sum() - 10) <= 2
    assert abs(white.any(1).argmax() - 90) <= 2 and abs(white.any(1).sum() - 45) <= 6


def test_a_model_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone.onnx: expected a YuNet model, got no such file$"):
        faces.yunet(tmp_path / "gone.onnx")
    for name, data in (("garbage.onnx", b"\x00garbage" * 99), ("empty.onnx", b""), ("text.txt", b"text")):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ModelError) as caught:
            faces.yunet(path)
        assert str(caught.value).startswith(f"{path}: expected a YuNet model that OpenCV can read, got ")
        assert "\n" not in str(caught.value)


def test_a_network_that_is_not_yunet(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "other.onnx"
    write_bright_faces(path)
    other = onnx.load(str(path))
    for node in other.graph.node:
        node.output[:] = [name.replace("obj_8", "other") for name in node.output]
    for output in other.graph.output:
        output.name = output.name.replace("obj_8", "other")
    onnx.save(other, str(path))
    with pytest.raises(ModelError, match="other.onnx: expected a YuNet model that OpenCV can read, got "):
        faces.yunet(path)


@pytest.mark.parametrize("score", [-0.1, 1.5, float("nan")])
def test_a_score_that_is_none(score: float) -> None:
    with pytest.raises(ConfigError, match="yunet: expected a score from 0 to 1, got"):
        faces.yunet(BRIGHT_FACES, score)


def test_an_opencv_without_yunet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "FaceDetectorYN")
    with pytest.raises(
        BackendError, match=f"expected OpenCV from 4.8 with FaceDetectorYN, got OpenCV {cv2.__version__}"
    ):
        faces.yunet(BRIGHT_FACES)


def in_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(k: int) -> None:
        try:
            barrier.wait(timeout=30)
            work(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert not errors, errors


def test_threads_share_a_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of two sizes at once: with one cv2.FaceDetectorYN, a thread would change the size under the other's."""
    plain = cv2.FaceDetectorYN.create
    made: list[int] = []

    class Recording:
        @staticmethod
        def create(*arguments: Any) -> Any:
            made.append(threading.get_ident())
            return plain(*arguments)

    monkeypatch.setattr(cv2, "FaceDetectorYN", Recording)
    detect = faces.yunet(BRIGHT_FACES)

    def work(k: int) -> None:
        width, height = ((320, 96), (96, 320))[k]
        for turn in range(60):
            column, row = 3 + turn % 5, 4 + turn % 4
            assert detect(bright(width, height, (column, row))) == [(8 * column - 12, 8 * row - 16, 32, 40)]

    in_threads(work, 2)
    assert len(made) == len(set(made)) == 3


def test_threads_read_faces(tmp_path: Path) -> None:
    videos = [write_video(tmp_path / f"{k}.avi", [patched(100 * k + n) for n in range(40)]) for k in range(2)]

    def work(k: int) -> None:
        for _ in range(5):
            got = read_one(FaceSource(video=videos[k], crop="detect"), find_patch)
            assert numbers(got) == [100 * k + n for n in frame_numbers(0, 40)]

    in_threads(work, 2)


def drawn_face(size: int) -> np.ndarray:
    """BGR (2 size, 2 size): what a cascade of Haar features takes for a face, in the middle."""
    picture = np.full((2 * size, 2 * size, 3), GREY, np.uint8)

    def ellipse(x: float, y: float, across: float, down: float, level: int) -> None:
        centre, axes = (int(x * size), int(y * size)), (int(across * size), int(down * size))
        cv2.ellipse(picture, centre, axes, 0, 0, 360, (level,) * 3, -1)

    ellipse(1, 1, 0.42, 0.55, 185)  # head
    ellipse(1, 0.52, 0.42, 0.22, 50)  # hair
    ellipse(1, 0.72, 0.3, 0.12, 190)  # forehead
    for side in (-0.17, 0.17):
        ellipse(1 + side, 0.86, 0.12, 0.07, 100)
        ellipse(1 + side, 0.78, 0.12, 0.025, 60)  # brow
        ellipse(1 + side, 0.87, 0.07, 0.035, 40)  # eye
        ellipse(1 + 1.1 * side, 1.08, 0.12, 0.12, 205)  # cheek
    ellipse(1, 0.98, 0.045, 0.16, 215)  # nose
    ellipse(1, 1.12, 0.08, 0.025, 110)
    ellipse(1, 1.27, 0.15, 0.04, 85)  # mouth
    return cv2.GaussianBlur(picture, (0, 0), size * 0.03)


@pytest.mark.skipif(not hasattr(cv2, "CascadeClassifier"), reason="this OpenCV has no CascadeClassifier")
def test_haar(tmp_path: Path) -> None:
    detect = faces.parse_detector("haar")
    for size in (120, 500):  # the second is larger than what is searched
        [(x, y, width, height)] = detect(drawn_face(size))
        assert abs(x + width / 2 - size) < 0.1 * size and abs(y + height / 2 - size) < 0.15 * size
        assert 0.7 * size < width < 1.4 * size
    assert detect(np.full((100, 100, 3), GREY, np.uint8)) == []
    cascade = tmp_path / "cascade.xml"
    cascade.write_bytes(Path(cv2.data.haarcascades, "haarcascade_frontalface_default.xml").read_bytes())
    same = faces.parse_detector(f"haar:{cascade}")
    assert same(drawn_face(120)) == detect(drawn_face(120))

    def work(k: int) -> None:
        for _ in range(5):
            assert detect(drawn_face(120)) == same(drawn_face(120)) != []

    in_threads(work, 2)
    cascade.write_text("no cascade")
    with pytest.raises(ModelError, match="cascade.xml: expected a cascade that OpenCV can read, got "):
        faces.haar(cascade)
    with pytest.raises(ModelError, match="gone.xml: expected a cascade, got no such file"):
        faces.haar(tmp_path / "gone.xml")
    image = tmp_path / "drawn.png"
    cv2.imwrite(str(image), drawn_face(120))
    assert isinstance(read_one(FaceSource(images=(image,), crop="detect"), detect), np.ndarray)


def test_an_opencv_without_haar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "CascadeClassifier", raising=False)
    with pytest.raises(BackendError) as caught:
        faces.parse_detector("haar")
    assert str(caught.value) == (
        f"haar: expected an OpenCV with CascadeClassifier, got OpenCV {cv2.__version__}; install "
        "opencv-python-headless<5, or name a YuNet model with yunet:MODEL.onnx"
    )


@pytest.mark.parametrize("text", ["", "yunet", "yunet:", "haar:", "dlib", "YuNet:a.onnx"])
def test_a_detector_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        faces.parse_detector(text)
    assert str(caught.value) == f"face detector: expected yunet:MODEL.onnx, haar or haar:CASCADE.xml, got {text!r}"


# Contact sheet


def some_faces(count: int) -> Iterator[np.ndarray]:
    for n in range(count):
        yield faces.resize(cv2.cvtColor(drawn_face(60), cv2.COLOR_BGR2GRAY)[20:110, 30:90], HEIGHT, WIDTH) // (
            1 + n % 2
        )


@pytest.mark.parametrize("count, columns, across, down", [(1, 8, 1, 1), (8, 8, 8, 1), (9, 8, 8, 2), (5, 2, 2, 3)])
def test_contact_sheet(tmp_path: Path, count: int, columns: int, across: int, down: int) -> None:
    path = tmp_path / "Bögen 1.png"
    shown = list(some_faces(count))
    contact_sheet(shown, [f"hap\nSes01F_impro01_F{n:03d}" for n in range(count)], path, columns)
    sheet = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    step, line = sheets.FACE_WIDTH + sheets.GAP, sheets.FACE_HEIGHT + 2 * sheets.LINE + sheets.GAP
    assert sheet.shape == (
        down * line - sheets.GAP + 2 * sheets.MARGIN,
        across * step - sheets.GAP + 2 * sheets.MARGIN,
    )
    for n, face in enumerate(shown):
        x, y = sheets.MARGIN + n % columns * step, sheets.MARGIN + n // columns * line
        cell = sheet[y : y + sheets.FACE_HEIGHT, x : x + sheets.FACE_WIDTH]
        assert np.array_equal(cell, faces.resize(face, sheets.FACE_HEIGHT, sheets.FACE_WIDTH))
        for k in range(2):  # each line has ink, and none of it leaves the width of its face
            top = y + sheets.FACE_HEIGHT + 1 + k * sheets.LINE
            strip = sheet[top : top + sheets.LINE, x - sheets.GAP // 2 : x + sheets.FACE_WIDTH + sheets.GAP // 2]
            inked = np.nonzero((strip < 150).any(0))[0] - sheets.GAP // 2
            assert inked.size and inked.min() >= -1 and inked.max() <= sheets.FACE_WIDTH
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file is left


def test_captions() -> None:
    assert sheets._ascii("Größe é 怒\tx") == "Gro?e e ??x"
    short = sheets._fitting("hap")
    assert short == "hap"
    long = sheets._fitting("Ses01F_impro01_a_very_long_name_F013")
    assert long.startswith("Ses01F") and long.endswith("F013") and "..." in long
    assert sheets._width(long) <= sheets.FACE_WIDTH < sheets._width(long.replace("...", "...mm"))


def test_contact_sheet_of_nothing(tmp_path: Path) -> None:
    face = next(some_faces(1))
    path = tmp_path / "sheet.png"
    with pytest.raises(InputError, match="expected faces and a caption for each, got 0 and 0"):
        contact_sheet([], [], path)
    with pytest.raises(InputError, match="expected faces and a caption for each, got 1 and 2"):
        contact_sheet([face], ["a", "b"], path)
    with pytest.raises(InputError, match=r"expected face 1 as uint8 \(224, 40\), got float32 \(224, 40\)"):
        contact_sheet([face, faces.to_unit(face)], ["a", "b"], path)
    with pytest.raises(ConfigError, match="expected one column or more, got 0"):
        contact_sheet([face], ["a"], path, 0)
    contact_sheet([face], [""], path)
    before = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="gone/sheet.png"):
        contact_sheet([face], ["a"], tmp_path / "gone" / "sheet.png")
    assert path.read_bytes() == before


if __name__ == "__main__":
    write_bright_faces(BRIGHT_FACES)
