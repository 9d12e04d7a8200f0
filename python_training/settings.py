"""Training settings: one TOML file says everything about a run."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from avser_fast.config import AVRE, MDSCM, ClipRule, ConfigError, FrontEnd

from .data.augment import Augmentation

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Optimisation:
    """AdamW or SGD with linear warm-up, then a schedule; weights are averaged exponentially (``ema``, 0: off).

    ``schedule`` is ``cosine`` (half a cosine down to 0 at the end), ``step`` (times ``step_factor`` every
    ``step_epochs``) or ``constant``.  ``amp`` is ``off``, ``bf16`` or ``fp16`` (autocast; fp16 scales the loss).
    ``epochs`` is the length of the schedule.  The epoch whose averaged weights score best on the validation speaker is
    kept: by UA, ties by loss, among the epochs of the last ``pick_last`` share of the schedule.  ``refit`` trains
    again on all training speakers, the validation speaker included, for as many epochs, once all stages have picked;
    stages that read a network of a refit are then trained again, too.  ``class_weights`` is
    the power of the inverse class frequency that the loss is weighted with: 0 counts utterances, 1 classes equally.
    """

    epochs: int = 60
    batch_size: int = 32
    optimizer: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 1e-2
    warmup_epochs: float = 2.0
    label_smoothing: float = 0.0
    class_weights: float = 0.5
    ema: float = 0.99
    gradient_clip: float = 5.0
    pick_last: float = 0.5
    refit: bool = False
    schedule: str = "cosine"
    step_epochs: int = 80
    step_factor: float = 0.5
    amp: str = "off"

    def __post_init__(self) -> None:
        for name, known in (
            ("optimizer", ("adamw", "sgd")),
            ("schedule", ("cosine", "step", "constant")),
            ("amp", ("off", "bf16", "fp16")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name}: expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}, got {getattr(self, name)!r}"
                )
        for name in ("epochs", "batch_size", "step_epochs"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}")
        for names, highest in (
            (("lr", "weight_decay", "warmup_epochs", "class_weights", "gradient_clip", "step_factor"), math.inf),
            (("momentum", "label_smoothing", "ema", "pick_last"), 1.0),
        ):
            for name in names:
                value = getattr(self, name)
                if type(value) not in (int, float) or not 0 <= value <= highest:
                    wanted = "a number of at least 0" if highest == math.inf else "a number from 0 to 1"
                    raise ConfigError(f"{name}: expected {wanted}, got {value!r}")


@dataclass(frozen=True)
class Adversarial:
    """Gradient reversal in the AVDAL stage.

    lambda is ``lam`` times 1 (``constant``), the DANN schedule 2 / (1 + exp(-10 p)) - 1 (``dann``; Ganin et al., JMLR
    2016, section 5.2.2) or min(1, p / ``warmup``) (``warm-up``), p the progress of the stage from 0 to 1.  ``lam`` = 0
    trains the same encoder without adaptation.  ``face_weight`` weighs the emotion loss of the faces,
    ``domain_weight`` the domain loss (at the domain classifier too, which ``lam`` is not).
    """

    schedule: str = "dann"
    lam: float = 1.0
    warmup: float = 0.2
    face_weight: float = 1.0
    domain_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "dann", "warm-up"):
            raise ConfigError(f"schedule: expected 'constant', 'dann' or 'warm-up', got {self.schedule!r}")
        if not 0 < self.warmup <= 1:
            raise ConfigError(f"warmup: expected a share of the stage from 0 (exclusive) to 1, got {self.warmup}")
        for name in ("lam", "face_weight", "domain_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class FusionRecipe:
    """The network that fuses (``config.Fusion``); the width of its features follows from the other two."""

    hidden: int = 128
    feature_weight: float = 0.7


@dataclass(frozen=True)
class Batching:
    """What a row of a batch is: one random crop (``crops``) or the clips of the clip rule; ``face_frames`` frames of a
    face, the utterance's own where ``paired``.  ``workers`` processes make batches ahead of time."""

    crops: bool = True
    face_frames: int = 1
    paired: bool = False
    workers: int = 0


#: The stages of training, in order, and the section of a recipe that says how each is optimised.
STAGES = {"mdscm": "optimisation", "avdal": "avdal", "fusion": "fusion", "joint": "joint"}


@dataclass(frozen=True)
class Settings:
    """A named recipe: front end (its mean and std are measured), clip rule of evaluation, network, optimisation.

    ``encoder`` is the network of the AVDAL stage, None for a recipe of speech alone.
    """

    name: str
    front_end: FrontEndRecipe
    clip_rule: ClipRule = field(default_factory=ClipRule)
    network: MDSCM = field(default_factory=MDSCM)
    optimisation: Optimisation = field(default_factory=Optimisation)
    augmentation: Augmentation = field(default_factory=Augmentation)
    batches: Batching = field(default_factory=Batching)
    encoder: AVRE | None = None
    avdal: Optimisation = field(default_factory=Optimisation)
    adversarial: Adversarial = field(default_factory=Adversarial)
    fusion_lstm: FusionRecipe = field(default_factory=FusionRecipe)
    fusion: Optimisation = field(default_factory=Optimisation)
    joint: Optimisation = field(default_factory=Optimisation)

    def of_stage(self, stage: str) -> Optimisation:
        found: Optimisation = getattr(self, STAGES[stage])
        return found

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class FrontEndRecipe:
    """A FrontEnd before the mean and standard deviation of ``normalization='global'`` are measured.

    ``zero`` says which level of the static channel becomes 0, the value of padding and masks: the ``mean``, or the
    ``quiet`` of the training data (its 2nd percentile), so that padding reads as silence.
    """

    mel_bands: int = 40
    channels: int = 1
    frame_length: int = 400
    n_fft: int = 512
    normalization: str = "none"
    zero: str = "mean"
    voice: bool = False

    def __post_init__(self) -> None:
        if self.zero not in ("mean", "quiet"):
            raise ConfigError(f"zero: expected 'mean' or 'quiet', got {self.zero!r}")

    def front_end(self) -> FrontEnd:
        """The front end; 0 and 1 stand for mean and std until ``system.measured_front_end`` fills them in."""
        measured = self.normalization == "global"
        return FrontEnd(
            mel_bands=self.mel_bands,
            channels=self.channels,
            frame_length=self.frame_length,
            n_fft=self.n_fft,
            normalization=self.normalization,
            mean=(0.0,) * self.channels if measured else (),
            std=(1.0,) * self.channels if measured else (),
            voice=self.voice,
        )


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value of a TOML file is what a field's annotation says; a whole number is a number, too."""
    if isinstance(wanted, types.UnionType) or get_origin(wanted) is Union:
        return any(_fits(value, kind) for kind in get_args(wanted))
    if get_origin(wanted) is tuple:
        kinds = get_args(wanted)
        if not isinstance(value, tuple):
            return False
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return all(_fits(v, kinds[0]) for v in value)
        return len(value) == len(kinds) and all(_fits(v, kind) for v, kind in zip(value, kinds))
    if dataclasses.is_dataclass(wanted):  # a section of its own, which its class checks
        return isinstance(value, dict)
    if wanted is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (type(None) if wanted is None else wanted)


def _wanted(kind: Any) -> str:
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return " or ".join(_wanted(k) for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is tuple:
        return "a list of " + {int: "whole numbers", float: "numbers"}.get(get_args(kind)[0], "values")
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(kind, "a section")


_SECTIONS = {
    "front_end": FrontEndRecipe,
    "clip_rule": ClipRule,
    "network": MDSCM,
    "optimisation": Optimisation,
    "augmentation": Augmentation,
    "batches": Batching,
    "encoder": AVRE,
    "avdal": Optimisation,
    "adversarial": Adversarial,
    "fusion_lstm": FusionRecipe,
    "fusion": Optimisation,
    "joint": Optimisation,
}


def load_settings(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read ``source``, a TOML file or the name of one in ``configs/``; ``overrides`` maps "section.key" to values.

    ``clips = 0`` in the file stands for None (as many as the utterance needs).  Raises ConfigError naming the file and
    the key.
    """
    path = Path(source)
    if not path.suffix:
        path = CONFIGS / f"{source}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIGS.glob("*.toml")))
        raise ConfigError(f"{source}: expected a TOML file or one of {known}")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: expected TOML, got {error}") from error
    for key, value in (overrides or {}).items():
        *sections, name = key.split(".")
        at = data
        for section in sections:
            at = at.setdefault(section, {})
            if not isinstance(at, dict):
                raise ConfigError(f"{path}: expected {section} of {key} to be a section, got the value {at!r}")
        at[name] = value
    built: dict[str, Any] = {}
    for section, values in data.items():
        if section not in _SECTIONS:
            raise ConfigError(f"{path}: expected the sections {', '.join(_SECTIONS)}, got [{section}]")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected {section} to be a section, got the value {values!r}")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if section == "clip_rule" and values.get("clips") == 0 and type(values["clips"]) is int:
            values["clips"] = None
        kinds = get_type_hints(_SECTIONS[section])
        for name, value in values.items():
            if name not in kinds:
                raise ConfigError(f"{path}: [{section}]: expected some of {', '.join(kinds)}, got {name}")
            if not _fits(value, kinds[name]):
                got = list(value) if isinstance(value, tuple) else value
                raise ConfigError(f"{path}: {section}.{name}: expected {_wanted(kinds[name])}, got {got!r}")
        try:
            built[section] = _SECTIONS[section](**values)
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"{path}: [{section}]: {error}") from error
    return Settings(name=path.stem, **{"front_end": FrontEndRecipe(), **built})
