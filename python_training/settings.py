"""Training settings: one TOML file says everything about a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avser_fast.config import MDSCM, ClipRule, ConfigError, FrontEnd

from .data.augment import Augmentation

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Optimisation:
    """AdamW or SGD with linear warm-up and cosine decay; weights are averaged exponentially (``ema``, 0: off).

    ``epochs`` is the length of the schedule.  The epoch whose averaged weights score best on the validation speaker is
    kept: by UA, ties by loss, among the epochs of the last ``pick_last`` share of the schedule.  ``refit`` then
    trains again on all training speakers, the validation speaker included, for as many epochs.  ``class_weights`` is
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

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "sgd"):
            raise ConfigError(f"optimizer: expected 'adamw' or 'sgd', got {self.optimizer!r}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Settings:
    """A named recipe: front end (its mean and std are measured), clip rule of evaluation, network, optimisation."""

    name: str
    front_end: FrontEndRecipe
    clip_rule: ClipRule = field(default_factory=ClipRule)
    network: MDSCM = field(default_factory=MDSCM)
    optimisation: Optimisation = field(default_factory=Optimisation)
    augmentation: Augmentation = field(default_factory=Augmentation)

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

    def __post_init__(self) -> None:
        if self.zero not in ("mean", "quiet"):
            raise ConfigError(f"zero: expected 'mean' or 'quiet', got {self.zero!r}")

    def front_end(self) -> FrontEnd:
        """The front end; 0 and 1 stand for mean and std until ``FeatureSet.measured_front_end`` fills them in."""
        measured = self.normalization == "global"
        return FrontEnd(
            mel_bands=self.mel_bands,
            channels=self.channels,
            frame_length=self.frame_length,
            n_fft=self.n_fft,
            normalization=self.normalization,
            mean=(0.0,) * self.channels if measured else (),
            std=(1.0,) * self.channels if measured else (),
        )


_SECTIONS = {
    "front_end": FrontEndRecipe,
    "clip_rule": ClipRule,
    "network": MDSCM,
    "optimisation": Optimisation,
    "augmentation": Augmentation,
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
        section, _, name = key.partition(".")
        data.setdefault(section, {})[name] = value
    built: dict[str, Any] = {}
    for section, values in data.items():
        if section not in _SECTIONS:
            raise ConfigError(f"{path}: expected the sections {', '.join(_SECTIONS)}, got [{section}]")
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if section == "clip_rule" and values.get("clips") == 0:
            values["clips"] = None
        try:
            built[section] = _SECTIONS[section](**values)
        except (TypeError, ConfigError) as error:
            raise ConfigError(f"{path}: [{section}]: {error}") from error
    return Settings(name=path.stem, **{"front_end": FrontEndRecipe(), **built})
