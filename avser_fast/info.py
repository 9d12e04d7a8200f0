"""What was built, what this machine offers and what will run: ``build_info`` and ``doctor``."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .precision import PRECISIONS, automatic, is_native, measured

PACKAGE = Path(__file__).resolve().parent
#: What `pip install avser_fast` brings, and what each extra needs; shown with their versions.
PACKAGES = ("numpy", "soundfile", "safetensors", "torch", "torchaudio", "triton", "opencv-python")


@dataclass(frozen=True)
class Variable:
    """One environment variable: ``read`` is when ("build" or "run"), ``values`` what it may hold."""

    name: str
    read: str
    values: str
    default: str
    meaning: str


#: Every environment variable that this project reads.
VARIABLES = (
    Variable(
        "AVSER_FAST_CPU_ISA",
        "run",
        "scalar, avx2, avx512, avx512_vnni, avx512_bf16, amx",
        "the best one supported but amx",
        "instruction set of the CPU kernels; one that the build or the machine lacks is an error; amx has only been "
        "emulated",
    ),
    Variable(
        "AVSER_FAST_PROFILE",
        "run",
        "0, 1",
        "0",
        "1 prints time, GFLOP/s and share of the measured ceiling of every part of a model when it is closed",
    ),
    Variable(
        "AVSER_FAST_CUDA_GRAPHS",
        "run",
        "0, 1",
        "0",
        "1 replays the Triton networks as CUDA graphs, which has not been verified on a GPU",
    ),
    Variable(
        "AVSER_FAST_TEST_GPU",
        "run",
        "0, 1",
        "0",
        "1 runs the tests of the CUDA engine on a GPU instead of the emulated one",
    ),
    Variable(
        "AVSER_FAST_CUDA",
        "build",
        "0, 1, auto",
        "auto",
        "compile the CUDA kernels: never, always (nvcc comes from the registry's wheels where no toolkit is found), "
        "where nvcc is found",
    ),
    Variable(
        "AVSER_FAST_SLIM",
        "build",
        "0, 1",
        "0",
        "1 builds and depends on nothing of torch: inference on the CPU",
    ),
    Variable(
        "TORCH_CUDA_ARCH_LIST",
        "build",
        "like 8.0;9.0a;9.0+PTX",
        "8.0 9.0a 9.0+PTX",
        "GPU architectures to compile for",
    ),
    Variable("CUDA_HOME", "build", "a folder", "nvcc in PATH", "CUDA toolkit to compile with"),
)


def build_info() -> dict[str, Any]:
    """How the compiled parts were built, and whether ``avser_fast._engine`` loads; imports NumPy at most.

    Keys: ``version``, ``package`` (the folder), ``build`` (what the build wrote down; empty where nothing was built),
    ``engine`` (its own account and instruction sets, or ``error`` with the loader's words).
    """
    try:
        build = json.loads((PACKAGE / "_build_info.json").read_text())
    except (FileNotFoundError, ValueError):  # not built here, or half a file: `doctor` says that nothing was built
        build = {}
    return {"version": _version("avser_fast"), "package": str(PACKAGE), "build": build, "engine": _engine()}


def report() -> dict[str, Any]:
    """What ``doctor`` prints, as plain data.  Imports torch where it is installed (seconds) to see whether it loads."""
    built = build_info()
    isa = built["engine"].get("isa")
    files = sorted((PACKAGE / "models").glob("*.safetensors"))
    return {
        **built,
        "precisions": {name: "native" if is_native(name, isa) else "emulated" for name in PRECISIONS} if isa else {},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_ops": _torch_ops(),
        "cuda": cuda_driver(),
        "ways": _ways(),
        "models": {path.stem: path.stat().st_size for path in files},
        "model_precisions": {path.stem: _model_precisions(path, isa) for path in files},
        "environment": {v.name: os.environ[v.name] for v in VARIABLES if v.name in os.environ},
    }


def doctor(found: dict[str, Any] | None = None) -> str:
    """A report for a person: versions, what was compiled and why not, what this machine supports, what is set."""
    r = report() if found is None else found
    build, engine, torch_ops, cuda = r["build"], r["engine"], r["torch_ops"], r["cuda"]
    lines = [
        f"avser_fast {r['version'] or '(not installed)'} in {r['package']}",
        f"Python {r['python']} on {r['platform']}",
        "packages: " + ", ".join(f"{name} {version or 'missing'}" for name, version in r["packages"].items()),
    ]
    if build:
        compiled = (
            f"compiled for {build['cuda_archs']} by nvcc {build['nvcc']}"
            if build["cuda"] == "1"
            else f"not compiled: {build['cuda_reason']}"
        )
        lines += [
            f"build: {build['compiler']}, {build['build_type']}, "
            f"Python {build['python']}, pybind11 {build['pybind11']}",
            f"CPU kernels: compiled for {build['isas']}",
            f"CUDA kernels: {compiled}",
        ]
    else:
        lines.append("build: nothing was built here (no _build_info.json); install with pip")
    if "error" in engine:
        lines.append(f"engine: cannot be loaded: {engine['error']}")
    else:
        runs = engine.get("isa") or f"none: {engine['isa_error']}"
        lines.append(f"engine: loads; this machine supports {' '.join(engine['supported_isas'])}, runs {runs}")
    if r["precisions"]:
        words = {"native": "native", "emulated": "emulated (slower, the same numbers up to rounding)"}
        lines.append("precisions: " + ", ".join(f"{name} {words[how]}" for name, how in r["precisions"].items()))
    if torch_ops.get("loaded"):
        lines.append(f"torch ops: load with torch {torch_ops['torch']}, built with {torch_ops['built_with_torch']}")
        lines += [f"  training, {why or f'backend {name!r}: runs'}" for name, why in torch_ops["absent"].items()]
    else:
        lines.append(f"torch ops: {torch_ops['error']}")
    lines.append(f"CUDA driver: {cuda['error']}" if "error" in cuda else f"CUDA driver: {cuda['driver']}")
    lines += [f"  GPU {i}: {name}" for i, name in enumerate(cuda.get("devices", ()))]
    for way in r["ways"]:
        where = "a GPU" if way["device"] == "cuda" else "a CPU"
        lines.append(f"inference on {where}, backend {way['backend']!r}: {way['why_not'] or 'runs'}")
        lines.append(f"  in {', '.join(way['precisions'])}; verified: {way['verified']}")
    models = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in r["models"].items())
    lines.append(f"models: {models or 'none'}")
    for name, found in r["model_precisions"].items():
        if "error" in found:
            lines.append(f"  {name}: cannot be read: {found['error']}")
            continue
        each = "; ".join(f"{precision} {_agreement(found[precision])}" for precision in PRECISIONS[1:])
        lines.append(f"  {name}: {each}{'' if found['calibrated'] else ', no ranges in the file'}")
        if found["auto"]:
            lines.append(f"  {name}: precision='auto' runs {found['auto']}, {found['reason'].removeprefix('auto: ')}")
    values = ", ".join(f"{name}={value}" for name, value in r["environment"].items())
    lines.append(f"environment: {values or 'no variable of this project is set'}")
    return "\n".join(lines)


def _agreement(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not measured"
    return f"decides as float32 on {100 * found['agreement']:.1f} % of {found['utterances']} utterances"


def _model_precisions(path: Path, isa: str | None) -> dict[str, Any]:
    """What a model's card says of its precisions, and what ``precision='auto'`` makes of it here; reads the header
    alone, without safetensors."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        card = json.loads(header["__metadata__"]["avser_fast"]).get("card", {})
        found: dict[str, Any] = {name: measured(card, name) for name in PRECISIONS[1:]}
        found["calibrated"] = any(name.startswith("calibration.") for name in header)
        found["auto"], found["reason"] = automatic(card, isa) if isa else (None, None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engine() -> dict[str, Any]:
    try:
        engine = importlib.import_module("avser_fast._engine")
    except Exception as error:  # whatever the loader says is what the user must see
        return {"error": f"{type(error).__name__}: {error}"}
    info: dict[str, Any] = {**engine.build_info(), "supported_isas": engine.supported_isas()}
    try:
        info["isa"] = engine.cpu_isa()
    except Exception as error:
        info["isa_error"] = str(error)
    return info


def _torch_ops() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {"loaded": False, "error": "torch is not installed"}
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("avser_fast.ops")  # defines the ops that the module implements
        module = importlib.import_module("avser_fast._torch_ops")
        absent = importlib.import_module("avser_fast.ops.backends").absent()
    except Exception as error:
        return {"loaded": False, "error": f"cannot be loaded: {type(error).__name__}: {error}"}
    return {"loaded": True, "torch": str(torch.__version__), "absent": absent, **module.build_info()}


#: On which GPUs the tests of a backend passed: backend -> [{"gpu", "capability", "date", "version", ...}].
GPU_VERIFIED = "gpu_verified.json"


def gpu_verified() -> dict[str, list[dict[str, Any]]]:
    """What ``benchmarks/gpu_check.sh`` wrote on machines with a GPU; empty before it ran on one."""
    path = PACKAGE / GPU_VERIFIED
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _ways() -> list[dict[str, Any]]:
    return list(importlib.import_module("avser_fast.inference.backends").ways())


def cuda_driver() -> dict[str, Any]:
    """``driver`` (its version) and ``devices`` (names), or ``error``; asks the driver itself, without torch."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        return {"error": f"none ({error})"}
    status = driver.cuInit(0)
    if status != 0:
        return {"error": f"cuInit failed with error {status}"}
    version, count = ctypes.c_int(), ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGetCount(ctypes.byref(count))
    devices = []
    for index in range(count.value):
        device, text = ctypes.c_int(), ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(text, 256, device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # compute capability
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        devices.append(f"{text.value.decode()} (compute capability {major.value}.{minor.value})")
    return {"driver": f"{version.value // 1000}.{version.value % 1000 // 10}", "devices": devices}
