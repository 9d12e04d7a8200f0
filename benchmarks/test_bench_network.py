"""The network alone: five clips to probabilities, the same weights in every runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from avser_fast import nn
from avser_fast._engine import Engine
from avser_fast.config import MEMBERS, ModelSpec
from avser_fast.inference.weights import read_model
from avser_fast.testing import assert_close

from .cases import clips
from .compare import Contender, Table, compare
from .peers import network_peers


def _model(name: str) -> tuple[ModelSpec, nn.MDSCM]:
    if name in MEMBERS:
        torch.manual_seed(0)
        return MEMBERS[name], nn.MDSCM(MEMBERS[name].network).eval()
    spec, tensors, _ = read_model(name)
    module = nn.MDSCM(spec.network).eval()
    module.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()}, strict=False)
    return spec, module


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["mdscm-published", "mdscm-small"])
def test_network(benchmark: Any, tables: list[Table], name: str, threads: int) -> None:
    import json

    spec, module = _model(name)
    batch = clips(spec, 1)
    with torch.inference_mode():
        expected = nn.MDSCM(spec.network).double().eval()
        expected.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
        truth = expected(torch.from_numpy(batch).double()).probabilities.numpy()
    state = {k: v.numpy() for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    engine = Engine(json.dumps(spec.to_dict()), state)

    def run() -> Any:
        return engine.forward(batch, None, threads=threads)[0]

    def check(result: Any) -> None:
        assert_close(result, truth, 1e-5, "probabilities")

    peers = network_peers(module, batch, truth, threads)
    case = f"{name}, 1 utterance of 5 clips, float32, {threads} thread{'s' if threads > 1 else ''}"
    table = compare(case, [Contender("avser_fast", run, check), *peers.contenders], peers.missing)
    tables.append(table)
    benchmark.extra_info["ratios"] = {row.name: round(table.ratio(row), 2) for row in table.rows}
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
