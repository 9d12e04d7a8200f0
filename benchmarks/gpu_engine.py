"""``python -m benchmarks.gpu_engine OUT [PART...]``: the CUDA engine, from clips in GPU memory to probabilities, beside
PyTorch.

The published network in bf16 (and the other precisions of ours), one utterance of 5 clips up to 205 of them; ours as a
CUDA graph of the caller's and, for small batches, by other teams of blocks; PyTorch eager channels-last AMP, the same
in a CUDA graph, and with weights in bf16 rather than AMP; torch.compile, with AMP and with weights in bf16, in parts of
its own, since it takes a minute to compile. Then 4.5 s of samples in GPU memory to probabilities, and the log-mel
features of 64 such recordings beside torchaudio's; the residual blocks alone; and where the time goes, stage by stage
(gpu_stages.py). PyTorch's networks have their batch norms folded. Outputs are compared with float64 before anything is
timed (samples: with the CPU engine). The device's own ceilings, rate of products and of copies, are measured beside.
Writes ``OUT/gpu-engine.json`` after every part; a contender that fails is written down and does not hide the others
(exit code 1 where it is ours).  Goals are in goals.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import avser_fast
from avser_fast import _engine, config, nn, reference
from avser_fast.testing import assert_close

from . import gpu_stages
from .cases import CLIPS
from .folded import FoldedBlock, FoldedMDSCM
from .goals import GPU_ENGINE_GOALS
from .gpu_parts import OURS, Made, Run, command, graph, interleaved, plain, timed
from .macs import mdscm_macs
from .models import MEMBERS
from .peers import reason

NETWORK = MEMBERS["mdscm-published"].network
ONE, MANY = 1, 205
UTTERANCES = (ONE, 16, MANY)
PRECISIONS = {"float32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2, "fp8": 0.1}
EAGER, GRAPH = "PyTorch eager AMP, channels-last", "PyTorch eager AMP in a CUDA graph"
HALF = "PyTorch eager, weights in bf16, in a CUDA graph"
COMPILED = "torch.compile max-autotune with CUDA graphs"
CUDNN, INDUCTOR = "cuDNN, channels-last", "torch.compile"
TORCHAUDIO, TORCHAUDIO_GRAPH = "torchaudio MelSpectrogram and log", "torchaudio in a CUDA graph"
SAMPLES = 72480  # 4.53 s: 452 frames
#: The arguments of the op: the published front end.
LOG_MEL = (16000, 40, 400, 160, 512, 0.97, 0.0, 8000.0)
#: Other teams of blocks, and maps in memory: what the default is chosen from.
TEAMS: dict[int, tuple[dict[str, Any], ...]] = {
    ONE: (
        {"team": 16}, {"team": 8}, {"team": 8, "through_memory": True}, {"team": 8, "direct_weights": True},
        {"team": 4}, {"team": 1}, {"team": 8, "group": 5}, {"team": 16, "staged": True},
    ),
    MANY: ({"team": 2, "group": 8}, {"team": 4, "group": 8}, {"team": 8, "group": 8}, {"team": 1, "group": 4}),
}  # fmt: skip


#: Calls in a graph of the stages, each with activations of its own: one of a few microseconds alone would be measured
#: as what the host takes to start it.  (Of many utterances that is true of the launch without stages alone.)
CALLS_OF_GRAPH = {ONE: 8, MANY: 1}
REPETITIONS = 3


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

    def first_steps(self, end: int, calls: int) -> Tensor:
        """Steps [0, end) alone, so many times."""
        addresses = [x.data_ptr() for x in self.outputs]
        stream = torch.cuda.current_stream().cuda_stream
        for _ in range(calls):
            self.engine.run_steps(self.clips.data_ptr(), *self.clips.shape[:2], *addresses, 0, end, stream)
        return self.outputs[0]


def name_of(precision: str) -> str:
    return OURS if precision == "bf16" else f"{OURS}, {precision}"


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    return {name: value.numpy() for name, value in nn.MDSCM(NETWORK).state_dict().items()}


def module() -> Any:
    made = nn.MDSCM(NETWORK, backend="reference").eval().requires_grad_(False)
    made.load_state_dict({name: torch.from_numpy(value) for name, value in tensors().items()}, strict=False)
    return made


def peer(clips: Tensor, *, compiled: bool = False, half: bool = False) -> Run:
    """Batch norms folded; with AMP or, ``half``, with weights in bf16, which then need no copy at every call."""
    dtype = torch.bfloat16 if half else torch.float32
    model: Any = FoldedMDSCM(module()).eval().to(clips.device, dtype, memory_format=torch.channels_last)
    if compiled:
        model = torch.compile(model, mode="max-autotune", dynamic=False)

    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=not half):
            logits: Tensor = model(clips.flatten(0, 1).to(dtype))
            return logits.unflatten(0, clips.shape[:2]).float().mean(1).softmax(-1)

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


def case(utterances: int) -> tuple[Tensor, np.ndarray]:
    """Clips in the GPU's memory, and their probabilities in float64."""
    shape = (utterances, CLIPS, NETWORK.planes, NETWORK.clip_frames, NETWORK.mel_bands)
    clips = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32)).cuda()
    exact = module().double().cuda()
    with torch.inference_mode():
        parts = [exact(part.double()).probabilities for part in clips.split(16)]
    return clips, torch.cat(parts).cpu().numpy()


def ours(clips: Tensor, **options: Any) -> Callable[[], Made]:
    return lambda: graph(OnDevice(NETWORK, tensors(), clips, **options))


def measure(utterances: int) -> dict[str, Any]:
    clips, expected = case(utterances)
    bf16 = PRECISIONS["bf16"]
    makers = {name_of(p): (ours(clips, precision=p), tolerance) for p, tolerance in PRECISIONS.items()}
    for options in TEAMS.get(utterances, ()):
        makers[f"{OURS}, {options}"] = ours(clips, precision="bf16", **options), bf16
    makers[EAGER] = lambda: plain(peer(clips)), bf16
    makers[GRAPH] = lambda: graph(peer(clips)), bf16
    makers[HALF] = lambda: graph(peer(clips, half=True)), bf16
    return timed(makers, expected)


def measure_stages(utterances: int) -> dict[str, Any]:
    """Every prefix of the steps as a graph, in turns; the whole must agree with float64."""
    clips, expected = case(utterances)
    own, calls = OnDevice(NETWORK, tensors(), clips, precision="bf16"), CALLS_OF_GRAPH[utterances]
    stages = own.engine.stages()
    made = [graph(functools.partial(own.first_steps, end, calls)) for end in range(len(stages) + 1)]
    run, output = made[-1]
    run()
    torch.cuda.synchronize()
    assert_close(output().float().cpu().numpy(), expected, PRECISIONS["bf16"], OURS)
    runs = {str(end): run for end, (run, _) in enumerate(made)}
    found = [interleaved(runs) for _ in range(REPETITIONS)]
    times = [[once[end]["min_ms"] / calls for once in found] for end in runs]
    count = utterances * CLIPS
    return {"clips": count, "calls_of_graph": calls, "rows": gpu_stages.rows(stages, count, times)}


def measure_blocks() -> dict[str, Any]:
    """The residual blocks of depthwise and pointwise convolutions on 1025 clips: ours as the difference of what runs
    with them and without them, beside the block alone in PyTorch, weights in bf16, batch norms folded."""
    clips, _ = case(MANY)
    own = OnDevice(NETWORK, tensors(), clips, precision="bf16")
    names = [stage["name"] for stage in own.engine.stages()]
    height, width, channels = NETWORK.clip_frames, NETWORK.mel_bands, NETWORK.stem[-1]
    for _ in NETWORK.stem:
        height, width = (height + 1) // 2, (width + 1) // 2
    found: dict[str, Any] = {}
    for i, block in enumerate(module().body.blocks):
        first = names.index(f"dsc_block.{i}.first")
        x = torch.randn(MANY * CLIPS, channels, height, width, device=clips.device, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        theirs = FoldedBlock(block).eval().to(clips.device, torch.bfloat16, memory_format=torch.channels_last)
        runs = {"before": graph(functools.partial(own.first_steps, first, 1))[0]}
        runs["behind"] = graph(functools.partial(own.first_steps, first + 2, 1))[0]
        failed: dict[str, str] = {}
        for name, model in ((CUDNN, theirs), (INDUCTOR, torch.compile(theirs, dynamic=False))):
            try:
                runs[name] = graph(without_gradients(model, x))[0]
            except Exception as error:  # whatever keeps a contender from running is what the results say of it
                failed[name] = reason(error)
        times = interleaved(runs)
        ours_ms = times["behind"]["min_ms"] - times["before"]["min_ms"]
        peers = {name: times[name]["min_ms"] for name in (CUDNN, INDUCTOR) if name in times}
        found[f"dsc_block.{i}"] = {"min_ms": {OURS: ours_ms, **peers}, "failed": failed}
        height, width, channels = (height + 1) // 2, (width + 1) // 2, NETWORK.blocks[i]
    return found


def without_gradients(model: Any, x: Tensor) -> Run:
    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def measure_compiled(utterances: int, half: bool) -> dict[str, Any]:
    clips, expected = case(utterances)
    bf16 = PRECISIONS["bf16"]
    theirs: Callable[[], Made] = lambda: plain(peer(clips, compiled=True, half=half))  # noqa: E731
    return timed({OURS: (ours(clips, precision="bf16"), bf16), COMPILED: (theirs, bf16)}, expected)


def utterance(rows: int) -> np.ndarray:
    """(rows, n) samples of as much noise as the other benchmarks' utterance has speech, at int16 scale."""
    return (np.random.default_rng(1).standard_normal((rows, SAMPLES)) * 3000).astype(np.float32)


def measure_samples() -> dict[str, Any]:
    """One utterance's samples in GPU memory to probabilities: one graph for front end, clips and network."""
    spec = MEMBERS["mdscm-published"]
    host = utterance(1)
    expected = avser_fast.Recognizer(spec, tensors(), device="cpu", precision="float32").forward_samples(host)[0]
    samples = torch.from_numpy(host).cuda()

    def make(precision: str) -> Callable[[], Made]:
        def made() -> Made:
            model = avser_fast.Recognizer(spec, tensors(), device="cuda", backend="cuda", precision=precision)
            return graph(lambda: model.forward_samples(samples)[0])

        return made

    return timed({name_of(p): (make(p), tolerance) for p, tolerance in PRECISIONS.items()}, expected)


def measure_log_mel() -> dict[str, Any]:
    """64 recordings: our op, with the published double arithmetic and natural log, beside torchaudio in float32, whose
    mel bands are others."""
    host = utterance(64)
    samples = torch.from_numpy(host).cuda()
    expected = np.stack([reference.log_mel(torch.from_numpy(row).double()).numpy() for row in host[:2]])

    def op() -> Made:
        run, output = graph(lambda: torch.ops.avser_fast.log_mel(samples, *LOG_MEL))
        return run, lambda: output()[:2]

    found = timed({OURS: (op, 1e-6)}, expected)
    try:
        import torchaudio

        transform = torchaudio.transforms.MelSpectrogram(16000, 512, 400, 160, n_mels=40, center=False).cuda()
        run = lambda: torch.log(transform(samples) + 1e-10)  # noqa: E731
        beside = {TORCHAUDIO: run, TORCHAUDIO_GRAPH: graph(run)[0]}
        if OURS in found["times"]:
            beside[OURS] = op()[0]
        found["times"] |= interleaved(beside)
    except Exception as error:
        found["failed"][TORCHAUDIO] = reason(error)
    return found


def goals(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every goal beside what was measured; None where a contender is missing."""

    def ms(part: str, name: str = OURS) -> float | None:
        found = content.get(part, {}).get("times", {}).get(name)
        return found and found["median_ms"]

    def ratio(part: str, *peers: str) -> float | None:
        own, theirs = ms(part), min(filter(None, (ms(part, name) for name in peers)), default=None)
        return theirs / own if own and theirs else None

    def over_compiled(utterances: int) -> float | None:
        found = (ratio(f"{part}-{utterances}", COMPILED) for part in ("compiled", "compiled-half"))
        return min(filter(None, found), default=None)

    def block_over(name: str) -> float | None:
        """Of the blocks, the least that is won."""
        times = [own["min_ms"] for own in content.get("blocks", {}).values()]
        if not times or any(name not in own or own[OURS] <= 0 for own in times):
            return None
        return min(own[name] / own[OURS] for own in times)

    one, many, sampled = ms(f"utterances-{ONE}"), ms(f"utterances-{MANY}"), ms("samples")
    rate = many and MANY * CLIPS / many * 1e3
    measured = {
        "one utterance, us": one and one * 1e3,
        "one utterance over torch.compile": over_compiled(ONE),
        "4.5 s of samples on the device, us": sampled and sampled * 1e3,
        "log-mel over torchaudio": ratio("log_mel", TORCHAUDIO, TORCHAUDIO_GRAPH),
        "1025 clips, clips/s": rate,
        "1025 clips over torch.compile": over_compiled(MANY),
        "depthwise and pointwise block over cuDNN": block_over(CUDNN),
        "depthwise and pointwise block over Inductor": block_over(INDUCTOR),
    }
    peak = content.get("ceilings", {}).get("bf16_tflops")
    share = rate * mdscm_macs(NETWORK) * 2 / 1e12 / peak if rate and peak else None
    found = {name: {"goal": GPU_ENGINE_GOALS[name], "measured": value} for name, value in measured.items()}
    return {**found, "1025 clips, share of the bf16 ceiling": {"goal": None, "measured": share}}


def set_shares(content: dict[str, Any]) -> None:
    """Rates of the stages beside the ceilings, which are another part."""
    for utterances in (ONE, MANY):
        found = content.get(f"stages-{utterances}", {}).get("rows", [])
        gpu_stages.set_shares(found, content.get("ceilings"))


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "ceilings": ceilings,
    "samples": measure_samples,
    "log_mel": measure_log_mel,
    **{f"utterances-{n}": functools.partial(measure, n) for n in UTTERANCES},
    **{f"stages-{n}": functools.partial(measure_stages, n) for n in (ONE, MANY)},
    "blocks": measure_blocks,
    **{f"compiled-half-{n}": functools.partial(measure_compiled, n, True) for n in (ONE, MANY)},
    **{f"compiled-{n}": functools.partial(measure_compiled, n, False) for n in (ONE, MANY)},
}


if __name__ == "__main__":
    command("gpu-engine", PARTS, goals, set_shares)
