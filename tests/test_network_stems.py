"""The network stems of the reference against torch's own modules, over random shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avser_fast import reference
from avser_fast.nn.mdscm import norm_tensors
from avser_fast.testing import assert_close

SHAPES = [(1, 1, 8, 8), (2, 3, 17, 5), (3, 4, 33, 10), (1, 5, 1, 1), (2, 2, 7, 40)]


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, dtype=torch.float64)
    for tensor in norm_tensors(norm):
        tensor.data.uniform_(0.5, 1.5)
    return norm


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_conv_stem(shape: tuple[int, ...], training: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    if training and shape[2:] == (1, 1):
        x = x.repeat(4, 1, 1, 1)
    layers, weights, norms = [], [], []
    for i, o in ((shape[1], 6), (6, 9)):
        conv, norm = nn.Conv2d(i, o, 3, 2, 1, bias=False, dtype=torch.float64), random_norm(o)
        layers += [conv, norm, nn.ReLU()]
        weights.append(conv.weight)
        norms.append([t.clone() for t in norm_tensors(norm)])
    expected = nn.Sequential(*layers).train(training)(x)
    assert_close(reference.conv_stem(x, weights, norms, training=training), expected, 1e-12)
    for ours, layer in zip(norms, layers[1::3]):
        assert_close(ours[2], layer.running_mean, 1e-12, "running mean")  # type: ignore[arg-type]
        assert_close(ours[3], layer.running_var, 1e-12, "running variance")  # type: ignore[arg-type]


class Block(nn.Module):
    """The residual block spelled out in torch modules, with the published in-place ReLU."""

    def __init__(self, i: int, o: int, relu_first: bool):
        super().__init__()
        f64 = {"dtype": torch.float64}
        self.dw1 = nn.Conv2d(i, i, 3, padding=1, groups=i, bias=False, **f64)
        self.pw1 = nn.Conv2d(i, o, 1, bias=False, **f64)
        self.dw2 = nn.Conv2d(o, o, 3, padding=1, groups=o, bias=False, **f64)
        self.pw2 = nn.Conv2d(o, o, 1, bias=False, **f64)
        self.bn1, self.bn2, self.bn3 = random_norm(o), random_norm(o), random_norm(o)
        self.short = nn.Conv2d(i, o, 1, stride=2, **f64)
        first = [nn.ReLU(inplace=True)] if relu_first else []
        self.path = nn.Sequential(
            *first, self.dw1, self.pw1, self.bn1, nn.ReLU(), self.dw2, self.pw2, self.bn2, nn.MaxPool2d(3, 2, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        residual = self.path(x)
        return residual + self.bn3(self.short(x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu_first", [False, True])
def test_dsc_block(shape: tuple[int, ...], relu_first: bool) -> None:
    torch.manual_seed(1)
    block = Block(shape[1], 7, relu_first).eval()
    x = torch.randn(shape, dtype=torch.float64)[:, :, :, :]
    actual = reference.dsc_block(
        x, block.dw1.weight, block.pw1.weight, norm_tensors(block.bn1), block.dw2.weight, block.pw2.weight,
        norm_tensors(block.bn2), block.short.weight, block.short.bias, norm_tensors(block.bn3), relu_first=relu_first,
    )  # fmt: skip
    assert_close(actual, block(x), 1e-12)
    assert actual.shape == (shape[0], 7, (shape[2] + 1) // 2, (shape[3] + 1) // 2)


def test_separable_convolution_is_one_dense_convolution() -> None:
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    depthwise, pointwise = torch.randn(3, 1, 3, 3, dtype=torch.float64), torch.randn(5, 3, 1, 1, dtype=torch.float64)
    dense = pointwise * depthwise.transpose(0, 1)
    assert_close(reference.separable_conv2d(x, depthwise, pointwise)[0], F.conv2d(x, dense, padding=1), 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_cs_attention(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    n, c, h, w = shape
    x, hidden = rng.standard_normal(shape), max(1, c // 2)
    ws, bs = rng.standard_normal((1, 2, 3, 3)), rng.standard_normal(1)
    w1, b1 = rng.standard_normal((hidden, c)), rng.standard_normal(hidden)
    w2, b2 = rng.standard_normal((c, hidden)), rng.standard_normal(c)

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    maps = np.pad(np.stack((x.max(1), x.mean(1)), 1), ((0, 0), (0, 0), (1, 1), (1, 1)))
    response = np.full((n, h, w), bs[0])
    for m in range(2):
        for i in range(3):
            for j in range(3):
                response += ws[0, m, i, j] * maps[:, m, i : i + h, j : j + w]
    after_spatial = x * sigmoid(response)[:, None]
    gates = 0
    for pooled in (after_spatial.mean((2, 3)), after_spatial.max((2, 3))):
        gates = gates + np.maximum(pooled @ w1.T + b1, 0) @ w2.T + b2
    expected = after_spatial * sigmoid(gates)[:, :, None, None]
    tensors = [torch.from_numpy(t) for t in (x, ws, bs, w1, b1, w2, b2)]
    assert_close(reference.cs_attention(*tensors), expected, 1e-12)
    assert_close(reference.cs_attention(*tensors[:3]), after_spatial, 1e-12, "spatial alone")
    assert torch.equal(reference.cs_attention(tensors[0]), tensors[0])


def test_tokens_are_channel_major() -> None:
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    tokens = reference.to_tokens(x)
    assert tokens.shape == (2, 4, 15)
    assert all(tokens[1, t, c * 5 + w] == x[1, c, t, w] for c in range(3) for t in range(4) for w in range(5))


@pytest.mark.parametrize(
    ("n", "tokens", "width", "heads", "hidden"), [(1, 1, 4, 1, 3), (3, 14, 24, 4, 10), (2, 5, 9, 3, 16)]
)
def test_temporal_attention(n: int, tokens: int, width: int, heads: int, hidden: int) -> None:
    layer = nn.TransformerEncoderLayer(width, heads, hidden, 0.0, batch_first=True, dtype=torch.float64)
    for p in layer.parameters():
        p.data.normal_()
    a = layer.self_attn
    modules = (a.out_proj, layer.linear1, layer.linear2, layer.norm1, layer.norm2)
    parts = [a.in_proj_weight, a.in_proj_bias, *(t for m in modules for t in (m.weight, m.bias))]
    x = torch.randn(n, tokens, width, dtype=torch.float64)
    assert_close(reference.temporal_attention(x, *parts, heads=heads), layer(x), 1e-11)
    with pytest.raises(ValueError, match=f"heads: expected a divisor of the width {width}, got 7"):
        reference.temporal_attention(x, *parts, heads=7)


def test_dropout_only_in_training_and_from_the_seed() -> None:
    layer = [torch.randn(s) for s in [(24, 8), (24,), (8, 8), (8,), (5, 8), (5,), (8, 5), (8,), (8,), (8,), (8,), (8,)]]
    x = torch.randn(2, 6, 8)

    def run(seed: int, training: bool) -> Tensor:
        torch.manual_seed(seed)
        return reference.temporal_attention(x, *layer, heads=2, dropout=0.5, training=training)

    assert torch.equal(run(0, False), run(1, False))
    assert torch.equal(run(0, True), run(0, True))
    assert not torch.equal(run(0, True), run(1, True))


def test_emotion_head_and_the_vote_of_clips() -> None:
    tokens = torch.randn(6, 5, 4, dtype=torch.float64)
    weight, bias = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x = tokens.numpy()
    pooled = np.concatenate((x.mean(1), np.sqrt(x.var(1) + 1e-5)), 1)
    features, logits = reference.emotion_head(tokens, weight, bias, pooling="mean_std")
    assert_close(features, pooled, 1e-12)
    assert_close(logits, pooled @ weight.numpy().T + bias.numpy(), 1e-12)
    features, _ = reference.emotion_head(tokens, weight[:, :4], bias)
    assert_close(features, x.mean(1), 1e-12)
    with pytest.raises(ValueError, match="pooling: expected 'mean' or 'mean_std', got 'max'"):
        reference.emotion_head(tokens, weight, bias, pooling="max")
    clips = torch.randn(2, 3, 4)
    clips[0, 2] = float("nan")  # a clip that does not vote must not matter
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert_close(
        reference.average_clips(clips, valid), [clips[0, :2].mean(0).tolist(), clips[1].mean(0).tolist()], 1e-6
    )


def test_gradient_reversal() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64)
    for lam in (0.0, 1.0, 0.3, torch.tensor(0.3, dtype=torch.float64)):
        y = reference.gradient_reversal(x, lam)
        assert torch.equal(y, x) and y.data_ptr() == x.data_ptr()
        (gradient,) = torch.autograd.grad((y**3 * weight).sum(), x, create_graph=True)
        assert_close(gradient, -float(lam) * (3 * x**2 * weight), 1e-12)
        (second,) = torch.autograd.grad(gradient.sum(), x)
        # The reversed gradient is itself a function of y, whose gradient passes the reversal once more.
        assert_close(second, float(lam) ** 2 * (6 * x * weight), 1e-12)


def test_reversal_schedule() -> None:
    assert reference.reversal_schedule(0.0) == 0.0
    assert reference.reversal_schedule(1.0) == pytest.approx(2 / (1 + np.exp(-10)) - 1)
    values = [reference.reversal_schedule(p / 10) for p in range(11)]
    assert values == sorted(values)


def test_domain_head() -> None:
    layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    linears = [layers[0], layers[2], layers[4]]
    assert_close(reference.domain_head(x, [m.weight for m in linears], [m.bias for m in linears]), layers(x), 1e-12)  # type: ignore[misc]


@pytest.mark.parametrize(("batch", "clips", "width", "classes"), [(1, 1, 1, 2), (3, 5, 12, 4), (2, 9, 7, 7)])
def test_fusion_lstm(batch: int, clips: int, width: int, classes: int) -> None:
    features = torch.randn(batch, clips, width, dtype=torch.float64)
    scores = torch.randn(batch, clips, classes, dtype=torch.float64)
    expected, branches = [], []
    for x in (features, scores):
        lstm, out = nn.LSTM(x.shape[2], 6, batch_first=True).double(), nn.Linear(6, classes).double()
        expected.append(out(lstm(x)[0][:, -1]))
        branches.append([lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0, lstm.bias_hh_l0, out.weight, out.bias])
    fused, a, b = reference.fusion_lstm(features, scores, *branches, feature_weight=0.6)
    assert_close(a, expected[0], 1e-12)
    assert_close(b, expected[1], 1e-12)
    assert_close(fused, 0.6 * a + 0.4 * b, 1e-12)


def test_fuse_inputs() -> None:
    f_s, f_v, z_s, z_v = (torch.randn(2, 5, n) for n in (3, 4, 6, 6))
    features, scores = reference.fuse_inputs(f_s, f_v, z_s, z_v)
    assert torch.equal(features[..., :3], f_s) and torch.equal(features[..., 3:], f_v)
    assert torch.equal(scores, torch.where(z_s > z_v, z_s, z_v))
