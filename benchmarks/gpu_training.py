"""``python -m benchmarks.gpu_training OUT [PART...]``: a training step and its convolutions on a GPU, beside PyTorch.

Gradients are compared with the float64 reference before anything is timed, those of the captured bf16 step too.  Writes
``OUT/gpu-training.json`` after every part; one that fails is written down and does not hide the others (exit code 1).
Goals are in goals.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avser_fast import ops

from . import training
from .cases import CLIPS
from .goals import GPU_GOALS
from .gpu_parts import OURS, Captured, command, interleaved
from .peers import reason

UTTERANCES, CHECKED = 32, 4
WITHOUT_GRAPH = f"{OURS} without a graph"
EAGER, GRAPHS = "PyTorch eager AMP", "torch.compile with CUDA graphs"
#: In bf16 the error of a gradient may be so many times that of PyTorch's autocast, plus this share of the largest one.
TIMES_AUTOCAST, BF16_SMALL = 2.0, 2e-3


def peak_mb(step: training.Step) -> float:
    """Device memory of a step beyond network, optimizer and batch."""
    step.run()
    step.optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@functools.cache
def check() -> dict[str, Any]:
    """What the gradients of ours and of eager differ by from float64, at most, at float32 without dropout."""
    exact = training.exact(CHECKED)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in (training.OURS, training.EAGER):
        training.check_gradients(training.Step(name, CHECKED, device="cuda", dropout=False).gradients(), exact)
    check_autocast("cuda", exact)
    return {"error_at_most": training.TOLERANCE, "utterances": CHECKED}


def check_autocast(device: str, exact: dict[str, Tensor]) -> None:
    """AssertionError where a gradient of our bf16 step, captured too on a GPU, is further off than autocast excuses."""

    def step(name: str) -> training.Step:
        return training.Step(name, CHECKED, device=device, precision="bf16", dropout=False)

    def errors(found: dict[str, Tensor]) -> dict[str, float]:
        return {name: float((value.cpu().double() - exact[name]).norm()) for name, value in found.items()}

    theirs = errors(step(training.EAGER).gradients())
    steps = {"eager": step(training.OURS).gradients()}
    if device == "cuda":
        ours = step(training.OURS)
        replay = Captured(ours.run)
        replay()
        steps["captured"] = {n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None}
    largest = max(float(value.norm()) for name, value in exact.items() if name != "loss")
    for how, found in steps.items():
        assert found.keys() | {"loss"} == exact.keys(), f"bf16 step, {how}: expected every gradient"
        for name, error in errors(found).items():
            allowed = TIMES_AUTOCAST * theirs[name] + BF16_SMALL * largest
            assert error <= allowed, f"bf16 step, {how}: {name}: error {error:.3g}, allowed {allowed:.3g}"


def bf16_step(name: str, **how: Any) -> training.Step:
    return training.Step(name, UTTERANCES, device="cuda", precision="bf16", **how)


def captured_step() -> Callable[[], Any]:
    """The whole step of ours, optimizer included, as one CUDA graph."""
    return Captured(bf16_step(training.OURS).run)


def timed_steps(makers: dict[str, Callable[[], Callable[[], Any]]]) -> dict[str, Any]:
    failed: dict[str, str] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, make in makers.items():
        try:
            run = make()
            run()
            runs[name] = run
        except Exception as error:  # whatever keeps a contender from starting is what the results say of it
            failed[name] = reason(error)
    return {"utterances": UTTERANCES, "clips": CLIPS, "times": interleaved(runs), "failed": failed}


def step_times() -> dict[str, Any]:
    """The step in bf16: ours as it is and captured, and eager under AMP."""
    check()  # what is wrong is not timed
    makers = {
        OURS: captured_step,
        WITHOUT_GRAPH: lambda: bf16_step(training.OURS).run,
        EAGER: lambda: bf16_step(training.EAGER).run,
    }
    return timed_steps(makers)


def compiled_times() -> dict[str, Any]:
    """Ours captured and torch.compile with CUDA graphs, which takes a minute to compile."""
    check()
    compiled = lambda: bf16_step(training.COMPILED, mode="reduce-overhead").run  # noqa: E731
    return timed_steps({OURS: captured_step, GRAPHS: compiled})


def memory() -> dict[str, float]:
    """Megabytes of a step beyond network, optimizer and batch."""
    return {name: peak_mb(bf16_step(of)) for name, of in ((OURS, training.OURS), (EAGER, training.EAGER))}


def pair_times() -> dict[str, Any]:
    """Depthwise and pointwise convolution, forward and backward, of the first block's larger pair; cuDNN beside."""
    found: dict[str, Any] = {}
    clips = UTTERANCES * CLIPS
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0, generator: Any = generator, dtype: Any = dtype) -> Tensor:
            made = (torch.randn(shape, generator=generator) * scale).to("cuda", dtype)
            return made.contiguous(memory_format=torch.channels_last).requires_grad_()

        x, depthwise = draw(clips, 128, 56, 10), draw(128, 1, 3, 3, scale=0.3)
        pointwise = draw(128, 128, 1, 1, scale=0.1)
        grad = torch.randn_like(x).contiguous(memory_format=torch.channels_last)
        asked = (x, depthwise, pointwise)

        def ours(asked: Any = asked, grad: Tensor = grad) -> Any:
            return torch.autograd.grad(ops.separable_conv2d(*asked)[0], asked, grad)

        def cudnn(asked: Any = asked, grad: Tensor = grad) -> Any:
            x, depthwise, pointwise = asked
            y = F.conv2d(F.conv2d(x, depthwise, padding=1, groups=128), pointwise)
            return torch.autograd.grad(y, asked, grad)

        for mine, theirs in zip(ours(), cudnn()):
            error = float((mine.float() - theirs.float()).abs().max() / theirs.float().abs().max())
            assert error <= (0.05 if dtype == torch.bfloat16 else 1e-3), f"separable_conv2d: {error:.3g} from cuDNN"
        found[str(dtype).removeprefix("torch.")] = interleaved({OURS: ours, "cuDNN": cudnn})
    return found


def ratios(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every goal beside what was measured; None where a contender or a part is missing."""
    bf16, peak = content.get("pair", {}).get("bfloat16"), content.get("peak_mb")

    def over(part: str, name: str) -> float | None:
        times = content.get(part, {}).get("times", {})
        ours = times.get(OURS) or times.get(WITHOUT_GRAPH)
        return times[name]["median_ms"] / ours["median_ms"] if ours and name in times else None

    measured = {
        "step over eager AMP": over("step", EAGER),
        "step over torch.compile": over("compiled", GRAPHS),
        "depthwise and pointwise over cuDNN": bf16 and bf16["cuDNN"]["median_ms"] / bf16[OURS]["median_ms"],
        "peak memory as a share of eager's": peak and peak[OURS] / peak[EAGER],
    }
    return {name: {"goal": GPU_GOALS[name], "measured": value} for name, value in measured.items()}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "gradients": check,
    "pair": pair_times,
    "step": step_times,
    "peak_mb": memory,
    "compiled": compiled_times,
}


if __name__ == "__main__":
    command("gpu-training", PARTS, ratios)
