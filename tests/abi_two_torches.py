"""Builds the package once, against the newest torch it supports, and runs that build under the oldest one too.

    python tests/abi_two_torches.py [--folder DIR] [--torch 2.14 2.11]

Makes one virtual environment per torch version below DIR (kept and used again; a temporary folder by default; 5 GB
each), builds a wheel in the first and checks it in all.  Takes minutes and downloads torch, so pytest does not run it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CHECK = """
import torch
from avser_fast import info, ops, reference
from avser_fast.testing import assert_close

torch_ops = info.report()["torch_ops"]
assert torch_ops["loaded"], torch_ops["error"]
assert ops.load_error is None
x = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0)) * 3000
for threads in (1, 2):
    torch.set_num_threads(threads)
    assert_close(ops.log_mel(x), reference.log_mel(x.double()), 1e-7, "log_mel")
assert_close(ops.log_mel(x.short()), reference.log_mel(x.short()), 1e-6, "log_mel of int16")
y = ops.log_mel(x)[0]
assert_close(ops.add_deltas(y, 3), reference.add_deltas(y.double(), 3), 1e-6, "add_deltas")
for rule, clips in (("published", 5), ("even", None)):
    for a, b in zip(ops.frame_clips(y[None], clips, 50, rule), reference.frame_clips(y[None], clips, 50, rule)):
        assert torch.equal(a, b), rule
assert_close(ops.resample(x, 44100, 16000), reference.resample(x.double(), 44100, 16000), 1e-6, "resample")
small = torch.randn(60, dtype=torch.float64, requires_grad=True)
options = dict(frame_length=16, frame_step=5, n_fft=16, mel_bands=3)
assert torch.autograd.gradcheck(lambda w: ops.log_mel(w, **options), (small,))
op = torch.ops.avser_fast
for call in (lambda: op.log_mel(x, n_fft=500), lambda: op.frame_clips(y, 5, 50, "odd")):
    try:
        call()
    except RuntimeError as error:
        assert "expected" in str(error)
    else:
        raise AssertionError("a bad argument was accepted")
from avser_fast import nn
clips = torch.randn(3, 2, 1, 32, 16)
torch.manual_seed(0)
how = dict(mel_bands=16, clip_frames=32, stem=(4, 8), blocks=(8, 16), attention_reduction=4)
model = nn.MDSCM(**how, encoder_heads=2, encoder_ff=8, block_dropout=0.0, encoder_dropout=0.0, backend="cpu")
found = {}
for backend in ("cpu", "reference"):
    model.backend = backend
    model.zero_grad()
    loss = model(clips).clip_logits.square().sum()
    loss.backward()
    found[backend] = [loss.detach(), *(p.grad.clone() for p in model.parameters())]
scale = max(float(g.abs().max()) for g in found["reference"])
for a, b in zip(found["cpu"], found["reference"]):
    assert float((a - b).abs().max()) <= 1e-4 * scale, "training step"
with torch.autocast("cpu", torch.bfloat16):
    model.backend = "cpu"
    assert model(clips).clip_logits.dtype == torch.bfloat16
print("ok: torch", torch.__version__, "runs the ops built with", torch_ops["built_with_torch"])
"""


def run(*command: object, **options: object) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the environments are kept")
    parser.add_argument("--torch", nargs="+", default=["2.14", "2.11"], metavar="VERSION", help="the first one builds")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="avser_fast_abi_"))
    pythons = []
    for version in options.torch:
        python = folder / f"torch-{version}" / "bin" / "python"
        if not python.exists():
            venv.create(folder / f"torch-{version}", with_pip=True)
            run(python, "-m", "pip", "install", "--quiet", f"torch=={version}.*", "numpy")
        pythons.append(python)
    wheels = folder / "wheel"
    shutil.rmtree(wheels, ignore_errors=True)
    run(pythons[0], "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", wheels, ROOT)
    (wheel,) = wheels.glob("*.whl")
    for python in pythons:
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
        # Away from the source tree, whose modules would be found first.
        run(python, "-c", CHECK, cwd=folder, env={**os.environ, "PYTHONPATH": ""})
    print(f"passed under torch {', '.join(options.torch)}; environments in {folder}")


if __name__ == "__main__":
    sys.exit(main())
