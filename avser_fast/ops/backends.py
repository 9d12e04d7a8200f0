"""Who computes the network's ops: one table that says what each backend can run, and why it cannot run the rest."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BackendError

#: Why ``avser_fast._torch_ops`` could not be loaded; None when it was.
load_error: Exception | None = None
try:
    from .. import _torch_ops  # noqa: F401  (importing it registers the implementations)
except ImportError as error:  # kept and shown by the first op that is called
    load_error = error

_HAS_TRITON = importlib.util.find_spec("triton") is not None
#: Triton's interpreter runs kernels on the CPU: they then answer for CPU tensors instead of the compiled ones.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def require_compiled(op: str) -> None:
    if load_error is not None:
        raise BackendError(
            f"avser_fast.ops.{op}: expected the compiled module avser_fast._torch_ops, "
            f"but loading it failed under torch {torch.__version__}: {load_error}"
        ) from load_error


@dataclass(frozen=True)
class Backend:
    """What a backend takes: devices and element types of the maps (statistics and norms are float32 in all), and the
    tokens of a clip in temporal_attention (None: any number)."""

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    tokens: int | None = None


TABLE = {
    "cpu": Backend(() if INTERPRETED else ("cpu",), (torch.float32, torch.bfloat16)),
    "triton": Backend(
        ("cuda", "cpu") if INTERPRETED else ("cuda",), (torch.float32, torch.bfloat16, torch.float16), tokens=128
    ),
}
#: Compute capability that the Triton kernels are compiled and tested for at least.
LEAST_CAPABILITY = (8, 0)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def effective_dtype(x: Tensor) -> torch.dtype:
    """The element type that an op will see: autocast's where it is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _missing(backend: str, x: Tensor) -> str | None:
    if backend == "cpu":
        return None if load_error is None else f"the compiled module, which does not load ({load_error})"
    if not _HAS_TRITON:
        return "the package triton, which is not installed"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        found = ".".join(map(str, torch.cuda.get_device_capability(x.device)))
        return f"a GPU of compute capability {least} or newer, got {found}"
    return None


def why_not(backend: str, x: Tensor, tokens: int = 0) -> str | None:
    """Why ``backend`` ("cpu" or "triton") cannot run the network's ops on maps like x, in one sentence, or None.

    tokens: of a clip, where temporal_attention is among the ops.
    """
    case = TABLE[backend]
    if not case.devices:
        return f"backend '{backend}': expected TRITON_INTERPRET unset (Triton's interpreter answers for CPU tensors)"
    if x.device.type not in case.devices:
        return f"backend '{backend}': expected tensors on {' or '.join(case.devices)}, got {x.device.type}"
    dtype = effective_dtype(x)
    if dtype not in case.dtypes:
        return f"backend '{backend}': expected {_names(case.dtypes)}, got {_names((dtype,))}"
    if case.tokens is not None and tokens > case.tokens:
        return f"backend '{backend}': temporal_attention: expected at most {case.tokens} tokens, got {tokens}"
    missing = _missing(backend, x)
    return None if missing is None else f"backend '{backend}': expected {missing}"


def choose(backend: str, x: Tensor, tokens: int = 0) -> str:
    """The backend that runs maps like x: the one asked for, or for "auto" the first that can, the reference last.

    Raises BackendError with ``why_not``'s sentence for one that was asked for and cannot.
    """
    if backend == "auto":
        return next((name for name in TABLE if why_not(name, x, tokens) is None), "reference")
    if backend == "reference":
        return backend
    if backend not in TABLE:
        raise BackendError(f"backend: expected auto, reference, {' or '.join(TABLE)}, got {backend!r}")
    reason = why_not(backend, x, tokens)
    if reason is not None:
        raise BackendError(reason)
    return backend


def check(op: str, x: Tensor, tokens: int = 0) -> None:
    """Raises BackendError when neither backend can run ``op`` on maps like x."""
    reasons = [why_not(name, x, tokens) for name, case in TABLE.items() if x.device.type in case.devices]
    if None not in reasons:
        words = "; ".join(r for r in reasons if r) or f"no backend has kernels for {x.device.type} tensors"
        raise BackendError(f"avser_fast.ops.{op}: {words} (avser_fast.reference.{op} runs everywhere)")
