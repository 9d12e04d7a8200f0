"""The networks that are measured, each with its weights, its folded form for the peers and its float64 truth."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from avser_fast import nn
from avser_fast.config import AVRE, MEMBERS, ModelSpec
from avser_fast.inference.weights import read_model
from avser_fast.testing import assert_close, max_error

from . import cases
from .accuracy import OURS_FLOAT32, PEERS_FLOAT32, TIMES_PLAIN, plain_logits
from .compare import OURS
from .folded import FoldedMDSCM, FoldedResNet18
from .runtimes import Deployed

Readout = Callable[[np.ndarray], np.ndarray]
#: Utterances whose errors say what a precision costs.
UTTERANCES = 16


def clip_logits(logits: np.ndarray) -> np.ndarray:
    return logits


def probabilities(logits: np.ndarray) -> np.ndarray:
    """(N, classes) logits of the clips of one utterance to (classes,)."""
    mean = logits.astype(np.float64).mean(0)
    shares = np.exp(mean - mean.max())
    return shares / shares.sum()


@dataclass(eq=False)
class Model:
    """``spec`` gives front end and clip rule, also to the audio-visual encoder, which hears the same clips."""

    name: str
    spec: ModelSpec
    module: Any
    deployed: Deployed
    _truth: dict[bytes, np.ndarray] = field(default_factory=dict)
    _limits: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        return cases.tensors(self.module)

    def clips(self, count: int) -> np.ndarray:
        """(count, channels, frames, bands)."""
        return cases.speech_clips(self.spec, count)

    @property
    def calibration(self) -> np.ndarray:
        return np.concatenate(self.deployed.calibration)

    def truth(self, clips: np.ndarray) -> np.ndarray:
        """Clip logits (N, classes) of (N, ...) clips by the reference in float64."""
        key = clips.tobytes()
        if key not in self._truth:
            exact = copy.deepcopy(self.module).double()
            with torch.inference_mode():
                self._truth[key] = exact(torch.from_numpy(clips).double()[None]).clip_logits[0].numpy()
        return self._truth[key]

    def limit(self, precision: str, readout: Readout = clip_logits, who: str = "peer") -> float:
        """Largest error of the readout of an utterance's clip logits, relative to the readout's scale."""
        if precision == "float32":
            return OURS_FLOAT32 if who == OURS else PEERS_FLOAT32
        key = precision, readout.__name__
        if key not in self._limits:
            clips = cases.as_served(self.spec, self.clips(UTTERANCES * cases.CLIPS))
            plain = plain_logits(precision, self.deployed.folded, clips, self.deployed.calibration)
            pairs = zip(np.split(plain, UTTERANCES), np.split(self.truth(clips), UTTERANCES))
            self._limits[key] = TIMES_PLAIN * max(max_error(readout(p), readout(t)) for p, t in pairs)
        return self._limits[key]

    def check(
        self, precision: str, clips: np.ndarray, readout: Readout = clip_logits, who: str = "peer"
    ) -> Callable[[Any], None]:
        """Of a result that should be the readout of the clip logits."""
        expected, most = readout(self.truth(clips)), self.limit(precision, readout, who)
        return lambda result: assert_close(result, expected, most, readout.__name__.replace("_", " "))


def _model(name: str, spec: ModelSpec, module: Any, folded: Any) -> Model:
    calibration = cases.as_served(spec, cases.speech_clips(spec, 40, cases.CALIBRATION))
    batches = [calibration[i : i + cases.CLIPS] for i in range(0, len(calibration), cases.CLIPS)]
    return Model(name, spec, module, Deployed(folded(module), batches))


@lru_cache(maxsize=1)
def published() -> Model:
    """The published MDSCM with random weights."""
    spec = MEMBERS["mdscm-published"]
    network = dataclasses.replace(spec.network, block_dropout=0.0, encoder_dropout=0.0)
    module = cases.random_weights(
        nn.MDSCM(network, backend="reference"), cases.speech_clips(spec, 60, cases.STATISTICS)
    )
    return _model("mdscm-published", spec, module, FoldedMDSCM)


@lru_cache(maxsize=1)
def shipped() -> Model:
    """The default model with its own weights."""
    spec, tensors, _ = read_model("default")
    module = nn.MDSCM(spec.network, backend="reference").eval().requires_grad_(False)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()}, strict=False)
    return _model("mdscm-small", spec, module, FoldedMDSCM)


@lru_cache(maxsize=1)
def resnet18() -> Model:
    """The audio-visual encoder with the ResNet-18 body and random weights, on log-mel clips."""
    spec = MEMBERS["mdscm-published"]
    inputs = cases.speech_clips(spec, 60, cases.STATISTICS)
    module = cases.random_weights(nn.AVRE(AVRE(body="resnet18")), inputs)
    return _model("resnet18", spec, module, FoldedResNet18)
