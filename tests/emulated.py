"""Builds and imports ``_emulated``: the GPU engine with every thread of a block as a fiber on the CPU.

With ``AVSER_FAST_TEST_GPU=1`` the same tests run on a GPU: ``module`` is the engine's own then.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from avser_fast import _engine

ROOT = Path(__file__).resolve().parents[1]


class OnGpu:
    """The engine's own module; what it is, and in which order its threads run, is not for a test to say."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_engine, name)

    def set_order(self, order: str, seed: int = 0) -> None:
        """Nothing."""

    def set_device(self, *capability: int, **values: int) -> None:
        if capability or values:
            pytest.skip("a GPU is what it is")


class OnEmulatedGpu:
    """The engine's module as it is where a GPU is, with the classes of ``module``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(module() if name.lower().startswith("gpu") else _engine, name)

    def build_info(self) -> dict[str, Any]:
        return {**_engine.build_info(), "cuda": True, "cuda_reason": ""}


def on_gpu() -> bool:
    return os.environ.get("AVSER_FAST_TEST_GPU") == "1"


def module() -> Any:
    """What has the classes of the GPU engine."""
    return OnGpu() if on_gpu() else build()


@functools.cache
def build() -> Any:
    """The emulated module, built into ``build/emulated`` where its sources are newer; skips if nothing can be built."""
    try:
        import ninja  # noqa: F401
        import pybind11  # noqa: F401

        import cmake  # noqa: F401
    except ImportError as error:
        pytest.skip(f"the emulated GPU cannot be built: {error}")
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    tools = Path(sysconfig.get_path("scripts"))
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one test run share it
        for command in (
            [tools / "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DAVSER_EMULATION=ON",
             f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}",
             f"-DAVSER_OUTPUT_DIR={folder / 'out'}"],
            [tools / "cmake", "--build", folder],
        ):  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "out").glob("_emulated*.so")
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
