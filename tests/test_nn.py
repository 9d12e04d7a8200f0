"""Modules: shapes over the family, the published sizes, masks, training, errors."""

from __future__ import annotations

import math

import pytest
import torch

from avser_fast import config, nn, reference
from avser_fast.errors import ConfigError
from avser_fast.testing import assert_close


@pytest.mark.parametrize(("bands", "features"), [(40, 768), (80, 1280), (128, 2048)])
@pytest.mark.parametrize("channels", [1, 3])
def test_published_members(bands: int, features: int, channels: int) -> None:
    model = nn.MDSCM(mel_bands=bands, in_channels=channels).eval()
    with torch.inference_mode():
        out = model(torch.randn(1, 2, channels, 224, bands))
    assert out.probabilities.shape == (1, 4)
    assert out.features.shape == (1, 2, features)
    assert out.clip_logits.shape == (1, 2, 4)
    assert_close(out.probabilities.sum(), 1.0, 1e-6)


def test_published_size() -> None:
    assert round(sum(p.numel() for p in nn.MDSCM().parameters()) / 1e6, 2) == 6.51
    assert round(sum(p.numel() for p in nn.AVRE().body.parameters()) / 1e6, 1) == 11.2


@pytest.mark.parametrize(
    "fields",
    [
        {"stem": (3,), "blocks": (5,), "attention_reduction": 5, "encoder_layers": 0, "mel_bands": 7, "clip_frames": 9},
        {"stem": (3, 4, 5), "blocks": (6, 7, 8), "attention_reduction": 3, "encoder_heads": 2, "pooling": "mean_std"},
        {"spatial_attention": False, "stem": (8, 9), "blocks": (10, 12), "attention_reduction": 2, "classes": 1},
        {"channel_attention": False, "stem": (8, 9), "blocks": (10, 12), "encoder_layers": 1, "classes": 7},
        {
            "stem": (3,),
            "blocks": (5,),
            "attention_reduction": 5,
            "encoder_layers": 0,
            "statistics": 25,
            "in_channels": 2,
        },
    ],
)
def test_other_members(fields: dict[str, object]) -> None:
    network = config.MDSCM(**fields)  # type: ignore[arg-type]
    model = nn.MDSCM(network).double().eval()
    clips = torch.randn(3, 2, network.in_channels, network.clip_frames, network.mel_bands, dtype=torch.float64)
    with torch.inference_mode():
        out = model(clips)
        tokens = model.body(clips.flatten(0, 1))
    assert tokens.shape == (6, network.tokens, network.token_width)
    assert out.features.shape == (3, 2, network.features)
    assert_close(out.probabilities, out.clip_logits.mean(1).softmax(-1), 1e-12)


def test_the_statistics_path_is_joined_to_the_pooled_tokens() -> None:
    network = config.MDSCM(
        in_channels=3,
        stem=(4,),
        blocks=(8,),
        attention_reduction=4,
        encoder_layers=0,
        statistics=9,
        statistics_hidden=7,
    )
    model = nn.MDSCM(network).double().eval()
    path = model.statistics
    assert path is not None
    for tensor in (path.norm.running_mean, path.norm.running_var, path.norm.weight, path.norm.bias):
        tensor.data.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    clips = torch.randn(2, 3, 3, 224, 40, dtype=torch.float64)
    with torch.inference_mode():
        out = model(clips)
        flat = clips.flatten(0, 1)
        weights = reference.frame_weights(flat, path.gate.weight, path.gate.bias)
        values = path.norm(reference.frame_statistics(path.bands(flat), weights))
        hidden = path.hidden(values).clamp(min=0)
        features = torch.cat((model.body(flat).mean(1), hidden), dim=1)
        logits = model.head(features)
    assert out.features.shape == (2, 3, network.features) and network.features == network.pooled_width + 7
    assert_close(out.features, features.unflatten(0, (2, 3)), 1e-12)
    assert_close(out.clip_logits, logits.unflatten(0, (2, 3)), 1e-12)


def test_only_valid_clips_vote() -> None:
    model = nn.MDSCM(stem=(4, 4), blocks=(8, 8), attention_reduction=4, encoder_layers=0).eval()
    clips = torch.randn(1, 4, 1, 224, 40)
    with torch.inference_mode():
        some = model(clips, torch.tensor([[True, True, False, False]]))
        alone = model(clips[:, :2])
        every = model(clips)
    assert_close(some.probabilities, alone.probabilities, 1e-6)
    assert not torch.allclose(some.probabilities, every.probabilities)


@pytest.mark.parametrize("shape", [(2, 5, 1, 224, 80), (2, 5, 3, 224, 40), (5, 1, 224, 40), (2, 5, 1, 200, 40)])
def test_wrong_clips_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"MDSCM: clips: expected shape \(B, L, 1, 224, 40\), got"):
        nn.MDSCM()(torch.zeros(shape))
    with pytest.raises(TypeError, match="expected a config.MDSCM or its fields, got both"):
        nn.MDSCM(config.MDSCM(), classes=4)


def test_wrong_configurations_are_named() -> None:
    with pytest.raises(ConfigError, match="encoder_heads: expected a divisor of the token width 768, got 5"):
        config.MDSCM(encoder_heads=5)
    with pytest.raises(ConfigError, match="pooling: expected one of"):
        config.MDSCM(pooling="max")
    with pytest.raises(ConfigError, match=r"statistics: expected 0 \(no path\) to 40, the number of bands, got 41"):
        config.MDSCM(statistics=41)
    with pytest.raises(ConfigError, match="statistics_hidden: expected at least 1, got 0"):
        config.MDSCM(statistics_hidden=0)
    with pytest.raises(ConfigError, match="statistics_dropout: expected 0 <= p < 1, got 1"):
        config.MDSCM(statistics_dropout=1)
    with pytest.raises(ConfigError, match="mdscm.statistics: expected 0 in an encoder, got 5"):
        config.AVRE(body="mdscm", mdscm=config.MDSCM(statistics=5))
    with pytest.raises(ConfigError, match="labels: expected 4 names"):
        config.ModelSpec(labels=("a", "b"))
    with pytest.raises(ConfigError, match="std: expected positive values"):
        config.FrontEnd(normalization="global", mean=(0.0,), std=(0.0,))
    with pytest.raises(ConfigError, match="only the keys .* got 'speed'"):
        config.ModelSpec.from_dict({"network": {"speed": 3}})
    with pytest.raises(ConfigError):
        config.ModelSpec.from_dict({"network": {"stem": "wide"}})


def test_a_spec_survives_its_json_form() -> None:
    import json

    front_end = config.FrontEnd(mel_bands=80, channels=2, normalization="global", mean=(1.5, 0.0), std=(2.0, 1.0))
    network = config.MDSCM(mel_bands=80, in_channels=2, stem=(4, 8), blocks=(16,), encoder_layers=0, classes=2)
    spec = config.ModelSpec(("yes", "no"), front_end, config.ClipRule("even", None), network)
    assert config.ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("body", ["resnet18", "mdscm"])
def test_avre(body: str) -> None:
    encoder = nn.AVRE(config.AVRE(body=body, classes=3, mdscm=config.MDSCM(classes=3)))
    clips = torch.randn(2, 3, 1, 224, 40)
    with torch.inference_mode():
        out = encoder.eval()(clips)
    assert out.logits.shape == (2, 3) and out.domain_logits.shape == (2, 1)
    assert out.features.shape == (2, 3, encoder.encoder.features) and out.clip_logits.shape == (2, 3, 3)
    assert_close(out.logits, out.clip_logits.mean(1), 1e-6)
    with pytest.raises(ValueError, match=r"AVRE: clips: expected shape \(B, L, 1, frames, bands\)"):
        encoder(clips[0])


def test_the_domain_gradient_is_reversed_on_its_way_into_the_body() -> None:
    head = nn.DomainHead(6, (5, 4), lam=0.25)
    x = torch.randn(3, 6, requires_grad=True)
    plain = torch.randn(3, 6).copy_(x.detach()).requires_grad_()
    head(x).sum().backward()
    weights, biases = [m.weight for m in head.layers], [m.bias for m in head.layers]  # type: ignore[misc]
    reversed_weights = [w.grad.clone() for w in weights]  # type: ignore[union-attr]
    head.zero_grad()
    reference.domain_head(plain, weights, biases).sum().backward()  # type: ignore[arg-type]
    assert_close(x.grad, -0.25 * plain.grad, 1e-6)  # type: ignore[operator]
    for mine, theirs in zip(reversed_weights, weights):
        assert_close(mine, theirs.grad, 1e-6, "the head's own gradient is not reversed")
    head.reversal.lam = 0.0
    x.grad = None
    head(x).sum().backward()
    assert (x.grad == 0).all()  # type: ignore[union-attr]


def test_fusion() -> None:
    fusion = nn.Fusion(features=10, classes=3, hidden=4)
    out = fusion(torch.randn(2, 5, 10), torch.randn(2, 5, 3))
    assert_close(out.fused, 0.7 * out.a + 0.3 * out.b, 1e-6)
    with pytest.raises(ValueError, match=r"Fusion: scores: expected shape \(B, L, 3\), got \(2, 5, 4\)"):
        fusion(torch.randn(2, 5, 10), torch.randn(2, 5, 4))


def test_training_reaches_every_parameter() -> None:
    model = nn.MDSCM(stem=(4, 4), blocks=(8, 8), attention_reduction=4, encoder_ff=16, pooling="mean_std")
    clips = torch.randn(4, 1, 1, 224, 40)
    loss = torch.nn.functional.cross_entropy(model(clips).clip_logits[:, 0], torch.tensor([0, 1, 2, 3]))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert math.isfinite(float(loss.detach()))
    before = [b.clone() for n, b in model.named_buffers() if n.endswith("running_mean")]
    model.eval()(clips)
    after = [b for n, b in model.named_buffers() if n.endswith("running_mean")]
    assert all(torch.equal(x, y) for x, y in zip(before, after))
