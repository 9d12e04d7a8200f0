"""What the GPU benchmarks share: the device, contenders timed in turns, and results that are kept part by part."""

from __future__ import annotations

import json
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avser_fast.testing import assert_close

from .peers import reason

WARM_UP, ROUNDS, CALLS = 8, 15, 10
#: How the names of our contenders begin.
OURS = "avser_fast"

Run = Callable[[], Any]
#: What runs, and what then gives its output.
Made = tuple[Run, Callable[[], Tensor]]


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


def interleaved(runs: Mapping[str, Run]) -> dict[str, dict[str, float]]:
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


class Captured:
    """``run`` as a CUDA graph.  Keeps it: a graph holds none of the memory that it reads and writes."""

    def __init__(self, run: Run) -> None:
        self._run = run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.output = run()

    def __call__(self) -> None:
        self._graph.replay()


def graph(run: Run) -> Made:
    captured = Captured(run)
    return captured, lambda: captured.output


def plain(run: Run) -> Made:
    return run, run


def timed(makers: Mapping[str, tuple[Callable[[], Made], float]], expected: np.ndarray) -> dict[str, Any]:
    """Times of the contenders whose output agrees, within a tolerance of each; why the others have none."""
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for name, (make, tolerance) in makers.items():
        try:
            run, output = make()
            run()
            torch.cuda.synchronize()
            assert_close(output().float().cpu().numpy(), expected, tolerance, name)
            runs[name] = run
        except Exception as error:  # whatever keeps a contender from running is what the results say of it
            traceback.print_exc()
            failed[name] = reason(error)
    return {"times": interleaved(runs), "failed": failed}


def run_parts(
    name: str,
    parts: Mapping[str, Callable[[], dict[str, Any]]],
    goals: Callable[[dict[str, Any]], dict[str, Any]],
    arguments: Sequence[str],
    combine: Callable[[dict[str, Any]], None] = lambda content: None,
) -> int:
    """The command ``OUT [PART...]``: all parts or those that are named, into ``OUT/NAME.json``, beside what is there.

    The file is written after every part, with what ``combine`` adds of several parts together; one that fails is
    written down and does not hide the others.  Exit codes: 1 where one failed, or a contender of ours did; 2 without a
    GPU or for wrong use.
    """
    if not torch.cuda.is_available():
        print(f"{name}: expected an NVIDIA GPU that torch can use, found none: nothing was measured")
        return 2
    if not arguments:
        print(f"{name}: expected a folder for the results")
        return 2
    out, chosen = Path(arguments[0]), list(arguments[1:]) or list(parts)
    if unknown := set(chosen) - parts.keys():
        print(f"{name}: expected parts of {', '.join(parts)}, got {', '.join(sorted(unknown))}")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    file, code = out / f"{name}.json", 0
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"failed": {}}
    content["device"] = device()
    for part in chosen:
        content["failed"].pop(part, None)
        content.pop(part, None)
        try:
            content[part] = parts[part]()
        except Exception as error:
            traceback.print_exc()
            content["failed"][part] = reason(error)
        wrong = [part in content["failed"], *(x.startswith(OURS) for x in content.get(part, {}).get("failed", ()))]
        code = max(code, int(any(wrong)))
        combine(content)
        content["goals"] = goals(content)
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(part, json.dumps(content.get(part, content["failed"].get(part)), indent=1), flush=True)
    return code


def command(name: str, parts: Any, goals: Any, *combine: Any) -> None:
    sys.exit(run_parts(name, parts, goals, sys.argv[1:], *combine))
