"""Products on matrix tiles: emulated, since no machine that runs the tests need have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from avser_fast import _engine

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512vnni",
         "-mavx512bf16"]  # fmt: skip
compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.mark.skipif(compiler is None, reason="no C++ compiler on this machine")
@pytest.mark.skipif("avx512_bf16" not in _engine.supported_isas(), reason="no AVX-512 with bf16 on this machine")
def test_products_on_emulated_tiles_agree_with_plain_sums(tmp_path: Path) -> None:
    assert compiler is not None
    common = [compiler, "-std=c++17", "-O2", "-ffp-contract=off", "-Wno-psabi", "-Wno-uninitialized",
              "-Wno-maybe-uninitialized", f"-I{ROOT / 'csrc'}"]  # fmt: skip
    kernel = [*FLAGS, "-DAVSER_AMX_EMULATED", "-DAVSER_ISA=amx", "-DAVSER_ISA_NAMESPACE=isa_amx"]
    built = tmp_path / "gemm_amx.o"
    source = ROOT / "csrc" / "ops" / "gemm" / "gemm_amx.cpp"
    subprocess.run([*common, *kernel, "-c", source, "-o", built], check=True, timeout=300)
    program = tmp_path / "amx"
    subprocess.run([*common, ROOT / "tests" / "cpp" / "amx.cpp", built, "-o", program], check=True, timeout=300)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "300 products agree\n", done.stdout + done.stderr


@pytest.mark.skipif("amx" not in _engine.build_info()["isas"], reason="built without matrix tiles")
def test_tiles_are_never_chosen_by_themselves() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "AVSER_FAST_CPU_ISA"}
    code = "from avser_fast import _engine; print(_engine.cpu_isa())"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == [isa for isa in _engine.supported_isas() if isa != "amx"][-1]


@pytest.mark.skipif("amx" in _engine.supported_isas(), reason="this machine has matrix tiles")
def test_tiles_that_are_not_there_are_named() -> None:
    code = "from avser_fast import _engine; print(_engine.cpu_isa())"
    environment = {**os.environ, "AVSER_FAST_CPU_ISA": "amx"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "expected an instruction set that this build and machine have" in run.stderr
    assert "got amx" in run.stderr
