"""What was built, how the build decides, and what ``doctor`` says about it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from avser_fast import _engine, info

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The in-tree build backend, with no variable of ours set."""
    pytest.importorskip("setuptools")
    for variable in ("AVSER_FAST_CUDA", "AVSER_FAST_SLIM", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("avser_fast_build", ROOT / "build_backend" / "avser_fast_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_build_info_agrees_with_the_modules() -> None:
    found = info.build_info()
    build, engine = found["build"], found["engine"]
    assert found["version"] == build["version"] == engine["version"]
    assert build["isas"].split() == engine["isas"] and engine["isas"][0] == "scalar"
    assert (build["cuda"] == "1") == engine["cuda"]
    assert engine["cuda"] != bool(engine["cuda_reason"]), "either compiled or a reason why not"
    assert engine["compiler"] == build["compiler"] and engine["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert engine["python"].split()[0] == build["python"] == info.report()["python"]
    assert set(engine["supported_isas"]) <= set(engine["isas"]) and engine["isa"] == _engine.cpu_isa()


def test_engine_needs_no_torch_and_no_module_of_the_package_but_errors() -> None:
    code = (
        "import sys\n"
        "from avser_fast import _engine\n"
        "import numpy; _engine.log_mel(numpy.zeros(500))\n"
        "print('torch' in sys.modules, sorted(m for m in sys.modules if m.startswith('avser_fast.')))"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "False ['avser_fast._engine']"


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.skipif(sys.platform != "linux", reason="looks at ELF symbols")
def test_modules_export_their_init_function_only() -> None:
    for module in info.PACKAGE.glob("_*.so"):
        listing = subprocess.run(
            ["nm", "-D", "--defined-only", module], capture_output=True, text=True, check=True
        ).stdout
        assert [line.split()[-1] for line in listing.splitlines()] == [f"PyInit_{module.name.split('.')[0]}"]


def test_doctor_tells_what_runs_and_what_is_set() -> None:
    run = python("from avser_fast import info; print(info.doctor())", AVSER_FAST_CPU_ISA="scalar")
    assert run.returncode == 0, run.stderr
    assert "runs scalar" in run.stdout and "AVSER_FAST_CPU_ISA=scalar" in run.stdout
    for word in ("CPU kernels", "CUDA kernels", "torch ops", "CUDA driver", "models", sys.version.split()[0]):
        assert word in run.stdout


def test_doctor_survives_a_bad_choice_and_shows_it() -> None:
    code = "from avser_fast import info; info._torch_ops = lambda: {'error': 'not asked'}; print(info.doctor())"
    run = python(code, AVSER_FAST_CPU_ISA="quantum")
    assert run.returncode == 0 and "expected one of" in run.stdout and "'quantum'" in run.stdout


def test_doctor_shows_the_loaders_own_words(tmp_path: Path) -> None:
    """A module that does not load is reported with the original error, for both modules."""
    package = tmp_path / "avser_fast"
    shutil.copytree(info.PACKAGE, package, ignore=shutil.ignore_patterns("_*.so", "__pycache__"))
    for module in info.PACKAGE.glob("_*.so"):
        (package / module.name).write_bytes(b"not a shared object")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from avser_fast import info; print(info.doctor())"
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert str(package) in run.stdout
    assert len(re.findall(r"cannot be loaded: ImportError: .*_(?:engine|torch_ops)\.", run.stdout)) == 2, run.stdout


def test_report_is_json() -> None:
    assert json.loads(json.dumps(info.report()))["package"] == str(info.PACKAGE)


def test_every_variable_is_in_the_table() -> None:
    """Each AVSER_FAST_* name in the sources is documented, and nothing else is."""
    seen: set[str] = set()
    files = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    for folder, pattern in (
        ("avser_fast", "*.py"),
        ("csrc", "*"),
        ("build_backend", "*.py"),
        ("python_training", "*.py"),
    ):
        files += [path for path in (ROOT / folder).rglob(pattern) if path.is_file()]
    for path in files:
        seen |= set(re.findall(r"AVSER_FAST_[A-Z_]+[A-Z]", path.read_text(errors="ignore")))
    assert seen == {variable.name for variable in info.VARIABLES if variable.name.startswith("AVSER_FAST_")}


def test_version_is_written_once() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.*)"$', pyproject, re.MULTILINE)
    assert info.build_info()["build"]["version"] == version


# ---- what the backend asks for


def test_torch_is_required_unless_slim_or_present(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "torch_folder", lambda: None)
    assert backend.TORCH in backend.get_requires_for_build_wheel()
    assert backend.TORCH in backend.get_requires_for_build_editable()
    monkeypatch.setattr(backend, "torch_folder", lambda: "somewhere")
    assert backend.TORCH not in backend.get_requires_for_build_wheel()
    monkeypatch.setattr(backend, "torch_folder", lambda: None)
    monkeypatch.setenv("AVSER_FAST_SLIM", "1")
    assert not any(need.startswith(("torch", "nvidia")) for need in backend.get_requires_for_build_wheel())


def test_nvcc_wheels_are_required_only_where_asked_for_and_missing(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "torch_folder", lambda: "somewhere")
    monkeypatch.setattr(backend, "wheel_nvcc", lambda: None)
    for installed, cuda, wanted in ((None, "1", True), (None, "auto", False), (None, "0", False), ("nvcc", "1", False)):
        monkeypatch.setattr(backend, "installed_nvcc", lambda found=installed: found)
        monkeypatch.setenv("AVSER_FAST_CUDA", cuda)
        needs = backend.get_requires_for_build_editable()
        assert set(backend.NVCC_WHEELS) <= set(needs) if wanted else not any("nvidia" in need for need in needs)
    assert all("==" in need for need in backend.NVCC_WHEELS)


def test_nvcc_is_found_in_path_and_toolkit_folder(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for folder in ("toolkit/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert backend.installed_nvcc() is None
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert backend.installed_nvcc() == str(tmp_path / "path" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert backend.installed_nvcc() == str(tmp_path / "toolkit" / "bin" / "nvcc")


@pytest.mark.parametrize(("variable", "value"), [("AVSER_FAST_CUDA", "yes"), ("AVSER_FAST_SLIM", "true")])
def test_a_bad_value_is_one_sentence(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as caught:
        backend.get_requires_for_build_wheel()
    assert re.fullmatch(rf"avser_fast: {variable}: expected [^\n]*, got '{value}'", str(caught.value))


def test_torch_of_the_wrong_range_is_not_taken(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(backend.sys, "path", [str(tmp_path)])
    monkeypatch.setattr(backend.sysconfig, "get_paths", lambda: {"platlib": str(tmp_path)})
    (tmp_path / "torch").mkdir()
    for version, fits in (
        ("2.10.1", False),
        ("2.11.0", True),
        ("2.14.1+cu130", True),
        ("2.15.0", False),
        ("3.0.0", False),
    ):
        (tmp_path / "torch" / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
        assert backend.torch_folder() == (str(tmp_path / "torch") if fits else None)


# ---- what CMake decides


@pytest.fixture
def cmake(tmp_path: Path) -> Any:
    if shutil.which("cmake") is None or shutil.which("ninja") is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("cmake, ninja and pybind11 are needed to configure a build")

    def configure(torch_root: Path, *definitions: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"]
        command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DAVSER_TORCH_ROOT={torch_root}"]
        command += [f"-D{definition}" for definition in definitions]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)

    return configure


def fake_torch(folder: Path, version: str) -> Path:
    (folder / "lib").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "version.py").write_text(f"__version__ = '{version}'\n")
    return folder


@pytest.mark.parametrize(
    ("version", "definitions", "environment", "words"),
    [
        ("2.14.0", ("AVSER_CUDA=maybe",), {}, "AVSER_FAST_CUDA: expected 0, 1 or auto, got 'maybe'"),
        ("2.14.0", ("AVSER_CUDA=1", "AVSER_NVCC=/no/such/nvcc"), {}, "nvcc: expected a working CUDA compiler"),
        ("2.10.0", ("AVSER_CUDA=0",), {}, "expected torch >= 2.11, < 2.15 to build _torch_ops against, got 2.10.0"),
        ("2.15.0", ("AVSER_CUDA=0",), {}, "expected torch >= 2.11, < 2.15 to build _torch_ops against, got 2.15.0"),
        (
            "2.14.0",
            ("AVSER_CUDA=1",),
            {"PATH": "bare", "CUDA_HOME": ""},
            "AVSER_FAST_CUDA=1: expected to compile the CUDA kernels",
        ),
    ],
)
def test_cmake_refuses_in_one_sentence(
    cmake: Any, tmp_path: Path, version: str, definitions: tuple[str, ...], environment: dict[str, str], words: str
) -> None:
    if environment.get("PATH") == "bare":  # everything that the build needs, and no nvcc
        (tmp_path / "bin").mkdir()
        for tool in ("cmake", "ninja", "c++", "g++", "gcc", "cc", "ld", "as", "ar", "ranlib", "uname", "sh"):
            found = shutil.which(tool)
            if found:
                (tmp_path / "bin" / tool).symlink_to(found)
        environment = {**environment, "PATH": str(tmp_path / "bin")}
    run = cmake(fake_torch(tmp_path / "torch", version), *definitions, **environment)
    assert run.returncode != 0
    assert words in " ".join(run.stderr.split()), run.stderr


def test_cmake_chooses_architectures_from_the_variable(cmake: Any, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    torch = fake_torch(tmp_path / "torch", "2.12.0")
    run = cmake(torch, "AVSER_CUDA=1", TORCH_CUDA_ARCH_LIST="8.6;9.0+PTX")
    assert run.returncode == 0, run.stderr
    built = json.loads((tmp_path / "build" / "avser_fast" / "_build_info.json").read_text())
    assert built["cuda"] == "1" and built["cuda_archs"] == "8.6 9.0+PTX" and built["nvcc"]
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert "code=sm_86" in rules and "code=sm_90" in rules and "code=compute_90" in rules and "sm_80" not in rules
    run = cmake(torch, "AVSER_CUDA=1", TORCH_CUDA_ARCH_LIST="Hopper")
    assert run.returncode != 0 and "TORCH_CUDA_ARCH_LIST: expected" in " ".join(run.stderr.split())


# ---- rules of the C++ part


def test_kernels_include_neither_torch_nor_python() -> None:
    """Only torch_ops.cpp knows torch; only it, the modules, bind.* and what these share know Python."""
    python = ("torch_ops.cpp", "engine_module.cpp", "emulated_module.cpp", "engine/arrays.h", "common/translate.h")
    for path in [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu")]:
        includes = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
        name = str(path.relative_to(CSRC))
        torch_headers = [i for i in includes if i.startswith(("torch/", "ATen/", "c10/"))]
        python_headers = [i for i in includes if i.startswith("pybind11") or i == "Python.h"]
        if name == "torch_ops.cpp":
            assert all(i.startswith(("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/")) for i in torch_headers)
        else:
            assert not torch_headers, f"{name} includes {torch_headers}"
        if name not in python and path.stem != "bind":
            assert not python_headers, f"{name} includes {python_headers}"


def test_sources_compiled_per_instruction_set_use_no_containers() -> None:
    """The linker may keep their copy of a library function for machines that cannot run it."""
    sources = sorted(CSRC.glob("ops/*/*_cpu.cpp"))
    assert sources
    for path in [*sources, CSRC / "common" / "simd.h"]:
        text = re.sub(r"//[^\n]*", "", path.read_text())
        used = re.findall(
            r"std::(?:vector|string|map|unordered_map|function|shared_ptr|unique_ptr|ostringstream)\b", text
        )
        assert not used, f"{path.name} uses {used}"
        assert "AVSER_ISA_NAMESPACE" in text
