"""Domain-adversarial training on a problem with a known answer.

Utterances are points: one coordinate tells the class in both domains; a second, louder one tells the domain and, in
the source domain only, the class as well.  A network that learns from the source leans on the second and fails on the
target; one whose features may not tell the domain has nothing but the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avser_fast import ops, reference

SIGNAL, NUISANCE, NOISE = 1.2, 2.5, 1.0
DIMENSIONS, FEATURES, WIDTH, COUNT, STEPS = 8, 4, 16, 400, 500
#: Lambda at the end of the schedule.
STRENGTH = 2.0
#: Learning rates of the encoder with its head and of the domain head: the judge must keep up with what it judges.
SLOW, FAST = 3e-3, 2e-2


@dataclass
class Domain:
    x: Tensor
    y: Tensor


def domain(generator: torch.Generator, *, source: bool) -> Domain:
    """COUNT points: x[0] = class, x[1] = domain (and class, in the source), all mixed by a rotation that is fixed."""
    y = torch.randint(0, 2, (COUNT,), generator=generator)
    sign = 2.0 * y - 1.0
    x = NOISE * torch.randn(COUNT, DIMENSIONS, generator=generator)
    x[:, 0] += SIGNAL * sign
    x[:, 1] += NUISANCE * (1.0 + 0.8 * sign if source else -1.0)
    rotation, _ = torch.linalg.qr(torch.randn(DIMENSIONS, DIMENSIONS, generator=torch.Generator().manual_seed(5)))
    return Domain(x @ rotation, y)


def train(seed: int, strength: float) -> tuple[float, float]:
    """(target accuracy, balanced accuracy of a fresh linear probe for the domain) with lambda up to ``strength``."""
    generator = torch.Generator().manual_seed(seed)
    source, target = domain(generator, source=True), domain(generator, source=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Linear(DIMENSIONS, FEATURES)
        emotion = nn.Linear(FEATURES, 2)
        judge = nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    slow = {"params": [*encoder.parameters(), *emotion.parameters()], "weight_decay": 1e-3}
    optimizer = torch.optim.Adam([slow, {"params": judge.parameters()}], betas=(0.5, 0.99))
    lam = torch.zeros(())
    x, y = torch.cat((source.x, target.x)), source.y
    where = torch.cat((torch.zeros(COUNT), torch.ones(COUNT)))
    for step in range(STEPS):
        lam.fill_(strength * reference.reversal_schedule(step / STEPS))
        for group, rate in zip(optimizer.param_groups, (SLOW, FAST)):
            group["lr"] = rate * min(1.0, 2.0 * (1.0 - step / STEPS))
        features = encoder(x)
        told = judge(ops.gradient_reversal(features, lam))[:, 0]
        loss = F.cross_entropy(emotion(features[:COUNT]), y) + F.binary_cross_entropy_with_logits(told, where)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        fresh_source, fresh_target = domain(generator, source=True), domain(generator, source=False)
        accuracy = float((emotion(encoder(fresh_target.x)).argmax(1) == fresh_target.y).double().mean())
        learnt, fresh = encoder(x), encoder(torch.cat((fresh_source.x, fresh_target.x)))
    return accuracy, probe(learnt, where, fresh, where)


def probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Balanced accuracy on other points of a logistic regression fitted to the end on standardised features."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits((x - mean) / std @ weight + bias, y) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        said = (test_x - mean) / std @ weight + bias > 0
    return float(torch.stack([(said[test_y == value] == bool(value)).double().mean() for value in (0, 1)]).mean())


def test_the_probe_tells_domains_apart_and_knows_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (4000,), generator=generator).float()
    x = torch.randn(4000, 3, generator=generator)
    assert abs(probe(x[:2000], y[:2000], x[2000:], y[2000:]) - 0.5) < 0.04
    x[:, 2] += 4.0 * y
    assert probe(x[:2000], y[:2000], x[2000:], y[2000:]) > 0.95


@pytest.mark.parametrize("seed", range(3))
def test_reversal_hides_the_domain_and_helps_the_target(seed: int) -> None:
    plain_accuracy, plain_probe = train(seed, 0.0)
    accuracy, found = train(seed, STRENGTH)
    figures = f"accuracy {plain_accuracy:.3f} -> {accuracy:.3f}, probe {plain_probe:.3f} -> {found:.3f}"
    assert plain_probe >= 0.8, figures
    assert found <= 0.6, figures
    assert accuracy >= plain_accuracy + 0.1, figures
