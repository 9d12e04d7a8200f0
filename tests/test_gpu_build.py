"""The GPU kernels without a GPU: packing, narrow numbers, the emulator itself, the assembler's report."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest
import torch

from avser_fast import _engine

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "avser_fast" / "_gpu_kernels.json"
WIDTHS = {"float32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


@pytest.mark.parametrize("name", TORCH)
def test_narrow_numbers_are_torchs(name: str) -> None:
    r = np.random.default_rng(0)
    values = np.concatenate(
        [
            r.standard_normal(4000) * np.exp(r.uniform(-30, 6, 4000)),
            np.ldexp(r.integers(-255, 256, 500).astype(np.float64), -12),  # ties and subnormal numbers
            [0.0, -0.0, 448.0, -448.0, 1e-30, 2.0**-10, 3 * 2.0**-11],
        ]
    ).astype(np.float32)
    values = values[np.abs(values) <= 448]
    expected = torch.from_numpy(values).to(TORCH[name]).float().numpy()
    np.testing.assert_array_equal(emulated.build().narrowed(values, name), expected)
    assert np.isnan(emulated.build().narrowed(np.array([np.nan], np.float32), name)).all()


def test_tf32_rounds_ties_away_from_zero() -> None:
    unit = np.float32(2.0**-10)
    values = np.array([1 + unit / 2, -1 - unit / 2, 1 + unit * 0.49, 3.0], np.float32)
    np.testing.assert_array_equal(emulated.build().narrowed(values, "tf32"), [1 + unit, -1 - unit, 1.0, 3.0])


@pytest.mark.parametrize("name", WIDTHS)
def test_panels_hold_what_a_lane_takes(name: str) -> None:
    """Every element is found where the instructions look for it, and everything else is 0."""
    n, k, length = 11, 20, 37
    r = np.random.default_rng(1)
    weight = r.integers(-8, 9, (n, k)).astype(np.float64)  # exact in every format
    places = r.permutation(length)[:k]
    packed, bias, scale, pairs, tiles = emulated.build().pack(
        weight, [float(i) for i in range(n)], name, places, length
    )
    operand = max(WIDTHS[name], 2)  # an 8-bit weight has the place of a 16-bit operand
    assert tiles == 2 and pairs == -(-length * operand // 64)
    assert bias == [*map(float, range(n)), *([0.0] * 5)]
    dtype: Any = {"float32": torch.float32, "tf32": torch.float32, **TORCH}[name]
    flat = torch.frombuffer(bytearray(packed), dtype=dtype).float().numpy()
    lanes = flat.reshape(tiles, pairs, 32, -1)
    per_word = 4 // operand
    dense = np.zeros((tiles * 8, pairs * 64 // operand))
    for tile, pair, lane, at in np.ndindex(*lanes.shape):
        word, element = divmod(at, per_word)
        step, half = divmod(word, 2)  # of two instructions, each with k in two halves of 16 bytes
        column = (pair * 64 + step * 32 + half * 16 + lane % 4 * 4) // operand + element
        dense[tile * 8 + lane // 4, column] = lanes[tile, pair, lane, at]
    if scale:
        dense *= np.array(scale)[:, None]
    expected = np.zeros_like(dense)
    expected[:n, places] = weight
    np.testing.assert_array_equal(dense, expected)


@pytest.mark.parametrize("height", (1, 2, 5, 14, 28, 56, 112))
@pytest.mark.parametrize("size", (1, 2, 3, 8, 13, 16))
def test_every_row_on_chip_has_one_owner(height: int, size: int) -> None:
    gpu = emulated.build()
    owned = [gpu.own_rows(height, rank, size) for rank in range(size)]
    assert [row for begin, end in owned for row in range(begin, end)] == [*range(height)]
    for row in range(height):
        begin, end = owned[gpu.owner_of(row, height, size)]
        assert begin <= row < end


def test_the_emulator_finds_faults() -> None:
    gpu = emulated.build()
    wrong = [(i + 1) % 64 for i in range(64)]
    found = []
    for order in ("forward", "backward"):
        gpu.set_order(order)
        found.append(gpu.run_faulty("barrier"))
    gpu.set_order("forward")
    assert any(x != wrong for x in found), "a missing barrier gives something else under some order"
    early = gpu.run_faulty("early")
    assert early[:32:2] == [7 + 8 * i for i in range(16)], "what was waited for is there"
    assert early[1:32:2] == [-1] * 16, "what was not waited for is not"
    with pytest.raises(RuntimeError, match="thread 0 of block 0 ends with copies under way"):
        gpu.run_faulty("wait")
    with pytest.raises(RuntimeError, match="63 of 64 threads wait for others that never come"):
        gpu.run_faulty("thread")
    with pytest.raises(RuntimeError, match="thread 63 of block 0: 4 bytes at offset 256 of 256 bytes of shared memory"):
        gpu.run_faulty("end")


@pytest.mark.skipif(not _engine.build_info()["cuda"], reason="built without the CUDA kernels")
def test_no_kernel_spills_and_nothing_warned() -> None:
    report = json.loads(REPORT.read_text())
    assert report["warnings"] == []
    names = {row["object"] for row in report["kernels"]}
    assert {f"program_{p}" for p in WIDTHS} <= names and {
        "resnet18_bf16",
        "fusion_program",
        "log_mel_cuda",
        "front_end_program",
    } <= names
    for row in report["kernels"]:
        assert row["spill_bytes"] == 0 and row["stack_bytes"] == 0, row
        assert row["registers"] * 256 <= 65536, row


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    "source",
    [
        "engine/cuda/program_fp8.cu",
        "engine/cuda/fusion_program.cu",
        "ops/log_mel/log_mel_cuda.cu",
        "engine/cuda/front_end_program.cu",
    ],
)
def test_compiles_for_every_architecture_without_a_warning(source: str, tmp_path: Path) -> None:
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "86", "89", "90a")]
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O1", "--expt-relaxed-constexpr", *archs, "-Werror", "all-warnings",
         "-Xcompiler=-Wall,-Wextra,-Werror",
         f"-I{ROOT / 'csrc'}", "-c", ROOT / "csrc" / source, "-o", tmp_path / "out.o"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
