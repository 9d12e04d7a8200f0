"""Faces of a corpus on one picture, to be looked at before anything is trained on them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from avser_fast.errors import ConfigError, InputError
from avser_fast.inference.whole_files import write_bytes

from .faces import HEIGHT, WIDTH, opencv, resize

#: Pixels: a face as it is shown, the space around and between cells, a line of text.
FACE_WIDTH, FACE_HEIGHT = 144, 180
MARGIN, GAP, LINE = 16, 14, 16
PAPER, INK, FRAME = 250, 40, 200
SCALE = 0.4


def contact_sheet(faces: Sequence[np.ndarray], captions: Sequence[str], path: Path, columns: int = 8) -> None:
    """Write a PNG of ``faces``, each uint8 (HEIGHT, WIDTH), row by row with its caption below.

    A caption may have several lines (label, key); a line that is wider than its face loses its middle, and letters that
    are not ASCII lose their accents or become ``?``.  The file appears whole or not at all.

    Raises InputError for no faces, a face of another shape or type, or captions of another number, ConfigError for less
    than one column, BackendError without OpenCV.
    """
    cv2 = opencv()
    if not faces or len(captions) != len(faces):
        raise InputError(f"contact sheet: expected faces and a caption for each, got {len(faces)} and {len(captions)}")
    if columns < 1:
        raise ConfigError(f"contact sheet: expected one column or more, got {columns}")
    for i, face in enumerate(faces):
        if face.shape != (HEIGHT, WIDTH) or face.dtype != np.uint8:
            raise InputError(
                f"contact sheet: expected face {i} as uint8 ({HEIGHT}, {WIDTH}), got {face.dtype} {face.shape}"
            )
    columns = min(columns, len(faces))
    lines = [caption.splitlines() for caption in captions]
    across = FACE_WIDTH + GAP
    down = FACE_HEIGHT + LINE * max(len(own) for own in lines) + GAP
    rows = -(-len(faces) // columns)
    sheet = np.full((rows * down - GAP + 2 * MARGIN, columns * across - GAP + 2 * MARGIN), PAPER, np.uint8)
    for i, face in enumerate(faces):
        x, y = MARGIN + i % columns * across, MARGIN + i // columns * down
        sheet[y : y + FACE_HEIGHT, x : x + FACE_WIDTH] = resize(face, FACE_HEIGHT, FACE_WIDTH)
        cv2.rectangle(sheet, (x - 1, y - 1), (x + FACE_WIDTH, y + FACE_HEIGHT), FRAME)
        for k, line in enumerate(lines[i]):
            text = _fitting(_ascii(line))
            left = x + (FACE_WIDTH - _width(text)) // 2
            baseline = y + FACE_HEIGHT + LINE * (k + 1) - 3
            cv2.putText(sheet, text, (left, baseline), cv2.FONT_HERSHEY_SIMPLEX, SCALE, INK, 1, cv2.LINE_AA)
    write_bytes(path, cv2.imencode(".png", sheet)[1].tobytes())


def _ascii(text: str) -> str:
    """OpenCV's fonts have ASCII alone."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in plain)


def _width(text: str) -> int:
    cv2 = opencv()
    return int(cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, SCALE, 1)[0][0])


def _fitting(text: str) -> str:
    """The text, without as much of its middle as it takes to be no wider than a face."""
    kept = len(text)
    shown = text
    while _width(shown) > FACE_WIDTH and kept:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[len(text) - (kept + 1) // 2 :]}"
    return shown
