"""The CUDA engine on a GPU beside torch: side streams, graphs of the caller, threads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from test_engine import MEMBERS, random_clips, reference

import avser_fast
from avser_fast import _engine, config
from avser_fast.errors import InputError
from avser_fast.inference.weights import random_tensors

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _engine.build_info()["cuda"]), reason="no CUDA GPU, or built without the kernels"
)
NETWORK = MEMBERS[0]
TENSORS, CLIPS = random_tensors(NETWORK, 0), random_clips(NETWORK, 4, 3)


class Call:
    """The engine on tensors of torch, on torch's current stream."""

    def __init__(self) -> None:
        self.engine: Any = _engine.GpuEngine(json.dumps({"network": config.plain(NETWORK)}), TENSORS)
        self.expected = self.engine.forward(CLIPS)

    def outputs(self) -> list[torch.Tensor]:
        return [torch.full(x.shape, float("nan"), device="cuda") for x in self.expected]

    def queue(self, clips: torch.Tensor, outputs: list[torch.Tensor]) -> None:
        addresses = [x.data_ptr() for x in outputs]
        stream = torch.cuda.current_stream().cuda_stream
        self.engine.forward_on_device(clips.data_ptr(), 0, 4, 3, *addresses, stream)

    def check(self, outputs: list[torch.Tensor]) -> None:
        for a, e in zip(outputs, self.expected):
            assert a.cpu().numpy().tobytes() == e.tobytes()


def test_agrees_with_the_reference() -> None:
    for a, e in zip(Call().expected, reference(NETWORK, TENSORS, CLIPS, None)):
        np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max())


def test_work_is_queued_on_the_current_stream() -> None:
    call, stream = Call(), torch.cuda.Stream()
    clips = torch.zeros(CLIPS.shape, device="cuda")
    late = torch.from_numpy(CLIPS).pin_memory()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the copy is far behind what the host queues
        clips.copy_(late, non_blocking=True)
        outputs = call.outputs()
        call.queue(clips, outputs)
    stream.synchronize()
    call.check(outputs)


def test_graphs_of_the_caller_run_beside_other_calls() -> None:
    call = Call()
    clips = torch.from_numpy(CLIPS).cuda()
    graphs = []
    for _ in range(2):
        outputs = call.outputs()
        made = torch.cuda.CUDAGraph()
        with torch.cuda.graph(made):
            call.queue(clips, outputs)
        graphs.append((made, outputs))
    for _ in range(3):
        for made, outputs in graphs:
            for x in outputs:
                x.fill_(float("nan"))
            made.replay()
        fresh = call.outputs()
        call.queue(clips, fresh)
        torch.cuda.synchronize()
        for outputs in (*(o for _, o in graphs), fresh):
            call.check(outputs)


def test_steps_in_pieces_are_one_forward() -> None:
    call = Call()
    clips, outputs, steps = torch.from_numpy(CLIPS).cuda(), call.outputs(), len(call.engine.stages())
    addresses = [x.data_ptr() for x in outputs]
    behind = len(NETWORK.stem) + 2 * len(NETWORK.blocks) + 1  # the convolutions, whose maps are gone after a launch
    for begin, end in ((0, behind), (behind, behind), (behind, steps - 1), (steps - 1, steps)):
        stream = torch.cuda.current_stream().cuda_stream
        call.engine.run_steps(clips.data_ptr(), 4, 3, *addresses, begin, end, stream)
    torch.cuda.synchronize()
    call.check(outputs)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        stream = torch.cuda.current_stream().cuda_stream
        call.engine.run_steps(clips.data_ptr(), 4, 3, *addresses, 0, 3, stream)
        with pytest.raises(InputError, match="begin: expected 0 on a stream that is recorded"):
            call.engine.run_steps(clips.data_ptr(), 4, 3, *addresses, behind, steps, stream)


def test_threads_with_streams_of_their_own() -> None:
    call = Call()

    def run(_: int) -> list[torch.Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            clips, outputs = torch.from_numpy(CLIPS).cuda(), call.outputs()
            for _ in range(20):
                call.queue(clips, outputs)
            torch.cuda.current_stream().synchronize()
            return outputs

    with ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(run, range(8)):
            call.check(outputs)


def test_samples_stay_on_the_gpu_and_in_the_callers_graph() -> None:
    """Equal-length recordings in torch's memory, on a side stream and in a graph: the bits of the host's way."""
    model = avser_fast.load("default", device="cuda", backend="cuda", precision="float32")
    host = np.random.default_rng(0).integers(-9000, 9000, (3, 40001)).astype(np.int16)
    expected = model.forward_samples(host)
    samples = torch.from_numpy(np.pad(host, ((0, 0), (0, 7)))).cuda()[:, :40001]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        model.forward_samples(samples)  # warm
        found = model.forward_samples(samples)
    stream.synchronize()
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        recorded = model.forward_samples(samples)
    made.replay()
    torch.cuda.synchronize()
    for outputs in (found, recorded):
        for a, e in zip(outputs[1:], expected[1:]):
            assert a.is_cuda and a.cpu().numpy().tobytes() == e.tobytes()
        np.testing.assert_allclose(outputs[0].cpu().numpy(), expected[0], rtol=1e-5)
    cpu = avser_fast.load("default", precision="float32").forward_samples(host)
    for a, e in zip(expected, cpu):
        np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max())
