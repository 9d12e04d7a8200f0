"""How far a contender may be from the float64 reference before it is timed.

float32 is held to a constant, as in the tests.  A lower precision is held to twice the largest error that a plain
implementation of it makes on sixteen utterances: PyTorch's own autocast for bf16, and for int8 the textbook scheme (one
scale per output channel of a weight, one per input tensor, the largest value seen in calibration).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

#: Relative to the scale of the output.
OURS_FLOAT32, PEERS_FLOAT32 = 1e-5, 1e-4
TIMES_PLAIN = 2.0


def simulated_int8(folded: nn.Module, calibration: list[np.ndarray]) -> nn.Module:
    """The textbook int8 of a network of convolutions and linear layers, computed in float32."""
    module = copy.deepcopy(folded)
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    largest = {layer: torch.zeros(()) for layer in layers}

    def watch(layer: Any, arguments: Any) -> None:
        largest[layer] = torch.maximum(largest[layer], arguments[0].abs().max())

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    with torch.no_grad():
        for clips in calibration:
            module(torch.from_numpy(clips))
    for hook in hooks:
        hook.remove()

    def rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (x / scale).round().clamp(-127, 127) * scale

    for layer in layers:
        weight = layer.weight.data
        scale = weight.abs().flatten(1).amax(1).clamp_min(1e-12) / 127
        layer.weight.data = rounded(weight, scale.view(-1, *[1] * (weight.dim() - 1)))
        step = largest[layer] / 127
        layer.register_forward_pre_hook(lambda _, arguments, step=step: (rounded(arguments[0], step),))
    return module


def plain_logits(precision: str, folded: nn.Module, clips: np.ndarray, calibration: list[np.ndarray]) -> np.ndarray:
    """Clip logits (N, classes) of the plain implementation of bf16 or int8."""
    x = torch.from_numpy(clips)
    with torch.inference_mode():
        if precision == "bf16":
            with torch.autocast("cpu", torch.bfloat16):
                return folded(x).float().numpy()
        return simulated_int8(folded, calibration)(x).numpy()
