"""``import avser_fast`` costs nothing and changes nothing; the public surface is what the package says it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import avser_fast
from avser_fast import config
from avser_fast.inference.weights import random_tensors, write_model

SPEECH = sorted((Path(__file__).parent.parent / "data" / "emodb4").glob("*.flac"))
SMALL = config.MDSCM(mel_bands=24, stem=(4, 8), blocks=(8,), attention_reduction=2, encoder_layers=0)
SPEC = config.ModelSpec(front_end=config.FrontEnd(mel_bands=24), clip_rule=config.ClipRule("even", None), network=SMALL)


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    write_model(path, SPEC, random_tensors(SMALL))
    return str(path)


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import avser_fast\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(*sorted(new & {'torch', 'numpy', 'triton', 'torchaudio', 'cv2', 'soundfile', 'safetensors'}))"
    )
    assert python(code).strip() == ""


def test_import_takes_less_than_four_tenths_of_a_second() -> None:
    code = "import time; t = time.perf_counter(); import avser_fast; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.4


def test_every_public_name_is_there() -> None:
    code = "import avser_fast\nfor n in avser_fast.__all__: print(n, getattr(avser_fast, n) is not None)"
    assert python(code).split() == [word for name in avser_fast.__all__ for word in (name, "True")]
    assert set(avser_fast.__all__) <= set(dir(avser_fast))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = avser_fast.no_such_name  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        exec("from avser_fast import no_such_name")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(avser_fast.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen | {"__version__"} == set(avser_fast.__all__)
    assert len(avser_fast.__all__) == len(set(avser_fast.__all__))


def test_infer_on_a_file_and_an_array_does_not_import_torch(model: str) -> None:
    code = (
        "import sys, avser_fast, numpy\n"
        "sound = {'array': numpy.arange(5000, dtype='int16'), 'sampling_rate': 44100}\n"
        "items = [sys.argv[2], open(sys.argv[2], 'rb').read(), sound]\n"
        "found = avser_fast.infer(items, model=sys.argv[1])\n"
        "rec = avser_fast.load(sys.argv[1]); rec.embed(items); rec.info()\n"
        "rec.forward(numpy.zeros((1, 2, 1, 224, 24), 'float32'))\n"
        "print([r.backend for r in found], 'torch' in sys.modules, 'soundfile' in sys.modules)"
    )
    assert python(code, model, str(SPEECH[0])).strip() == "['engine', 'engine', 'engine'] False True"


def test_nothing_global_changes(model: str) -> None:
    """No seeding, no thread count, no logging, no network, no environment: on import, load and infer."""
    code = """
import logging, os, random, socket, sys, threading, warnings
import numpy, torch
def refuse(*a, **k): raise AssertionError("network")
def state():
    return (random.getstate(), numpy.random.get_state()[1].tolist(), numpy.random.get_state()[2],
            torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_num_interop_threads(),
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32, numpy.geterr(),
            list(logging.root.handlers), logging.root.level, dict(os.environ), os.getcwd(),
            [f for f in warnings.filters if not f[2].__module__.startswith("sympy")])  # torch's doing
before = state()
socket.socket.connect = refuse
socket.getaddrinfo = refuse
import avser_fast
for backend in ("engine", "reference"):
    avser_fast.load(sys.argv[1], backend=backend).infer([sys.argv[2]])
avser_fast.infer([sys.argv[2]], model=sys.argv[1])
after = state()
print([i for i, (a, b) in enumerate(zip(before, after)) if a != b])
"""
    assert python(code, model, str(SPEECH[0])).strip() == "[]"
