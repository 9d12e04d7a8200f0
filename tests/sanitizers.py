"""Runs the C++ library, called from many threads at once, under the compiler's sanitizers.

    python tests/sanitizers.py [--folder DIR] [--only thread]

Builds the library without Python and ``cpp/concurrent.cpp`` below DIR (kept and used again; a temporary folder by
default), once with ThreadSanitizer and once with AddressSanitizer and UndefinedBehaviorSanitizer, and runs both, the
second on every instruction set of this machine.  Takes minutes, so pytest does not run it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from avser_fast import _engine
from avser_fast.inference.weights import find_model

ROOT = Path(__file__).resolve().parents[1]

#: The flag by name.  A race does not depend on the instruction set, a read beyond an array does.
SANITIZERS = {"thread": "-fsanitize=thread", "address": "-fsanitize=address,undefined -fno-sanitize-recover=all"}
CALLERS, ROUNDS = "4", "2"


def link_concurrent(compiler: str, library: Path, program: Path, *flags: str) -> Path:
    """``cpp/concurrent.cpp`` with the library of a build."""
    source = ROOT / "tests" / "cpp" / "concurrent.cpp"
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{ROOT / 'csrc'}",
        *flags,
    ]
    subprocess.run([*command, str(source), str(library), "-pthread", "-o", str(program)], check=True)
    return program


def check(name: str, folder: Path) -> None:
    isas = ["scalar"] if name == "thread" else _engine.supported_isas()
    options = [f"-DCMAKE_CXX_FLAGS={SANITIZERS[name]} -g", "-DAVSER_PYTHON=OFF", f"-DAVSER_ISAS={';'.join(isas)}"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options], check=True)
    subprocess.run(["cmake", "--build", str(folder)], check=True)
    flags = [*SANITIZERS[name].split(), "-g"]
    program = link_concurrent(os.environ.get("CXX", "c++"), folder / "libavser.a", folder / "concurrent", *flags)
    for isa in isas:
        print(f"{name}, {isa}", flush=True)
        environment = {**os.environ, "AVSER_FAST_CPU_ISA": isa, "AVSER_FAST_PROFILE": "1"}
        subprocess.run([str(program), str(find_model("default")), CALLERS, ROUNDS], env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to build; kept")
    parser.add_argument("--only", choices=tuple(SANITIZERS), help="one of them")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for name in SANITIZERS if chosen.only is None else [chosen.only]:
            check(name, (chosen.folder or Path(temporary)) / name)
    print("no sanitizer has anything to say")


if __name__ == "__main__":
    main()
