"""What precision int8 is, in float64: values rounded to 256 steps of their calibrated range, weights to 255 steps per
output channel; what the attention multiplies with itself to bf16, the values in steps of what is mixed of them;
everything else exact.  The engine computes the same in integers, bf16 and float32."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avser_fast import nn, reference
from avser_fast.config import MDSCM

EPSILON = 1e-5  # of batch norms


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().double()


class Int8Scheme:
    """``stems()`` of the engine and the outputs of the network, by the rounding rules alone."""

    def __init__(self, network: MDSCM, tensors: dict[str, np.ndarray], calibration: dict[str, np.ndarray]) -> None:
        self.network = network
        self.module = nn.MDSCM(network).double().eval()
        self.module.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
        self.tensors = {k: torch.from_numpy(v).double() for k, v in tensors.items()}
        self.ranges = {k: torch.from_numpy(v).double() for k, v in calibration.items()}
        rows, channels = network.token_width // network.blocks[-1], network.blocks[-1]
        # The engine keeps a token's mel rows apart, the published order its channels.
        self.places = torch.tensor([i % rows * channels + i // rows for i in range(network.token_width)])

    def steps(self, name: str, rectified: bool, tokens: bool = False) -> tuple[Tensor, Tensor]:
        """Size of a step and the step that is 0, by channel."""
        low, high = self.ranges[name]
        if tokens:
            low, high = low[self.places], high[self.places]
        low = torch.zeros_like(low) if rectified else low.clamp(max=0)
        size = ((high.clamp(min=0) - low) / 255).clamp(min=1e-12)
        return size, torch.round(-low / size)

    def rounded(self, x: Tensor, steps: tuple[Tensor, Tensor], axis: int) -> Tensor:
        shape = [-1 if i == axis % x.dim() else 1 for i in range(x.dim())]
        size, zero = (s.view(shape) for s in steps)
        return (torch.round(x / size + zero).clamp(0, 255) - zero) * size

    @staticmethod
    def weights(matrix: Tensor, inputs: Tensor) -> Tensor:
        """(n, k) rounded by row, after each column was multiplied by the step of its input."""
        scaled = matrix * inputs
        most = scaled.abs().amax(1, keepdim=True)
        size = torch.where(most > 0, most / 127, 1.0)
        return torch.round(scaled / size) * size / inputs

    def folded(self, conv: str, norm: str) -> tuple[Tensor, Tensor]:
        t = self.tensors
        weight = t[conv + ".weight"]
        scale = t[norm + ".weight"] / torch.sqrt(t[norm + ".running_var"] + EPSILON)
        bias = t.get(conv + ".bias", torch.zeros(len(weight), dtype=torch.float64))
        return weight * scale.view(-1, 1, 1, 1), (bias - t[norm + ".running_mean"]) * scale + t[norm + ".bias"]

    def conv(self, x: Tensor, conv: str, norm: str, inputs: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
        weight, bias = self.folded(conv, norm)
        columns = inputs.repeat_interleave(weight[0, 0].numel())
        weight = self.weights(weight.flatten(1), columns).view_as(weight)
        return F.conv2d(x, weight, bias, stride, padding)

    def depthwise(self, x: Tensor, name: str) -> Tensor:
        """Taps rounded by channel; nine of one channel meet the same step, which does not change that."""
        weight = self.tensors[name + ".weight"]
        taps = self.weights(weight.flatten(1), torch.ones(9, dtype=torch.float64)).view_as(weight)
        return F.conv2d(x, taps, padding=1, groups=x.shape[1])

    def linear(self, x: Tensor, name: str, inputs: Tensor) -> Tensor:
        return F.linear(x, self.weights(self.tensors[name + ".weight"], inputs), self.tensors[name + ".bias"])

    def block(self, i: int, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        name, value = f"body.blocks.{i}.", f"dsc_block.{i}"
        mixed1 = self.steps(value + ".depthwise1", False)
        hidden = self.steps(value + ".hidden", True)
        mixed2 = self.steps(value + ".depthwise2", False)
        y = self.depthwise(x, name + "depthwise1")
        y = self.conv(self.rounded(y, mixed1, 1), name + "pointwise1", name + "norm1", mixed1[0])
        y = self.rounded(y, hidden, 1)
        y = self.depthwise(y, name + "depthwise2")
        y = self.conv(self.rounded(y, mixed2, 1), name + "pointwise2", name + "norm2", mixed2[0])
        y = F.max_pool2d(y, 3, 2, 1) + self.conv(x, name + "shortcut", name + "shortcut_norm", inputs, 2)
        if i + 1 == len(self.network.blocks):
            return y, inputs
        out = self.steps(value, True)
        return self.rounded(y, out, 1), out[0]

    def encoder_layer(self, i: int, x: Tensor) -> Tensor:
        name, value, t = f"body.encoder.{i}.", f"temporal_attention.{i}.", self.tensors
        n, tokens, width = x.shape
        heads = self.network.encoder_heads
        steps = self.steps(value + "input", False, tokens=True)
        q, k, v = self.linear(self.rounded(x, steps, -1), name + "qkv", steps[0]).chunk(3, -1)
        steps = self.steps(value + "mixed", False)
        q, k, v = (bf16(x).view(n, tokens, heads, -1).transpose(1, 2) for x in (q, k, v / steps[0]))
        weights = bf16(torch.softmax(q @ k.transpose(2, 3) / (width // heads) ** 0.5, -1))
        mixed = (weights @ v).transpose(1, 2).reshape(n, tokens, width) * steps[0]
        x = x + self.linear(self.rounded(mixed, steps, -1), name + "out", steps[0])
        x = F.layer_norm(x, (width,), t[name + "norm1.weight"], t[name + "norm1.bias"])
        steps = self.steps(value + "norm1", False, tokens=True)
        hidden = self.linear(self.rounded(x, steps, -1), name + "ff1", steps[0])
        steps = self.steps(value + "hidden", True)
        x = x + self.linear(self.rounded(hidden, steps, -1), name + "ff2", steps[0])
        return F.layer_norm(x, (width,), t[name + "norm2.weight"], t[name + "norm2.bias"])

    def run(self, clips: np.ndarray) -> dict[str, np.ndarray]:
        """Every stem, then ``features`` and ``clip_logits``, each (B, L, ...)."""
        batch = clips.shape[:2]
        x = torch.from_numpy(clips).double().flatten(0, 1)
        path, out = self.module.statistics, {}
        hidden = None
        if path is not None:  # the statistics are not rounded
            out["frame_statistics"], hidden = path.measure(x), path(x)
        inputs = torch.ones(self.network.in_channels, dtype=torch.float64)
        for i in range(len(self.network.stem)):
            conv, norm = f"body.conv_stem.convs.{i}", f"body.conv_stem.norms.{i}"
            if i == 0:  # the clip and its weights are not rounded
                x = F.conv2d(x, *self.folded(conv, norm), stride=2, padding=1)
            else:
                x = self.conv(x, conv, norm, inputs, 2, 1)
            steps = self.steps(f"conv_stem.{i}", True)
            x, inputs = self.rounded(x, steps, 1), steps[0]
        out["conv_stem"] = x
        for i in range(len(self.network.blocks)):
            x, inputs = self.block(i, x, inputs)
            out[f"dsc_block.{i}"] = x
        out["cs_attention"] = x = self.module.body.attention(x)
        x = reference.to_tokens(x)
        for i in range(self.network.encoder_layers):
            out[f"temporal_attention.{i}"] = x = self.encoder_layer(i, x)
        head = self.module.head
        out["features"], out["clip_logits"] = reference.emotion_head(
            x, head.weight, head.bias, pooling=self.network.pooling, statistics=hidden
        )
        return {name: value.detach().unflatten(0, batch).numpy() for name, value in out.items()}
