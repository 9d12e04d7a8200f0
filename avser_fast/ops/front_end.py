"""Fake kernels and derivatives of the front end's ops: log_mel, add_deltas, frame_clips, resample.

Their arithmetic is that of the function of the same name in ``avser_fast.reference``, whose derivative is the op's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .schemas import LIBRARY, LOG_MEL_NAMES, autograd, fake

# ---- log_mel


def _frames(samples: Any, frame_length: int, frame_step: int) -> Any:
    """Works on symbolic sizes without deciding which case they are in."""
    return 1 + torch.sym_max(0, (samples - frame_length + frame_step - 1) // frame_step)


@fake("log_mel")
def _(
    waveform: Tensor,
    sampling_rate: int = 16000,
    mel_bands: int = 40,
    frame_length: int = 400,
    frame_step: int = 160,
    n_fft: int = 512,
    preemphasis: float = 0.97,
    low_hz: float = 0.0,
    high_hz: float = 8000.0,
) -> Tensor:
    frames = _frames(waveform.shape[-1], frame_length, frame_step)
    dtype = torch.float64 if waveform.dtype == torch.float64 else torch.float32
    return waveform.new_empty((*waveform.shape[:-1], frames, mel_bands), dtype=dtype)


def _log_mel_backward(grad: Tensor, waveform: Tensor, *options: Any) -> Tensor:
    with torch.enable_grad():
        x = waveform.detach().double().requires_grad_()
        y = reference.log_mel(x, **dict(zip(LOG_MEL_NAMES, options)))
        (dx,) = torch.autograd.grad(y, x, grad.double())
    return dx.to(waveform.dtype)


LIBRARY.impl("log_mel_backward", _log_mel_backward, "CompositeExplicitAutograd")


@fake("log_mel_backward")
def _(grad: Tensor, waveform: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(waveform, memory_format=torch.contiguous_format)


def _log_mel_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.options = inputs[1:]


def _log_mel_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (waveform,) = ctx.saved_tensors
    return (torch.ops.avser_fast.log_mel_backward(grad, waveform, *ctx.options), *([None] * len(ctx.options)))


autograd("log_mel", _log_mel_grad, _log_mel_context)


# ---- add_deltas


@fake("add_deltas")
def _(features: Tensor, channels: int, window: int = 2) -> Tensor:
    return features.new_empty((*features.shape[:-2], channels, *features.shape[-2:]))


LIBRARY.impl("add_deltas", reference.add_deltas, "CUDA")


def _add_deltas_backward(grad: Tensor, window: int) -> Tensor:
    channels = grad.shape[-3]
    with torch.enable_grad():
        x = torch.zeros_like(grad.select(-3, 0)).requires_grad_()  # linear: any point will do
        (dx,) = torch.autograd.grad(reference.add_deltas(x, channels, window), x, grad)
    return dx


LIBRARY.impl("add_deltas_backward", _add_deltas_backward, "CompositeExplicitAutograd")


@fake("add_deltas_backward")
def _(grad: Tensor, window: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-3], *grad.shape[-2:]))


def _add_deltas_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.window = inputs[2]


def _add_deltas_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.avser_fast.add_deltas_backward(grad, ctx.window), None, None


autograd("add_deltas", _add_deltas_grad, _add_deltas_context)


# ---- frame_clips


def _clip_count(frames: Any, clips: int | None, clip_frames: int) -> Any:
    if clips is not None:
        return clips
    return 1 if frames <= clip_frames else 1 - (-(frames - clip_frames) // max(1, clip_frames // 2))


@fake("frame_clips")
def _(features: Tensor, clips: int | None, clip_frames: int, rule: str) -> tuple[Tensor, Tensor]:
    channels, frames, bands = features.shape
    count = _clip_count(frames, clips, clip_frames)
    return features.new_empty((count, channels, clip_frames, bands)), features.new_empty((count,), dtype=torch.bool)


LIBRARY.impl("frame_clips", reference.frame_clips, "CUDA")


def _frame_clips_backward(grad: Tensor, frames: int, clips: int | None, clip_frames: int, rule: str) -> Tensor:
    """Every frame collects the gradients of its copies; frame number 0, the padding, is dropped."""
    table, _ = reference.clip_table(frames, clips, clip_frames, rule)
    channels, bands = grad.shape[1], grad.shape[3]
    total = grad.new_zeros(channels, frames + 1, bands)
    total.index_add_(1, table.flatten().to(grad.device), grad.transpose(0, 1).flatten(1, 2))
    return total[:, 1:].contiguous()


LIBRARY.impl("frame_clips_backward", _frame_clips_backward, "CompositeExplicitAutograd")


@fake("frame_clips_backward")
def _(grad: Tensor, frames: int, clips: int | None, clip_frames: int, rule: str) -> Tensor:
    return grad.new_empty((grad.shape[1], frames, grad.shape[3]))


def _frame_clips_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.frames = inputs[0].shape[1]
    ctx.rule = inputs[1:]
    ctx.mark_non_differentiable(output[1])


def _frame_clips_grad(ctx: Any, grad: Tensor, _valid_grad: Tensor | None) -> tuple[Any, ...]:
    return torch.ops.avser_fast.frame_clips_backward(grad, ctx.frames, *ctx.rule), None, None, None


autograd("frame_clips", _frame_clips_grad, _frame_clips_context)


# ---- resample


@fake("resample")
def _(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    length = -((-waveform.shape[-1] * to_rate) // from_rate)
    return waveform.new_empty((*waveform.shape[:-1], length))


LIBRARY.impl("resample", reference.resample, "CUDA")


def _resample_backward(grad: Tensor, samples: int, from_rate: int, to_rate: int) -> Tensor:
    with torch.enable_grad():
        x = grad.new_zeros((*grad.shape[:-1], samples)).requires_grad_()  # linear: any point will do
        (dx,) = torch.autograd.grad(reference.resample(x, from_rate, to_rate), x, grad)
    return dx


LIBRARY.impl("resample_backward", _resample_backward, "CompositeExplicitAutograd")


@fake("resample_backward")
def _(grad: Tensor, samples: int, from_rate: int, to_rate: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], samples))


def _resample_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.samples = inputs[0].shape[-1]
    ctx.rates = inputs[1:]


def _resample_grad(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return torch.ops.avser_fast.resample_backward(grad, ctx.samples, *ctx.rates), None, None


autograd("resample", _resample_grad, _resample_context)
