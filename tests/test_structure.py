"""Rules about the tree itself: import direction, one table of environment variables, a project that speaks of
itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from avser_fast.info import VARIABLES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "avser_fast"

#: A room may import rooms to its left.  Modules outside these rooms are listed with the last room that they may import.
ORDER = ["errors", "config", "precision", "testing", "reference", "triton", "ops", "nn", "inference"]
OUTSIDE = {
    "info": "testing",
    "av4ser": "inference",
    "cli": "inference",
    "__init__": "inference",
    "__main__": "inference",
}


def imported_rooms(path: Path) -> Iterator[str]:
    """Rooms of avser_fast that a file imports, at any depth of its code."""
    inside = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = list(inside[: len(inside) - node.level]) if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            if module[:1] == ["avser_fast"]:
                yield from [module[1]] if len(module) > 1 else [alias.name for alias in node.names]
            elif module[:1] in (["python_training"], ["benchmarks"], ["tests"]):
                yield module[0]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "avser_fast" and len(parts) > 1:
                    yield parts[1]
                elif parts[0] in ("python_training", "benchmarks", "tests"):
                    yield parts[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_direction(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    limit = ORDER.index(OUTSIDE.get(room, room))
    for other in imported_rooms(path):
        if other.startswith("_"):
            continue  # compiled modules and dunder names stand below everything
        if room in ("cli", "__main__") and other in ("python_training", "cli", "info"):
            continue  # the command line hands `train` and `evaluate` over to the trainer
        if room in ("__init__", "cli") and other in OUTSIDE:
            continue
        if room == "inference" and other == "info":
            continue
        assert other in ORDER, f"{path}: imports {other}, which is no room of avser_fast"
        assert ORDER.index(other) <= limit, f"{path}: {room} must not import {other}"


def test_the_import_test_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "avser_fast"
    (package / "reference").mkdir(parents=True)
    wrong = package / "reference" / "wrong.py"
    wrong.write_text("def f():\n    from ..nn.mdscm import MDSCM\n    import avser_fast.inference.weights\n")
    monkeypatch.setitem(globals(), "PACKAGE", package)
    assert list(imported_rooms(wrong)) == ["nn", "inference"]


def source_files() -> list[Path]:
    suffixes = {".py", ".cpp", ".h", ".cu", ".txt", ".toml", ".pyi"}
    folders = ("avser_fast", "csrc", "examples", "python_training", "benchmarks", "build_backend")
    files = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    files += [p for folder in folders for p in (ROOT / folder).rglob("*")]
    return [p for p in files if p.suffix in suffixes and p.is_file()]


def test_every_environment_variable_is_in_the_table() -> None:
    used = {
        name
        for path in source_files()
        for name in re.findall(r"\bAVSER_FAST_[A-Z_]+\b", path.read_text(encoding="utf-8"))
    }
    assert used == {v.name for v in VARIABLES if v.name.startswith("AVSER_FAST_")}
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for v in VARIABLES:
        assert f"| `{v.name}` | {v.read} | {v.values} | {v.default} | {v.meaning} |" in contributing, v.name


def test_no_line_names_a_place_on_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(home|root|opt|mnt|Users)/")
    documents = [*ROOT.glob("*.md"), *(ROOT / "csrc").rglob("*.md"), *(ROOT / "avser_fast").rglob("*.md")]
    for path in [*source_files(), *documents]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not pattern.search(line), f"{path}:{number}: {line.strip()}"


def test_readme_commands_are_the_ones_that_ci_runs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- ci: (\w+) -->\n```sh\n", readme)
    assert names == ["main", "test"]
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f"readme {name}" in ci for name in names)


def test_readme_tables_come_from_the_results_files() -> None:
    from benchmarks.render import rendered

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert rendered(readme) == readme, "run `python -m benchmarks.render`"
