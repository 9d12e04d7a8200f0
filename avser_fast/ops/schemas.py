"""Every op of ``torch.ops.avser_fast`` by its schema, in the order of the data flow.

Importing this module needs torch and no compiler.  Fake kernels and derivatives are in ``front_end.py`` and
``network.py``; the arithmetic comes from ``avser_fast._torch_ops`` on the CPU (and CUDA, for log_mel) and from
``avser_fast.triton`` on CUDA, and is that of the function of the same name in ``avser_fast.reference``.

A ``*_backward`` op takes what the forward saved; ``need_input`` and ``need_weights`` say which results are wanted, and
one that is not is an empty tensor.  Maps are (N, C, H, W), channels-last in memory when an op made them.  ``mean,
scale, shift`` are the batch norm that the producer of a map left to its consumer (``reference.rectified_affine``); a
convolution returns its output and the statistics of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

LIBRARY = torch.library.Library("avser_fast", "DEF")

LOG_MEL_NAMES = (
    "sampling_rate",
    "mel_bands",
    "frame_length",
    "frame_step",
    "n_fft",
    "preemphasis",
    "low_hz",
    "high_hz",
)
_LOG_MEL_OPTIONS = (
    "int sampling_rate=16000, int mel_bands=40, int frame_length=400, int frame_step=160, int n_fft=512, "
    "float preemphasis=0.97, float low_hz=0.0, float high_hz=8000.0"
)
_BEFORE = "Tensor? mean, Tensor? scale, Tensor? shift, bool relu"
_OUTPUT = "Tensor grad, Tensor grad_mean, Tensor grad_var, Tensor y, Tensor y_mean"
_PATHS = (
    "Tensor x, Tensor mean, Tensor scale, Tensor shift, "
    "Tensor shortcut, Tensor shortcut_mean, Tensor shortcut_scale, Tensor shortcut_shift, float dropout, Tensor seed"
)
_ATTENTION = (
    "Tensor x, Tensor? spatial_weight, Tensor? spatial_bias, "
    "Tensor? channel_weight1, Tensor? channel_bias1, Tensor? channel_weight2, Tensor? channel_bias2"
)
_LAYER = (
    "Tensor in_weight, Tensor in_bias, Tensor out_weight, Tensor out_bias, "
    "Tensor ff1_weight, Tensor ff1_bias, Tensor ff2_weight, Tensor ff2_bias, "
    "Tensor norm1_weight, Tensor norm1_bias, Tensor norm2_weight, Tensor norm2_bias, "
    "int heads, float dropout, Tensor seed, float eps"
)

SCHEMAS = f"""
log_mel(Tensor waveform, {_LOG_MEL_OPTIONS}) -> Tensor
log_mel_backward(Tensor grad, Tensor waveform, {_LOG_MEL_OPTIONS}) -> Tensor
add_deltas(Tensor features, int channels, int window=2) -> Tensor
add_deltas_backward(Tensor grad, int window) -> Tensor
frame_clips(Tensor features, int? clips, int clip_frames, str rule) -> (Tensor, Tensor)
frame_clips_backward(Tensor grad, int frames, int? clips, int clip_frames, str rule) -> Tensor
resample(Tensor waveform, int from_rate, int to_rate) -> Tensor
resample_backward(Tensor grad, int samples, int from_rate, int to_rate) -> Tensor
strided_conv2d(Tensor x, Tensor weight, Tensor? bias, {_BEFORE}) -> (Tensor y, Tensor y_mean, Tensor y_var)
strided_conv2d_backward({_OUTPUT}, Tensor x, Tensor weight, {_BEFORE}, bool need_input, bool need_weights)
  -> (Tensor x, Tensor weight, Tensor bias, Tensor scale, Tensor shift)
separable_conv2d(Tensor x, Tensor depthwise, Tensor pointwise, {_BEFORE}) -> (Tensor y, Tensor y_mean, Tensor y_var)
separable_conv2d_backward({_OUTPUT}, Tensor x, Tensor depthwise, Tensor pointwise, {_BEFORE},
  bool need_input, bool need_weights) -> (Tensor x, Tensor depthwise, Tensor pointwise, Tensor scale, Tensor shift)
pool_shortcut({_PATHS}) -> Tensor
pool_shortcut_backward(Tensor grad, {_PATHS})
  -> (Tensor x, Tensor scale, Tensor shift, Tensor shortcut, Tensor shortcut_scale, Tensor shortcut_shift)
cs_attention({_ATTENTION}) -> Tensor
cs_attention_backward(Tensor grad, {_ATTENTION})
  -> (Tensor x, Tensor spatial_weight, Tensor spatial_bias,
      Tensor channel_weight1, Tensor channel_bias1, Tensor channel_weight2, Tensor channel_bias2)
temporal_attention(Tensor x, {_LAYER})
  -> (Tensor y, Tensor qkv, Tensor mixed, Tensor sum1, Tensor hidden, Tensor sum2)
temporal_attention_backward(Tensor grad, Tensor x, Tensor qkv, Tensor mixed, Tensor sum1, Tensor hidden, Tensor sum2,
  {_LAYER}, bool need_weights)
  -> (Tensor x, Tensor in_weight, Tensor in_bias, Tensor out_weight, Tensor out_bias,
      Tensor ff1_weight, Tensor ff1_bias, Tensor ff2_weight, Tensor ff2_bias,
      Tensor norm1_weight, Tensor norm1_bias, Tensor norm2_weight, Tensor norm2_bias)
emotion_head(Tensor tokens, Tensor weight, Tensor bias, str pooling, Tensor? statistics)
  -> (Tensor features, Tensor logits)
emotion_head_backward(Tensor grad_features, Tensor grad_logits, Tensor tokens, Tensor features, Tensor weight,
  str pooling) -> (Tensor tokens, Tensor weight, Tensor bias, Tensor statistics)
clip_cross_entropy(Tensor clip_logits, Tensor targets, Tensor? valid) -> Tensor
clip_cross_entropy_backward(Tensor grad, Tensor clip_logits, Tensor targets, Tensor? valid) -> Tensor
gradient_reversal(Tensor(a) x, Tensor lam) -> Tensor(a)
gradient_reversal.Scalar(Tensor(a) x, float lam) -> Tensor(a)
"""


def _define() -> None:
    lines: list[str] = []
    for line in SCHEMAS.strip().splitlines():
        if line.startswith(" "):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    for line in lines:
        LIBRARY.define(line)


_define()


def fake(name: str) -> Callable[[_F], _F]:
    """The decorated function gives the op's output shapes."""
    return torch.library.register_fake(f"avser_fast::{name}", lib=LIBRARY)


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    torch.library.register_autograd(f"avser_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def no_second_derivative(name: str) -> None:
    """Asking for the derivative of the backward op ``name`` is an error that says where it can be had."""

    def backward(ctx: Any, *grads: Any) -> Any:
        stem = name.removesuffix("_backward")
        raise NotImplementedError(
            f"{stem}: expected to be differentiated once, got a second derivative; backend 'reference' has them all"
        )

    autograd(name, backward, lambda ctx, inputs, output: None)


def autocast(name: str, cast: Callable[..., tuple[Any, ...]]) -> None:
    """Under autocast the op gets ``cast(dtype, *arguments)``, dtype being autocast's for the device."""
    op = getattr(torch.ops.avser_fast, name).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def kernel(*arguments: Any, device: str = device) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*cast(torch.get_autocast_dtype(device), *arguments))

        LIBRARY.impl(name, kernel, key)
