"""PEP 517 backend: setuptools, with build requirements that depend on what is to be built.

* torch, whose headers ``_torch_ops`` is compiled against, unless ``AVSER_FAST_SLIM=1`` or a torch of the right range is
  already installed where the package will go (the module runs with any of them, so the two need not be equal);
* nvcc from the registry's wheels where ``AVSER_FAST_CUDA=1`` and no toolkit is found.  The versions are pinned: mixed,
  they reject each other's output.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

TORCH = "torch>=2.11,<2.15"
NVCC_WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
]


def slim() -> bool:
    """``AVSER_FAST_SLIM``: build and depend on nothing of torch."""
    value = os.environ.get("AVSER_FAST_SLIM", "") or "0"
    if value not in ("0", "1"):
        raise SystemExit(f"avser_fast: AVSER_FAST_SLIM: expected 0 or 1, got {value!r}")
    return value == "1"


def cuda() -> str:
    """``AVSER_FAST_CUDA``: 0, 1 or auto."""
    value = os.environ.get("AVSER_FAST_CUDA", "") or "auto"
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"avser_fast: AVSER_FAST_CUDA: expected 0, 1 or auto, got {value!r}")
    return value


def installed_nvcc() -> str | None:
    """nvcc of a toolkit: under CUDA_HOME (or CUDA_PATH), else in PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        root = os.environ.get(variable)
        if root and (Path(root) / "bin" / "nvcc").is_file():
            return str(Path(root) / "bin" / "nvcc")
    return shutil.which("nvcc")


def wheel_nvcc() -> str | None:
    """nvcc of the wheels, among the packages this process can import."""
    for folder in sys.path:
        for nvcc in sorted(Path(folder or ".").glob("nvidia/cu*/bin/nvcc")):
            return str(nvcc)
    return None


def torch_folder() -> str | None:
    """The torch package to take headers from: an importable one first, else that of the environment installed into.

    An isolated build does not see the latter's packages, but its interpreter is the same.
    """
    for folder in [*sys.path, sysconfig.get_paths()["platlib"]]:
        version = Path(folder or ".") / "torch" / "version.py"
        if version.is_file():
            found = re.search(r"^__version__ *= *'(\d+)\.(\d+)", version.read_text(), re.MULTILINE)
            if found and (2, 11) <= (int(found[1]), int(found[2])) < (2, 15):
                return str(version.parent)
    return None


def _extra_requirements() -> list[str]:
    extra = []
    if not slim():
        if torch_folder() is None:
            extra.append(TORCH)
        if cuda() == "1" and installed_nvcc() is None and wheel_nvcc() is None:
            extra += NVCC_WHEELS
    else:
        cuda()  # a bad value is refused in any build
    return extra


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_extra_requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_extra_requirements()]
