"""What a model is: front end, clip rule and network, as plain frozen data.

This module is the bottom of the import order and imports nothing heavy.  A configuration is written into the
header of every model file (``to_dict``) and read back from it (``from_dict``), so it must say everything that
changes a number: a choice that is not recorded here is not a choice a model may make.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from .errors import ConfigError

CLIP_RULES = ("published", "even")
NORMALIZATIONS = ("none", "global", "utterance")
POOLINGS = ("mean", "mean_std")
AVRE_BODIES = ("resnet18", "mdscm")

#: float waveforms in [-1, 1] are multiplied by this before the front end, which works at int16 scale.
INT16_SCALE = 32768.0
#: What the kernels take: hertz, and points of a transform.
MAX_RATE, MAX_FFT = 384000, 1 << 20
#: Lowest and highest pitch that is looked for, hertz, and the values that a frame of the voice plane holds.
VOICE_HZ, VOICE_VALUES = (60, 500), 4
#: Cepstra that the statistics of the voice look at, and how many statistics they are.
VOICE_CEPSTRA, VOICE_STATISTICS = 12, 39
#: The largest clip, map or attention over tokens: a configuration must not ask for memory without end.
MAX_VALUES = 1 << 28


def _require(ok: bool, what: str, expected: str, got: object) -> None:
    if not ok:
        raise ConfigError(f"{what}: expected {expected}, got {got!r}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _number(value: object) -> bool:
    return _whole(value) or (isinstance(value, float) and math.isfinite(value))


#: What a header may hold for a field, by the field's annotation: JSON itself tells neither 5.0 from 5 nor 1 from true.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number below 2^31", _whole),
    "int | None": ("a whole number below 2^31 or null", lambda v: v is None or _whole(v)),
    "float": ("a finite number", _number),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str": ("a string", lambda v: isinstance(v, str)),
    "tuple[int, ...]": ("a list of whole numbers", lambda v: isinstance(v, (list, tuple)) and all(map(_whole, v))),
    "tuple[float, ...]": ("a list of finite numbers", lambda v: isinstance(v, (list, tuple)) and all(map(_number, v))),
    "tuple[int, ...] | None": (
        "a list of whole numbers or null",
        lambda v: v is None or (isinstance(v, (list, tuple)) and all(map(_whole, v))),
    ),
}


def _from_dict(cls: type, data: Mapping[str, Any], what: str) -> Any:
    _require(isinstance(data, Mapping), what, "a mapping", data)
    known = {f.name: str(f.type) for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(data) - set(known))
    _require(not unknown, what, f"only the keys {', '.join(sorted(known))}", ", ".join(unknown))
    for name, value in data.items():
        expected, fits = _KINDS.get(known[name], ("", lambda v: True))
        _require(fits(value), f"{what}.{name}", expected, value)
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})


@dataclass(frozen=True)
class FrontEnd:
    """Waveform to log-mel features (matches python_speech_features.logfbank at 16 kHz, int16 scale).

    ``frame_length`` and ``frame_step`` are in samples, ``low_hz``/``high_hz`` in hertz.  ``channels`` is 1 (static),
    2 (static, delta) or 3 (static, delta, delta-delta).  ``normalization``:

    * ``none``: the published features, natural log at int16 scale;
    * ``global``: minus ``mean``, divided by ``std``, one pair per channel measured on the training data, so that
      loudness and spectral tilt differences between utterances are kept;
    * ``utterance``: each band of each channel has mean 0 and standard deviation 1 within the utterance.

    Normalisation happens before the clips are cut; padding frames are therefore 0 after normalisation.

    ``voice`` adds one plane behind the channels, which no normalisation touches: pitch and voicing of each frame
    (``reference.voice``).
    """

    sampling_rate: int = 16000
    mel_bands: int = 40
    channels: int = 1
    frame_length: int = 400
    frame_step: int = 160
    n_fft: int = 512
    preemphasis: float = 0.97
    low_hz: float = 0.0
    high_hz: float = 8000.0
    delta_window: int = 2
    normalization: str = "none"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    voice: bool = False

    def __post_init__(self) -> None:
        _require(0 < self.sampling_rate <= MAX_RATE, "sampling_rate", f"1..{MAX_RATE} hertz", self.sampling_rate)
        _require(1 <= self.mel_bands <= self.n_fft // 2, "mel_bands", f"1..{self.n_fft // 2}", self.mel_bands)
        _require(self.channels in (1, 2, 3), "channels", "1, 2 or 3", self.channels)
        _require(self.frame_step > 0, "frame_step", "a positive number of samples", self.frame_step)
        power = 16 <= self.n_fft <= MAX_FFT and self.n_fft & (self.n_fft - 1) == 0
        _require(power, "n_fft", f"a power of two from 16 to {MAX_FFT}", self.n_fft)
        _require(0 < self.frame_length <= self.n_fft, "frame_length", f"1..{self.n_fft} samples", self.frame_length)
        _require(
            0 <= self.low_hz < self.high_hz <= self.sampling_rate / 2,
            "low_hz, high_hz",
            "0 <= low < high <= half the sampling rate",
            (self.low_hz, self.high_hz),
        )
        _require(1 <= self.delta_window <= 1000, "delta_window", "1..1000 frames", self.delta_window)
        _require(self.normalization in NORMALIZATIONS, "normalization", f"one of {NORMALIZATIONS}", self.normalization)
        if self.normalization == "global":
            for name in ("mean", "std"):
                values = getattr(self, name)
                _require(len(values) == self.channels, name, f"{self.channels} value(s), one per channel", values)
                _require(all(math.isfinite(v) for v in values), name, "finite values", values)
            _require(all(v > 0 for v in self.std), "std", "positive values", self.std)
        else:
            _require(not self.mean and not self.std, "mean, std", "empty unless normalization='global'", self.mean)
        if self.voice:
            self._check_voice()

    def _check_voice(self) -> None:
        _require(self.sampling_rate >= 8000, "sampling_rate", "at least 8000 hertz with voice", self.sampling_rate)
        _require(abs(self.preemphasis) < 1, "preemphasis", "a factor between -1 and 1 with voice", self.preemphasis)
        _require(self.mel_bands >= VOICE_VALUES, "mel_bands", f"at least {VOICE_VALUES} with voice", self.mel_bands)
        most = self.sampling_rate // VOICE_HZ[0] + 1
        _require(self.frame_length > most, "frame_length", f"more than {most} samples with voice", self.frame_length)
        # Products of samples that far apart must not wrap around.
        _require(
            self.n_fft >= self.frame_length + most,
            "n_fft",
            f"at least {self.frame_length + most} with voice, frame_length and the longest period",
            self.n_fft,
        )

    @property
    def planes(self) -> int:
        """Planes of the features: the channels, then that of the voice if there is one."""
        return self.channels + self.voice

    @property
    def seconds_per_step(self) -> float:
        return self.frame_step / self.sampling_rate

    def frames(self, samples: int) -> int:
        """Number of frames of a waveform: the last one is zero-padded, a short waveform has one."""
        _require(samples > 0, "samples", "at least 1", samples)
        return 1 if samples <= self.frame_length else 1 + -(-(samples - self.frame_length) // self.frame_step)


@dataclass(frozen=True)
class ClipRule:
    """How an utterance of T frames becomes clips (names: ``published``, ``even``; see ``reference.clip_table``).

    ``clips`` is L.  For ``even`` it may be None: as many clips as half-overlapping coverage of T needs.
    """

    rule: str = "published"
    clips: int | None = 5
    clip_frames: int = 224

    def __post_init__(self) -> None:
        _require(self.rule in CLIP_RULES, "rule", f"one of {CLIP_RULES}", self.rule)
        _require(1 <= self.clip_frames <= MAX_VALUES, "clip_frames", f"1..{MAX_VALUES}", self.clip_frames)
        _require(
            (self.clips is None and self.rule == "even") or (isinstance(self.clips, int) and self.clips >= 1),
            "clips",
            "at least 1 (or None with rule='even')",
            self.clips,
        )


@dataclass(frozen=True)
class MDSCM:
    """One member of the MDSCM family.  The defaults are the published network (Wei et al. 2022, section 2.1).

    ``stem`` are the widths of the stride-2 convolutions, ``blocks`` those of the depthwise-separable residual blocks,
    the last of which carries the attention.  ``encoder_layers`` may be 0.  ``pooling`` joins the tokens of a clip:
    ``mean`` gives D features, ``mean_std`` 2 D, with D = ``token_width``.

    ``statistics`` > 0 adds a path beside the convolutions: a linear map of all bands of a frame to that many values,
    their means and deviations over the frames (``reference.frame_statistics``), batch norm and a hidden layer of
    ``statistics_hidden`` rectified units, which are joined to the clip feature.  With ``voice`` it takes those of the
    voice plane, too (``reference.voice_statistics``); the convolutions never see that plane.
    """

    mel_bands: int = 40
    in_channels: int = 1
    clip_frames: int = 224
    classes: int = 4
    stem: tuple[int, ...] = (32, 64)
    blocks: tuple[int, ...] = (128, 256)
    spatial_attention: bool = True
    channel_attention: bool = True
    attention_reduction: int = 16
    encoder_layers: int = 2
    encoder_heads: int = 4
    encoder_ff: int = 512
    pooling: str = "mean"
    block_dropout: float = 0.5
    encoder_dropout: float = 0.4
    statistics: int = 0
    statistics_hidden: int = 128
    statistics_dropout: float = 0.3
    voice: bool = False

    def __post_init__(self) -> None:
        for name in ("mel_bands", "in_channels", "clip_frames", "attention_reduction", "encoder_heads", "encoder_ff"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.classes >= 1, "classes", "at least 1", self.classes)
        for name in ("stem", "blocks"):
            widths = getattr(self, name)
            _require(len(widths) >= 1 and all(w >= 1 for w in widths), name, "one or more positive widths", widths)
        _require(self.encoder_layers >= 0, "encoder_layers", "0 or more", self.encoder_layers)
        _require(self.pooling in POOLINGS, "pooling", f"one of {POOLINGS}", self.pooling)
        _require(
            0 <= self.statistics <= self.mel_bands,
            "statistics",
            f"0 (no path) to {self.mel_bands}, the number of bands",
            self.statistics,
        )
        if self.voice:
            _require(
                self.statistics >= VOICE_CEPSTRA,
                "statistics",
                f"at least {VOICE_CEPSTRA} with voice, which looks at so many cepstra",
                self.statistics,
            )
        values = self._most_values()
        _require(values <= MAX_VALUES, "clip_frames", f"maps of at most {MAX_VALUES} values", values)
        _require(self.statistics_hidden >= 1, "statistics_hidden", "at least 1", self.statistics_hidden)
        for name in ("block_dropout", "encoder_dropout", "statistics_dropout"):
            _require(0 <= getattr(self, name) < 1, name, "0 <= p < 1", getattr(self, name))
        if self.channel_attention:
            _require(
                self.attention_reduction <= self.blocks[-1],
                "attention_reduction",
                f"at most the last block width {self.blocks[-1]}",
                self.attention_reduction,
            )
        if self.encoder_layers:
            _require(
                self.token_width % self.encoder_heads == 0,
                "encoder_heads",
                f"a divisor of the token width {self.token_width}",
                self.encoder_heads,
            )

    def _most_values(self) -> int:
        height, width = self.clip_frames, self.mel_bands
        sizes = [self.planes * height * width]
        for i, channels in enumerate((*self.stem, *self.blocks)):
            before, height, width = height * width, (height + 1) // 2, (width + 1) // 2
            sizes.append(channels * (height * width if i < len(self.stem) else before))
        return max(*sizes, height * height if self.encoder_layers else 0)

    def _halved(self, size: int) -> int:
        for _ in range(len(self.stem) + len(self.blocks)):
            size = (size - 1) // 2 + 1  # kernel 3, stride 2, padding 1
        return size

    @property
    def planes(self) -> int:
        """Planes of a clip: the channels that the convolutions read, then that of the voice if there is one."""
        return self.in_channels + self.voice

    @property
    def tokens(self) -> int:
        """Time steps left after the convolutions (14 for 224 frames)."""
        return self._halved(self.clip_frames)

    @property
    def token_width(self) -> int:
        """Channels x remaining mel rows (256 x 3 = 768 for 40 bands)."""
        return self.blocks[-1] * self._halved(self.mel_bands)

    @property
    def attention_width(self) -> int:
        """Hidden width of the channel attention's MLP (256 / 16 = 16)."""
        return max(1, self.blocks[-1] // self.attention_reduction)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled tokens, which come first in a clip feature."""
        return self.token_width * (2 if self.pooling == "mean_std" else 1)

    @property
    def statistics_width(self) -> int:
        """Inputs of the statistics path's hidden layer: static means, the deviations of every channel, the voice."""
        return (1 + self.in_channels) * self.statistics + VOICE_STATISTICS * self.voice

    @property
    def features(self) -> int:
        """Width of a clip feature f_s: pooled tokens, then the statistics path if there is one."""
        return self.pooled_width + (self.statistics_hidden if self.statistics else 0)


@dataclass(frozen=True)
class AVRE:
    """Audio-visual representation encoder: body, emotion classifier and domain classifier (section 2.2).

    ``domain_hidden`` defaults to the published widths: (50, 20) for ResNet-18, (128, 20) for the MDSCM body.
    """

    body: str = "resnet18"
    in_channels: int = 1
    classes: int = 4
    domain_hidden: tuple[int, ...] | None = None
    mdscm: MDSCM = field(default_factory=MDSCM)

    def __post_init__(self) -> None:
        _require(self.body in AVRE_BODIES, "body", f"one of {AVRE_BODIES}", self.body)
        _require(self.in_channels >= 1, "in_channels", "at least 1", self.in_channels)
        _require(self.classes >= 1, "classes", "at least 1", self.classes)
        if self.domain_hidden is None:
            object.__setattr__(self, "domain_hidden", (50, 20) if self.body == "resnet18" else (128, 20))
        if not isinstance(self.mdscm, MDSCM):
            object.__setattr__(self, "mdscm", _from_dict(MDSCM, self.mdscm, "mdscm"))
        if self.body == "mdscm":
            for name in ("in_channels", "classes"):
                inner = getattr(self.mdscm, name)
                _require(inner == getattr(self, name), name, f"the body's {inner}", getattr(self, name))
            _require(self.mdscm.statistics == 0, "mdscm.statistics", "0 in an encoder", self.mdscm.statistics)

    @property
    def features(self) -> int:
        return 512 if self.body == "resnet18" else self.mdscm.features


@dataclass(frozen=True)
class Fusion:
    """Two LSTMs over the clips of an utterance, features and scores (section 2.3)."""

    features: int = 1280
    classes: int = 4
    hidden: int = 128
    feature_weight: float = 0.7

    def __post_init__(self) -> None:
        for name in ("features", "classes", "hidden"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(0 <= self.feature_weight <= 1, "feature_weight", "0..1", self.feature_weight)


_Spec = TypeVar("_Spec", bound="ModelSpec | EncoderSpec | SystemSpec")


def _check_labels(labels: tuple[str, ...], classes: int) -> None:
    _require(len(labels) == classes, "labels", f"{classes} names", labels)
    _require(len(set(labels)) == len(labels), "labels", "distinct names", labels)


def _check_clips(front: FrontEnd, clip: ClipRule, net: MDSCM) -> None:
    _require(front.mel_bands == net.mel_bands, "front_end.mel_bands", f"{net.mel_bands}", front.mel_bands)
    _require(clip.clip_frames == net.clip_frames, "clip_rule.clip_frames", f"{net.clip_frames}", clip.clip_frames)


def plain(value: Any) -> dict[str, Any]:
    """JSON-able form of a configuration; a ``voice`` that is off is left out, as in files from before it was known."""
    return dataclasses.asdict(
        value, dict_factory=lambda items: {k: v for k, v in items if not (k == "voice" and v is False)}
    )


def _spec_from_dict(cls: type[_Spec], data: Mapping[str, Any]) -> _Spec:
    """Unknown keys and impossible values raise ConfigError."""
    _require(isinstance(data, Mapping), "model", "a mapping", data)
    parts = {"front_end": FrontEnd, "clip_rule": ClipRule, "network": MDSCM, "encoder": AVRE, "fusion": Fusion}
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(data) - set(names))
    _require(not unknown, "model", f"only {', '.join(names)}", ", ".join(unknown))
    labels = data.get("labels", ModelSpec.labels)
    named = isinstance(labels, (list, tuple)) and all(isinstance(label, str) for label in labels)
    _require(named, "labels", "a list of names", labels)
    try:
        built = {name: _from_dict(parts[name], data[name], name) for name in names if name in parts and name in data}
        return cls(labels=tuple(labels), **built)
    except TypeError as error:
        raise ConfigError(f"model: a value has the wrong type ({error})") from error


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to score speech with an MDSCM: labels, front end, clip rule, network."""

    kind: ClassVar[str] = "mdscm"

    labels: tuple[str, ...] = ("ang", "hap", "neu", "sad")
    front_end: FrontEnd = field(default_factory=FrontEnd)
    clip_rule: ClipRule = field(default_factory=ClipRule)
    network: MDSCM = field(default_factory=MDSCM)

    def __post_init__(self) -> None:
        _check_labels(self.labels, self.network.classes)
        channels = self.network.in_channels
        _require(self.front_end.channels == channels, "front_end.channels", f"{channels}", self.front_end.channels)
        _check_clips(self.front_end, self.clip_rule, self.network)
        _require(
            self.front_end.voice == self.network.voice, "front_end.voice", f"{self.network.voice}", self.front_end.voice
        )

    @property
    def features(self) -> int:
        """Width of a clip feature."""
        return self.network.features

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks that run."""
        return ("mdscm",)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form, written into the header of a model file."""
        return plain(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ModelSpec:
        """Inverse of ``to_dict``; unknown keys and impossible values raise ConfigError."""
        return _spec_from_dict(ModelSpec, data)


@dataclass(frozen=True)
class EncoderSpec:
    """Everything needed to score speech with an audio-visual encoder alone: labels, front end, clip rule, encoder."""

    kind: ClassVar[str] = "avre"

    labels: tuple[str, ...] = ("ang", "hap", "neu", "sad")
    front_end: FrontEnd = field(default_factory=FrontEnd)
    clip_rule: ClipRule = field(default_factory=ClipRule)
    encoder: AVRE = field(default_factory=AVRE)

    def __post_init__(self) -> None:
        _check_labels(self.labels, self.encoder.classes)
        channels = self.encoder.in_channels
        _require(self.front_end.channels == channels, "front_end.channels", f"{channels}", self.front_end.channels)
        _require(not self.front_end.voice, "front_end.voice", "False for an encoder alone", self.front_end.voice)
        if self.encoder.body == "mdscm":
            _check_clips(self.front_end, self.clip_rule, self.encoder.mdscm)
        else:
            values = 16 * self.clip_rule.clip_frames * self.front_end.mel_bands  # 64 channels at half height and width
            _require(values <= MAX_VALUES, "clip_rule.clip_frames", f"maps of at most {MAX_VALUES} values", values)

    @property
    def features(self) -> int:
        """Width of a clip feature."""
        return self.encoder.features

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks that run."""
        return (f"avre-{self.encoder.body}",)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form."""
        return plain(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> EncoderSpec:
        """Inverse of ``to_dict``; unknown keys and impossible values raise ConfigError."""
        return _spec_from_dict(EncoderSpec, data)


@dataclass(frozen=True)
class SystemSpec:
    """Everything needed to score speech with the whole system: labels, front end, clip rule, MDSCM, audio-visual
    encoder, fusion.

    Both networks see the same clips; an encoder of fewer channels than the front end has takes the first ones (one:
    the static features).
    """

    kind: ClassVar[str] = "system"

    labels: tuple[str, ...] = ("ang", "hap", "neu", "sad")
    front_end: FrontEnd = field(default_factory=FrontEnd)
    clip_rule: ClipRule = field(default_factory=ClipRule)
    network: MDSCM = field(default_factory=MDSCM)
    encoder: AVRE = field(default_factory=AVRE)
    fusion: Fusion = field(default_factory=Fusion)

    def __post_init__(self) -> None:
        speech = ModelSpec(self.labels, self.front_end, self.clip_rule, self.network)
        encoder, fusion = self.encoder, self.fusion
        channels = speech.front_end.channels
        _require(encoder.in_channels <= channels, "encoder.in_channels", f"1..{channels}", encoder.in_channels)
        if encoder.body == "mdscm":
            _check_clips(self.front_end, self.clip_rule, encoder.mdscm)
        for name, part in (("encoder", encoder), ("fusion", fusion)):
            _require(part.classes == len(self.labels), f"{name}.classes", f"{len(self.labels)}", part.classes)
        width = self.network.features + encoder.features
        _require(fusion.features == width, "fusion.features", f"{width}, those of both networks", fusion.features)

    @property
    def features(self) -> int:
        """Width of a clip feature: f_s, then f_v."""
        return self.fusion.features

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks that run."""
        return "mdscm", f"avre-{self.encoder.body}", "fusion"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able form, written into the header of a model file."""
        return plain(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> SystemSpec:
        """Inverse of ``to_dict``; unknown keys and impossible values raise ConfigError."""
        return _spec_from_dict(SystemSpec, data)


#: Named members of the family.  The shipped default model carries its own ModelSpec in its file.
MEMBERS: dict[str, ModelSpec] = {
    "mdscm-published": ModelSpec(),
    "mdscm-published-80": ModelSpec(front_end=FrontEnd(mel_bands=80), network=MDSCM(mel_bands=80)),
    "mdscm-published-128": ModelSpec(front_end=FrontEnd(mel_bands=128), network=MDSCM(mel_bands=128)),
}
