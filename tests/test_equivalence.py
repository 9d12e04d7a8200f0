"""The fused ops train as the reference does: the short form of ``python -m python_training.equivalence``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_corpus import SPEAKERS, two_per_class

from avser_fast import nn
from avser_fast.ops import backends
from python_training import equivalence
from python_training.data import PreparedCorpus, shipped
from python_training.data.emodb import read_emodb
from python_training.equivalence import FUSED, REFERENCES, compare, judge, members, train_steps

pytestmark = pytest.mark.skipif(backends.INTERPRETED, reason="minutes in the interpreter")
STEPS = 30


def _split(corpus: PreparedCorpus) -> tuple[PreparedCorpus, list[int], list[int]]:
    return corpus, two_per_class(corpus, SPEAKERS[1:]), two_per_class(corpus, SPEAKERS[:1])


@pytest.mark.parametrize("name", members())
def test_thirty_steps(name: str, prepared_emodb: PreparedCorpus) -> None:
    settings = members()[name]
    settings = dataclasses.replace(settings, optimisation=dataclasses.replace(settings.optimisation, batch_size=8))
    clips = torch.zeros(1, 3, settings.network.clip_frames, settings.network.mel_bands)
    assert backends.choose(nn.MDSCM(settings.network).backend, clips) == "cpu", "two references would be compared"
    result = compare(settings, *_split(prepared_emodb), STEPS)
    assert result["within"], json.dumps(result["windows"])
    curves = {run: values["losses"] for run, values in result["runs"].items()}
    assert list(curves) == [FUSED, *REFERENCES] and all(len(c) == STEPS for c in curves.values())
    assert curves[FUSED] not in [c for n, c in curves.items() if n != FUSED], "the fused ops are the reference's"
    assert abs(curves[FUSED][0] - curves["reference, contiguous"][0]) < 1e-5
    assert sum(curves[FUSED][-5:]) < sum(curves[FUSED][:5]), "nothing was learnt"


def _runs(fused: float, drift: float) -> dict[str, dict[str, Any]]:
    names = [FUSED, *REFERENCES]
    off = dict(zip(names, (fused, 0.0, drift, drift / 2)))
    return {n: {"losses": [1.0 + o * i for i in range(60)], "ua": 0.5} for n, o in off.items()}


def test_a_curve_further_off_is_seen() -> None:
    """Four spreads away is too far, one is not, and neither is anything but rounding where the reference has none."""
    assert judge(_runs(fused=1e-4, drift=1e-4))["within"]
    far = judge(_runs(fused=4e-4, drift=1e-4))
    assert not far["within"] and far["windows_within"] == 0
    assert not judge(_runs(fused=1e-4, drift=0.0))["within"]


def test_a_wrong_gradient_is_seen(prepared_emodb: PreparedCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """One gradient of the network that points a little elsewhere (AdamW would not notice one that is too long), seen
    before rounding has made the references themselves part."""
    settings = members()["mdscm-small"]
    settings = dataclasses.replace(settings, optimisation=dataclasses.replace(settings.optimisation, batch_size=8))
    sets = _split(prepared_emodb)
    runs = {
        name: train_steps(settings, *sets, 3, fused=False, layout=layout, onednn=onednn)
        for name, (layout, onednn) in REFERENCES.items()
    }
    plain = nn.MDSCM.__init__

    def wrong(self: nn.MDSCM, *arguments: Any, **keywords: Any) -> None:
        plain(self, *arguments, **keywords)
        self.body.blocks[0].pointwise2.weight.register_hook(lambda grad: grad + grad.roll(1, 0))  # type: ignore[union-attr]

    monkeypatch.setattr(nn.MDSCM, "__init__", wrong)
    runs[FUSED] = train_steps(settings, *sets, 3, fused=True)
    assert not judge(runs)["within"]


def test_command_line(
    emodb: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "corpus"
    data.mkdir()
    for path in [p for p in sorted(emodb.iterdir()) if p.name[:2] in ("03", "08")][::8]:
        (data / path.name).symlink_to(path)
    monkeypatch.setitem(shipped.SHIPPED, "emodb4", lambda _: read_emodb(data))
    path = tmp_path / "new" / "equivalence.json"
    code = equivalence.main(["--steps", "2", "--output", str(path), "--prepared", str(tmp_path)])
    content = json.loads(path.read_text(encoding="utf-8"))
    assert code == (0 if all(n["within"] for n in content["networks"].values()) else 1)
    assert content["steps"] == 2 and set(content["networks"]) == set(members())
    for network in content["networks"].values():
        assert {len(run["losses"]) for run in network["runs"].values()} == {2}
    assert "held-out UA" in capsys.readouterr().out


def test_the_kept_result() -> None:
    """What the documentation may say was measured is what the file says."""
    if not equivalence.RESULT.exists():
        pytest.skip("not run yet")
    content = json.loads(equivalence.RESULT.read_text(encoding="utf-8"))
    for network in content["networks"].values():
        again = judge(network["runs"])
        assert (again["within"], again["windows_within"]) == (network["within"], network["windows_within"])
        assert len(network["runs"][FUSED]["losses"]) == content["steps"]
