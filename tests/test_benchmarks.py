"""The benchmarks themselves: they must refuse wrong results, list what is missing, count right and render what was
measured."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from avser_fast import _engine, nn
from avser_fast.config import AVRE, MDSCM
from avser_fast.testing import assert_close, max_error
from benchmarks import (
    accuracy,
    cases,
    compare,
    conftest,
    goals,
    gpu_engine,
    gpu_training,
    harness,
    macs,
    memory,
    models,
    render,
    training,
)
from benchmarks.compare import OURS, Contender, Row, Table
from benchmarks.folded import FoldedMDSCM, FoldedResNet18
from benchmarks.harness import Bench
from benchmarks.peers import Peers

FACTS = {"group": "mdscm-published", "precision": "float32", "threads": 1, "utterances": 1}


def right(result: Any) -> None:
    assert_close(result, [1.0, 2.0], 1e-6, "answer")


def answer(values: list[float]) -> Callable[[], list[float]]:
    return lambda: values


# Turns


def test_a_wrong_peer_is_named_and_nothing_is_timed() -> None:
    calls = []

    def run() -> list[float]:
        calls.append(1)
        return [1.0, 2.0]

    contenders = [Contender(OURS, run, right), Contender("hasty", answer([1.0, 2.1]), right)]
    with pytest.raises(AssertionError, match=r"two numbers: hasty: answer: scaled error 0\.05 .* worst at \(1,\)"):
        compare.compare("two numbers", contenders, {})
    assert len(calls) == 1


def test_every_contender_gets_its_turns() -> None:
    contenders = [Contender(name, answer([1.0, 2.0]), right) for name in (OURS, "other")]
    table = compare.compare("two numbers", contenders, {"third": "not installed"}, FACTS, budget_s=0.0)
    assert [row.name for row in table.rows] == [OURS, "other"]
    for row in table.rows:
        assert row.calls == compare.LEAST_ROUNDS * compare.CALLS and 0 < row.min_ms <= row.median_ms <= row.p95_ms
    assert re.search(r"third +missing: not installed", table.text())
    assert Table.from_dict(json.loads(json.dumps(dataclasses.asdict(table)))) == table


def test_a_turn_waits_until_no_pool_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of C spins, which Python's lock does not stop."""
    spins = threading.Thread(target=_engine.measure_peak, args=("float32", 0.15, 1))
    spins.start()
    while compare.busy_threads() == 0:
        assert spins.is_alive(), "the thread was never seen at work"
    assert compare.settle()
    assert not spins.is_alive() and compare.busy_threads() == 0
    spins.join()
    monkeypatch.setattr(compare, "busy_threads", lambda: 1)
    assert not compare.settle(0.01)
    made = [compare.Contender(name, lambda: None, lambda result: None) for name in ("a", "b")]
    monkeypatch.setattr(compare, "settle", lambda: False)
    table = compare.compare("case", made, {}, budget_s=0.0)
    assert table.facts == {"unsettled_turns": 2 * compare.LEAST_ROUNDS, "crowded_turns": 0}


def test_ratios_and_share() -> None:
    rows = [Row(OURS, "", 2.0, 1.0, 3.0), Row("slow", "", 6.0, 5.0, 7.0), Row("fast", "", 3.0, 2.0, 4.0)]
    table = Table("case", rows, {}, {**FACTS, "macs": 10**9, "ceiling_gmacs": 1000.0})
    assert table.best_ratio() == 1.5 and table.ratio(rows[1]) == 3.0
    assert table.share() == pytest.approx(0.5)
    alone = Table("case", rows[1:], {OURS: "absent"}, FACTS)
    assert alone.best_ratio() is None and alone.share() is None and alone.ratio(rows[1]) is None


# Peers and their settings


def test_the_fastest_right_setting_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = answer([1.0, 2.0]), answer([1.0, 2.0])
    order = iter([2.0, 3.0, 4.0, 1.0, 2.0, 3.0])  # in turns: the fast one was disturbed at first
    monkeypatch.setattr("benchmarks.peers.trial", lambda run: next(order))
    peers = Peers()

    def broken() -> Callable[[], Any]:
        raise OSError("no such library\nand more")

    builds = {"slow": lambda: slow, "fast": lambda: fast}
    peers.best("peer", {"wrong": lambda: answer([1.0, 3.0]), "broken": broken, **builds}, right)
    (contender,) = peers.contenders
    assert contender.setting == "fast" and contender.run is fast and contender.tried["slow"] == "2000.000 ms"
    assert contender.tried["wrong"].startswith("refused: answer: scaled error 0.5")
    assert contender.tried["broken"] == "OSError: no such library"


def test_a_peer_that_cannot_be_had_is_listed_with_the_reason() -> None:
    def absent() -> Callable[[], Any]:
        raise ImportError("No module named 'fastest'")

    peers = Peers()
    peers.add("one", absent, right)
    peers.best("two", {"only": absent}, right)
    peers.best("three", {"only": lambda: answer([2.0, 2.0])}, right)
    assert not peers.contenders
    assert peers.missing["one"] == peers.missing["two"] == "ImportError: No module named 'fastest'"
    assert peers.missing["three"].startswith("refused: answer:")


# The harness


def measure(bench: Bench, ours: Callable[[], Callable[[], Any]]) -> Table:
    peers = Peers()
    peers.add("peer", lambda: answer([1.0, 2.0]), right)
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda run, **_: run())
    return bench.measure(benchmark, "two numbers", ours, right, peers, dict(FACTS))


def test_what_the_engine_does_not_have_is_reported_beside_its_peers() -> None:
    def absent() -> Callable[[], Any]:
        raise TypeError("Engine: unexpected argument 'precision'")

    bench = Bench(budget_s=0.0)
    with pytest.raises(pytest.skip.Exception, match="two numbers: TypeError: Engine: unexpected argument 'precision'"):
        measure(bench, absent)
    (table,) = bench.tables
    assert list(table.missing) == [OURS] and [row.name for row in table.rows] == ["peer"]


def test_a_failure_of_ours_is_no_absence() -> None:
    def broken() -> Callable[[], Any]:
        raise ValueError("a tensor has the wrong shape")

    with pytest.raises(ValueError, match="wrong shape"):
        measure(Bench(budget_s=0.0), broken)
    with pytest.raises(AssertionError, match="two numbers: avser_fast: answer"):
        measure(Bench(budget_s=0.0), lambda: answer([0.0, 2.0]))


def test_a_case_that_this_process_cannot_run_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "cores", lambda: 1)
    bench = Bench()
    with pytest.raises(pytest.skip.Exception, match="needs 2 cores"):
        bench.needs("case", {**FACTS, "threads": 2})
    with pytest.raises(pytest.skip.Exception, match="large batches"):
        bench.needs("case", {**FACTS, "utterances": 16})
    assert [list(table.missing) for table in bench.tables] == [[OURS], [OURS]]
    Bench(full=True).needs("case", {**FACTS, "utterances": 16})


@pytest.mark.parametrize("red", [False, True])
def test_nothing_is_reported_while_a_benchmark_is_red(tmp_path: Path, red: bool) -> None:
    bench, lines = Bench(budget_s=0.0), []
    measure(bench, lambda: answer([1.0, 2.0]))
    config = SimpleNamespace(stash={conftest._BENCH: bench}, getoption=lambda name: tmp_path / "results")
    reporter = SimpleNamespace(section=lines.append, write_line=lines.append)
    conftest.pytest_terminal_summary(reporter, int(red), config)  # type: ignore[arg-type]
    written = list((tmp_path / "results").glob("*"))
    if red:
        assert not written and not any("times ours" in line for line in lines)
        return
    assert [path.name for path in written] == ["two-numbers.json"]
    found = json.loads(written[0].read_text())
    assert found["rows"][0]["name"] == OURS and {"cpu", "isa", "python"} <= set(found["device"])
    assert any("times ours" in line for line in lines)


def test_results_are_refused_while_a_test_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def failed(command: list[str], **_: Any) -> Any:
        assert command[-len(conftest.TESTS) :] == conftest.TESTS
        return SimpleNamespace(returncode=1, stdout="FAILED tests/test_golden.py")

    monkeypatch.setattr(subprocess, "run", failed)

    def session(results: Path | None) -> Any:
        return SimpleNamespace(
            config=SimpleNamespace(getoption=lambda name: results, option=SimpleNamespace(collectonly=False))
        )

    conftest.pytest_sessionstart(session(None))
    with pytest.raises(pytest.exit.Exception, match=r"(?s)no results while a test is red.*FAILED tests/test_golden.py"):
        conftest.pytest_sessionstart(session(Path("results")))


# Multiply-adds and folded networks

NETWORKS = [
    MDSCM(),
    MDSCM(mel_bands=80, in_channels=3),
    MDSCM(
        stem=(5, 9), blocks=(12, 18, 20), attention_reduction=3, encoder_layers=0, pooling="mean_std", clip_frames=97
    ),
    MDSCM(mel_bands=24, stem=(4,), blocks=(8,), spatial_attention=False, attention_reduction=2, encoder_heads=3),
    MDSCM(mel_bands=24, stem=(4, 8), blocks=(12,), channel_attention=False, encoder_layers=1, encoder_ff=7),
    MDSCM(in_channels=3, clip_frames=97, stem=(4,), blocks=(8,), attention_reduction=2, encoder_layers=0, statistics=9),
]


def counted(module: torch.nn.Module, clips: torch.Tensor) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module.eval()(clips)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_multiply_adds_of_the_family(network: MDSCM) -> None:
    clips = torch.zeros(1, 2, network.in_channels, network.clip_frames, network.mel_bands)
    assert counted(nn.MDSCM(network, backend="reference"), clips) == 2 * macs.mdscm_macs(network)


@pytest.mark.parametrize(("frames", "bands"), [(224, 40), (97, 33)])
def test_multiply_adds_of_resnet18(frames: int, bands: int) -> None:
    module = nn.AVRE(AVRE(body="resnet18"))
    module.domain = torch.nn.Identity()  # type: ignore[assignment]
    assert counted(module, torch.zeros(1, 1, 1, frames, bands)) == macs.resnet18_macs(frames, bands)


def with_statistics(module: Any, clips: torch.Tensor) -> Any:
    return cases.random_weights(module, clips[0].numpy())


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_folded_networks_give_the_same_logits(network: MDSCM) -> None:
    network = dataclasses.replace(network, block_dropout=0.0, encoder_dropout=0.0, statistics_dropout=0.0)
    clips = torch.randn(1, 3, network.in_channels, network.clip_frames, network.mel_bands)
    module = with_statistics(nn.MDSCM(network), clips)
    assert_close(FoldedMDSCM(module)(clips[0]), module.double()(clips.double()).clip_logits[0], 1e-5)


def test_folded_resnet18_gives_the_same_logits() -> None:
    clips = torch.randn(1, 3, 1, 97, 33)
    module = with_statistics(nn.AVRE(AVRE(body="resnet18")), clips)
    assert_close(FoldedResNet18(module)(clips[0]), module.double()(clips.double()).clip_logits[0], 1e-5)


# Bounds


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8"])
def test_bounds_refuse_the_answers_for_other_clips(precision: str) -> None:
    model = models.shipped()
    clips = model.clips(10)
    own, other = clips[:5], clips[5:]
    check = model.check(precision, own)
    check(model.truth(own))
    with pytest.raises(AssertionError, match="clip logits: scaled error"):
        check(model.truth(other))
    with pytest.raises(AssertionError, match="clip logits: scaled error"):
        check(model.truth(own)[::-1])
    if precision != "float32":
        plain = accuracy.plain_logits(precision, model.deployed.folded, own, model.deployed.calibration)
        assert max_error(plain, model.truth(own)) > accuracy.PEERS_FLOAT32
        check(plain)


def test_ours_is_held_to_more_in_float32() -> None:
    model = models.shipped()
    assert model.limit("float32", who=OURS) == 1e-5 < model.limit("float32")


# Memory


def test_growth_is_seen() -> None:
    kept: list[mmap.mmap] = []

    def leak(samples: int) -> None:
        kept.append(mmap.mmap(-1, 1 << 20))  # pages of its own, not what an earlier test freed
        kept[-1].write(bytes([1]) * (1 << 20))

    series, grown = memory.growth(leak, calls=100)
    assert len(series) == memory.SAMPLES and grown > 50
    _, still = memory.growth(lambda samples: None, calls=100)
    assert still < 1


# Tables and pictures


@pytest.fixture
def results(tmp_path: Path) -> Path:
    peer = Row(
        "OpenVINO", "openvino 1.2", 12.0, 11.0, 13.0, "whole batch", 9, {"whole batch": "", "streams": "refused"}
    )
    ours = Row(OURS, "avser_fast 0", 8.0, 7.0, 9.0, calls=9)
    facts = {**FACTS, "macs": 4 * 10**8, "ceiling_gmacs": 100.0}
    start = {**FACTS, "group": "start-up", "resident_mb": {OURS: 61.0}}
    tables = [
        Table("published at int8", [peer], {OURS: "AttributeError: none"}, {**FACTS, "precision": "int8"}),
        Table("published at float32", [ours, peer], {"PyTorch compiled": "slow"}, facts),
        Table("first result", [dataclasses.replace(ours, median_ms=250.0)], {}, start),
    ]
    bench = Bench(tables=tables)
    bench.write(tmp_path)
    harness.write_result(tmp_path / "memory.json", {"calls": 10_000, "resident_mb": [50.0, 50.5], "grown_mb": 0.5})
    return tmp_path


def test_rendered_tables(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goals, "GOALS", {("mdscm-published", None, None, None): 1.0})
    text = render.speed_table(results)
    row = "| MDSCM as published | float32 | 5 | 1 | 8 | 50 % | OpenVINO (12 ms) | **1.50** | 1: met |"
    missing = "| MDSCM as published | int8 | 5 | 1 | not run |  | OpenVINO (12 ms) |  | 1: not measured |"
    assert text.index(row) < text.index(missing)
    assert "first result: 0.25 s, 61 MB resident, torch not imported (goal 0.6 s, 200 MB: met)" in text
    assert "10,000 calls of mixed lengths: 50.0 MB resident after the first twentieth, 50.5 MB at the end" in text
    assert "openvino 1.2." in text
    details = render.details(results)
    assert "| published at float32 | 1 | 1.50 | met |" in details
    assert "| published at int8 | 1 |  | AttributeError: none |" in details
    assert "OpenVINO, other settings tried: streams: refused." in details
    assert "PyTorch compiled was not run: slow." in details


def test_goals_of_a_gpu_where_parts_are_missing() -> None:
    assert {v["measured"] for v in gpu_training.ratios({"failed": {"pair": "x"}}).values()} == {None}
    times = {n: {"median_ms": v} for n, v in (("avser_fast", 2.0), (gpu_training.EAGER, 7.0))}
    content = {"step": {"times": times}, "peak_mb": {"avser_fast": 30.0, gpu_training.EAGER: 100.0}}
    found = {name: v["measured"] for name, v in gpu_training.ratios(content).items()}
    assert found["step over eager AMP"] == 3.5 and found["peak memory as a share of eager's"] == 0.3
    assert found["step over torch.compile"] is None and found["depthwise and pointwise over cuDNN"] is None


def test_a_bf16_step_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "CHECKED", 1)
    exact = training.exact(1)
    gpu_training.check_autocast("cpu", exact)
    name = "body.blocks.1.pointwise2.weight"
    with pytest.raises(AssertionError, match=f"bf16 step, eager: {name}"):
        plain = training.Step.gradients

        def wrong(self: training.Step) -> dict[str, torch.Tensor]:
            found = plain(self)
            return {**found, name: -found[name]} if self.name == OURS else found

        monkeypatch.setattr(training.Step, "gradients", wrong)
        gpu_training.check_autocast("cpu", exact)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: benchmarks/gpu_check.sh runs it")
def test_without_a_gpu_that_is_said_in_a_sentence(tmp_path: Path) -> None:
    script = [str(render.ROOT / "benchmarks" / "gpu_check.sh"), str(tmp_path / "out")]
    module = [sys.executable, "-m", "benchmarks.gpu_training", str(tmp_path / "out")]
    for command in (script, module):
        done = subprocess.run(
            command, cwd=render.ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
        )
        said = done.stdout + done.stderr
        assert done.returncode == 2 and said.count("\n") == 1 and "expected an NVIDIA GPU" in said, said


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    assert render.speed_table(tmp_path) == "Not measured yet."
    assert "Not measured yet." in render.details(tmp_path)


def test_the_page_of_results_comes_from_the_files() -> None:
    page = (render.SPEED / "README.md").read_text(encoding="utf-8")
    assert page == render.details(), "run `python -m benchmarks.render`"


def test_the_readme_comes_from_the_files() -> None:
    text = (render.ROOT / "README.md").read_text(encoding="utf-8")
    assert text == render.rendered(text), "run `python -m benchmarks.render`"
    notes = render.NOTES.read_text(encoding="utf-8")
    assert notes == render.rendered_notes(notes), "run `python -m benchmarks.render`"
    assert render.choices_table(render.SPEED) == "Not measured yet."
    assert render.stages_table(render.SPEED) == "Not measured yet."
    assert render.default_ua(render.SPEED) == "UA not measured yet"
    assert render.accuracy_table(render.SPEED) == "Not measured yet."


def test_the_chart_is_drawn(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import chart

    tables, _ = render.read(results)
    chart.draw(tables, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


def test_the_most_specific_goal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {("a", None, None, None): 1.0, ("a", "int8", None, None): 2.0, ("a", "int8", 2, 16): 3.0}
    monkeypatch.setattr(goals, "GOALS", given)
    facts = {"group": "a", "precision": "int8", "threads": 2, "utterances": 16}
    assert goals.goal(facts) == 3.0
    assert goals.goal({**facts, "threads": 1}) == 2.0
    assert goals.goal({**facts, "precision": "bf16"}) == 1.0
    assert goals.goal({**facts, "group": "b"}) is None


def test_a_turn_on_two_threads_waits_for_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1.0, 1.1, 1.0, 1.9])
    monkeypatch.setattr(compare._engine, "measure_peak", lambda precision, seconds, threads: next(rates))
    assert compare.await_cores(1)
    assert compare.await_cores(2) and list(rates) == []
    monkeypatch.setattr(compare._engine, "measure_peak", lambda precision, seconds, threads: 1.0)
    assert not compare.await_cores(2, 0.05)
    monkeypatch.setattr(compare, "await_cores", lambda threads: threads == 1)
    made = [compare.Contender(name, lambda: None, lambda result: None) for name in ("a", "b")]
    for threads, crowded in ((1, 0), (2, 2 * compare.LEAST_ROUNDS)):
        table = compare.compare("case", made, {}, {"threads": threads}, budget_s=0.0)
        assert table.facts == {"threads": threads, "unsettled_turns": 0, "crowded_turns": crowded}


def test_a_wrong_gradient_keeps_a_training_step_out_of_the_table() -> None:
    exact = training.exact(1)
    found = training.Step(training.OURS, 1, dropout=False).gradients()
    training.check_gradients(found, exact)
    name = "body.blocks.1.pointwise2.weight"
    with pytest.raises(AssertionError, match=name):
        training.check_gradients({**found, name: -found[name]}, exact)
    with pytest.raises(AssertionError, match="expected gradients of"):
        training.check_gradients({n: v for n, v in found.items() if n != name}, exact)


def test_gradients_in_bf16_are_judged_by_those_of_pytorch() -> None:
    exact = training.exact(1)
    plain, found = (
        training.Step(name, 1, dropout=False, precision="bf16").gradients() for name in (training.EAGER, training.OURS)
    )
    away = training.distances(plain, exact)
    training.check_low_precision(found, exact, away)
    for name, wrong in (("body.encoder.0.ff1.weight", -1.0), ("body.attention.channel1.weight", 0.0), ("loss", 1.1)):
        with pytest.raises(AssertionError, match=name):
            training.check_low_precision({**found, name: wrong * found[name]}, exact, away)
    with pytest.raises(AssertionError, match="expected PyTorch eager's gradients"):
        training.check_low_precision(found, exact, {**away, training.ALL: 2.0 * training.FARTHEST})
    with pytest.raises(AssertionError, match="expected gradients of"):
        training.distances({"loss": found["loss"]}, exact)


def test_goals_of_the_engine_on_a_gpu_where_contenders_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_engine, "mdscm_macs", lambda network: 100_000_000)
    assert {v["measured"] for v in gpu_engine.goals({"failed": {"samples": "x"}}).values()} == {None}
    one, many = {gpu_engine.OURS: {"median_ms": 0.05}}, {gpu_engine.OURS: {"median_ms": 1.0}}
    content = {
        "ceilings": {"bf16_tflops": 500.0},
        "utterances-1": {"times": one},
        "compiled-1": {"times": {**one, gpu_engine.COMPILED: {"median_ms": 0.2}}},
        "compiled-half-1": {"times": {**one, gpu_engine.COMPILED: {"median_ms": 0.15}}},
        "utterances-205": {"times": many},
        "compiled-205": {"times": many},
    }
    found = {name: v["measured"] for name, v in gpu_engine.goals(content).items()}
    assert found["one utterance, us"] == 50.0 and found["one utterance over torch.compile"] == pytest.approx(3.0)
    assert found["1025 clips, clips/s"] == 1_025_000 and found["1025 clips over torch.compile"] is None
    assert found["1025 clips, share of the bf16 ceiling"] == pytest.approx(0.41)
