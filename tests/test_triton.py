"""The Triton kernels without a GPU: compiled ahead of time for the GPUs that are supported, and run by the interpreter.

The launches that are compiled are those of the published network: every op runs on tensors without memory, and instead
of being launched a kernel is written down with its arguments.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_cases import PUBLISHED, WIDE, Case, attention, head, layer, loss, pool, separable, strided

from avser_fast import nn
from avser_fast.config import ModelSpec
from avser_fast.errors import BackendError
from avser_fast.inference.backends import float32_products
from avser_fast.inference.triton_backend import narrow
from avser_fast.inference.weights import read_any
from avser_fast.ops import backends, stems

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter compiles nothing")

if not backends.INTERPRETED:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    import avser_fast.triton as kernels

ROOT = Path(__file__).resolve().parents[1]
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
#: The published network, the default model's pooling, and the longest clips that the encoder takes.
CASES = [
    *PUBLISHED,
    head(2, 14, 96, 4, pooling="mean_std", statistics=32),
    layer(2, 128, 96, 64, 2, dropout=0.1),
    loss(8, 5, 4, votes=True),
]
#: Bytes that a thread may spill: what a compiler leaves over when it aims at a round number of registers; more where
#: one program holds the attention weights of a long clip.
SPILLS, LONG_CLIP_SPILLS = 64, 640


def modules() -> list[Any]:
    return [kernels] + [
        importlib.import_module(f"{kernels.__name__}.{module.name}")
        for module in pkgutil.iter_modules(kernels.__path__)
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
            general = kernel.params[place].do_not_specialize
            if isinstance(value, Tensor):
                signature[name] = POINTERS[value.dtype]
                aligned.append(place)
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1 and not general:  # as at run time: the number one is a constant
                constants[name] = 1
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and not general:
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


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Filled by every launch from now on, which does nothing else."""
    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        assert len(grid) <= 3 and all(g >= 1 for g in grid) and all(g < 65536 for g in grid[1:])
        found.append(Launch.of(kernel, arguments, options))

    for module in modules():
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", record)
    return found


def launches(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Everything that the case's op and its backward launch."""
    found = recorded(monkeypatch)
    arguments = meta(case, dtype)
    outputs = getattr(kernels, case.stem)(*arguments)
    getattr(kernels, f"{case.stem}_backward")(*gradients(case, arguments, outputs))
    return found


def check(launch: Launch, capability: int, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    compiled = launch.compile(capability)
    where = f"sm_{capability}: {launch.name}"
    assert compiled.asm["cubin"], where
    assert compiled.metadata.shared <= SHARED[capability], f"{where}: {compiled.metadata.shared} bytes of shared memory"
    log = capsys.readouterr().out
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert spilled is not None, f"{where}: no report of ptxas: {log}"
    most = LONG_CLIP_SPILLS if dict(launch.constants).get("BLOCK_T", 0) > 64 else SPILLS
    assert int(spilled.group(1)) <= most, f"{where}: {spilled.group()}"


def full_name(kernel: Any) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


def every_launch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    return list(dict.fromkeys(launch for case in CASES for launch in launches(case, dtype, monkeypatch)))


#: All launches in bf16 and in float32, each for one of the architectures, and one launch of each kernel in fp16: every
#: kernel for both.  ``python tests/test_triton.py`` compiles all of them for both, in minutes, and prints a table.
@pytest.mark.parametrize(
    ("dtype", "capability", "once"),
    [(torch.bfloat16, 90, False), (torch.float32, 80, False), (torch.float16, 90, True)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_compiles_ahead_of_time(
    dtype: torch.dtype,
    capability: int,
    once: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The launches of the published network become cubins that fit: shared memory, registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    found = every_launch(dtype, monkeypatch)
    if once:
        found = list({full_name(launch.kernel): launch for launch in found}.values())
    for launch in found:
        check(launch, capability, capsys)


@pytest.mark.parametrize(("precision", "capability"), [("tf32", 90), ("bf16", 80)], ids=lambda value: str(value))
def test_inference_compiles_ahead_of_time(
    precision: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one utterance of the default model launches in eval mode, with the inputs' real sizes."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DUMP_PTXAS_LOG", "1")
    found = recorded(monkeypatch)
    spec, _, _, _ = read_any("default")
    assert isinstance(spec, ModelSpec)
    with torch.device("meta"):
        model = nn.MDSCM(spec.network, backend="triton").eval()
        clips = torch.empty(1, 4, spec.network.planes, spec.network.clip_frames, spec.network.mel_bands)
    if precision == "bf16":
        narrow(model.body, torch.bfloat16)
    # Tensors without memory stand for those of a GPU: the ops reach the kernels instead of their fake kernels.
    monkeypatch.setitem(backends.TABLE, "triton", replace(backends.TABLE["triton"], devices=("meta",)))
    monkeypatch.setattr(stems, "_ops", kernels)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # there is none for them to ask for
    with torch.inference_mode(), float32_products("tf32" if precision == "tf32" else "ieee"):
        assert model(clips).clip_logits.shape == (1, 4, spec.network.classes)
    assert len(found) >= 10
    assert {dict(launch.constants).get("PRECISION", precision) for launch in found} == {
        precision, "ieee" if precision == "bf16" else "tf32"
    }  # fmt: skip
    for launch in dict.fromkeys(found):
        check(launch, capability, capsys)


def test_every_kernel_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is what is launched, and its name says so; every other function of Triton is called by another."""
    functions = {
        full_name(value): value
        for module in modules()
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.fn.__module__.startswith(kernels.__name__)
    }
    launched = {full_name(launch.kernel) for launch in every_launch(torch.float32, monkeypatch)}
    named = {name for name in functions if name.endswith("_kernel")}
    assert launched == named
    for name in functions.keys() - named:
        called = re.compile(rf"\b{functions[name].fn.__name__}\(")
        assert any(called.search(other.src) for key, other in functions.items() if key != name), f"{name}: not used"


def test_another_batch_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another number of clips nor one that 16 divides: what is launched differs in nothing that is compiled."""

    def compiled(n: int) -> list[Launch]:
        cases = [
            strided(n, 32, 16, 8, 8),
            separable(n, 16, 32, 6, 5),
            pool(n, 32, 6, 5, dropout=0.5),
            attention(n, 32, 3, 3, 2),
            layer(n, 3, 32, 16, 2, dropout=0.1),
            head(n, 3, 32, 4),
            loss(n, 2, 4),
        ]
        return [launch for case in cases for launch in launches(case, torch.bfloat16, monkeypatch)]

    assert compiled(1) == compiled(2) == compiled(16) == compiled(19)


def test_long_clips_are_refused_in_one_sentence() -> None:
    words = "temporal_attention: x: expected at most 128 tokens in a clip, got 129"
    assert kernels.limits("temporal_attention", 2, 129, 64) == words
    assert kernels.limits("temporal_attention", 2, 128, 64) is None
    arguments = meta(layer(1, 129, 16, 16, 1), torch.float32)
    with pytest.raises(BackendError, match=words):
        kernels.temporal_attention(*arguments)


# The stems in three element types, and layouts, subsets and schemas of one or two cases each.
INTERPRETED = (
    "(test_matches_reference and (5x6x5 or 33x9x2 or 3x8x8 or 16x7x5 or 17x8x4 or 33x1x1 or 33x7x2 or 3x14x32 or 17x48"
    " or 4x14x33 or 5x3x7)) or test_no_clips"
    " or ((test_opcheck or test_gradient_subsets) and (separable_conv2d-2x5x6x5 or pool_shortcut-2x5x6x5))"
    " or (test_layouts and sliced and not pool) or (test_expanded and 2x5) or test_stem_and_block"
)


def test_interpreted() -> None:
    """Tests of the ops on the kernels, run by Triton's interpreter on the CPU; CONTRIBUTING.md has the whole run."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/test_training_ops.py",
            "-k",
            INTERPRETED,
        ],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) >= 30, done.stdout[-2000:]


def table() -> None:
    """Every launch in every element type for every architecture, with what ptxas says of it."""
    os.environ["TRITON_DUMP_PTXAS_LOG"] = os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with pytest.MonkeyPatch.context() as monkeypatch:
            found = every_launch(dtype, monkeypatch)
        for launch in found:
            for capability in SHARED:
                log = io.StringIO()
                with contextlib.redirect_stdout(log):
                    compiled = launch.compile(capability)
                figures = [re.search(rf"{p}", log.getvalue()) for p in (r"Used (\d+)", r"(\d+) bytes spill stores")]
                registers, spilled = (f.group(1) if f else "?" for f in figures)
                blocks = {k: v for k, v in launch.constants if k.startswith("BLOCK")}
                print(
                    f"sm_{capability} {str(dtype)[6:]:8} {full_name(launch.kernel)[len(kernels.__name__) + 1 :]:50}"
                    f" shared {compiled.metadata.shared:6} registers {registers:>3} spilled {spilled:>3} {blocks}"
                )


if __name__ == "__main__":
    table()


def test_the_table_knows_the_limit() -> None:
    """What is said before the call is what the kernels take."""
    from avser_fast.triton.temporal_attention import MOST_TOKENS

    assert backends.TABLE["triton"].tokens == MOST_TOKENS
