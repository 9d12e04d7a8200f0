"""A session of benchmarks: its options, its tables at the end, and its results files.

``--results FOLDER`` takes the time that good figures need, and nothing is written unless the tests of the numbers pass
before and every benchmark passes afterwards: no speed-up is reported while a test is red.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .harness import Bench, device

ROOT = Path(__file__).resolve().parents[1]
#: The tests that say whether our numbers are right.
TESTS = ["tests", "-q", "-x", "-m", "not slow", "-k", "golden or engine or training_ops"]
QUICK_S, FULL_S = 1.0, 25.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=None, help="folder for one JSON file per case")
    parser.addoption("--full", action="store_true", help="large batches too; --results implies it")
    parser.addoption("--peers", choices=("default", "all"), default="default", help="all: those that start slowly too")
    parser.addoption("--budget", type=float, default=None, help="seconds of turns per case")


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--results") is None or session.config.option.collectonly:
        return
    command = [sys.executable, "-m", "pytest", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.exit(f"no results while a test is red: pytest {' '.join(TESTS)}\n{done.stdout[-3000:]}", returncode=1)


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Bench:
    results = pytestconfig.getoption("--results") is not None
    budget = pytestconfig.getoption("--budget")
    made = Bench(
        budget_s=budget if budget is not None else FULL_S if results else QUICK_S,
        peers=pytestconfig.getoption("--peers"),
        full=results or pytestconfig.getoption("--full"),
    )
    pytestconfig.stash[_BENCH] = made
    return made


_BENCH = pytest.StashKey[Bench]()


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    bench = config.stash.get(_BENCH, None)
    if bench is None or not bench.tables:
        return
    terminalreporter.section("ratios against peers, contenders in turns, outputs checked first")
    if exitstatus != 0:
        terminalreporter.write_line("no ratios and no results files: a benchmark is red")
        return
    terminalreporter.write_line(", ".join(f"{key}: {value}" for key, value in device().items()))
    for table in bench.tables:
        terminalreporter.write_line("")
        terminalreporter.write_line(table.text())
    folder = config.getoption("--results")
    if folder is not None:
        bench.write(folder)
        terminalreporter.write_line(f"\nwritten to {folder}")
