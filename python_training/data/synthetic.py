"""A made-up corpus in IEMOCAP's layout, for tests and demos: no recording of a person, no figure that means anything.

The voices are sums of harmonics under moving formants, the faces are drawn.  Level, pitch, pace and spectral tilt of a
voice, and brows, eyes and mouth of a face, follow the emotion, so that a learner has something to find; how well it
does says nothing about speech, faces or emotions of people.
"""

from __future__ import annotations

import json
import math
import wave
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: The file at the root of a synthetic corpus, and what it says.
NOTICE_NAME = "SYNTHETIC.txt"
NOTICE = """\
This corpus is SYNTHETIC.  It has the layout of IEMOCAP and nothing else of it: nothing in it is speech of a person or
the face of a person, the voices are computed and the faces are drawn.  It exists for tests and demos.  No accuracy on
it means anything: never report one as a result.
"""
BOXES_NAME = "boxes.json"

SAMPLE_RATE = 16000
#: Control points of a voice, per second, and samples between two of them.
CONTROL_RATE = 100
_HOP = SAMPLE_RATE // CONTROL_RATE
#: Turns start and end on multiples of this many seconds: 8 samples, exact in the four decimals of a label file.
_GRID = 0.0005
#: No harmonic above this frequency in Hz.
_BAND = 7200.0
#: RMS of the noise of the room.
_ROOM = 4e-4
#: Seconds before and after a turn in which the face changes.
_ONSET = 0.3
#: Formants F1, F2, F3 in Hz of six vowels of men (Peterson and Barney, JASA 1952), and those above that stay.
_VOWELS = np.array(
    [
        (270, 2290, 3010),
        (530, 1840, 2480),
        (730, 1090, 2440),
        (570, 840, 2410),
        (300, 870, 2240),
        (640, 1190, 2390),
    ],
    np.float64,
)
_HIGH_FORMANTS = (3500.0, 4500.0, 5500.0, 6500.0)
#: Bandwidths in Hz of the seven formants.
_BANDWIDTHS = (80.0, 100.0, 140.0, 220.0, 300.0, 400.0, 500.0)

Array = NDArray[Any]


class _Prosody(NamedTuple):
    """A way to speak: ``level`` in dB of full scale (RMS while there is sound), ``pitch`` in semitones from the
    speaker's own, ``spread`` of the pitch in semitones, ``pace`` in syllables/s, ``tilt`` of the source in dB/octave,
    share of syllables before a ``pause``, ``jitter`` of the pitch in semitones."""

    level: float
    pitch: float
    spread: float
    pace: float
    tilt: float
    pause: float
    jitter: float


class _Expression(NamedTuple):
    """A face: ``raised`` brows, ``slant`` of the brows (1: inner ends down, -1: inner ends up), ``curve`` of the mouth
    (1: corners up, -1: corners down), ``wide`` mouth, ``eyes`` (1: open as usual)."""

    raised: float
    slant: float
    curve: float
    wide: float
    eyes: float


class _Emotion(NamedTuple):
    """``word`` is a rater's, ``affect`` valence, activation and dominance from 1 to 5."""

    word: str
    affect: tuple[float, float, float]
    prosody: _Prosody
    face: _Expression


_EMOTIONS = {
    name: _Emotion(word, affect, _Prosody(*prosody), _Expression(*face))
    for name, word, affect, prosody, face in (
        ("ang", "Anger", (1.7, 4.2, 4.3), (-17, 4, 5.5, 5.6, -3.5, 0.08, 0.25), (-0.6, 1.0, -0.1, -0.1, 0.9)),
        ("hap", "Happiness", (4.3, 3.3, 3.2), (-20, 5, 6, 4.8, -5.5, 0.1, 0.12), (0.4, 0.0, 1.0, 0.6, 0.75)),
        ("exc", "Excited", (4.2, 4.1, 3.6), (-18.5, 7, 7.5, 5.4, -5, 0.06, 0.15), (0.9, 0.0, 0.9, 0.8, 1.2)),
        ("neu", "Neutral", (3.0, 2.6, 2.8), (-23, 0, 2.2, 4.1, -7, 0.14, 0.1), (0.0, 0.0, 0.0, 0.0, 1.0)),
        ("sad", "Sadness", (1.9, 2.1, 2.2), (-29, -2, 1, 2.9, -10.5, 0.3, 0.15), (0.2, -1.0, -0.9, -0.2, 0.6)),
        ("fru", "Frustration", (2.0, 3.3, 3.3), (-20, 1.5, 3.2, 4.4, -5.5, 0.2, 0.2), (-0.4, 0.5, -0.5, 0.0, 0.8)),
        ("sur", "Surprise", (3.3, 3.7, 3.0), (-20, 8, 8, 4.4, -6.5, 0.2, 0.12), (1.6, -0.2, 0.0, -0.6, 1.5)),
        ("fea", "Fear", (1.9, 3.6, 2.1), (-24, 6, 2.5, 5.6, -8, 0.22, 0.5), (1.2, -0.8, -0.4, 0.3, 1.4)),
        ("dis", "Disgust", (1.8, 3.0, 3.2), (-22, -2, 3, 3.4, -5, 0.16, 0.3), (-0.5, 0.4, -0.8, 0.4, 0.5)),
        ("oth", "Other", (3.0, 2.9, 3.0), (-21, 1, 3.6, 3.8, -6.5, 0.18, 0.15), (0.5, 0.2, 0.2, -0.4, 1.0)),
    )
}
#: Of which two are blended, turn by turn, where the raters do not agree (xxx).
_BLENDED = ("ang", "hap", "neu", "sad", "fru")
#: A speaker's turns go through the first of these in an order of the seed; every time but the first, ``oth`` gives its
#: place to the next of the second.
_COMMON = ("ang", "hap", "neu", "sad", "exc", "fru", "xxx", "oth")
_RARE = ("sur", "fea", "dis", "oth")
#: Standard deviation between turns of one emotion, in the order of ``_Prosody``.
_VARIETY = (1.2, 0.6, 0.3, 0.25, 0.4, 0.0, 0.02)


class _Voice(NamedTuple):
    """``pitch`` in Hz, ``tract``: formants relative to ``_VOWELS``."""

    pitch: float
    tract: float


class _Look(NamedTuple):
    """Colours in BGR; ``size`` and ``slim`` scale the face, ``long`` is its hair."""

    skin: tuple[float, float, float]
    hair: tuple[float, float, float]
    shirt: tuple[float, float, float]
    size: float
    slim: float
    long: bool


@dataclass(frozen=True)
class SyntheticTurn:
    """One turn: ``start`` and ``end`` in seconds of its dialog; ``speaker`` is the session with the sex (``Ses01F``).

    ``wav`` is the turn alone (16 kHz, mono), ``dialog_wav`` and ``video`` the whole dialog; ``video`` is None where
    none was written.
    """

    name: str
    emotion: str
    speaker: str
    session: str
    dialog: str
    start: float
    end: float
    wav: Path
    dialog_wav: Path
    video: Path | None


@dataclass(frozen=True)
class SyntheticCorpus:
    """What was written under ``root``: the turns in order of sessions, dialogs and time, and where the faces are.

    ``boxes[session][sex]`` is x, y, width and height in pixels of the box that holds the face of that actor in every
    frame of the session, for session ``Ses01`` and so on and sex ``F`` or ``M``; ``boxes.json`` holds the same.
    """

    root: Path
    turns: tuple[SyntheticTurn, ...]
    boxes: dict[str, dict[str, list[int]]]


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """Randomness that depends on the seed and what it is for alone, not on what else is written."""
    return np.random.default_rng([seed, *purpose.encode()])


def _smooth(track: Array, width: int) -> Array:
    """A track (n,) under a Hann window of ``width`` control points, an odd number; its ends are held."""
    window = np.hanning(width + 2)[1:-1]
    return np.convolve(np.pad(track, width // 2, mode="edge"), window / window.sum(), mode="valid")


# ---- Sound -----------------------------------------------------------------------------------------------------------


class _Controls(NamedTuple):
    """Tracks of a voice at its control points: ``voiced`` and ``noise`` amplitude (n,), ``pitch`` in semitones (n,)
    and ``formants`` in Hz (n, 7)."""

    voiced: Array
    noise: Array
    pitch: Array
    formants: Array


def _controls(prosody: _Prosody, voice: _Voice, points: int, generator: np.random.Generator) -> _Controls:
    """Syllables of a burst of noise or a weak voiced onset and a vowel, with pauses, until ``points`` are filled."""
    voiced, noise, accent = np.zeros(points), np.zeros(points), np.zeros(points)
    formants = np.tile(_VOWELS[-1], (points, 1))
    at, last = 4, points - 6
    vowel = -1
    while last - at >= 8:
        if at > 4 and generator.random() < prosody.pause:
            at += int(generator.uniform(0.12, 0.3) * CONTROL_RATE)
        length = int(np.clip(CONTROL_RATE / prosody.pace * generator.lognormal(0, 0.2), 8, 60))
        end = min(at + length, last)
        onset = min(at + int(min(0.3 * length, generator.uniform(5, 9))), end)
        vowel = int((vowel + generator.integers(1, len(_VOWELS))) % len(_VOWELS))
        formants[at:] = _VOWELS[vowel] * generator.normal(1, 0.03, 3)
        accent[at:] = generator.normal(0, 0.5)
        if generator.random() < 0.45:
            noise[at:onset] = generator.uniform(0.1, 0.3)
        else:
            voiced[at:onset] = 0.25
        voiced[onset:end] = generator.uniform(0.65, 1.0)
        at = end
    place = np.arange(points) / CONTROL_RATE
    falling = 0.5 - np.linspace(0, 1, points)
    vibrato = 0.2 * np.sin(2 * np.pi * (5.5 * place + generator.random()))
    jitter = prosody.jitter * generator.standard_normal(points)
    pitch = prosody.pitch + prosody.spread * (_smooth(accent, 13) + 0.8 * falling) + vibrato + jitter
    moving = np.stack([_smooth(formants[:, i], 9) for i in range(3)], 1)
    high = np.broadcast_to(_HIGH_FORMANTS, (points, len(_HIGH_FORMANTS)))
    return _Controls(_smooth(voiced, 5), _smooth(noise, 3), pitch, np.hstack((moving, high)) * voice.tract)


def _resonance(frequency: Array, formants: Array) -> Array:
    """Gain (n, harmonics) at ``frequency`` (n, harmonics) in Hz of resonators one after the other at ``formants``
    (n, 7) in Hz; 1 at 0 Hz."""
    gain = np.ones_like(frequency)
    for i, width in enumerate(_BANDWIDTHS):
        centre = formants[:, i, None]
        ratio = frequency / centre
        gain /= np.hypot(1 - ratio**2, ratio * width / centre)
    return gain


def _speak(prosody: _Prosody, voice: _Voice, samples: int, generator: np.random.Generator) -> Array:
    """Sound (samples,) in full scale: harmonics of a pitch under a tilt and formants, and bursts of noise."""
    hops = -(-samples // _HOP)
    controls = _controls(prosody, voice, hops + 1, generator)
    pitch = voice.pitch * 2 ** (controls.pitch / 12)
    ticks = np.arange(hops * _HOP) / _HOP
    phase = np.cumsum(np.interp(ticks, np.arange(hops + 1), pitch)) * (2 * np.pi / SAMPLE_RATE)
    harmonics = np.arange(1, int(_BAND / pitch.min()) + 1)
    frequency = pitch[:, None] * harmonics
    level = harmonics ** (prosody.tilt / (20 * math.log10(2))) * _resonance(frequency, controls.formants)
    level *= controls.voiced[:, None] * np.clip((_BAND - frequency) / 500, 0, 1)
    # Between two control points the amplitudes go from those of the first to those of the second.
    turning = np.remainder(phase, 2 * np.pi).astype(np.float32).reshape(hops, 1, _HOP)
    waves = np.sin(harmonics.astype(np.float32)[:, None] * turning)
    ends = np.stack((level[:-1], level[1:]), 1).astype(np.float32) @ waves
    rise = np.arange(_HOP, dtype=np.float32) / _HOP
    tone = (ends[:, 0] * (1 - rise) + ends[:, 1] * rise).reshape(-1).astype(np.float64)
    loud = np.interp(ticks, np.arange(hops + 1), controls.voiced) > 0.3
    tone /= max(float(np.sqrt(np.mean(tone[loud] ** 2))) if loud.any() else 1.0, 1e-9)
    burst = np.diff(generator.standard_normal(len(ticks) + 1)) * np.interp(ticks, np.arange(hops + 1), controls.noise)
    sound = 10 ** (prosody.level / 20) * (tone + burst)[:samples]
    return sound * min(1.0, 0.9 / max(float(np.abs(sound).max()), 1e-9))


def _write_wav(path: Path, sound: Array) -> None:
    """Write sound (n,) or (n, channels) in full scale as 16 bit at 16 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if sound.ndim == 1 else sound.shape[1])
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.clip(np.round(sound * 32768), -32768, 32767).astype("<i2").tobytes())


# ---- Picture ---------------------------------------------------------------------------------------------------------


def _colour(colour: tuple[float, float, float], shade: float = 1.0) -> tuple[float, float, float]:
    blue, green, red = (min(255.0, c * shade) for c in colour)
    return blue, green, red


def _draw_face(canvas: Array, look: _Look, face: _Expression, opening: float, pose: tuple[float, float, float]) -> None:
    """Draw into a square canvas (n, n, 3): a face of which ``opening`` (0 to 1) of the mouth is open; ``pose`` is its
    place, x and y in half canvases from the middle, and its roll in degrees."""
    import cv2

    half = canvas.shape[0] / 2
    scale = half * look.size
    x, y, roll = pose
    turn = np.deg2rad(roll)
    axes = np.array(((np.cos(turn), np.sin(turn)), (-np.sin(turn), np.cos(turn)))) * scale
    middle = np.array((half * (1 + x), half * (1 + y)))

    def at(points: Any) -> Array:
        """Coordinates of the face, 1 is ``scale``, as pixels in sixteenths."""
        return np.round((np.asarray(points, np.float64) @ axes + middle) * 16).astype(np.int32)

    def ellipse(centre: tuple[float, float], size: tuple[float, float], colour: tuple[float, float, float]) -> None:
        where = at(centre)
        radii = (round(size[0] * scale * 16), round(size[1] * scale * 16))
        cv2.ellipse(canvas, (int(where[0]), int(where[1])), radii, roll, 0, 360, colour, -1, cv2.LINE_AA, 4)

    def line(points: Any, thickness: float, colour: tuple[float, float, float], closed: bool = False) -> None:
        cv2.polylines(canvas, [at(points)], closed, colour, max(1, round(thickness * scale)), cv2.LINE_AA, 4)

    slim, dark = look.slim, _colour(look.hair, 0.6)
    if look.long:
        ellipse((0, 0), (0.78 * slim, 0.92), look.hair)
    else:
        ellipse((0, -0.12), (0.68 * slim, 0.8), look.hair)
        for side in (-1, 1):
            ellipse((side * 0.63 * slim, 0.1), (0.08, 0.15), _colour(look.skin, 0.85))
    ellipse((0, 0.1), (0.62 * slim, 0.78), look.skin)
    for side in (-1, 1):
        tall = 0.085 * face.eyes
        ellipse((side * 0.26 * slim, -0.06), (0.13, max(tall, 0.012)), (235, 235, 235) if tall > 0.02 else dark)
        if tall > 0.02:
            ellipse((side * 0.26 * slim, -0.06), (0.06, min(0.065, tall)), (50, 35, 25))
        inner, outer = -0.26 - 0.09 * face.raised + 0.14 * face.slant, -0.26 - 0.09 * face.raised - 0.08 * face.slant
        bend = (0.28 * slim, (inner + outer) / 2 - 0.03)
        brow = np.array(((0.11 * slim, inner), bend, (0.44 * slim, outer)))
        line(brow * (side, 1), 0.075, dark)
    line(((0.02, 0.0), (-0.05, 0.23), (0.05, 0.25)), 0.04, _colour(look.skin, 0.72))

    across = np.linspace(-1, 1, 13)
    width = 0.25 * slim * (1 + 0.35 * face.wide) * (1 - 0.15 * opening)
    rest = 0.5 + face.curve * 0.13 * (0.4 - across**2)
    gap = opening * 0.26 * (1 - across**2)
    mouth = np.concatenate(
        (np.stack((across * width, rest - 0.3 * gap), 1), np.stack((across * width, rest + 0.7 * gap), 1)[::-1])
    )
    if opening > 0.05:
        cv2.fillPoly(canvas, [at(mouth)], (35, 20, 60), cv2.LINE_AA, 4)
    line(mouth, 0.055, _colour((0.75 * look.skin[0], 0.62 * look.skin[1], 0.92 * look.skin[2])), closed=True)


def _background(size: tuple[int, int], actors: list[tuple[_Look, list[int]]]) -> Array:
    """What does not move (height, width, 3): a wall, a line between the halves, necks and shoulders."""
    import cv2

    width, height = size
    wall = np.linspace(70, 40, height)[:, None, None] * np.array((1.0, 0.92, 0.85))
    picture = np.broadcast_to(wall, (height, width, 3)).astype(np.uint8).copy()
    for look, (x, y, side, _) in actors:
        left = 0 if x < width // 2 else width // 2
        half = picture[:, left : left + width // 2]
        centre, bottom = x - left + side // 2, y + side
        neck = (round(0.17 * side), round(0.3 * side))
        cv2.ellipse(half, (centre, bottom - side // 8), neck, 0, 0, 360, _colour(look.skin, 0.8), -1, cv2.LINE_AA)
        shoulders = (round(0.5 * side), round(0.22 * side))
        cv2.ellipse(half, (centre, bottom + side // 8), shoulders, 0, 0, 360, look.shirt, -1, cv2.LINE_AA)
    picture[:, width // 2 - 1 : width // 2 + 1] = 10
    return picture


@dataclass(frozen=True)
class _Actor:
    """One face through a dialog: ``faces`` (frames, 5) are ``_Expression``s, ``opening`` (frames,) of the mouth."""

    look: _Look
    box: list[int]
    faces: Array
    opening: Array


def _frames(size: tuple[int, int], fps: float, actors: list[_Actor], generator: np.random.Generator) -> Iterator[Array]:
    """The pictures (height, width, 3) of a dialog, BGR."""
    import cv2

    background = _background(size, [(actor.look, actor.box) for actor in actors])
    # A face is drawn at twice its size at least and then made smaller, which keeps thin lines.
    patches = []
    for actor in actors:
        x, y, side, _ = actor.box
        canvas = 2 * max(side, 40)
        patches.append(cv2.resize(background[y : y + side, x : x + side], (canvas, canvas)))
    drift = generator.uniform(0, 2 * np.pi, (len(actors), 3))
    speed = generator.uniform(0.8, 2.2, (len(actors), 3))
    reach = np.array((0.05, 0.03, 4.0))
    for i in range(len(actors[0].opening)):
        picture = background.copy()
        for actor, patch, phase, rate in zip(actors, patches, drift, speed):
            canvas = patch.copy()
            sway = reach * np.sin(phase + rate * i / fps)
            sway[1] += 0.02 * actor.opening[i]
            face = _Expression(*(float(v) for v in actor.faces[i]))
            _draw_face(canvas, actor.look, face, float(actor.opening[i]), (sway[0], sway[1], sway[2]))
            x, y, side, _ = actor.box
            picture[y : y + side, x : x + side] = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)
        noise = generator.integers(-5, 6, picture.shape, dtype=np.int8)
        yield np.clip(picture.astype(np.int16) + noise, 0, 255).astype(np.uint8)


def _write_video(path: Path, frames: Iterator[Array], size: tuple[int, int], fps: float) -> None:
    """Write pictures as motion JPEG in AVI.  Raises RuntimeError where OpenCV cannot."""
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, size)
    if not writer.isOpened():
        raise RuntimeError(f"{path}: expected OpenCV to write MJPG in AVI, got no writer from OpenCV {cv2.__version__}")
    try:
        for frame in frames:
            writer.write(frame)
    finally:
        writer.release()


# ---- Corpus ----------------------------------------------------------------------------------------------------------


class _Planned(NamedTuple):
    """A turn before anything of it is written."""

    session: str
    dialog: str
    sex: str
    name: str
    emotion: str

    @property
    def speaker(self) -> str:
        return self.session + self.sex


class _Recorded(NamedTuple):
    """A turn of a dialog: ``first`` and ``last`` are samples of the dialog, ``sound`` (last - first,) in full scale."""

    plan: _Planned
    first: int
    last: int
    sound: Array
    felt: _Emotion
    lines: list[str]


def _dialog_name(session: int, number: int) -> str:
    """``Ses01F_impro01``, ``Ses01M_script01_1``, ``Ses01F_script01_1``, ``Ses01M_impro01``, ``Ses01F_impro02``, ..."""
    text, rest = divmod(number, 4)
    kind = f"script{text + 1:02d}_1" if rest in (1, 2) else f"impro{text + 1:02d}"
    return f"Ses{session:02d}{'FM'[rest % 2]}_{kind}"


def _plan(sessions: int, dialogs: int, turns: int, seed: int) -> list[_Planned]:
    """The turns in order of sessions, dialogs and time; the two actors take turns."""
    plan = []
    for session in range(1, sessions + 1):
        for number in range(dialogs):
            dialog = _dialog_name(session, number)
            for i in range(turns):
                sex = "FM"[(i + number) % 2]
                plan.append(_Planned(f"Ses{session:02d}", dialog, sex, f"{dialog}_{sex}{i // 2:03d}", ""))
    order = [_COMMON[i] for i in _generator(seed, "emotions").permutation(len(_COMMON))]
    at, emotions = 0, {}
    for speaker in sorted({turn.speaker for turn in plan}):
        own = [turn.name for turn in plan if turn.speaker == speaker]
        # The emotions go on from speaker to speaker, in an order of the speaker's own.
        for i, name in enumerate(_generator(seed, f"order {speaker}").permutation(own), start=at):
            passes, rest = divmod(i, len(order))
            rare = passes and order[rest] == "oth"
            emotions[str(name)] = _RARE[(passes - 1) % len(_RARE)] if rare else order[rest]
        at += len(own)
    return [turn._replace(emotion=emotions[turn.name]) for turn in plan]


def _felt(emotion: str, generator: np.random.Generator) -> tuple[_Emotion, list[str]]:
    """How one turn is: the emotion, or a blend of two for xxx, at a strength of its own, and what three raters say."""
    if emotion == "xxx":
        said = [_EMOTIONS[name] for name in generator.choice(_BLENDED, 3, replace=False)]
        felt = said[:2]
    else:
        felt = [_EMOTIONS[emotion]]
        said = [*felt, *felt, felt[0] if generator.random() < 0.6 else _EMOTIONS["oth"]]
    valence, activation, dominance = np.mean([f.affect for f in felt], axis=0)
    prosody = np.mean([f.prosody for f in felt], axis=0) + generator.standard_normal(7) * _VARIETY
    neutral = np.array(_EMOTIONS["neu"].face)
    face = neutral + (np.mean([f.face for f in felt], axis=0) - neutral) * generator.uniform(0.8, 1.1)
    one = _Emotion(felt[0].word, (valence, activation, dominance), _Prosody(*prosody), _Expression(*face))
    return one, [f.word for f in said]


def _label_lines(
    plan: _Planned,
    span: tuple[float, float],
    affect: tuple[float, float, float],
    words: list[str],
    generator: np.random.Generator,
) -> list[str]:
    """A turn in a label file: the line that counts, then the raters' and the speaker's own, then an empty one."""
    scores = np.clip(np.round(affect + generator.normal(0, 0.5, (3, 3))), 1, 5).astype(int)
    mean = ", ".join(f"{value:.4f}" for value in scores[:2].mean(0))
    self_rater = f"{plan.sex}1"
    return [
        f"[{span[0]:.4f} - {span[1]:.4f}]\t{plan.name}\t{plan.emotion}\t[{mean}]",
        *(f"C-{rater}:\t{word};\t()" for rater, word in zip(("E1", "E3", "E4", self_rater), [*words, words[0]])),
        *(f"A-{rater}:\tval {v}; act {a}; dom  {d};\t()" for rater, (v, a, d) in zip(("E3", "E4", self_rater), scores)),
        "",
    ]


def _record(plan: list[_Planned], voices: dict[str, _Voice], seed: int) -> list[_Recorded]:
    """The turns of a dialog, one after the other with pauses between them."""
    recorded = []
    at = _generator(seed, f"pauses {plan[0].dialog}")
    last = 0
    for turn in plan:
        generator = _generator(seed, f"turn {turn.name}")
        first = last + round(at.uniform(0.3, 0.9) / _GRID) * round(_GRID * SAMPLE_RATE)
        last = first + round(generator.uniform(1.0, 4.0) / _GRID) * round(_GRID * SAMPLE_RATE)
        felt, words = _felt(turn.emotion, generator)
        lines = _label_lines(turn, (first / SAMPLE_RATE, last / SAMPLE_RATE), felt.affect, words, generator)
        sound = _speak(felt.prosody, voices[turn.sex], last - first, generator)
        recorded.append(_Recorded(turn, first, last, sound, felt, lines))
    return recorded


def _mix(turns: list[_Recorded], left: str, seed: int) -> Array:
    """The sound of a dialog (samples, 2) in full scale: each actor's microphone, the one of sex ``left`` first, hears
    the other one faintly."""
    samples = turns[-1].last + SAMPLE_RATE // 2
    sound = _generator(seed, f"room {turns[0].plan.dialog}").standard_normal((samples, 2)) * _ROOM
    for turn in turns:
        gains = (1.0, 0.15) if turn.plan.sex == left else (0.15, 1.0)
        sound[turn.first : turn.last] += turn.sound[:, None] * gains
    return sound


def _act(turns: list[_Recorded], sex: str, look: _Look, box: list[int], frames: int, fps: float, seed: int) -> _Actor:
    """What one actor's face does in a dialog: neutral but for the own turns, the mouth follows the own sound."""
    middle = (np.arange(frames) + 0.5) / fps
    neutral = np.array(_EMOTIONS["neu"].face)
    faces = np.tile(neutral, (frames, 1))
    opening = np.zeros(frames)
    for turn in turns:
        if turn.plan.sex != sex:
            continue
        start, end = turn.first / SAMPLE_RATE, turn.last / SAMPLE_RATE
        outside = np.maximum(np.maximum(start - middle, middle - end), 0)
        faces += np.clip(1 - outside / _ONSET, 0, 1)[:, None] * (np.array(turn.felt.face) - neutral)
        power = np.concatenate(([0.0], np.cumsum(turn.sound**2)))
        edges = np.clip(
            np.round(np.arange(frames + 1) / fps * SAMPLE_RATE).astype(int) - turn.first, 0, len(turn.sound)
        )
        level = np.sqrt(np.maximum(np.diff(power[edges]), 0) * fps / SAMPLE_RATE)
        opening += level / max(float(level.max()), 1e-9)
    blinks = _generator(seed, f"blinks {turns[0].plan.dialog}{sex}").random(frames) < 0.3 / fps
    faces[blinks, _Expression._fields.index("eyes")] = 0.05
    return _Actor(look, box, faces, opening)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("ascii"))


def _write_decoys(folder: Path, dialog: str, turn: str) -> None:
    """What the release has beside its label files and no reader of labels must take for one."""
    (folder / f"._{dialog}.txt").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \xff\xfe" + bytes(56))
    _write_text(folder / "Attribute" / f"{dialog}_e3_atr.txt", f"{turn} :act 3; :val 3; :dom 3; :()\n")
    _write_text(folder / "Categorical" / f"{dialog}_e1_cat.txt", f"{turn} :Neutral state; :()\n")
    _write_text(folder / "Self-evaluation" / f"{dialog}_f1_cat.txt", f"{turn} :Neutral state; :()\n")


def _boxes(session: str, size: tuple[int, int], women_left: bool, seed: int) -> dict[str, list[int]]:
    """Where the two faces of a session are: one in each half, in its upper part, above shoulders."""
    half, height = size[0] // 2, size[1]
    side = int(0.8 * min(half, height))
    generator = _generator(seed, f"boxes {session}")
    boxes = {}
    for left, sex in zip((0, half), "FM" if women_left else "MF"):
        x = left + int(generator.integers(2, half - side - 1))
        boxes[sex] = [x, int(generator.integers(0, (height - side) // 2 + 1)), side, side]
    return boxes


def _speaker(speaker: str, seed: int) -> tuple[_Voice, _Look]:
    generator = _generator(seed, f"speaker {speaker}")
    woman = speaker.endswith("F")
    pitch, tract = generator.normal((205, 1.16) if woman else (118, 1.0), (12, 0.03))
    skin = _colour((150.0, 180.0, 225.0), generator.uniform(0.7, 1.05))
    hair = ((35.0, 40.0, 50.0), (30.0, 55.0, 85.0), (70.0, 120.0, 150.0))[int(generator.integers(3))]
    blue, green, red = generator.uniform(30, 110, 3)
    size, slim = generator.uniform((0.84, 0.92), (0.94, 1.05))
    return _Voice(pitch, tract), _Look(skin, hair, (blue, green, red), size, slim, woman)


def _write_dialog(
    folder: Path,
    plan: list[_Planned],
    cast: dict[str, tuple[_Voice, _Look]],
    boxes: dict[str, list[int]],
    film: tuple[tuple[int, int], float] | None,
    decoys: bool,
    seed: int,
) -> list[SyntheticTurn]:
    """Write a dialog into the ``folder`` of its session; ``film`` is the size and the frames/s of its video."""
    dialog = plan[0].dialog
    turns = _record(plan, {sex: voice for sex, (voice, _) in cast.items()}, seed)
    left, right = sorted(boxes, key=lambda sex: boxes[sex])
    sound = _mix(turns, left, seed)
    sound_path = folder / "dialog" / "wav" / f"{dialog}.wav"
    _write_wav(sound_path, sound)
    written = []
    video = folder / "dialog" / "avi" / "DivX" / f"{dialog}.avi" if film else None
    for turn in turns:
        path = folder / "sentences" / "wav" / dialog / f"{turn.plan.name}.wav"
        _write_wav(path, sound[turn.first : turn.last, 0 if turn.plan.sex == left else 1])
        span = (turn.first / SAMPLE_RATE, turn.last / SAMPLE_RATE)
        whose = (turn.plan.name, turn.plan.emotion, turn.plan.speaker, turn.plan.session, dialog)
        written.append(SyntheticTurn(*whose, *span, path, sound_path, video))
    labels = folder / "dialog" / "EmoEvaluation"
    lines = ["% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]", "", *(line for t in turns for line in t.lines)]
    _write_text(labels / f"{dialog}.txt", "\n".join(lines) + "\n")
    if decoys:
        _write_decoys(labels, dialog, plan[0].name)
    if film and video:
        frames = math.ceil(len(sound) / SAMPLE_RATE * film[1])
        actors = [_act(turns, sex, cast[sex][1], boxes[sex], frames, film[1], seed) for sex in (left, right)]
        _write_video(video, _frames(*film, actors, _generator(seed, f"picture {dialog}")), *film)
    return written


def _check(sessions: int, dialogs: int, turns: int, seed: int, size: tuple[int, int], fps: float) -> None:
    for name, value, most in (("sessions", sessions, 5), ("dialogs", dialogs, 28), ("turns", turns, 1000)):
        if not 1 <= value <= most:
            raise ValueError(f"{name}: expected 1 to {most}, got {value}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    if size[0] % 2 or size[0] < 64 or size[1] < 32:
        raise ValueError(f"frame_size: expected an even width from 64 and a height from 32, got {size[0]}x{size[1]}")
    if not 1 <= fps <= 60:
        raise ValueError(f"fps: expected 1 to 60, got {fps}")


def write_iemocap(
    root: Path,
    *,
    sessions: int = 5,
    dialogs: int = 2,
    turns: int = 8,
    seed: int = 0,
    video: bool = True,
    frame_size: tuple[int, int] = (192, 96),
    fps: float = 10.0,
    decoys: bool = True,
) -> SyntheticCorpus:
    """Write a made-up corpus in IEMOCAP's layout into the new or empty folder ``root``.

    ``SYNTHETIC.txt`` at its root says that nothing in it is speech or a face of a person.  ``dialogs`` are per session
    (two: one of ``Ses01F`` and one of ``Ses01M``), ``turns`` per dialog, of 1 to 4 seconds each.  From 8 turns in all,
    each of ang, hap, exc, neu, sad, fru, xxx and oth occurs; with the defaults, every speaker has the first seven.
    ``frame_size`` is width and height in pixels of the videos, in which the actors stand side by side, ``fps`` their
    frames/s; ``video=False`` writes none.  ``decoys`` adds, once per session, what the release has beside its label
    files: ``._*.txt`` and the folders of single raters.

    The same arguments write the same wav files, labels and, before they are encoded, pictures.  Raises ValueError for
    an argument out of range or a folder that is not empty, RuntimeError where OpenCV cannot write the videos.
    """
    _check(sessions, dialogs, turns, seed, frame_size, fps)
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root}: expected a new or empty folder for a synthetic corpus, got something that is there")
    plan: dict[str, dict[str, list[_Planned]]] = defaultdict(lambda: defaultdict(list))
    for turn in _plan(sessions, dialogs, turns, seed):
        plan[turn.session][turn.dialog].append(turn)
    boxes = {name: _boxes(name, frame_size, i % 2 == 0, seed) for i, name in enumerate(plan)}
    _write_text(root / NOTICE_NAME, NOTICE)
    _write_text(root / BOXES_NAME, json.dumps(boxes) + "\n")
    written: list[SyntheticTurn] = []
    for number, (name, planned) in enumerate(plan.items(), start=1):
        cast = {sex: _speaker(name + sex, seed) for sex in "FM"}
        folder = root / f"Session{number}"
        for i, turns_of_one in enumerate(planned.values()):
            film = (frame_size, fps) if video else None
            written += _write_dialog(folder, turns_of_one, cast, boxes[name], film, decoys and i == 0, seed)
    return SyntheticCorpus(root, tuple(written), boxes)
