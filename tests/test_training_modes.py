"""What trainers do with a module of fused ops: compile, export, autocast, recompute, split, freeze, replay.

Every test runs the whole of a small network, on the CPU and where there is one on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from avser_fast import config, nn, ops, reference
from avser_fast.errors import BackendError
from avser_fast.ops import backends
from avser_fast.testing import assert_close, max_error

pytestmark = [
    pytest.mark.skipif(backends.INTERPRETED, reason="minutes in the interpreter"),
    pytest.mark.usefixtures("whole_float32"),
]

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
#: The fused backend of a device.
FUSED = {"cpu": "cpu", "cuda": "triton"}
#: Steps of the whole network in float32 that differ in nothing but the order of sums.
CLOSE = 1e-4
SHAPE: dict[str, Any] = dict(in_channels=1, clip_frames=32, mel_bands=16, stem=(4, 8), blocks=(8, 16))
SHAPE |= dict(attention_reduction=4, encoder_layers=1, encoder_heads=2, encoder_ff=16, pooling="mean_std")
SHAPE |= dict(statistics=5, statistics_hidden=6, statistics_dropout=0.0)


def network(dropout: float = 0.0) -> config.MDSCM:
    return config.MDSCM(**SHAPE, block_dropout=dropout, encoder_dropout=dropout)


def model(device: str = "cpu", backend: str = "auto", dropout: float = 0.0, seed: int = 0) -> nn.MDSCM:
    """The same weights for the same seed; batch norms whose scales, shifts and statistics are not those of a start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.MDSCM(network(dropout), backend=backend)
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if name.endswith(("running_mean", "running_var", "norm1.weight", "norm1.bias")):
                value.add_(0.3 * torch.rand(value.shape, generator=generator))
    return made.to(device)


def batch(device: str = "cpu", seed: int = 0, utterances: int = 4) -> tuple[Tensor, Tensor]:
    """Clips (B, 3, 1, frames, bands) and the class of every utterance."""
    generator = torch.Generator().manual_seed(1000 + seed)
    clips = torch.randn(utterances, 3, 1, SHAPE["clip_frames"], SHAPE["mel_bands"], generator=generator)
    return clips.to(device), torch.arange(utterances, device=device) % 4


Step = dict[str, Tensor]


def step(module: nn.MDSCM, clips: Tensor, targets: Tensor, forward: Callable[..., Any] | None = None) -> Step:
    """Outputs, gradients of the loss and running statistics of one step, by name."""
    out = (module if forward is None else forward)(clips)
    double = out.clip_logits.dtype == torch.float64
    loss = (reference if double else ops).clip_cross_entropy(out.clip_logits, targets)
    asked = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(asked.values()))
    found = {f"output {name}": value.detach() for name, value in out._asdict().items()}
    found |= {"loss": loss.detach(), **{f"gradient {n}": g for n, g in zip(asked, grads)}}
    return found | {f"buffer {n}": b.clone() for n, b in module.named_buffers() if "running" in n}


def scale_of(name: str, expected: Step) -> float:
    """A bias in front of a batch norm has a gradient of rounding errors only: gradients share their largest."""
    kind = name.split()[0]
    values = [v for n, v in expected.items() if n.split()[0] == kind and (kind == "gradient" or n == name)]
    return max(float(v.abs().max()) for v in values)


def error_of(name: str, found: Step, expected: Step) -> float:
    return float((found[name].cpu().double() - expected[name].cpu().double()).abs().max()) / scale_of(name, expected)


def assert_same(found: Step, expected: Step, tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance == 0.0:
            assert torch.equal(found[name], value), f"{name}: differs by {error_of(name, found, expected):.3g}"
        else:
            error = error_of(name, found, expected)
            assert error <= tolerance, f"{name}: error {error:.3g}"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.compiler.reset()


@pytest.mark.parametrize("device", DEVICES)
def test_auto_is_the_fused_backend(device: str) -> None:
    """Without this the other tests would compare the reference with itself."""
    module, (clips, targets) = model(device), batch(device)
    assert backends.choose(module.backend, clips.flatten(0, 1)) == FUSED[device]
    assert_same(step(module, clips, targets), step(model(device, "reference"), clips, targets), CLOSE)
    exact = model("cpu", "reference").double()
    double = step(exact, clips.cpu().double(), targets.cpu())
    assert_same(step(model(device), clips, targets), double, CLOSE)


# ---- compile, export


COMPILERS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler"),
        ],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_steps_equal_eager_ones(compiler: str, training: bool, device: str) -> None:
    eager = model(device).train(training)
    compiled = copy.deepcopy(eager)
    forward = torch.compile(compiled, fullgraph=True, backend=compiler)
    for seed in (0, 1):
        clips, targets = batch(device, seed)
        assert_same(step(compiled, clips, targets, forward), step(eager, clips, targets), CLOSE)


def test_a_compiled_step_draws_new_masks() -> None:
    module, (clips, targets) = model(dropout=0.5), batch()
    forward = torch.compile(module, fullgraph=True, backend="aot_eager")
    first, second = step(module, clips, targets, forward), step(module, clips, targets, forward)
    assert not torch.equal(first["loss"], second["loss"])


@pytest.mark.parametrize("device", DEVICES)
def test_exported(device: str) -> None:
    """The exported program answers as the module does, for another number of utterances too, and knows our ops."""
    module, (clips, _) = model(device).eval(), batch(device)
    utterances = torch.export.Dim("utterances", min=2, max=64)
    program = torch.export.export(module, (clips,), dynamic_shapes={"clips": {0: utterances}})
    names = {str(node.target) for node in program.graph.nodes}
    assert "avser_fast.separable_conv2d.default" in names and "avser_fast.temporal_attention.default" in names
    for given in (clips, batch(device, 1, utterances=7)[0]):
        for ours, theirs in zip(program.module()(given), module(given)):
            assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_lambda_changed_between_compiled_steps_takes_effect(device: str) -> None:
    """The reversed gradient follows the tensor, and nothing is compiled again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    fields = {k: v for k, v in SHAPE.items() if not k.startswith("statistics")}
    body = config.MDSCM(**fields, block_dropout=0.0, encoder_dropout=0.0)
    torch.manual_seed(0)
    encoder = nn.AVRE(config.AVRE(body="mdscm", classes=4, mdscm=body)).to(device).eval()
    lam = torch.zeros((), device=device)
    encoder.domain.reversal.lam = lam
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(encoder, fullgraph=True, backend=counter)
    weight = encoder.body.conv_stem.convs[0].weight  # type: ignore[union-attr, index]
    clips = batch(device)[0]

    def gradient(value: float) -> Tensor:
        lam.fill_(value)
        (found,) = torch.autograd.grad(forward(clips).domain_logits.sum(), [weight])
        return found  # type: ignore[no-any-return]

    one = gradient(1.0)
    assert float(one.abs().max()) > 0
    for value in (0.0, 0.25, 2.0):
        assert_close(gradient(value), value * one, 1e-6, f"lambda {value}")
    assert counter.frame_count == 1


# ---- autocast


class AsOnCuda(TorchFunctionMode):
    """Under autocast, what torch computes in float32 on a GPU and in bf16 on a CPU is computed in float32."""

    WIDE = frozenset(
        ("cross_entropy", "cumsum", "exp", "layer_norm", "log", "log_softmax", "norm", "pow", "softmax", "sum")
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in self.WIDE or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        wide = [a.float() if isinstance(a, Tensor) and a.dtype == torch.bfloat16 else a for a in args]
        with torch.autocast("cpu", enabled=False):
            return func(*wide, **(kwargs or {}))


@pytest.mark.parametrize("device", [*DEVICES, "cpu as a GPU"])
@pytest.mark.parametrize("training", (True, False))
def test_autocast(training: bool, device: str) -> None:
    """bf16 in, bf16 out; parameters, their gradients and all statistics stay float32; no less exact than torch.

    Torch's layer norm makes float32 of bf16 on a GPU, and its features are what it made; those of the fused ops are
    bf16 on every device.  24 seeds: with six, a gradient of ours was once 3.3 times as wrong as torch's, with 24 1.1.
    """
    as_on_cuda, emulated = device != "cpu", AsOnCuda if device == "cpu as a GPU" else contextlib.nullcontext
    device = device.split()[0]
    errors: dict[str, dict[str, float]] = {"auto": {}, "reference": {}}
    for seed in range(24):
        clips, targets = batch(device, seed, utterances=8)
        exact = step(model("cpu", "reference", seed=seed).double().train(training), clips.cpu().double(), targets.cpu())
        dtypes: dict[str, dict[str, torch.dtype]] = {}
        for backend, found in errors.items():
            module = model(device, backend, seed=seed).train(training)
            with torch.autocast(device, torch.bfloat16), emulated():
                taken = step(module, clips, targets)
            dtypes[backend] = {name: value.dtype for name, value in taken.items()}
            for name in exact:
                found[name] = found.get(name, 0.0) + error_of(name, taken, exact) ** 2
        assert dtypes["reference"].pop("output features") == (torch.float32 if as_on_cuda else torch.bfloat16)
        assert dtypes["auto"].pop("output features") == torch.bfloat16
        assert dtypes["auto"] == dtypes["reference"]
        assert dtypes["auto"]["output clip_logits"] == torch.bfloat16
        kept = {v for k, v in dtypes["auto"].items() if k.startswith(("gradient", "buffer"))}
        assert kept == {torch.float32}
    for name, ours in errors["auto"].items():
        allowed = 2.0 * errors["reference"][name] ** 0.5 + 1e-6
        assert ours**0.5 <= allowed, f"{name}: {ours**0.5:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_are_float32_under_autocast(device: str) -> None:
    x, weight = torch.randn(2, 4, 6, 5, device=device), torch.randn(8, 4, 3, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, mean, var = ops.strided_conv2d(x, weight)
        z, *others = ops.separable_conv2d(y, torch.randn(8, 1, 3, 3, device=device), weight.new_ones(16, 8, 1, 1))
    assert y.dtype == z.dtype == torch.bfloat16
    assert {t.dtype for t in (mean, var, *others)} == {torch.float32}


# ---- less memory, several processes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_checkpointed_gradients_are_the_same(dropout: float, device: str) -> None:
    """The second forward draws the masks of the first.  (It updates running statistics again, as torch's own does.)"""
    clips, targets = batch(device)
    module = model(device, dropout=dropout)
    body = module.body

    def forward(x: Tensor) -> Any:
        tokens = checkpoint(body.forward, x.flatten(0, 1), use_reentrant=False)
        assert module.statistics is not None
        features, logits = ops.emotion_head(
            tokens,
            module.head.weight,
            module.head.bias,
            pooling="mean_std",
            statistics=module.statistics(x.flatten(0, 1)),
        )
        logits = logits.unflatten(0, x.shape[:2])
        return nn.mdscm.ClipOutput(logits.mean(1).softmax(-1), features.unflatten(0, x.shape[:2]), logits)

    torch.manual_seed(7)
    plain = step(copy.deepcopy(module), clips, targets)
    torch.manual_seed(7)
    again = step(module, clips, targets, forward)
    kept = [name for name in plain if name.startswith("gradient")]
    assert len(kept) > 30
    assert_same({n: again[n] for n in kept}, {n: plain[n] for n in kept})
    torch.manual_seed(8)
    other = step(module, clips, targets, forward)
    assert torch.equal(other["loss"], again["loss"]) == (dropout == 0.0), "the masks are drawn from torch's generator"


def _process(rank: int, folder: str) -> None:
    """One of two processes: a step on its half of the batch; the first writes what it got."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=100)
    )
    try:
        module = model()
        clips, targets = (t.chunk(2)[rank] for t in batch())
        wrapped = DistributedDataParallel(module)
        ops.clip_cross_entropy(wrapped(clips).clip_logits, targets).backward()
        found = {f"gradient {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
        found |= {f"buffer {n}": b for n, b in module.named_buffers() if "running" in n}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_average_their_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, args=(str(tmp_path),), nprocs=2)
    torch.set_num_threads(1)
    clips, targets = batch()
    halves = [step(model(), c, t) for c, t in zip(clips.chunk(2), targets.chunk(2))]
    for rank, half in enumerate(halves):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) > 40
        for name, value in found.items():
            if name.startswith("buffer"):
                assert torch.equal(value, half[name]), f"{name}: statistics are of the process's own half"
            else:
                assert_close(value, (halves[0][name] + halves[1][name]) / 2, 1e-6, name)


# ---- backends


@pytest.mark.parametrize("device", DEVICES)
def test_checkpoints_move_between_backends(device: str) -> None:
    fused, plain = model(device, FUSED[device]), model(device, "reference", seed=1)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for seed in range(2):
        step(fused, *batch(device, seed))  # running statistics of its own
    plain.load_state_dict(fused.state_dict())
    clips = batch(device, 5)[0]
    with torch.no_grad():
        for ours, theirs in zip(fused.eval()(clips), plain.eval()(clips)):
            assert_close(ours, theirs, 1e-5)
    back = model(device, FUSED[device], seed=2).eval()
    back.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(back(clips).clip_logits, fused(clips).clip_logits)


@pytest.mark.parametrize("device", DEVICES)
def test_a_backend_may_be_changed_at_any_time(device: str) -> None:
    module, (clips, targets) = model(device), batch(device)
    names, fused = list(module.state_dict()), step(module, clips, targets)
    module = model(device)
    module.backend = "reference"
    assert list(module.state_dict()) == names and module.backend == module.body.backend == "reference"
    assert_same(step(module, clips, targets), fused, CLOSE)
    module = model(device, "reference")
    module.backend = FUSED[device]
    assert_same(step(module, clips, targets), fused)


def test_a_backend_that_cannot_says_why() -> None:
    clips = batch()[0]
    with pytest.raises(BackendError, match=r"^backend 'triton': expected tensors on cuda, got cpu$"):
        model(backend="triton")(clips)
    with pytest.raises(BackendError, match=r"^backend 'cpu': expected float32, bfloat16, got float64$"):
        model(backend="cpu").double()(clips.double())
    with pytest.raises(BackendError, match=r"^backend: expected auto, reference, cpu or triton, got 'gpu'$"):
        model(backend="gpu")(clips)
    with torch.no_grad():
        assert model().double()(clips.double()).clip_logits.dtype == torch.float64  # "auto" falls back


# ---- the same numbers again


def test_bit_identical_for_any_number_of_threads() -> None:
    """On widths and sizes that are worth splitting, masks included.  (The statistics path is torch's own sums, which
    depend on the threads.)"""
    fields = {**SHAPE, "clip_frames": 96, "mel_bands": 40, "stem": (16, 32), "blocks": (48, 64), "statistics": 0}
    torch.manual_seed(0)
    start = nn.MDSCM(config.MDSCM(**fields, block_dropout=0.3, encoder_dropout=0.2))
    clips, targets = torch.randn(3, 3, 1, 96, 40), torch.tensor([0, 1, 2])
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        found.append(step(copy.deepcopy(start), clips, targets))
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize("device", DEVICES)
def test_bit_identical_again(device: str) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(step(model(device, dropout=0.4), *batch(device)))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_body(device: str) -> None:
    """Only the head learns: its gradient is that of a whole step, the body gets none, and the clips may ask for one."""
    clips, targets = batch(device)
    whole = step(model(device), clips, targets)
    module = model(device)
    module.body.requires_grad_(False)
    found = step(module, clips, targets)
    assert not any("body" in name for name in found if name.startswith("gradient"))
    assert_same({n: v for n, v in found.items()}, {n: whole[n] for n in found})
    asking = clips.clone().requires_grad_()
    ops.clip_cross_entropy(module(asking).clip_logits, targets).backward()
    assert all(p.grad is None for p in module.body.parameters())
    other = clips.clone().requires_grad_()
    ops.clip_cross_entropy(model(device, "reference")(other).clip_logits, targets).backward()
    assert asking.grad is not None and other.grad is not None
    assert_close(asking.grad, other.grad, CLOSE)


# ---- memory that nobody wrote


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_outputs_filled_with_nan_beforehand(dtype: torch.dtype, device: str) -> None:
    """torch fills what ``empty`` gives with NaN when asked to be deterministic: every element is written over."""
    clips, targets = batch(device)
    found = []
    for poisoned in (False, True):
        torch.use_deterministic_algorithms(poisoned, warn_only=True)
        assert bool(torch.empty(100, device=device).isnan().all()) == poisoned
        torch.manual_seed(3)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            found.append(step(model(device, dropout=0.3), clips, targets))
    assert_same(found[1], found[0])


POISON = """
import hashlib, sys
import torch
from test_training_modes import batch, model, step
torch.manual_seed(3)
unwritten = torch.empty(3000).view(torch.uint8).unique().tolist()
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16):
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for name, value in step(model(dropout=0.3), *batch()).items():
            assert value.isfinite().all(), name
            digest.update(value.float().numpy().tobytes())
print(unwritten, digest.hexdigest())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc fills memory on request")
def test_memory_filled_by_the_allocator() -> None:
    """Buffers that are not torch's too: the bytes that malloc leaves in them change nothing."""
    found = []
    for byte in (1, 128):
        # Everything from the heap: fresh pages of mmap are zero whatever is asked for.
        fill = {"MALLOC_PERTURB_": str(byte), "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": "67108864"}
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", POISON],
            env={**os.environ, **fill, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        unwritten, _, digest = done.stdout.strip().rpartition(" ")
        assert str(255 ^ byte) in unwritten, f"expected memory filled with {255 ^ byte}, got {unwritten}"
        found.append(digest)
    assert found[0] == found[1]


# ---- a step as one CUDA graph


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dropout", (0.0, 0.4))
def test_a_whole_step_as_one_cuda_graph(dropout: float) -> None:
    """Forward, loss, reversed domain loss, backward and SGD replayed: lambda and seeds are read on the device."""
    clips, targets = batch("cuda")
    domain = torch.tensor([0.0, 1.0, 0.0, 1.0], device="cuda")
    lam = torch.zeros((), device="cuda")

    def make() -> tuple[nn.MDSCM, nn.DomainHead, torch.optim.Optimizer]:
        module = model("cuda", dropout=dropout)
        torch.manual_seed(5)
        judge = nn.DomainHead(module.network.features, (8,)).to("cuda")
        judge.reversal.lam = lam
        optimizer = torch.optim.SGD([*module.parameters(), *judge.parameters()], lr=0.01)
        return module, judge, optimizer

    def one(module: nn.MDSCM, judge: nn.DomainHead, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        out = module(x)
        logits = judge(out.features.mean(1))[:, 0]
        loss = ops.clip_cross_entropy(out.clip_logits, targets)
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(logits, domain)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    parts = make()
    start = [copy.deepcopy(p.state_dict()) for p in parts[:2]]
    static = clips.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            one(*parts, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = one(*parts, static)

    def replayed(values: list[float]) -> tuple[list[float], dict[str, Tensor]]:
        for part, state in zip(parts, start):
            part.load_state_dict(state)  # type: ignore[union-attr]
        losses = []
        for n, value in enumerate(values):
            lam.fill_(value)
            static.copy_(batch("cuda", n)[0])
            graph.replay()
            losses.append(float(loss))
        return losses, {k: v.clone() for k, v in parts[0].state_dict().items()}

    values = [0.0, 1.0, 0.5]
    losses, state = replayed(values)
    if dropout:
        again, _ = replayed(values)
        assert losses != again, "a replay draws masks of its own"
        return
    eager = make()
    for n, value in enumerate(values):
        lam.fill_(value)
        assert abs(float(one(*eager, batch("cuda", n)[0])) - losses[n]) <= 1e-5 * abs(losses[n])
    for name, tensor in eager[0].state_dict().items():
        assert max_error(state[name].float(), tensor.float()) <= 1e-4, name
    _, without = replayed([0.0, 0.0, 0.0])
    assert any(not torch.equal(without[k], v) for k, v in state.items() if v.is_floating_point()), (
        "lambda had no effect"
    )
