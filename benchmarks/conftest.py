"""Collects the tables of a run, prints them at its end and writes them where ``--results`` says."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import pytest

from .compare import Table

_TABLES: list[Table] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=None, help="folder for one JSON file per case")


@pytest.fixture
def tables() -> list[Table]:
    return _TABLES


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _device() -> dict[str, Any]:
    from avser_fast import _engine

    return {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "isa": _engine.cpu_isa()}


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    if not _TABLES:
        return
    terminalreporter.section("ratios against peers, contenders in turns, outputs checked first")
    device = _device()
    terminalreporter.write_line(", ".join(f"{key}: {value}" for key, value in device.items()))
    for table in _TABLES:
        terminalreporter.write_line("")
        terminalreporter.write_line(table.text())
    folder = config.getoption("--results")
    if folder is not None and exitstatus == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for table in _TABLES:
            name = "".join(c if c.isalnum() else "-" for c in table.case.lower()).strip("-")
            while "--" in name:
                name = name.replace("--", "-")
            content = {"device": device, **dataclasses.asdict(table)}
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"\nwritten to {folder}")
