"""``python -m benchmarks.gpu_training OUT``: a training step and its convolutions on a GPU, beside PyTorch.

Gradients are compared with the float64 reference before anything is timed, those of the captured bf16 step too.  Writes
``OUT/gpu-training.json`` after every part; one that fails is written down and does not hide the others (exit code 1).
Goals are in goals.py.
"""

from __future__ import annotations

import json
import statistics
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avser_fast import ops

from . import training
from .cases import CLIPS
from .goals import GPU_GOALS
from .peers import reason

UTTERANCES, CHECKED = 32, 4
WARM_UP, ROUNDS, CALLS = 8, 15, 10
EAGER, GRAPHS = "PyTorch eager AMP", "torch.compile with CUDA graphs"
#: In bf16 the error of a gradient may be so many times that of PyTorch's autocast, plus this share of the largest one.
TIMES_AUTOCAST, BF16_SMALL = 2.0, 2e-3


def device() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def interleaved(runs: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Milliseconds per call of every contender, in turns, each turn between two CUDA events."""
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    took: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            start.record()
            for _ in range(CALLS):
                run()
            end.record()
            end.synchronize()
            took[name].append(start.elapsed_time(end) / CALLS)
    return {name: {"median_ms": statistics.median(v), "min_ms": min(v)} for name, v in took.items()}


def captured(step: training.Step) -> Callable[[], Any]:
    """The whole step, optimizer included, as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    step.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step.run()
    return graph.replay


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


def check() -> Any:
    """What the gradients of ours and of eager differ by from float64, at most, at float32 without dropout."""
    exact = training.exact(CHECKED)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in (training.OURS, training.EAGER):
        training.check_gradients(training.Step(name, CHECKED, device="cuda", dropout=False).gradients(), exact)
    check_autocast("cuda", exact)
    return training.TOLERANCE


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
        replay = captured(ours)
        replay()
        steps["captured"] = {n: p.grad for n, p in ours.model.named_parameters() if p.grad is not None}
    largest = max(float(value.norm()) for name, value in exact.items() if name != "loss")
    for how, found in steps.items():
        assert found.keys() | {"loss"} == exact.keys(), f"bf16 step, {how}: expected every gradient"
        for name, error in errors(found).items():
            allowed = TIMES_AUTOCAST * theirs[name] + BF16_SMALL * largest
            assert error <= allowed, f"bf16 step, {how}: {name}: error {error:.3g}, allowed {allowed:.3g}"


def step_times() -> dict[str, Any]:
    """The step in bf16: ours as it is and captured, eager under AMP, torch.compile with CUDA graphs."""
    missing: dict[str, str] = {}
    runs: dict[str, Callable[[], Any]] = {}

    def add(name: str, build: Callable[[], Callable[[], Any]]) -> None:
        try:
            run = build()
            run()
            runs[name] = run
        except Exception as error:  # whatever keeps a contender from starting is what the results say of it
            missing[name] = reason(error)

    def step(name: str, **how: Any) -> training.Step:
        return training.Step(name, UTTERANCES, device="cuda", precision="bf16", **how)

    add("avser_fast", lambda: captured(step(training.OURS)))
    add("avser_fast without a graph", lambda: step(training.OURS).run)
    add(EAGER, lambda: step(training.EAGER).run)
    add(GRAPHS, lambda: step(training.COMPILED, mode="reduce-overhead").run)
    memory = {name: peak_mb(step(of)) for name, of in (("avser_fast", training.OURS), (EAGER, training.EAGER))}
    return {"times": interleaved(runs), "missing": missing, "peak_mb": memory}


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
        found[str(dtype).removeprefix("torch.")] = interleaved({"avser_fast": ours, "cuDNN": cudnn})
    return found


def ratios(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every goal beside what was measured; None where a contender or a part is missing."""
    step, pair = content.get("step", {}), content.get("pair", {})
    times, memory, bf16 = step.get("times", {}), step.get("peak_mb"), pair.get("bfloat16")

    def over(name: str) -> float | None:
        ours = times.get("avser_fast") or times.get("avser_fast without a graph")
        return times[name]["median_ms"] / ours["median_ms"] if ours and name in times else None

    measured = {
        "step over eager AMP": over(EAGER),
        "step over torch.compile": over(GRAPHS),
        "depthwise and pointwise over cuDNN": bf16 and bf16["cuDNN"]["median_ms"] / bf16["avser_fast"]["median_ms"],
        "peak memory as a share of eager's": memory and memory["avser_fast"] / memory[EAGER],
    }
    return {name: {"goal": GPU_GOALS[name], "measured": value} for name, value in measured.items()}


PARTS: dict[str, Callable[[], Any]] = {
    "gradient_error_at_most": check,
    "pair": pair_times,
    "step": step_times,
}


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("gpu_training: expected an NVIDIA GPU that torch can use, found none: nothing was measured")
        return 2
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"device": device(), "utterances": UTTERANCES, "clips": CLIPS, "failed": {}}
    for name, part in PARTS.items():
        if name in content["failed"]:
            continue
        try:
            content[name] = part()
        except Exception as error:
            traceback.print_exc()
            content["failed"][name] = reason(error)
            if part is check:
                content["failed"]["step"] = "not timed: its gradients are wrong"
        content["goals"] = ratios(content)
        (out / "gpu-training.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))
    return 1 if content["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
