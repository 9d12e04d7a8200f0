"""Faces as the network takes them: five grey frames of 224 x 40 from the span of a video or from pictures.

The span is cut into five equal parts and each gives one frame: its centre.  A picture is blank when its grey levels
hardly differ (a black video, a grey card).  A part whose centre is blank or, with crop ``detect``, shows no face is
filled as follows, and never with an arbitrary piece of a picture:

1. ``detect`` alone looks at the frame a quarter into the part, then at the one three quarters into it;
2. the part takes the frame of the nearest part that has one, of two as near the earlier;
3. no part has one: ``FaceError``, ``blank-video`` where every frame looked at is blank, else ``no-face``.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avser_fast.errors import AvserError, BackendError, ConfigError, ModelError

from .corpus import FAULTS, FaceSource

#: Frames of an utterance, and the size that each is squashed to.
FRAMES = 5
HEIGHT, WIDTH = 224, 40
#: Standard deviation of the grey levels (0 to 255) under which a picture shows nothing.
BLANK = 2.0
#: Longest side, in pixels, of the picture that ``yunet`` and ``haar`` search: YuNet knows faces of 10 to 300 pixels.
SEARCHED = 640
#: A video may fall short of the frames that its header claims by this share (half of a part), not by more.
SHORTFALL = 0.5 / FRAMES

#: A picture, BGR uint8 (height, width, 3), to boxes of faces: x, y, width and height in pixels.  Any callable will do;
#: of several faces the largest within the picture is taken.
Detector = Callable[[np.ndarray], Sequence[tuple[int, int, int, int]]]


class FaceError(AvserError, ValueError):
    """The face of an item cannot be used; ``kind`` is one of corpus.FAULTS: missing-video, unreadable-video,
    blank-video or no-face."""

    def __init__(self, kind: str, message: str) -> None:
        if kind not in FAULTS:
            raise ValueError(f"kind of a fault: expected one of {', '.join(FAULTS)}, got {kind!r}")
        super().__init__(kind, message)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


def to_unit(frames: np.ndarray) -> np.ndarray:
    """Grey levels 0 to 255, any shape, as float32 from -1 to 1."""
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1)


def frame_numbers(first: int, last: int, count: int = FRAMES) -> list[int]:
    """Centres of ``count`` equal parts of the frames from ``first`` up to, not including, ``last``.

    Fewer frames than parts repeat.  Raises ValueError for a span without frames.
    """
    return _numbers(first, last, count, 2)


def _numbers(first: int, last: int, count: int, quarter: int) -> list[int]:
    """The frames ``quarter`` quarters into each of ``count`` equal parts of the frames [first, last)."""
    if not 0 <= first < last or count < 1:
        raise ValueError(f"frames: expected 0 <= first < last and a count from 1, got {first}, {last} and {count}")
    return [first + (4 * i + quarter) * (last - first) // (4 * count) for i in range(count)]


def read_faces(
    sources: Sequence[FaceSource], detector: Detector | None = None
) -> Iterator[tuple[int, np.ndarray | FaceError]]:
    """The face of every source as (index of the source, uint8 (FRAMES, HEIGHT, WIDTH)), or what is wrong with it.

    A video is read once, from its beginning, for all of its sources; a source comes as soon as its frames are there,
    so not in the order of ``sources``.  One without an end comes when the video ends: its frames are those that can be
    decoded, for which the video is read again where its header claims another number.  (OpenCV 4 decodes at most one
    more than an AVI or MP4 claims.)  More than a tenth fewer than claimed are an error, and so is a centre of a part
    that a given end puts behind the video's.  Images stand for frames at equal distances.  At most one picture per
    source that is being read is held.

    Raises ConfigError for a crop ``detect`` without a detector, BackendError without OpenCV.
    """
    opencv()
    for i, source in enumerate(sources):
        if source.crop == "detect" and detector is None:
            raise ConfigError(f"face {i} ({source.video or source.images[0]}): expected a face detector, got none")
    return _read_faces(sources, detector)


def _read_faces(
    sources: Sequence[FaceSource], detector: Detector | None
) -> Iterator[tuple[int, np.ndarray | FaceError]]:
    videos: dict[Path, dict[int, FaceSource]] = {}
    for i, source in enumerate(sources):
        if source.video is None:
            yield i, _read_images(source, detector)
        else:
            videos.setdefault(source.video, {})[i] = source
    for video, its_sources in videos.items():
        yield from _read_video(video, its_sources, detector)


class _Frames:
    """The frames [first, last) of one source, chosen and cropped while its pictures come by in order."""

    def __init__(self, name: str, source: FaceSource, first: int, last: int, detector: Detector | None) -> None:
        self.name, self.source, self.last = name, source, last
        self.detector = detector if source.crop == "detect" else None
        self.early, self.centres, self.late = (_numbers(first, last, FRAMES, quarter) for quarter in (1, 2, 3))
        self.numbers = sorted({*self.centres, *(self.early + self.late if self.detector else ())})
        self.faces: list[np.ndarray | None] = [None] * FRAMES
        self.held: dict[int, np.ndarray] = {}
        self.looked: dict[int, np.ndarray | None] = {}
        self.blank: list[float] = []  # mean grey level of each blank picture

    def wants(self, number: int) -> bool:
        if number in self.centres or (self.detector and number in self.early):
            return True
        return bool(self.detector) and any(n == number and f is None for n, f in zip(self.late, self.faces))

    def complete(self, number: int) -> bool:
        """Whether nothing is wanted of the frames after ``number``."""
        return not any(n > number and self.wants(n) for n in self.numbers)

    def show(self, number: int, picture: np.ndarray, item: str) -> None:
        """Takes BGR uint8 (height, width, 3); ``item`` names it in the error of a box that it does not contain."""
        region = self._region(picture, item)
        if self.detector and number in self.early:
            self.held[number] = region
        for i in range(FRAMES):
            if number == self.centres[i]:
                self.faces[i] = self._look(number, region)
                if self.detector and self.faces[i] is None:
                    self.faces[i] = self._look(self.early[i], self.held[self.early[i]])
            if self.detector and number == self.late[i] and self.faces[i] is None:
                self.faces[i] = self._look(number, region)
        open_parts = [early for early, centre in zip(self.early, self.centres) if centre > number]
        self.held = {n: r for n, r in self.held.items() if n in open_parts}

    def result(self) -> np.ndarray | FaceError:
        """uint8 (FRAMES, HEIGHT, WIDTH); a part without a frame takes the nearest one."""
        found = [i for i, face in enumerate(self.faces) if face is not None]
        if found:
            nearest = [min(found, key=lambda j: abs(i - j)) for i in range(FRAMES)]
            return np.stack([face for face in (self.faces[j] for j in nearest) if face is not None])
        count = len(self.looked)
        if len(self.blank) == count:
            level = sum(self.blank) / count
            return FaceError(
                "blank-video",
                f"{self.name}: expected a picture, got {count} blank frames of mean grey level {level:.0f}",
            )
        blank = f", {len(self.blank)} of them blank" if self.blank else ""
        return FaceError("no-face", f"{self.name}: expected a face, found none in {count} frames{blank}")

    def _region(self, picture: np.ndarray, item: str) -> np.ndarray:
        if self.source.box is None or self.source.crop == "whole":
            return picture
        x, y, width, height = self.source.box
        if x < 0 or y < 0 or width < 1 or height < 1 or x + width > picture.shape[1] or y + height > picture.shape[0]:
            raise FaceError(
                "unreadable-video",
                f"{item}: expected a box (x, y, width, height) within the picture of {picture.shape[1]} x "
                f"{picture.shape[0]}, got {self.source.box}",
            )
        return np.ascontiguousarray(picture[y : y + height, x : x + width])

    def _look(self, number: int, region: np.ndarray) -> np.ndarray | None:
        if number not in self.looked:
            self.looked[number] = self._face(region)
        return self.looked[number]

    def _face(self, region: np.ndarray) -> np.ndarray | None:
        """uint8 (HEIGHT, WIDTH); None where nothing is to be seen."""
        cv2 = opencv()
        grey = cv2.cvtColor(region, cv2.COLOR_BGR2GRAY)
        if _is_blank(grey):
            self.blank.append(float(grey.mean()))
            return None
        if self.detector is not None:
            try:
                boxes = [_clip(box, grey.shape[1], grey.shape[0]) for box in self.detector(region)]
            except cv2.error as error:
                came = f"one of {grey.shape[1]} x {grey.shape[0]} ({_sentence(error)})"
                raise FaceError(
                    "unreadable-video", f"{self.name}: expected a picture that the detector can search, got {came}"
                ) from None
            if not boxes:
                return None
            x, y, width, height = max(boxes, key=lambda box: box[2] * box[3])
            grey = grey[y : y + height, x : x + width]
            if not grey.size or _is_blank(grey):
                return None
        return resize(grey, HEIGHT, WIDTH)


def _is_blank(grey: np.ndarray) -> bool:
    return float(opencv().meanStdDev(grey)[1][0, 0]) < BLANK


def _clip(box: Sequence[int], width: int, height: int) -> tuple[int, int, int, int]:
    """The part of a box (x, y, width, height) that lies in a picture; its sides are 0 where none does."""
    x, y, w, h = (int(v) for v in box)
    left, top = min(max(x, 0), width), min(max(y, 0), height)
    return left, top, max(0, min(x + w, width) - left), max(0, min(y + h, height) - top)


def resize(grey: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (any height, any width) to (height, width): means of areas where a side shrinks, linear where it grows.

    One side after the other, for OpenCV's INTER_AREA takes no means when one side shrinks while the other grows.
    """
    cv2 = opencv()
    for size in ((width, grey.shape[0]), (width, height)):
        shrinks = size[0] < grey.shape[1] or size[1] < grey.shape[0]
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return grey


def _read_images(source: FaceSource, detector: Detector | None) -> np.ndarray | FaceError:
    more = f" and {len(source.images) - 1} more" if len(source.images) > 1 else ""
    frames = _Frames(f"{source.images[0]}{more}", source, 0, len(source.images), detector)
    try:
        for number in frames.numbers:
            if frames.wants(number):
                frames.show(number, _read_image(source.images[number]), str(source.images[number]))
    except FaceError as error:
        return error
    return frames.result()


def _read_image(path: Path) -> np.ndarray:
    """BGR uint8 (height, width, 3)."""
    _require_file(path, "an image")
    cv2 = opencv()
    try:
        data = np.fromfile(path, dtype=np.uint8)
        picture = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except OSError as error:
        raise FaceError("unreadable-video", f"{path}: expected an image, got {error.strerror or error}") from None
    except cv2.error as error:
        raise FaceError("unreadable-video", f"{path}: expected an image, got {_sentence(error)}") from None
    if picture is None:
        raise FaceError(
            "unreadable-video",
            f"{path}: expected an image that OpenCV can decode, got {data.size} bytes that it cannot",
        )
    return picture


def _read_video(
    video: Path, sources: Mapping[int, FaceSource], detector: Detector | None, count: int | None = None
) -> Iterator[tuple[int, np.ndarray | FaceError]]:
    """``count``: the number of frames, where a pass has counted them."""
    try:
        capture, fps = _open(video)
    except FaceError as error:
        for i in sources:
            yield i, error
        return
    try:
        unread, came = yield from _sample(video, capture, fps, sources, detector, count)
    finally:
        capture.release()
    if unread:
        yield from _read_video(video, {i: sources[i] for i in unread}, detector, came)


def _open(video: Path) -> tuple[Any, float]:
    """A cv2.VideoCapture and its frames per second."""
    _require_file(video, "a video")
    cv2 = opencv()
    name = os.path.abspath(video)  # absolute: a name such as concat:1.avi is no protocol
    if not _is_utf8(name):
        raise FaceError("unreadable-video", f"{video}: expected a path in UTF-8, as OpenCV wants it, got other bytes")
    capture = cv2.VideoCapture(name)
    if not capture.isOpened():
        raise FaceError(
            "unreadable-video",
            f"{video}: expected a video that OpenCV can decode, got {os.path.getsize(video)} bytes that it cannot",
        )
    fps = float(capture.get(cv2.CAP_PROP_FPS))
    if not 1 <= fps <= 1000:
        capture.release()
        raise FaceError("unreadable-video", f"{video}: expected 1 to 1000 frames per second, got {fps:g}")
    return capture, fps


def _sample(
    video: Path,
    capture: Any,
    fps: float,
    sources: Mapping[int, FaceSource],
    detector: Detector | None,
    count: int | None,
) -> Generator[tuple[int, np.ndarray | FaceError], None, tuple[list[int], int]]:
    """One pass over a video.  Returns the sources without an end that it could not serve because their number of frames
    was not what the header claims, and that number."""
    claimed = max(0, int(capture.get(opencv().CAP_PROP_FRAME_COUNT)))
    reading: dict[int, _Frames] = {}
    takers: dict[int, list[int]] = {}
    uncounted: set[int] = set()  # sources that end where the video does, as long as that is only a claim
    for i, source in sources.items():
        name = _name(video, source)
        try:
            first, last = _span(name, source, fps, count)
        except FaceError as error:
            yield i, error
            continue
        if last is None:
            uncounted.add(i)
            last = claimed
        if first < last:
            reading[i] = _Frames(name, source, first, last, detector)
            for number in reading[i].numbers:
                takers.setdefault(number, []).append(i)

    number = 0
    while (reading or uncounted) and capture.grab():
        due = [i for i in takers.get(number, ()) if i in reading and reading[i].wants(number)]
        picture = capture.retrieve()[1] if due else None
        for i in due:
            try:
                if picture is None:
                    at = f"frame {number} ({number / fps:.2f} s)"
                    raise FaceError("unreadable-video", f"{reading[i].name}: expected a picture in {at}, got none")
                reading[i].show(number, picture, str(video))
            except FaceError as error:
                yield i, error
                del reading[i]
                uncounted.discard(i)
                continue
            if i not in uncounted and reading[i].complete(number):
                yield i, reading.pop(i).result()
        number += 1

    short = number == 0 or number < claimed * (1 - SHORTFALL)
    came = f"got {number} ({number / fps:.2f} s)"
    unread = []
    for i in [*reading, *(uncounted - reading.keys())]:
        frames = reading.get(i)
        if i in uncounted and short:
            header = f"the {claimed} frames ({claimed / fps:.2f} s) that its header claims" if claimed else "frames"
            yield i, FaceError("unreadable-video", f"{video}: expected {header}, {came}")
        elif frames is None or (i in uncounted and number != claimed):
            unread.append(i)
        elif number <= frames.centres[-1]:
            wanted = f"{frames.last} frames ({frames.last / fps:.2f} s) of the video"
            yield i, FaceError("unreadable-video", f"{frames.name}: expected {wanted}, {came}")
        else:
            yield i, frames.result()
    return unread, number


def _name(video: Path, source: FaceSource) -> str:
    if source.end is None:
        return f"{video}, from {source.start:g} s" if source.start else str(video)
    return f"{video}, {source.start:g} to {source.end:g} s"


def _span(name: str, source: FaceSource, fps: float, count: int | None) -> tuple[int, int | None]:
    """Seconds to frames [first, last), at least one; last is None where the source ends with a video of unknown
    ``count``."""
    end = math.inf if source.end is None else source.end
    if not (0 <= source.start < end and math.isfinite(source.start * fps)) or source.end == math.inf:
        raise FaceError(
            "unreadable-video",
            f"{name}: expected a start from 0 s and a later end, got {source.start:g} and {source.end}",
        )
    first = round(source.start * fps)
    if source.end is not None:
        return first, max(first + 1, round(source.end * fps))
    if count is not None and first >= count:
        raise FaceError("unreadable-video", f"{name}: expected a video that is longer, got {count / fps:.2f} s")
    return first, count


def _require_file(path: Path, what: str) -> None:
    if not os.path.isfile(path):
        came = "a folder" if os.path.isdir(path) else "no such file"
        raise FaceError("missing-video", f"{path}: expected {what}, got {came}")


def _is_utf8(path: str) -> bool:
    """Whether OpenCV can be given this path: any other ends the process."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def yunet(model: Path, min_score: float = 0.7) -> Detector:
    """The YuNet face detector of a model file (``face_detection_yunet_*.onnx`` of the OpenCV zoo), through
    cv2.FaceDetectorYN; faces that score less than ``min_score`` (0 to 1) are left out.  For any number of threads.

    Raises ModelError for a file that is not there, that OpenCV cannot read or that is not YuNet, ConfigError for a
    score that is none, BackendError without OpenCV.
    """
    cv2 = opencv()
    if not hasattr(cv2, "FaceDetectorYN"):
        raise BackendError(f"yunet: expected OpenCV from 4.8 with FaceDetectorYN, got OpenCV {cv2.__version__}")
    if not 0 <= min_score <= 1:
        raise ConfigError(f"yunet: expected a score from 0 to 1, got {min_score}")
    if not os.path.isfile(model):
        raise ModelError(f"{model}: expected a YuNet model, got no such file")
    path = os.path.abspath(model)
    if not _is_utf8(path):
        raise ModelError(f"{model}: expected a path in UTF-8, as OpenCV wants it, got other bytes")
    own = _per_thread(lambda: cv2.FaceDetectorYN.create(path, "", (SEARCHED, SEARCHED), min_score))

    def detect(picture: np.ndarray) -> list[tuple[int, int, int, int]]:
        small, across, down = _searched(picture)
        network = own()
        network.setInputSize((small.shape[1], small.shape[0]))
        found = network.detect(small)[1]
        return [_scaled(face[:4], across, down) for face in (() if found is None else found)]

    try:
        detect(np.zeros((64, 64, 3), np.uint8))
    except cv2.error as error:
        raise ModelError(f"{model}: expected a YuNet model that OpenCV can read, got {_sentence(error)}") from None
    return detect


def haar(cascade: Path | None = None) -> Detector:
    """The cascade of Haar features ``cascade``, by default OpenCV's own for frontal faces.  For any number of threads.

    Raises BackendError where the installed OpenCV has no CascadeClassifier (5.0) or no cascades, ModelError for a
    file that is not there or that it cannot read.
    """
    cv2 = opencv()
    if not hasattr(cv2, "CascadeClassifier"):
        raise BackendError(
            f"haar: expected an OpenCV with CascadeClassifier, got OpenCV {cv2.__version__}; install "
            "opencv-python-headless<5, or name a YuNet model with yunet:MODEL.onnx"
        )
    if cascade is None:
        if not hasattr(cv2, "data"):
            raise BackendError(
                f"haar: expected cascades in OpenCV {cv2.__version__}, got none; name one: haar:CASCADE.xml"
            )
        cascade = Path(cv2.data.haarcascades, "haarcascade_frontalface_default.xml")
    if not os.path.isfile(cascade):
        raise ModelError(f"{cascade}: expected a cascade, got no such file")
    path = os.path.abspath(cascade)
    if not _is_utf8(path):
        raise ModelError(f"{cascade}: expected a path in UTF-8, as OpenCV wants it, got other bytes")
    own = _per_thread(lambda: cv2.CascadeClassifier(path))
    try:
        unusable = "a file without one" if own().empty() else ""
    except (cv2.error, SystemError) as error:
        unusable = _sentence(error.__cause__ or error)
    if unusable:
        raise ModelError(f"{cascade}: expected a cascade that OpenCV can read, got {unusable}")

    def detect(picture: np.ndarray) -> list[tuple[int, int, int, int]]:
        small, across, down = _searched(picture)
        found = own().detectMultiScale(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY), scaleFactor=1.1, minNeighbors=5)
        return [_scaled(box, across, down) for box in found]

    return detect


def parse_detector(text: str) -> Detector:
    """``yunet:MODEL.onnx``, ``haar`` or ``haar:CASCADE.xml``; raises ConfigError for another text, and what ``yunet``
    and ``haar`` raise."""
    name, colon, file = text.partition(":")
    if name == "yunet" and file:
        return yunet(Path(file))
    if name == "haar" and bool(file) == bool(colon):
        return haar(Path(file) if file else None)
    raise ConfigError(f"face detector: expected yunet:MODEL.onnx, haar or haar:CASCADE.xml, got {text!r}")


def _per_thread(make: Callable[[], Any]) -> Callable[[], Any]:
    """OpenCV's detectors keep state while they run, so each thread has its own."""
    local = threading.local()

    def own() -> Any:
        if not hasattr(local, "value"):
            local.value = make()
        return local.value

    return own


def _searched(picture: np.ndarray) -> tuple[np.ndarray, float, float]:
    """The picture with no side longer than SEARCHED, and how many of its pixels one of that is, across and down."""
    height, width = picture.shape[:2]
    scale = SEARCHED / max(height, width)
    if scale >= 1:
        return picture, 1.0, 1.0
    cv2 = opencv()
    small_width, small_height = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.resize(picture, (small_width, small_height), interpolation=cv2.INTER_AREA)
    return small, width / small_width, height / small_height


def _scaled(box: Sequence[float], across: float, down: float) -> tuple[int, int, int, int]:
    x, y, width, height = (float(v) for v in box)
    return round(x * across), round(y * down), round(width * across), round(height * down)


def _sentence(error: BaseException) -> str:
    """What went wrong according to a cv2.error, without the place in OpenCV's sources."""
    return " ".join(str(getattr(error, "err", "") or error).split())


def opencv() -> Any:
    """The module cv2, loaded when first needed; BackendError where it is not there."""
    try:
        import cv2
    except ImportError as error:
        raise BackendError(f"faces: expected OpenCV (pip install opencv-python-headless), got {error}") from None
    return cv2
