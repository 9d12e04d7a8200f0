"""The kernels and the whole-model Engine on NumPy arrays; importing it needs NumPy and no torch.

Errors are the classes of ``avser_fast.errors``: InputError for arrays, ConfigError for options, ModelError for weights,
BackendError for ``AVSER_FAST_CPU_ISA``.  The interpreter lock is released while a kernel runs; ``threads`` counts the
caller and changes no bit of a result.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, Any]:
    """How this module was built: compiler, build type, instruction sets, CUDA, versions."""

def supported_isas() -> list[str]:
    """Instruction sets that are compiled in and that this machine has, best last: of scalar, avx2, avx512,
    avx512_vnni, avx512_bf16."""

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
    vtlp: float = 1.0,
    vtlp_high_hz: float = 4800.0,
) -> NDArray[Any]:
    """Log-mel features (frames, mel_bands) of a 1-D waveform at int16 scale, any stride; see ``reference.log_mel``.

    Frame length and step are samples, ``low_hz`` and ``high_hz`` hertz.  The arithmetic is float64 whatever ``dtype``.
    ``vtlp`` (0.5..2) other than 1 warps the mel filters; ``vtlp_high_hz`` is then below half the sampling rate.
    """

def add_deltas(features: NDArray[np.float32] | NDArray[np.float64], channels: int, window: int = 2) -> NDArray[Any]:
    """(frames, bands) to (channels, frames, bands): static, delta, delta of delta; see ``reference.add_deltas``."""

def normalize(
    features: NDArray[np.float32],
    rule: str,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    channels: int | None = None,
) -> NDArray[np.float32]:
    """(planes, frames, bands), the shape is kept; ``rule`` and its values as in ``config.FrontEnd``.

    The first ``channels`` planes are normalised, all by default; the others are copied.

    See ``reference.normalize``.
    """

def clip_table(frames: int, clips: int | None, clip_frames: int, rule: str) -> NDArray[np.int64]:
    """(L, clip_frames) 1-based frame numbers, 0 = padding; see ``reference.clip_table``."""

def frame_clips(
    features: NDArray[np.float32] | NDArray[np.float64], clips: int | None, clip_frames: int, rule: str
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """(channels, frames, bands) to ((L, channels, clip_frames, bands), (L,) which clips vote)."""

def resample(waveform: NDArray[np.float32], from_rate: int, to_rate: int) -> NDArray[np.float32]:
    """(samples,) to (ceil(samples * to_rate / from_rate),), rates 1..384000 hertz; see ``reference.resample``."""

def read_files(paths: Sequence[bytes], limit: int) -> list[NDArray[np.uint8] | None]:
    """The bytes of regular files, in order, as many as there are until they are ``limit`` bytes together.

    None for what is no regular file of 1..``limit`` bytes that can be read.
    """

def at_rate(waveform: NDArray[np.float32], from_rate: int, to_rate: int) -> NDArray[np.int16] | NDArray[np.float32]:
    """``resample``, as int16 where that loses nothing."""

class Decoder:
    """Whole wav and FLAC files decoded by a libsndfile that this process has loaded: the addresses of its functions."""

    def __init__(
        self, *, sf_open_virtual: int, sf_readf_short: int, sf_readf_float: int, sf_error: int, sf_close: int
    ) -> None: ...
    def decode(
        self, files: Sequence[NDArray[np.uint8]], sampling_rate: int
    ) -> list[tuple[NDArray[np.int16] | NDArray[np.float32], int] | None]:
        """Of the bytes of every file its mono waveform (n,) at ``sampling_rate``, as ``at_rate`` gives it, and the
        rate of the file.

        None for another format, for what is damaged, longer than 2^23 samples, not of 1 or 2 channels, outside of
        4000..192000 hertz or of [-1, 1].
        """

def front_end(
    waveforms: Sequence[NDArray[np.int16] | NDArray[np.float32]],
    *,
    channels: int = 1,
    delta_window: int = 2,
    sampling_rate: int = 16000,
    mel_bands: int = 40,
    frame_length: int = 400,
    frame_step: int = 160,
    n_fft: int = 512,
    preemphasis: float = 0.97,
    low_hz: float = 0.0,
    high_hz: float = 8000.0,
    vtlp: float = 1.0,
    voice: bool = False,
    threads: int = 1,
) -> list[NDArray[np.float32]]:
    """``reference.log_mel``, ``add_deltas`` and, if wanted, ``voice`` of every waveform: (planes, frames, mel_bands).

    Waveforms are contiguous, at int16 scale; with ``voice`` ConfigError unless ``n_fft`` holds a frame and the longest
    period.
    """

def measure_peak(precision: Literal["float32", "bf16", "int8"], seconds: float = 0.2, threads: int = 1) -> float:
    """Multiply-adds per second of a loop on registers alone, the ceiling of any kernel on this machine.

    0.0 where the running instruction set has no instruction for the precision.  ConfigError for other arguments.
    """

def measure_read(bytes: int, seconds: float = 0.2, threads: int = 1) -> float:
    """Bytes per second read by all threads together, each from ``bytes`` (4096..2^30) of its own, again and again."""

class Engine:
    """The whole forward of one MDSCM on the CPU; immutable, safe to call from many threads."""

    def __init__(
        self,
        spec_json: str,
        tensors: Mapping[str, NDArray[np.float32]],
        *,
        precision: Literal["float32", "bf16", "int8"] = "float32",
        calibration: Mapping[str, NDArray[np.float32]] | None = None,
        stop_after: str = "",
        poison: bool = False,
    ) -> None:
        """Pack the state dict of ``avser_fast.nn.MDSCM`` for ``json.dumps(ModelSpec.to_dict())``; arrays are copied.

        ``precision`` is that of the products; an instruction set without instructions for it computes them in wider
        ones.  int8, and no other, needs the ``calibration`` of a float32 engine.  ``stop_after``, one of ``stems()``,
        makes ``forward`` return what that stem makes, for debugging.  ``poison`` fills unwritten memory with NaN before
        every call, for tests.  Raises ConfigError or ModelError naming the field, tensor or range.
        """

    def forward(self, clips: NDArray[np.float32], valid: NDArray[np.bool_] | None = None, threads: int = 1) -> Any:
        """(B, L, channels, clip_frames, bands), (B, L) or None: all clips vote, to (probabilities (B, classes),
        clip features (B, L, D), clip logits (B, L, classes)), float32.

        Probabilities are the softmax of the mean logits of the clips that vote, NaN where none does.  In bf16 and int8
        a clip that holds NaN or infinity has NaN in every output.  With ``stop_after`` one array instead: (B, L,
        channels, height, width) of a convolution or the attention, (B, L, tokens, width) of an encoder layer.
        """

    def calibrate(self, clips: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """The range of every value that int8 rounds, measured on clips: name -> (2, channels), lowest and highest.

        float32 engines only; clips as in ``forward``, finite, at least one.
        """

    def stems(self) -> list[str]:
        """What ``stop_after`` may name: conv_stem, dsc_block.i, cs_attention, temporal_attention.i.

        A dsc_block that another one follows is given rectified, as its follower reads it.
        """

    @property
    def precision(self) -> str:
        """float32, bf16 or int8."""

    @property
    def isa(self) -> str:
        """Instruction set that this engine runs on."""

class SpeechModel:
    """The whole way in one call, from a waveform to scores: what ``Recognizer`` does on the engine, in C++.

    Immutable, safe to call from many threads.  ``tensors`` are float32, named as in the state dict of ``nn.MDSCM``, and
    copied; ``spec_json`` is ``json.dumps(ModelSpec.to_dict())``.  ``precision``: float32, bf16 or int8, which needs
    ``calibration`` as in ``Engine``.
    """

    def __init__(
        self,
        spec_json: str,
        tensors: Mapping[str, NDArray[np.float32]],
        *,
        precision: str = "float32",
        calibration: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None: ...
    @staticmethod
    def open(path: str | os.PathLike[str], *, precision: str = "float32") -> SpeechModel:
        """A model file; ModelError, one sentence that names it, for anything else.  int8 needs the ranges in the file
        (``avser-fast convert``)."""

    def run(
        self,
        waveform: NDArray[np.int16] | NDArray[np.float32],
        sampling_rate: int | None = None,
        *,
        threads: int = 1,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
        """1-D samples at int16 scale, at the model's rate unless ``sampling_rate`` says another, to probabilities (K,),
        features (L, D) and logits (L, K) of the clips that vote, and what each holds: frames (L, 2) and seconds (L, 2),
        begin and end, all zero for padding alone.
        """

    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def sampling_rate(self) -> int:
        """Of the front end, in hertz."""

class ResNet18:
    """The ResNet-18 audio-visual encoder with its emotion classifier; immutable, safe to call from many threads."""

    def __init__(
        self,
        tensors: Mapping[str, NDArray[np.float32]],
        *,
        in_channels: int = 1,
        classes: int = 4,
        precision: str = "float32",
        poison: bool = False,
    ) -> None:
        """Pack the state dict of ``avser_fast.nn.AVRE(body="resnet18")``; the domain classifier is left out.

        ``precision``: float32 or bf16.  Raises ConfigError or ModelError naming the argument or tensor.
        """

    def forward(
        self, clips: NDArray[np.float32], valid: NDArray[np.bool_] | None = None, threads: int = 1
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """(B, L, channels, height, width), log-mel clips or faces of any size, to (probabilities (B, classes), clip
        features f_v (B, L, 512), clip logits (B, L, classes)); ``valid`` as in ``Engine.forward``."""

    @property
    def precision(self) -> str: ...
    @property
    def isa(self) -> str: ...

class Fusion:
    """Fusion of clip features and clip logits by two LSTMs (section 2.3), float32; safe to call from many threads."""

    def __init__(
        self,
        tensors: Mapping[str, NDArray[np.float32]],
        *,
        features: int = 1280,
        classes: int = 4,
        hidden: int = 128,
        feature_weight: float = 0.7,
        poison: bool = False,
    ) -> None:
        """Pack the state dict of ``avser_fast.nn.Fusion``."""

    def forward(
        self, features: NDArray[np.float32], scores: NDArray[np.float32], threads: int = 1
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """(B, L, D) and (B, L, classes) to the logits (fused, branch a, branch b), each (B, classes)."""

def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The kernels' own natural logarithm of positive numbers, for tests."""

class GpuModel:
    """A network's whole forward on an NVIDIA GPU; immutable, safe to call from many threads.  An utterance's outputs
    have the same bits alone, in any batch and at any position.  Only where the build had nvcc."""

    def forward(
        self, clips: NDArray[Any], valid: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """clips (B, L, channels, frames, bands), valid (B, L) bool (None: every clip votes) -> probabilities
        (B, classes), features (B, L, D), clip_logits (B, L, classes); InputError, BackendError."""

    def forward_on_device(
        self,
        clips: int,
        valid: int,
        batch: int,
        count: int,
        probabilities: int,
        features: int,
        logits: int,
        stream: int,
    ) -> None:
        """The same between addresses in this GPU's memory, float32 and contiguous (valid: bytes, or 0), queued on a
        cudaStream_t without waiting; may be recorded into a CUDA graph."""

    def run_steps(
        self,
        clips: int,
        batch: int,
        count: int,
        probabilities: int,
        features: int,
        logits: int,
        begin: int,
        end: int,
        stream: int,
    ) -> None:
        """For measurements: steps [begin, end) of ``forward_on_device``, every clip voting.

        ``begin == end`` is one launch that does nothing.  Steps before ``begin`` must have been the last call on that
        stream, for the same batch: calls of one size share the memory in which they leave activations.  InputError
        where they leave none, since a team carries clips in turn or a recorded graph gives every call memory of its
        own, and outside of the steps.
        """

    def stages(self) -> list[dict[str, Any]]:
        """Of every step: ``name``; ``flops`` of a clip, 2 per multiply-add of products as they are defined;
        ``weight_bytes``, read once; ``read_bytes`` and ``write_bytes`` of a clip's activations, each counted once.

        The statistics path runs within the first step and is counted there.
        """

    def warm_up(self, batch: int, count: int) -> None:
        """Makes the memory and the graph for batches of this size before the first call."""
    @property
    def precision(self) -> str: ...
    def schedule(self, batch: int, count: int) -> dict[str, int | bool]: ...
    @property
    def device_name(self) -> str: ...

class GpuEngine(GpuModel):
    """One MDSCM.  precision: float32, tf32, bf16, fp16 or fp8; ``team``, ``group`` and ``staged`` say how thread blocks
    share the clips (team 0: chosen by the batch), ``through_memory`` that no map stays on chip, ``direct_weights`` that
    no weights come ahead of their stages.  BackendError where there is no such GPU, ConfigError, ModelError."""

    def __init__(
        self,
        spec_json: str,
        tensors: Mapping[str, NDArray[Any]],
        *,
        precision: str = "float32",
        device: int = 0,
        team: int = 0,
        group: int = 1,
        staged: bool = False,
        through_memory: bool = False,
        direct_weights: bool = False,
        poison: bool = False,
    ) -> None: ...

class GpuResNet18(GpuModel):
    """The ResNet-18 audio-visual encoder for clips of one size; as ``GpuEngine``, without fp8."""

    def __init__(
        self,
        tensors: Mapping[str, NDArray[Any]],
        *,
        in_channels: int = 1,
        height: int = 224,
        width: int = 40,
        classes: int = 4,
        precision: str = "float32",
        device: int = 0,
        team: int = 0,
        group: int = 1,
        staged: bool = False,
        poison: bool = False,
    ) -> None: ...

class GpuFusion:
    """Fusion of clip features and clip logits by two LSTMs on a GPU, float32."""

    def __init__(
        self,
        tensors: Mapping[str, NDArray[Any]],
        *,
        features: int = 1280,
        classes: int = 4,
        hidden: int = 128,
        feature_weight: float = 0.7,
        device: int = 0,
    ) -> None: ...
    def forward(
        self, features: NDArray[Any], scores: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """features (B, L, D), scores (B, L, classes) -> fused, a, b, each (B, classes) logits."""

def gpu_info(device: int = 0) -> dict[str, Any]:
    """name, capability, multiprocessors, shared_bytes, emulated; BackendError where there is none that can be used."""
