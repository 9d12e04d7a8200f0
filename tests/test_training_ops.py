"""The network's ops: outputs and gradients against float64 autograd of the reference, schemas, layouts, errors.

``TRITON_INTERPRET=1 pytest tests/test_training_ops.py`` runs the same tests on the Triton kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck
from training_cases import EMPTY, PUBLISHED, SMALL, Case, judge, keywords, leaves, positional, run, stem

from avser_fast import _engine, ops, reference
from avser_fast.errors import AvserError
from avser_fast.ops import backends
from avser_fast.testing import assert_close

pytestmark = pytest.mark.usefixtures("whole_float32")

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and not backends.INTERPRETED else [])
DTYPES = [torch.float32, torch.bfloat16]
IDS = {"ids": lambda case: case.name if isinstance(case, Case) else str(case).removeprefix("torch.")}


def dtypes(device: str) -> list[torch.dtype]:
    return [*DTYPES, torch.float16] if device == "cuda" or backends.INTERPRETED else DTYPES


# ---- the reference's parts make its wholes


def test_philox_known_answers() -> None:
    """Random123's test vectors with counters and keys that this use can express."""
    assert int(reference.philox(torch.tensor([0]), 0, 0)) == 0x6627E8D5
    ones = reference.philox(torch.tensor([2**32 + 5]), 3, 2**40 + 9)
    assert torch.equal(ones, reference.philox(torch.tensor([5]), 3, torch.tensor(2**40 + 9)))
    draws = reference.philox(torch.arange(100_000), 1, 1234).double() / 2**32
    assert abs(float(draws.mean()) - 0.5) < 0.004 and abs(float(draws.var()) - 1 / 12) < 0.002


def test_counted_dropout() -> None:
    x = torch.ones(50_000, dtype=torch.float64)
    for p in (0.1, 0.5, 0.9):
        out = reference.counted_dropout(x, p, 11)
        assert set(out.unique().tolist()) == {0.0, 1.0 / (1.0 - p)}
        assert abs(float((out == 0).double().mean()) - p) < 0.01
    assert not torch.equal(reference.counted_dropout(x, 0.5, 1), reference.counted_dropout(x, 0.5, 2))
    assert not torch.equal(reference.counted_dropout(x, 0.5, 1, 0), reference.counted_dropout(x, 0.5, 1, 1))
    assert torch.equal(reference.counted_dropout(x, 1.0, 3), torch.zeros_like(x))


# ---- ops


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, **IDS)
def test_matches_reference(case: Case, device: str) -> None:
    for dtype in dtypes(device):
        judge(case, dtype, device)


@pytest.mark.skipif(backends.INTERPRETED, reason="Triton's interpreter answers for CPU tensors")
@pytest.mark.parametrize("isa", [isa for isa in _engine.supported_isas() if isa != _engine.cpu_isa()])
def test_every_instruction_set(isa: str) -> None:
    """The same cases on what this process does not run by itself."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "AVSER_FAST_CPU_ISA": isa}
    done = subprocess.run(
        [*command, "-k", "(matches_reference and not published and cpu) or no_clips"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.skipif(backends.INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", PUBLISHED, **IDS)
def test_matches_reference_on_published_shapes(case: Case, device: str) -> None:
    for dtype in DTYPES:
        judge(case, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", EMPTY, **IDS)
def test_no_clips(case: Case, device: str) -> None:
    """No clips, or clips of nothing."""
    for dtype in DTYPES:
        tensors = leaves(case, dtype, device)
        for what, value in run(stem(case, ops), case, tensors).items():
            assert bool((value == 0).all()), f"{case.name}: {what} ({dtype})"


LAYOUTS: dict[str, Any] = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack((x, x + 1), -1).flatten(3)[..., ::2],
    "sliced channels": lambda x: torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "offset": lambda x: torch.cat((x[:1], x))[1:],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[2], SMALL[8], SMALL[11], SMALL[15], SMALL[18]], **IDS)
def test_layouts(case: Case, layout: str, device: str) -> None:
    """Maps in any memory layout, gradients that arrive in any."""

    def change(name: str, x: Tensor) -> Tensor:
        out: Tensor = LAYOUTS[layout](x) if name in ("x", "shortcut") else x
        return out

    judge(case, torch.float32, device, change)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[10], SMALL[11], SMALL[14], SMALL[25], SMALL[29]], **IDS)
def test_expanded_gradients(case: Case, device: str) -> None:
    """The gradient of a sum is one number seen everywhere: a tensor without strides."""
    results = []
    for room, dtype in ((ops, torch.float32), (reference, torch.float64)):
        tensors = leaves(case, dtype, device)
        out = stem(case, room)(*positional(case, tensors), **keywords(case, tensors))
        out = out[0] if isinstance(out, tuple) else out
        asked = [t for t in tensors.values() if t is not None and t.requires_grad]
        grads = torch.autograd.grad(out.sum(), asked, allow_unused=True)
        results.append([torch.zeros_like(t) if g is None else g for g, t in zip(grads, asked)])
    for (ours, exact), name in zip(zip(*results), tensors):
        scale = max(1.0, float(exact.abs().max()))
        assert float((ours.double() - exact).abs().max()) <= 1e-4 * scale, f"{case.name}: {name}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [SMALL[0], SMALL[9], SMALL[11], SMALL[15], SMALL[18], SMALL[25], SMALL[29]], **IDS)
def test_gradient_subsets(case: Case, device: str) -> None:
    """Whatever is asked for comes out the same as when everything is asked for."""
    whole = run(stem(case, ops), case, leaves(case, torch.float32, device))
    names = [k for k, v in case.tensors.items() if v is not None and k not in case.fixed]
    for subset in [[n] for n in names] + [names[:1] + names[2:3], names[1:]]:
        tensors = leaves(case, torch.float32, device)
        for name, value in tensors.items():
            if value is not None:
                value.requires_grad_(name in subset)
        for what, value in run(stem(case, ops), case, tensors).items():
            assert torch.equal(value, whole[what]), f"{case.name}: {what} of {subset}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, **IDS)
def test_opcheck(case: Case, device: str) -> None:
    """Schema, registration of the derivative, fake kernel, and the whole under AOT autograd."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "avser_fast":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    tensors = leaves(case, torch.float32, device)
    with Recorder():
        run(stem(case, ops), case, tensors)
    assert len(calls) == 2
    for op, arguments in calls:
        backward = op._opname.endswith("_backward")
        copies = tuple(
            a.detach().clone().requires_grad_(a.is_floating_point() and not backward) if isinstance(a, Tensor) else a
            for a in arguments
        )
        opcheck(op, copies)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[8], SMALL[14], SMALL[18], SMALL[23], SMALL[27]], **IDS)
def test_reference_second_derivatives(case: Case) -> None:
    """gradcheck and gradgradcheck of the reference in float64, which is what defines the ops' derivatives."""
    options = {**case.options}
    if case.stem == "temporal_attention":
        options["seed"] = 5
    tensors = leaves(case, torch.float64, "cpu")
    asked = [t for t in tensors.values() if t is not None]

    def function(*given: Tensor) -> Any:
        filled = iter(given)
        full = [None if t is None else next(filled) for t in tensors.values()]
        return stem(case, reference)(*full, **options)

    assert torch.autograd.gradcheck(function, asked, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, asked, fast_mode=True)


def test_a_second_derivative_is_refused() -> None:
    case = SMALL[0]
    tensors = leaves(case, torch.float32, "cpu")
    y, _, _ = ops.separable_conv2d(*positional(case, tensors), **case.options)
    (grad,) = torch.autograd.grad(y.sum(), [tensors["x"]], create_graph=True)  # type: ignore[list-item]
    with pytest.raises(NotImplementedError, match="separable_conv2d: expected to be differentiated once.*reference"):
        torch.autograd.grad(grad.sum(), [tensors["x"]])  # type: ignore[list-item]


# ---- gradient reversal


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_gradient_reversal(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(3, 4, dtype=dtype, device=device, requires_grad=True)
    for lam in (0.0, 0.3, torch.tensor(0.7, device=device), torch.tensor(2.0, dtype=torch.float64, device=device)):
        y = ops.gradient_reversal(x, lam)
        assert torch.equal(y, x) and y.data_ptr() == x.data_ptr() and y._is_view()
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(x))
        assert torch.equal(grad, torch.full_like(x, -float(lam)).to(dtype))
    with torch.no_grad():
        assert ops.gradient_reversal(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_reversal_twice(device: str) -> None:
    x = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    lam = torch.tensor(0.4, dtype=torch.float64, device=device)
    (first,) = torch.autograd.grad(ops.gradient_reversal(x, lam).pow(3).sum(), x, create_graph=True)
    assert_close(first, -0.4 * 3 * x.detach() ** 2, 1e-15)
    # The backward is linear: d/dx of -lam 3 y^2 with y = x behind a reversal gives another -lam.
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_close(second, 0.4 * 0.4 * 6 * x.detach(), 1e-15)
    for value in (0.4, lam):
        opcheck(
            torch.ops.avser_fast.gradient_reversal.Scalar
            if isinstance(value, float)
            else torch.ops.avser_fast.gradient_reversal.default,
            (x, value),
        )


# ---- errors


def test_errors_name_the_argument() -> None:
    x, depthwise, pointwise = torch.ones(1, 4, 5, 6), torch.ones(4, 1, 3, 3), torch.ones(8, 4, 1, 1)
    cases: list[tuple[Any, tuple[Any, ...], str]] = [
        (ops.separable_conv2d, (x[0], depthwise, pointwise), "x: expected shape .N, in, H, W., got .4, 5, 6."),
        (ops.separable_conv2d, (x, depthwise[:3], pointwise), "depthwise: expected shape .4, 1, 3, 3., got"),
        (ops.separable_conv2d, (x, depthwise, pointwise.double()), "pointwise: expected torch.float32 as x is"),
        (ops.separable_conv2d, (x, depthwise, pointwise, torch.ones(4)), "expected all three or none"),
        (ops.separable_conv2d, (x.double(), depthwise.double(), pointwise.double()), "float64.*reference.separable"),
        (ops.strided_conv2d, (x, torch.ones(8, 4, 2, 2)), "weight: expected shape .out, 4, 3, 3., got .8, 4, 2, 2."),
        (ops.cs_attention, (x, torch.ones(1, 2, 3, 3)), "spatial_bias: expected a tensor beside"),
        (ops.gradient_reversal, (x, torch.ones(2)), "lam: expected shape .., got .2,."),
    ]
    for function, arguments, words in cases:
        with pytest.raises((AvserError, ValueError), match=words):
            function(*arguments)


def test_one_value_per_channel_cannot_be_normalised() -> None:
    norm = [torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)]
    with pytest.raises(ValueError, match="expected more than 1 value per channel in training, got 1"):
        ops.conv_stem(torch.ones(1, 3, 2, 2), [torch.ones(4, 3, 3, 3)], [norm], training=True)


# ---- stems made of several ops


def _stem_and_block(room: Any, dtype: torch.dtype, device: str, training: bool) -> tuple[dict[str, Tensor], list[Any]]:
    """conv_stem, then a block that rectifies first; outputs, gradients and running statistics."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    def norm(channels: int) -> list[Tensor]:
        return [1 + draw(channels, scale=0.2), draw(channels), draw(channels), 1 + draw(channels).abs()]

    x = draw(3, 3, 13, 11)
    weights = [draw(6, 3, 3, 3, scale=0.3), draw(18, 6, 3, 3, scale=0.2)]
    norms = [norm(6), norm(18)]
    block = [draw(18, 1, 3, 3, scale=0.4), draw(20, 18, 1, 1, scale=0.3), norm(20), draw(20, 1, 3, 3, scale=0.4)]
    block += [draw(20, 20, 1, 1, scale=0.3), norm(20), draw(20, 18, 1, 1, scale=0.3), draw(20), norm(20)]
    asked = [x, *weights, *(t for n in norms for t in n[:2])]
    asked += [t for part in block for t in (part[:2] if isinstance(part, list) else [part])]
    for tensor in asked:
        tensor.requires_grad_()
    hidden = room.conv_stem(x, weights, norms, training=training)
    y = room.dsc_block(hidden, *block, relu_first=True, training=training)
    grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), device=device).view_as(y).to(dtype)).sum(), asked)
    running = [t for n in [*norms, block[2], block[5], block[8]] for t in n[2:]]
    return {"hidden": hidden.detach(), "y": y.detach(), **{f"gradient {i}": g for i, g in enumerate(grads)}}, running


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", (True, False))
def test_stem_and_block(training: bool, device: str) -> None:
    exact, running = _stem_and_block(reference, torch.float64, "cpu", training)
    torchs, _ = _stem_and_block(reference, torch.float32, device, training)
    ours, ours_running = _stem_and_block(ops, torch.float32, device, training)
    scale = max(float(v.abs().max()) for k, v in exact.items() if k.startswith("gradient"))
    for what, value in exact.items():
        # A bias in front of a batch norm has a gradient of rounding errors only: judged by the scale of all gradients.
        size = scale if what.startswith("gradient") else float(value.abs().max())
        error = float((ours[what].cpu().double() - value).abs().max()) / size
        allowed = 2 * float((torchs[what].cpu().double() - value).abs().max()) / size + 1e-6
        assert error <= allowed, f"{what}: {error:.3g} > {allowed:.3g}"
    for ours_value, value in zip(ours_running, running):
        assert_close(ours_value, value, 1e-5, "running statistics")


@pytest.mark.parametrize("shape", [(6, 8, 3, 1), (6, 8, 1, 3), (6, 8, 1, 1), (6, 8, 3, 2)])
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_batch_norm_of_narrow_maps(layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    """Gradients as ``to_tokens`` hands them back, against batch norm written out."""
    torch.manual_seed(0)
    n, channels, height, width = shape
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    grad = torch.randn(n, height, channels * width, dtype=torch.float64).unflatten(2, (channels, width)).transpose(1, 2)
    norm = [torch.rand(channels, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    running = [torch.zeros(channels, dtype=torch.float64), torch.ones(channels, dtype=torch.float64)]
    ours = torch.autograd.grad(reference.batch_norm(x, [*norm, *running], training=True), [x, *norm], grad)
    affine = reference.batch_norm_affine(
        *reference.batch_statistics(x), n * height * width, [*norm, *running], training=True
    )
    exact = torch.autograd.grad(reference.rectified_affine(x, affine, relu=False), [x, *norm], grad)
    for found, expected, what in zip(ours, exact, ("x", "weight", "bias")):
        assert_close(found, expected, 1e-12, what)


def test_running_statistics_are_torchs() -> None:
    """Against torch's own module: momentum, the unbiased variance, and gradients that pass through the statistics."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    module = torch.nn.BatchNorm2d(3).double()
    mean, var = reference.batch_statistics(x)
    norm = [module.weight, module.bias, torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    affine = reference.batch_norm_affine(mean, var, 4 * 72, norm, training=True)
    ours = reference.rectified_affine(x, affine, relu=True)
    theirs = F.relu(module(x))
    assert_close(ours, theirs, 1e-12)
    assert module.running_mean is not None and module.running_var is not None
    assert_close(norm[2], module.running_mean, 1e-12)
    assert_close(norm[3], module.running_var, 1e-12)
    weight = torch.randn_like(x)
    for mine, torchs in zip(
        torch.autograd.grad((ours * weight).sum(), [x, module.weight, module.bias]),
        torch.autograd.grad((theirs * weight).sum(), [x, module.weight, module.bias]),
    ):
        assert_close(mine, torchs, 1e-11)


def test_the_table_of_backends() -> None:
    """Each reason in one sentence, before anything runs; "auto" falls back to the reference, by name."""
    clips = torch.ones(1, 1, 8, 8)
    here = "triton" if backends.INTERPRETED else "cpu"
    assert backends.choose("auto", clips) == here and backends.choose("reference", clips) == "reference"
    assert backends.choose("auto", clips.double()) == "reference"
    assert "expected float32, bfloat16" in (backends.why_not(here, clips.double()) or "")
    assert backends.TABLE["triton"].tokens == 128 and backends.TABLE["cpu"].tokens is None
    if backends.INTERPRETED:
        assert "at most 128 tokens, got 129" in (backends.why_not("triton", clips, 129) or "")
        assert backends.choose("auto", clips, 129) == "reference"
        assert "expected TRITON_INTERPRET unset" in (backends.why_not("cpu", clips) or "")
    else:
        assert "expected tensors on cuda, got cpu" in (backends.why_not("triton", clips) or "")
    with pytest.raises(AvserError, match="backend: expected auto, reference, cpu or triton, got 'gpu'"):
        backends.choose("gpu", clips)
    with pytest.raises(AvserError, match="float64"):
        backends.choose(here, clips.double())
