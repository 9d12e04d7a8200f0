"""The Triton kernels without a GPU: compiled ahead of time for the GPUs that are supported, and run by the interpreter.

The launches that are compiled are those of the published network: every op runs on tensors without memory, and instead
of being launched a kernel is written down with its arguments.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from avser_fast.ops import backends
from training_cases import PUBLISHED, WIDE, Case, loss, separable, strided

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter compiles nothing")

if not backends.INTERPRETED:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    import avser_fast.triton as kernels

#: Shared memory of a block, in bytes, by compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}
CASES = [*PUBLISHED, loss(8, 5, 4, votes=True)]


def modules() -> list[Any]:
    return [kernels] + [
        importlib.import_module(f"{kernels.__name__}.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)
    ]


@dataclass(frozen=True)
class Launch:
    """What is compiled for a launch: the kernel, its arguments' types, its constants, its warps."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Launch:
        names = kernel.arg_names
        constants = {k: v for k, v in options.items() if k in names}
        signature = dict.fromkeys(names, "constexpr")
        aligned = []
        for place, (name, value) in enumerate(zip(names, arguments)):
            if isinstance(value, Tensor):
                signature[name] = POINTERS[value.dtype]
                aligned.append(place)
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1:  # as at run time: the number one is a constant
                constants[name] = 1
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(place)
        assert len(arguments) + sum(k in names for k in options) == len(names), f"{kernel.__name__}: arguments"
        return Launch(
            kernel,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple(aligned),
            tuple((k, v) for k, v in options.items() if k not in names),
        )

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__} {dict(self.signature)} {dict(self.constants)} {dict(self.options)}"

    def compile(self, capability: int) -> Any:
        source = triton.compiler.ASTSource(
            fn=self.kernel,
            signature=dict(self.signature),
            constexprs=dict(self.constants),
            attrs={(place,): [["tt.divisibility", 16]] for place in self.aligned},
        )
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(self.options))


def meta(case: Case, dtype: torch.dtype) -> list[Any]:
    """The case's arguments as its op gets them, on the meta device."""

    def made(name: str, value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point():
            return None if value is None else value.to("meta")
        return value.to(device="meta", dtype=torch.float32 if name in WIDE else dtype)

    tensors = {name: made(name, value) for name, value in case.tensors.items()}
    seed = torch.empty((), dtype=torch.int64, device="meta")
    if case.stem == "pool_shortcut":
        return [*tensors.values(), case.options["dropout"], seed]
    if case.stem == "temporal_attention":
        return [*tensors.values(), case.options["heads"], case.options["dropout"], seed, 1e-5]
    if case.stem == "emotion_head":
        given = list(tensors.values())
        return [*given[:3], case.options["pooling"], given[3] if len(given) > 3 else None]
    if case.stem == "clip_cross_entropy":
        logits = tensors["clip_logits"]
        assert logits is not None
        return [logits.float(), logits.new_empty(logits.shape[::2], dtype=torch.float32), tensors["valid"]]
    if "relu" in case.options:
        return [*tensors.values(), case.options["relu"]]
    return list(tensors.values())


def gradients(case: Case, arguments: list[Any], outputs: Any) -> list[Any]:
    """Arguments of the backward op."""
    if case.stem in ("strided_conv2d", "separable_conv2d"):
        y, mean, var = outputs
        inputs = [a for i, a in enumerate(arguments) if not (case.stem == "strided_conv2d" and i == 2)]
        return [y, mean, var, y, mean, *inputs, case.tensors["mean"] is not None, True]
    if case.stem == "temporal_attention":
        y, *saved = outputs
        return [y, arguments[0], *saved, *arguments[1:], True]
    if case.stem == "emotion_head":
        features, logits = outputs
        return [features, logits, arguments[0], features, arguments[1], arguments[3]]
    return [outputs, *arguments]


def launches(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Everything that the case's op and its backward launch."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        assert len(grid) <= 3 and all(g >= 1 for g in grid) and all(g < 65536 for g in grid[1:])
        found.append(Launch.of(kernel, arguments, options))

    for module in modules():
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", record)
    arguments = meta(case, dtype)
    outputs = getattr(kernels, case.stem)(*arguments)
    getattr(kernels, f"{case.stem}_backward")(*gradients(case, arguments, outputs))
    return found


@pytest.fixture
def empty_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    yield


def check(launch: Launch, capability: int, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    compiled = launch.compile(capability)
    where = f"sm_{capability}: {launch.name}"
    assert compiled.asm["cubin"], where
    assert compiled.metadata.shared <= SHARED[capability], f"{where}: {compiled.metadata.shared} bytes of shared memory"
    log = capsys.readouterr().out
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills is not None, f"{where}: no report of ptxas: {log}"
    assert spills.group(1) == spills.group(2) == "0", f"{where}: {spills.group()}"
