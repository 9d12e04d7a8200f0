"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from avser_fast import cli
from python_training.data import PreparedCorpus, prepare, read_corpus
from python_training.data.boxes import Boxes, with_boxes
from python_training.data.shipped import shipped_corpus
from python_training.data.synthetic import write_iemocap

ROOT = Path(__file__).resolve().parents[1]


#: What CUDA says of faults after which a process gets nothing else from its GPU.
FATAL = ("illegal memory access", "misaligned address", "unspecified launch failure", "illegal instruction")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A worker ends after such a fault, and pytest-xdist starts another one: else every later test would fail, too."""
    if "PYTEST_XDIST_WORKER" in os.environ and report.failed and any(x in report.longreprtext for x in FATAL):
        os._exit(1)


@pytest.fixture(scope="session")
def emodb() -> Path:
    """Folder of the real recordings that come with the project."""
    folder = ROOT / "data" / "emodb4"
    assert any(folder.glob("*.flac")), f"{folder}: expected recordings"
    return folder


@pytest.fixture(scope="session")
def prepared_emodb(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """The same recordings, prepared."""
    return shipped_corpus("emodb4", tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def artificial(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """20 artificial utterances of four speakers in two sessions, speech and faces, prepared."""
    folder = tmp_path_factory.mktemp("artificial")
    tree = write_iemocap(folder / "tree", sessions=2, dialogs=2, turns=8)
    prepare(with_boxes(read_corpus("iemocap", tree.root), Boxes(tree.boxes), detect=False), folder / "out")
    return PreparedCorpus(folder / "out")


@pytest.fixture
def whole_float32() -> Iterator[None]:
    """Torch's convolutions on a GPU, which results are judged by, in whole float32: left alone they run in TF32."""
    import torch

    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Any:
    """A command line in this process: exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(list(arguments))
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call
