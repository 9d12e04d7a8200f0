"""The kernels and the whole-model Engine on NumPy arrays; importing it needs NumPy and no torch.

Errors are the classes of ``avser_fast.errors``: InputError for arrays, ConfigError for options, ModelError for weights,
BackendError for ``AVSER_FAST_CPU_ISA``.  The interpreter lock is released while a kernel runs; ``threads`` counts the
caller and changes no bit of a result.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, Any]:
    """How this module was built: compiler, build type, instruction sets, CUDA, versions."""

def supported_isas() -> list[str]:
    """Instruction sets that are compiled in and that this machine has, best last: of scalar, avx2, avx512."""

def cpu_isa() -> str:
    """The one that runs: the best, or the one named by ``AVSER_FAST_CPU_ISA`` (BackendError when it cannot)."""

def log_mel(
    waveform: NDArray[np.int16] | NDArray[np.float32] | NDArray[np.float64],
    *,
    sampling_rate: int = 16000,
    mel_bands: int = 40,
    frame_length: int = 400,
    frame_step: int = 160,
    n_fft: int = 512,
    preemphasis: float = 0.97,
    low_hz: float = 0.0,
    high_hz: float = 8000.0,
    dtype: Literal["float32", "float64"] = "float32",
    threads: int = 1,
) -> NDArray[Any]:
    """Log-mel features (frames, mel_bands) of a 1-D waveform at int16 scale, any stride; see ``reference.log_mel``.

    Frame length and step are samples, ``low_hz`` and ``high_hz`` hertz.  The arithmetic is float64 whatever ``dtype``.
    """

def add_deltas(features: NDArray[np.float32] | NDArray[np.float64], channels: int, window: int = 2) -> NDArray[Any]:
    """(frames, bands) to (channels, frames, bands): static, delta, delta of delta; see ``reference.add_deltas``."""

def clip_table(frames: int, clips: int | None, clip_frames: int, rule: str) -> NDArray[np.int64]:
    """(L, clip_frames) 1-based frame numbers, 0 = padding; see ``reference.clip_table``."""

def frame_clips(
    features: NDArray[np.float32] | NDArray[np.float64], clips: int | None, clip_frames: int, rule: str
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """(channels, frames, bands) to ((L, channels, clip_frames, bands), (L,) which clips vote)."""

def resample(waveform: NDArray[np.float32], from_rate: int, to_rate: int) -> NDArray[np.float32]:
    """(samples,) to (ceil(samples * to_rate / from_rate),), rates 1..384000 hertz; see ``reference.resample``."""

def measure_peak(precision: Literal["float32", "bf16", "int8"], seconds: float = 0.2, threads: int = 1) -> float:
    """Multiply-adds per second of a loop on registers alone, the ceiling of any kernel on this machine.

    0.0 where the running instruction set has no instruction for the precision.  ConfigError for other arguments.
    """

def measure_read(bytes: int, seconds: float = 0.2, threads: int = 1) -> float:
    """Bytes per second read by all threads together, each from ``bytes`` (4096..2^30) of its own, again and again."""

class Engine:
    """The whole forward of one MDSCM in float32 on the CPU; immutable, safe to call from many threads."""

    def __init__(self, spec_json: str, tensors: Mapping[str, NDArray[np.float32]], *, poison: bool = False) -> None:
        """Pack the state dict of ``avser_fast.nn.MDSCM`` for ``json.dumps(ModelSpec.to_dict())``; arrays are copied.

        ``poison`` fills unwritten memory with NaN before every call, for tests.  Raises ConfigError or ModelError
        naming the field or tensor.
        """

    def forward(
        self, clips: NDArray[np.float32], valid: NDArray[np.bool_] | None = None, threads: int = 1
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """(B, L, channels, clip_frames, bands), (B, L) or None: all clips vote, to (probabilities (B, classes),
        clip features (B, L, D), clip logits (B, L, classes)).

        Probabilities are the softmax of the mean logits of the clips that vote, NaN where none does.
        """

    @property
    def isa(self) -> str:
        """Instruction set that this engine runs on."""

def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The kernels' own natural logarithm of positive numbers, for tests."""
