"""Runs CMake and says what was built.  All compile flags are in CMakeLists.txt, all metadata in pyproject.toml."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import avser_fast_build as backend  # noqa: E402

CORE = ["numpy>=1.24", "soundfile>=0.12", "safetensors>=0.4"]
WITH_TORCH = [
    backend.TORCH,
    "torchaudio==2.11.*",
    "triton>=3.4; platform_system == 'Linux'",
    "opencv-python>=4.8",
]
BUILD_INFO = "_build_info.json"
# What the assembler says of the GPU kernels, where they are compiled.
GPU_KERNELS = "_gpu_kernels.json"


class CMakeBuild(build_ext):
    """Builds every module with one CMake project, into the folder that setuptools expects them in."""

    def run(self) -> None:
        into_source = self.inplace or self.editable_mode
        self.inplace = False  # built aside first, as setuptools does itself
        package = Path(self.get_ext_fullpath("avser_fast._engine")).resolve().parent
        package.mkdir(parents=True, exist_ok=True)
        self.cmake(package)
        if into_source:
            self.into_source(package)
        self.summary(package / BUILD_INFO)

    def cmake(self, package: Path) -> None:
        slim = backend.slim()
        # Kept between builds: the objects that depend on no package of a (temporary) build environment stay valid.
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{'-slim' if slim else ''}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "CMakeCache.txt").unlink(missing_ok=True)
        define = {
            "AVSER_OUTPUT_DIR": package,
            "AVSER_CUDA": backend.cuda(),
            "AVSER_NVCC": backend.installed_nvcc() or backend.wheel_nvcc() or "",
            "AVSER_TORCH": "OFF" if slim else "ON",
            "AVSER_TORCH_ROOT": "" if slim else backend.torch_folder() or "",
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": self.pybind11(),
        }
        ninja = shutil.which("ninja")
        if ninja is None:
            raise SystemExit("avser_fast: expected ninja in the build environment, found none")
        define["CMAKE_MAKE_PROGRAM"] = ninja
        options = [f"-D{name}={value}" for name, value in define.items()]
        jobs = str(self.parallel or os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1)
        try:
            subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options], check=True)
            subprocess.run(["cmake", "--build", str(folder), "--parallel", jobs], check=True)
        except FileNotFoundError:
            raise SystemExit("avser_fast: expected cmake in the build environment, found none") from None
        except subprocess.CalledProcessError as error:
            step = "compiling" if "--build" in error.cmd else "configuring"
            raise SystemExit(f"avser_fast: {step} failed for the reason given above") from None

    @staticmethod
    def pybind11() -> str:
        import pybind11

        return pybind11.get_cmake_dir()

    def into_source(self, package: Path) -> None:
        source = ROOT / "avser_fast"
        built = [*package.glob("*.so"), package / BUILD_INFO, *package.glob(GPU_KERNELS)]
        suffix = self.get_ext_filename("_engine").removeprefix("_engine")
        for old in (*source.glob(f"_*{suffix}"), *source.glob(GPU_KERNELS)):
            if old.name not in {path.name for path in built}:
                old.unlink()  # a slim build must not leave an older build's torch module behind
        for path in built:
            # Written beside and renamed: a process that has the old module loaded keeps its old file.
            temporary = source / f".{path.name}.new"
            shutil.copy2(path, temporary)
            os.replace(temporary, source / path.name)

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("avser_fast._engine")).parent
        return [*super().get_outputs(), str(package / BUILD_INFO), *map(str, package.glob(GPU_KERNELS))]

    def copy_extensions_to_source(self) -> None:
        """Done by ``into_source``."""

    @staticmethod
    def summary(path: Path) -> None:
        info = json.loads(path.read_text())
        cuda = (
            f"for {info['cuda_archs']}, by nvcc {info['nvcc']}" if info["cuda"] == "1" else f"no: {info['cuda_reason']}"
        )
        torch = f"for torch 2.11 to 2.14, with the headers of {info['torch']}" if info["torch"] else "no: slim build"
        lines = [
            f"avser_fast {info['version']}",
            f"  compiler       {info['compiler']}, {info['build_type']}",
            f"  CPU kernels    {info['isas']}",
            f"  torch ops      {torch}",
            f"  CUDA kernels   {cuda}",
        ]
        print("\n".join(lines), flush=True)


modules = ["avser_fast._engine"] if backend.slim() else ["avser_fast._engine", "avser_fast._torch_ops"]
setup(
    ext_modules=[Extension(name, sources=[]) for name in modules],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=CORE if backend.slim() else [*CORE, *WITH_TORCH],
)
