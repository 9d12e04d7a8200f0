"""``python -m benchmarks.gpu_engine OUT``: the CUDA engine, from clips in GPU memory to probabilities, beside PyTorch.

The published network in bf16 (and the other precisions of ours), one utterance of 5 clips up to 205 of them; ours as a
CUDA graph of the caller's and, for small batches, by other teams of blocks; PyTorch eager channels-last AMP, the same
in a CUDA graph, torch.compile. Then 4.5 s of samples in GPU memory to probabilities, and the log-mel features of 64
such recordings beside torchaudio's. Outputs are compared with float64 before anything is timed (samples: with the CPU
engine). The device's own ceilings, rate of products and of copies, are measured beside. Writes ``OUT/gpu-engine.json``;
a contender that fails is written down and does not hide the others (exit code 1 where it is ours).  Goals are in
goals.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import avser_fast
from avser_fast import _engine, config, nn, reference
from avser_fast.testing import assert_close

from .cases import CLIPS
from .goals import GPU_ENGINE_GOALS
from .gpu_training import device, interleaved
from .macs import mdscm_macs
from .models import MEMBERS
from .peers import reason

UTTERANCES = (1, 16, 205)
PRECISIONS = {"float32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2, "fp8": 0.1}
OURS = "avser_fast"
EAGER, GRAPH = "PyTorch eager AMP, channels-last", "PyTorch eager AMP in a CUDA graph"
COMPILED = "torch.compile max-autotune with CUDA graphs"
TORCHAUDIO = "torchaudio MelSpectrogram and log"
SAMPLES = 72480  # 4.53 s: 452 frames
#: The arguments of the op: the published front end.
LOG_MEL = (16000, 40, 400, 160, 512, 0.97, 0.0, 8000.0)
#: Other teams of blocks for one utterance: what the default is chosen from.
TEAMS: tuple[dict[str, Any], ...] = (
    {"team": 16}, {"team": 8}, {"team": 4}, {"team": 1}, {"team": 8, "group": 5}, {"team": 16, "staged": True},
)  # fmt: skip

Run = Callable[[], Any]


class OnDevice:
    """Our engine on clips (B, L, C, W, M) in the GPU's memory, on torch's current stream."""

    def __init__(self, network: Any, tensors: dict[str, np.ndarray], clips: Tensor, **options: Any) -> None:
        spec = json.dumps({"network": config.plain(network)})
        self.engine = _engine.GpuEngine(spec, tensors, **options)
        self.clips = clips.contiguous()
        batch, count = clips.shape[:2]
        sizes = ((batch, network.classes), (batch, count, network.features), (batch, count, network.classes))
        self.outputs = [torch.full(size, float("nan"), device=clips.device) for size in sizes]

    def __call__(self) -> Tensor:
        addresses = [x.data_ptr() for x in self.outputs]
        stream = torch.cuda.current_stream().cuda_stream
        self.engine.forward_on_device(self.clips.data_ptr(), 0, *self.clips.shape[:2], *addresses, stream)
        return self.outputs[0]


def graph(run: Run) -> tuple[Run, Callable[[], Tensor]]:
    """``run`` as a CUDA graph, and what gives its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        output = run()
    return made.replay, lambda: output


def peer(network: Any, tensors: dict[str, np.ndarray], clips: Tensor, compiled: bool) -> Run:
    model: Any = nn.MDSCM(network, backend="reference").eval().requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()}, strict=False)
    model = model.to("cuda", memory_format=torch.channels_last)
    if compiled:
        model = torch.compile(model, mode="max-autotune")

    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            probabilities: Tensor = model(clips).probabilities
            return probabilities

    return run


def ceilings() -> dict[str, float]:
    """TFLOP/s of a bf16 product of 8192 and GB/s of a copy, bytes read and written."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    x = torch.empty(1 << 28, device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    found = interleaved({"product": lambda: a @ a, "copy": lambda: y.copy_(x)})
    return {
        "bf16_tflops": 2 * 8192**3 / found["product"]["median_ms"] / 1e9,
        "copy_gbps": 2 * x.numel() / found["copy"]["median_ms"] / 1e6,
    }


def measure(network: Any, tensors: dict[str, np.ndarray], utterances: int) -> dict[str, Any]:
    shape = (utterances, CLIPS, network.planes, network.clip_frames, network.mel_bands)
    host = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    reference = nn.MDSCM(network, backend="reference").double().eval()
    reference.load_state_dict({n: torch.from_numpy(v) for n, v in tensors.items()}, strict=False)
    clips = torch.from_numpy(host).cuda()
    with torch.inference_mode():
        parts = [reference.cuda()(part.double()).probabilities for part in clips.split(16)]
        expected = torch.cat(parts).cpu().numpy()
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}

    def add(name: str, build: Callable[[], tuple[Run, Callable[[], Tensor]]], tolerance: float) -> None:
        try:
            run, output = build()
            run()
            torch.cuda.synchronize()
            assert_close(output().float().cpu().numpy(), expected, tolerance, name)
            runs[name] = run
        except Exception as error:  # whatever keeps a contender from running is what the results say of it
            failed[name] = reason(error)

    def plain(run: Run) -> tuple[Run, Callable[[], Tensor]]:
        return run, run

    for precision, tolerance in PRECISIONS.items():
        name = OURS if precision == "bf16" else f"{OURS}, {precision}"
        add(name, lambda p=precision: graph(OnDevice(network, tensors, clips, precision=p)), tolerance)
    if utterances == 1:
        for options in TEAMS:
            add(f"{OURS}, {options}", lambda o=options: graph(OnDevice(network, tensors, clips, precision="bf16", **o)),
                PRECISIONS["bf16"])  # fmt: skip
    add(EAGER, lambda: plain(peer(network, tensors, clips, False)), PRECISIONS["bf16"])
    add(GRAPH, lambda: graph(peer(network, tensors, clips, False)), PRECISIONS["bf16"])
    add(COMPILED, lambda: plain(peer(network, tensors, clips, True)), PRECISIONS["bf16"])
    return {"utterances": utterances, "clips": utterances * CLIPS, "times": interleaved(runs), "failed": failed}


def utterance(rows: int) -> np.ndarray:
    """(rows, n) samples of as much noise as the other benchmarks' utterance has speech, at int16 scale."""
    return (np.random.default_rng(1).standard_normal((rows, SAMPLES)) * 3000).astype(np.float32)


def measure_samples(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """One utterance's samples in GPU memory to probabilities: one graph for front end, clips and network."""
    spec = MEMBERS["mdscm-published"]
    host = utterance(1)
    expected = avser_fast.Recognizer(spec, tensors, device="cpu", precision="float32").forward_samples(host)[0]
    samples = torch.from_numpy(host).cuda()
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    for precision, tolerance in PRECISIONS.items():
        name = OURS if precision == "bf16" else f"{OURS}, {precision}"
        try:
            model = avser_fast.Recognizer(spec, tensors, device="cuda", backend="cuda", precision=precision)
            run, output = graph(lambda m=model: m.forward_samples(samples)[0])
            run()
            torch.cuda.synchronize()
            assert_close(output().cpu().numpy(), expected, tolerance, name)
            runs[name] = run
        except Exception as error:  # as in `measure`
            failed[name] = reason(error)
    return {"samples": SAMPLES, "times": interleaved(runs), "failed": failed}


def measure_log_mel() -> dict[str, Any]:
    """64 recordings: our op, with the published double arithmetic and natural log, beside torchaudio in float32."""
    host = utterance(64)
    samples = torch.from_numpy(host).cuda()
    runs: dict[str, Run] = {}
    failed: dict[str, str] = {}
    try:
        expected = np.stack([reference.log_mel(torch.from_numpy(row).double()).numpy() for row in host[:2]])
        run, output = graph(lambda: torch.ops.avser_fast.log_mel(samples, *LOG_MEL))
        run()
        torch.cuda.synchronize()
        assert_close(output()[:2].cpu().numpy(), expected, 1e-6, OURS)
        runs[OURS] = run
    except Exception as error:
        failed[OURS] = reason(error)
    try:
        import torchaudio

        transform = torchaudio.transforms.MelSpectrogram(16000, 512, 400, 160, n_mels=40, center=False).cuda()
        plain = lambda: torch.log(transform(samples) + 1e-10)  # noqa: E731
        runs[TORCHAUDIO] = plain
        runs[f"{TORCHAUDIO} in a CUDA graph"] = graph(plain)[0]
    except Exception as error:
        failed[TORCHAUDIO] = reason(error)
    return {"recordings": len(host), "samples": SAMPLES, "times": interleaved(runs), "failed": failed}


def goals(content: dict[str, Any], macs: int) -> dict[str, dict[str, Any]]:
    """Every goal beside what was measured; None where a contender is missing."""
    cases = {case["utterances"]: case for case in content.get("cases", ())}

    def ms(utterances: int, name: str) -> float | None:
        found = cases.get(utterances, {}).get("times", {}).get(name)
        return found and found["median_ms"]

    def ratio(utterances: int) -> float | None:
        ours, theirs = ms(utterances, OURS), ms(utterances, COMPILED)
        return theirs / ours if ours and theirs else None

    def front(part: str, name: str) -> float | None:
        found = content.get(part, {}).get("times", {}).get(name)
        return found and found["median_ms"]

    sampled, ours, theirs = front("samples", OURS), front("log_mel", OURS), front("log_mel", TORCHAUDIO)
    graphed = front("log_mel", f"{TORCHAUDIO} in a CUDA graph")
    theirs = min(filter(None, (theirs, graphed)), default=None)
    one, many = ms(UTTERANCES[0], OURS), ms(UTTERANCES[-1], OURS)
    rate = many and UTTERANCES[-1] * CLIPS / many * 1e3
    measured = {
        "one utterance, us": one and one * 1e3,
        "one utterance over torch.compile": ratio(UTTERANCES[0]),
        "4.5 s of samples on the device, us": sampled and sampled * 1e3,
        "log-mel over torchaudio": theirs / ours if ours and theirs else None,
        "1025 clips, clips/s": rate,
        "1025 clips over torch.compile": ratio(UTTERANCES[-1]),
    }
    peak = content.get("ceilings", {}).get("bf16_tflops")
    share = rate * macs * 2 / 1e12 / peak if rate and peak else None
    found = {name: {"goal": GPU_ENGINE_GOALS[name], "measured": value} for name, value in measured.items()}
    return {**found, "1025 clips, share of the bf16 ceiling": {"goal": None, "measured": share}}


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("gpu_engine: expected an NVIDIA GPU that torch can use, found none: nothing was measured")
        return 2
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    network = MEMBERS["mdscm-published"].network
    torch.manual_seed(0)
    tensors = {name: value.numpy() for name, value in nn.MDSCM(network).state_dict().items()}
    content: dict[str, Any] = {"device": device(), "ceilings": ceilings(), "cases": []}
    content |= {"samples": measure_samples(tensors), "log_mel": measure_log_mel()}
    for utterances in UTTERANCES:
        content["cases"].append(measure(network, tensors, utterances))
        content["goals"] = goals(content, mdscm_macs(network))
        (out / "gpu-engine.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))
    parts = [*content["cases"], content["samples"], content["log_mel"]]
    return 1 if any(name.startswith(OURS) for part in parts for name in part["failed"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
