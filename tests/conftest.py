"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def emodb() -> Path:
    """Folder of the real recordings that come with the project."""
    folder = ROOT / "data" / "emodb4"
    assert any(folder.glob("*.flac")), f"{folder}: expected recordings"
    return folder
