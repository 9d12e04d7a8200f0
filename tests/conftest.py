"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from avser_fast import cli

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def emodb() -> Path:
    """Folder of the real recordings that come with the project."""
    folder = ROOT / "data" / "emodb4"
    assert any(folder.glob("*.flac")), f"{folder}: expected recordings"
    return folder


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """A command line in this process: exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(list(arguments))
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call
