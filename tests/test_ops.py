"""torch.ops.avser_fast: parity, schemas, fake kernels, derivatives, errors."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.library import opcheck

from avser_fast import ops, reference
from avser_fast.errors import AvserError, BackendError, ConfigError, InputError
from avser_fast.testing import assert_close

SMALL: dict[str, Any] = {"frame_length": 16, "frame_step": 5, "n_fft": 16, "mel_bands": 3}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 3000).to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.int16, torch.float32, torch.float64))
def test_log_mel_matches_reference(dtype: torch.dtype, device: str) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 1e-7
    for shape, options in itertools.product(
        ((1,), (400,), (401,), (3, 5000), (2, 1, 777), (2, 3, 1999)), ({}, {"mel_bands": 128}, SMALL)
    ):
        wave = noise(*shape, dtype=dtype)
        out = ops.log_mel(wave.to(device), **options)
        assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and out.is_contiguous()
        assert_close(out, reference.log_mel(wave.double(), **options), tolerance, f"{shape} {options}")


def test_log_mel_strides() -> None:
    base = noise(6, 40, 90)
    for view in (base[::2, 3:20, ::3], base.transpose(0, 2), base[0, :, 5], base[1].expand(4, 40, 90), base[0, 0, 7:]):
        assert_close(ops.log_mel(view, **SMALL), reference.log_mel(view.double(), **SMALL), 1e-7, str(view.stride()))


def test_no_waveforms() -> None:
    assert ops.log_mel(torch.zeros(0, 500)).shape == (0, 2, 40)
    assert ops.resample(torch.zeros(0, 500), 2, 1).shape == (0, 250)
    assert ops.add_deltas(torch.zeros(0, 5, 4), 2).shape == (0, 2, 5, 4)


def test_the_batch_changes_no_bit() -> None:
    """Alone, in any batch, at any position, with any number of threads."""
    batch = noise(5, 30000)
    whole = ops.log_mel(batch)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.log_mel(batch), whole)
            assert torch.equal(ops.log_mel(batch.flip(0)).flip(0), whole)
            for i in range(5):
                assert torch.equal(ops.log_mel(batch[i]), whole[i])
                assert torch.equal(ops.resample(batch, 44100, 16000)[i], ops.resample(batch[i], 44100, 16000))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
def test_the_other_ops_match_reference(device: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        features = noise(2, 3, 50, 18, dtype=dtype)[..., ::2]
        for channels, window in itertools.product((1, 2, 3), (1, 2, 5)):
            out = ops.add_deltas(features.to(device), channels, window)
            assert_close(out, reference.add_deltas(features.double(), channels, window), tolerance)
        wave = noise(2, 700, 3, dtype=dtype).transpose(1, 2)
        out = ops.resample(wave.to(device), 441, 160)
        assert out.dtype == dtype
        assert_close(out, reference.resample(wave.double(), 441, 160), tolerance)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        features = noise(12, 83, 3, dtype=dtype).transpose(0, 2)
        for clips, width, rule in ((5, 24, "published"), (2, 100, "published"), (None, 20, "even"), (7, 30, "even")):
            got = ops.frame_clips(features.to(device), clips, width, rule)
            for a, b in zip(got, reference.frame_clips(features, clips, width, rule)):
                assert a.dtype == b.dtype and torch.equal(a.cpu(), b)


def test_unwritten_memory_never_shows() -> None:
    """Outputs are allocated uninitialised; torch fills such memory with NaN here."""
    wave = noise(3, 4000)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        assert torch.empty(8).isnan().all()
        features = ops.log_mel(wave)
        assert features.isfinite().all()
        assert ops.add_deltas(features, 3).isfinite().all()
        assert ops.frame_clips(features, 5, 30, "even")[0].isfinite().all()
        assert ops.resample(wave, 3, 2).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(was)


CASES: list[tuple[str, tuple[Any, ...]]] = [
    ("log_mel", (noise(2, 900).requires_grad_(),)),
    ("log_mel", (noise(900, dtype=torch.int16),)),
    ("log_mel", (noise(3, 70, dtype=torch.float64)[:, ::2].requires_grad_(), 16000, 3, 16, 5, 16)),
    ("add_deltas", (noise(2, 9, 4).requires_grad_(), 3)),
    ("add_deltas", (noise(9, 4).requires_grad_(), 2, 4)),
    ("frame_clips", (noise(2, 70, 5).requires_grad_(), None, 20, "even")),
    ("frame_clips", (noise(2, 70, 5).requires_grad_(), 4, 30, "published")),
    ("frame_clips", (noise(5, 9, 2).transpose(0, 2).requires_grad_(), 3, 30, "even")),
    ("resample", (noise(2, 300).requires_grad_(), 44100, 16000)),
    ("resample", (noise(300), 8000, 8000)),
]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_opcheck(name: str, arguments: tuple[Any, ...]) -> None:
    """Schema, derivative registration, fake kernel and tracing with symbolic sizes."""
    opcheck(getattr(torch.ops.avser_fast, name).default, arguments)


def test_gradients() -> None:
    wave = noise(2, 48, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.log_mel(x, **SMALL), (wave,), eps=1e-2)
    features = torch.randn(2, 2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.add_deltas(x, 3), (features,))
    for clips, width, rule in ((5, 4, "published"), (None, 4, "even"), (3, 20, "even")):
        assert torch.autograd.gradcheck(lambda x: ops.frame_clips(x, clips, width, rule)[0], (features[0],))  # noqa: B023
    short = torch.randn(2, 30, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.resample(x, 3, 2), (short,))


def test_gradient_is_that_of_the_reference() -> None:
    wave = noise(2, 3000)
    found = []
    for module, x in ((ops, wave.clone()), (reference, wave.double())):
        x.requires_grad_()
        module.log_mel(x).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert_close(found[0], found[1], 1e-5)


def test_compiled_graphs_keep_the_ops() -> None:
    """torch.export sees the op as one node, with a symbolic number of samples."""

    class Front(torch.nn.Module):
        def forward(self, wave: torch.Tensor) -> torch.Tensor:
            return ops.add_deltas(torch.ops.avser_fast.log_mel(wave), 2)

    samples = torch.export.Dim("samples", min=500, max=100_000)
    exported = torch.export.export(Front(), (noise(2, 8000),), dynamic_shapes={"wave": {1: samples}})
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "avser_fast.log_mel.default" in targets and "avser_fast.add_deltas.default" in targets
    wave = noise(2, 5555, seed=9)
    assert torch.equal(exported.module()(wave), Front()(wave))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (InputError, ("log_mel", "waveform", "list"), lambda: ops.log_mel([1.0])),  # type: ignore[arg-type]
        (InputError, ("log_mel", "waveform", "()"), lambda: ops.log_mel(torch.tensor(1.0))),
        (InputError, ("log_mel", "waveform", "(2, 0)"), lambda: ops.log_mel(torch.zeros(2, 0))),
        (InputError, ("log_mel", "waveform", "float16"), lambda: ops.log_mel(torch.zeros(9, dtype=torch.float16))),
        (ConfigError, ("n_fft", "500"), lambda: ops.log_mel(torch.zeros(9), n_fft=500)),
        (InputError, ("add_deltas", "features", "(3,)"), lambda: ops.add_deltas(torch.zeros(3), 2)),
        (ConfigError, ("add_deltas", "channels", "4"), lambda: ops.add_deltas(torch.zeros(3, 2), 4)),
        (ConfigError, ("add_deltas", "window", "0"), lambda: ops.add_deltas(torch.zeros(3, 2), 2, 0)),
        (InputError, ("frame_clips", "features", "(3, 2)"), lambda: ops.frame_clips(torch.zeros(3, 2))),
        (InputError, ("frame_clips", "features", "(1, 0, 2)"), lambda: ops.frame_clips(torch.zeros(1, 0, 2))),
        (ConfigError, ("rule", "odd"), lambda: ops.frame_clips(torch.zeros(1, 3, 2), 5, 4, "odd")),
        (ConfigError, ("clips",), lambda: ops.frame_clips(torch.zeros(1, 3, 2), None, 4, "published")),
        (InputError, ("resample", "waveform", "int16"), lambda: ops.resample(torch.zeros(9, dtype=torch.int16), 2, 1)),
        (ConfigError, ("resample", "to_rate", "0"), lambda: ops.resample(torch.zeros(9), 2, 0)),
    ],
)
def test_bad_arguments_are_named(error: type[AvserError], words: tuple[str, ...], call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words) and "expected" in message and "\n" not in message


def test_the_ops_check_for_themselves() -> None:
    """torch.ops can be called without the Python wrappers: the compiled code repeats every check."""
    op = torch.ops.avser_fast
    for words, call in (
        ("log_mel: n_fft: expected", lambda: op.log_mel(torch.zeros(9), n_fft=500)),
        ("log_mel: waveform: expected", lambda: op.log_mel(torch.zeros(9, dtype=torch.int32))),
        ("log_mel: waveform: expected", lambda: op.log_mel(torch.zeros(3, 0))),
        ("log_mel: waveform: expected", lambda: op.log_mel(torch.tensor(1.0))),
        ("add_deltas: channels: expected", lambda: op.add_deltas(torch.zeros(3, 2), 4)),
        ("frame_clips: features: expected", lambda: op.frame_clips(torch.zeros(3, 2), 5, 4, "even")),
        ("clips: expected", lambda: op.frame_clips(torch.zeros(1, 3, 2), -1, 4, "even")),
        ("resample: from_rate: expected", lambda: op.resample(torch.zeros(3), 0, 1)),
        ("resample: waveform: expected", lambda: op.resample(torch.zeros(3, dtype=torch.int16), 2, 1)),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()


def test_a_missing_module_is_named_with_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ImportError("libsomething.so.7: cannot open shared object file")
    monkeypatch.setattr(ops.backends, "load_error", original)
    for call in (
        lambda: ops.log_mel(torch.zeros(9)),
        lambda: ops.add_deltas(torch.zeros(3, 2), 2),
        lambda: ops.frame_clips(torch.zeros(1, 3, 2)),
        lambda: ops.resample(torch.zeros(9), 2, 1),
    ):
        with pytest.raises(BackendError, match="libsomething.so.7") as caught:
            call()
        assert caught.value.__cause__ is original


def test_schemas_exist_before_the_compiled_module() -> None:
    """Without ``_torch_ops`` the ops have names, shapes and derivatives; only running them fails, in words."""
    code = (
        "import sys; sys.modules['avser_fast._torch_ops'] = None\n"
        "import torch\n"
        "from avser_fast import errors, ops\n"
        "print(torch.ops.avser_fast.log_mel(torch.empty(2, 5000, device='meta')).shape)\n"
        "try: ops.log_mel(torch.zeros(9))\n"
        "except errors.BackendError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    shape, message = run.stdout.splitlines()
    assert shape == "torch.Size([2, 30, 40])" and "_torch_ops" in message and "log_mel" in message
