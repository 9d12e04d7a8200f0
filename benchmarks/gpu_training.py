"""``python -m benchmarks.gpu_training OUT PART...``: training on a GPU beside PyTorch, into ``OUT/gpu_training.json``.

Parts: ``step`` (the published network under bf16 autocast, 32 utterances of 5 clips; eager and as one CUDA graph),
``compiled`` (PyTorch's compiler at two settings, into the same comparison), ``convolution`` (one separable convolution,
forward and backward, beside cuDNN).  Everything is compared with float64 first.  A part that fails is written down and
does not hide the others.  Exit code 0: every part ran; 1: one failed; 2: there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avser_fast import nn, ops
from avser_fast.inference.weights import write_bytes
from avser_fast.ops import backends

from . import training
from .compare import OURS
from .goals import GPU_CONVOLUTION, GPU_MEMORY, GPU_TRAINING
from .training import COMPILED, EAGER, Batch, Taken

FILE = "gpu_training.json"
CAPTURED = f"{OURS}, one CUDA graph"
UTTERANCES, CLIPS = 32, 5
#: PyTorch's compiler: with CUDA graphs, and with every kernel tried.
MODES = ("reduce-overhead", "max-autotune-no-cudagraphs")
#: (in, out, height, width) of the separable convolutions of the published network.
CONVOLUTIONS = ((64, 128, 56, 10), (128, 128, 56, 10), (128, 256, 28, 5), (256, 256, 28, 5))
#: Timed calls between two waits for the device, and turns of every contender.
CALLS, ROUNDS = 10, 15
#: In bf16: our errors are held to so many times those of PyTorch's autocast, plus this share of the largest gradient.
TIMES_AUTOCAST, BF16_SMALL = 2.0, 2e-3

Run = Callable[[], Any]


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def times(contenders: dict[str, Run], device: str, rounds: int = ROUNDS, calls: int = CALLS) -> dict[str, Any]:
    """Median, least and number of milliseconds per call, contenders in turns."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 2):  # two that only warm up
        for name, run in contenders.items():
            sync(device)
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            sync(device)
            if turn >= 2:
                found[name].append(1e3 * (time.perf_counter() - begin) / calls)
    return {n: {"median_ms": statistics.median(v), "min_ms": min(v), "turns": len(v)} for n, v in found.items()}


def captured(run: Run) -> tuple[Run, Any]:
    """``run`` as one CUDA graph, and what it returns at every replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


# ---- a training step


def clips(device: str, utterances: int, count: int) -> Batch:
    """Random features: the machine need not be able to read recordings."""
    network = training.network()
    generator = torch.Generator().manual_seed(0)
    shape = (utterances, count, network.in_channels, network.clip_frames, network.mel_bands)
    classes = torch.randint(0, network.classes, (utterances,), generator=generator)
    values = torch.randn(shape, generator=generator)
    return Batch(values.to(device), classes.repeat_interleave(count).to(device))


def model(backend: str, device: str) -> nn.MDSCM:
    made = training.model(backend, device)
    return training.channels_last(made) if backend == "reference" else made


def stepper(module: nn.MDSCM, given: Batch, dtype: torch.dtype, mode: str | None = None) -> Callable[[], Taken]:
    """One step under autocast, compiled at ``mode`` if given.  The learning rate is 0 (``benchmarks.training``)."""
    device = given.clips.device.type
    update = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True, capturable=device == "cuda")
    names, parameters = zip(*module.named_parameters())

    def forward(x: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = module(x).clip_logits.flatten(0, 1)
        return F.cross_entropy(logits.float(), targets)

    call = forward if mode is None else torch.compile(forward, mode=mode, dynamic=False)

    def step() -> Taken:
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        update.zero_grad(set_to_none=True)
        loss = call(given.clips, given.targets)
        loss.backward()
        update.step()
        return loss.detach(), {n: p.grad for n, p in zip(names, parameters) if p.grad is not None}

    return step


def errors(taken: Taken, exact: Taken) -> dict[str, float]:
    """Norm of the error of loss and gradients."""
    found = {n: float((taken[1][n].double() - g).norm()) for n, g in exact[1].items()}
    return {"loss": abs(float(taken[0]) - float(exact[0])), **found}


def judge(taken: Taken, exact: Taken, eager: dict[str, float]) -> float:
    """AssertionError for errors beyond those that autocast excuses; the largest error as a share of what is allowed."""
    largest = max(float(g.norm()) for g in exact[1].values())
    worst = 0.0
    for name, error in errors(taken, exact).items():
        allowed = TIMES_AUTOCAST * eager[name] + BF16_SMALL * (largest if name != "loss" else abs(float(exact[0])))
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
        worst = max(worst, error / allowed)
    return worst


def peak_mb(step: Run, device: str) -> float:
    """What a step allocates beyond what is there already: model, state of the optimizer, batch."""
    if device != "cuda":
        return float("nan")
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def step_part(
    device: str = "cuda",
    utterances: int = UTTERANCES,
    count: int = CLIPS,
    modes: Sequence[str] = (),
    rounds: int = ROUNDS,
    calls: int = CALLS,
) -> dict[str, Any]:
    """Ours eager and captured, PyTorch eager under autocast and channels-last, PyTorch compiled at ``modes``."""
    given, low = clips(device, utterances, count), torch.bfloat16
    exact = stepper(training.model("reference", device).double(), _double(given), torch.float32)()
    full = stepper(model("auto", device), given, torch.float32)()
    # Without autocast; the tests hold every op to less, here a unit that rounding switched on or off must pass.
    training.check(_on_cpu(exact), training.PEERS_GRADIENT)(_on_cpu(full))
    contenders: dict[str, Run] = {OURS: stepper(model("auto", device), given, low)}
    contenders[EAGER] = stepper(model("reference", device), given, low)
    allowed = errors(contenders[EAGER](), exact)
    result: dict[str, Any] = {"utterances": utterances, "clips": count, "refused": {}}
    result["share_of_allowed_error"] = {OURS: judge(contenders[OURS](), exact, allowed)}
    result["memory_mb"] = {name: peak_mb(run, device) for name, run in contenders.items()}
    if device == "cuda":
        contenders[CAPTURED], taken = captured(stepper(model("auto", device), given, low))
        contenders[CAPTURED]()
        sync(device)
        result["share_of_allowed_error"][CAPTURED] = judge(taken, exact, allowed)
    for mode in modes:
        try:
            run = stepper(model("reference", device), given, low, mode)
            for _ in range(3):
                run()
            judge(run(), exact, allowed)
            contenders[f"{COMPILED}, {mode}"] = run
        except Exception as error:  # a setting that does not work on this machine is listed with its reason
            result["refused"][mode] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return {**result, "times": times(contenders, device, rounds, calls)}


def _double(given: Batch) -> Batch:
    return Batch(given.clips.double(), given.targets)


def _on_cpu(taken: Taken) -> Taken:
    return taken[0].cpu(), {n: g.cpu() for n, g in taken[1].items()}


# ---- a convolution


def convolution(shape: tuple[int, int, int, int], device: str, images: int, rounds: int, calls: int) -> dict[str, Any]:
    """Forward and backward of one separable convolution in bf16: ours, which also takes the statistics of its output,
    and torch's two convolutions in either layout, which does not."""
    i, o, height, width = shape
    generator = torch.Generator().manual_seed(i)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(sizes, generator=generator)).to(device, torch.bfloat16)

    x, depthwise, pointwise = (
        draw(images, i, height, width),
        draw(i, 1, 3, 3, scale=0.3),
        draw(o, i, 1, 1, scale=i**-0.5),
    )
    grad = draw(images, o, height, width)

    def torchs(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, depthwise, padding=1, groups=i), pointwise)

    def fused(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> Tensor:
        return ops.separable_conv2d(x, depthwise, pointwise)[0]

    def runner(function: Callable[..., Tensor], layout: torch.memory_format, dtype: torch.dtype) -> Run:
        given = [t.to(dtype).contiguous(memory_format=layout).requires_grad_() for t in (x, depthwise, pointwise)]
        weight = grad.to(dtype).contiguous(memory_format=layout)

        def run() -> list[Tensor]:
            y = function(*given)
            return [y.detach(), *torch.autograd.grad(y, given, weight)]

        return run

    last = torch.channels_last
    exact = runner(torchs, last, torch.float64)()
    runs = {
        OURS: runner(fused, last, torch.bfloat16),
        "cuDNN, channels-last": runner(torchs, last, torch.bfloat16),
        "cuDNN, contiguous": runner(torchs, torch.contiguous_format, torch.bfloat16),
    }
    off = {n: [float((a.double() - b).norm() / b.norm()) for a, b in zip(run(), exact)] for n, run in runs.items()}
    for what, ours, theirs in zip(("y", "x", "depthwise", "pointwise"), off[OURS], off["cuDNN, channels-last"]):
        allowed = TIMES_AUTOCAST * theirs + torch.finfo(torch.bfloat16).eps / 2
        assert ours <= allowed, f"separable_conv2d {shape}: {what}: error {ours:.3g}, allowed {allowed:.3g}"
    if device == "cuda":
        runs = {name: captured(run)[0] for name, run in runs.items()}  # kernels, not the time to launch them
    found = times(runs, device, rounds, calls)
    return {"shape": list(shape), "images": images, "errors": off, "times": found}


def convolution_part(
    device: str = "cuda", images: int = UTTERANCES * CLIPS, rounds: int = ROUNDS, calls: int = CALLS
) -> dict[str, Any]:
    cases = [convolution(shape, device, images, rounds, calls) for shape in CONVOLUTIONS]
    ours = sum(case["times"][OURS]["median_ms"] for case in cases)
    cudnn = sum(min(v["median_ms"] for n, v in case["times"].items() if n != OURS) for case in cases)
    return {"cases": cases, "ours_ms": ours, "cudnn_ms": cudnn}


# ---- goals and the command line


def goals(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each goal with what was measured, None where it was not.  Ours is the faster of eager and captured."""
    measured: dict[str, float | None] = dict.fromkeys((*GPU_TRAINING, "separable convolutions", "memory"))
    for part in ("step", "compiled"):
        found = parts.get(part, {}).get("times", {})
        ours = min((v["median_ms"] for n, v in found.items() if n.startswith(OURS)), default=None)
        for peer in GPU_TRAINING:
            theirs = min((v["median_ms"] for n, v in found.items() if n.startswith(peer)), default=None)
            if ours is not None and theirs is not None and (part == "compiled" or measured[peer] is None):
                measured[peer] = theirs / ours
    if parts.get("convolution", {}).get("cases"):
        measured["separable convolutions"] = parts["convolution"]["cudnn_ms"] / parts["convolution"]["ours_ms"]
    used = parts.get("step", {}).get("memory_mb")
    if used:
        measured["memory"] = used[OURS] / used[EAGER]
    names = {
        **{f"training step, {peer}, times as long as ours": (peer, goal, False) for peer, goal in GPU_TRAINING.items()},
        "separable convolutions, cuDNN, times as long as ours": ("separable convolutions", GPU_CONVOLUTION, False),
        f"memory of a step, share of {EAGER}'s": ("memory", GPU_MEMORY, True),
    }
    judged = {}
    for name, (key, goal, most) in names.items():
        value = measured[key]
        met = None if value is None else value <= goal if most else value >= goal
        judged[name] = {"goal": goal, "measured": value, "most": most, "met": met}
    return judged


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "step": step_part,
    "convolution": convolution_part,
    "compiled": lambda: step_part(modes=MODES),
}


def gpu() -> dict[str, Any]:
    import triton

    return {
        "name": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_training", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    given = parser.parse_args(arguments)
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART: expected some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print("gpu_training: expected an NVIDIA GPU that torch can use, got none")
        return 2
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # of the float32 check alone
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / FILE
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"parts": {}}
    content["gpu"] = gpu()
    code = 0
    for part in given.parts or PARTS:
        reason = backends.why_not("triton", torch.zeros(1, device="cuda"))
        try:
            assert reason is None, reason
            content["parts"][part] = PARTS[part]()
        except Exception as error:
            traceback.print_exc()
            content["parts"][part] = {"failed": f"{type(error).__name__}: {error}"}
            code = 1
        content["goals"] = goals(content["parts"])
        write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())
        print(json.dumps({part: content["parts"][part]}, indent=1), flush=True)
    for name, judged in content["goals"].items():
        print(name, judged)
    return code


if __name__ == "__main__":
    sys.exit(main())
