"""Several evaluations side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from python_training.comparison import Run, against, changes, closest, collect, compare, read_run
from python_training.evaluation import write_fold
from python_training.tables import compare_table


def write_run(folder: Path, answers: list[int], validation: dict[str, float]) -> Path:
    """A run of two folds; ``answers`` are those of both."""
    for speaker, ua in validation.items():
        fold: dict[str, Any] = {
            "protocol": "leave-one-speaker-out", "seed": 0, "name": f"speaker{speaker}",
            "test_of": f"speaker {speaker}", "validation_of": "speaker v", "shares_speakers": False,
            "leakage": "", "labels": ["no", "yes"],
            "keys": [f"{speaker}{i}" for i in range(4)], "speakers": [speaker] * 4, "truth": [0, 0, 1, 1],
            "models": {"mdscm": np.eye(2)[answers].tolist()}, "validation_ua": {"mdscm": ua},
        }  # fmt: skip
        write_fold(fold, folder / "evaluation")
    settings = {"name": folder.name, "network": {"stem": [8]}, "manifest_sha256": folder.name}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "environment.json").write_text(json.dumps({"seeds": [0]}))
    return folder


def test_nested_choice_uses_validation_speakers_only(tmp_path: Path) -> None:
    # On speaker b the better network has the worse validation speaker: the choice must follow validation.
    good = write_run(tmp_path / "good", [0, 0, 1, 1], {"a": 0.9, "b": 0.1})
    bad = write_run(tmp_path / "bad", [1, 1, 0, 0], {"a": 0.4, "b": 0.6})
    comparison = compare([good, bad])
    ua = {name: summary["models"]["mdscm"]["ua"]["mean"] for name, summary in comparison["runs"].items()}
    assert ua == {"good": 100.0, "bad": 0.0}
    assert comparison["nested"]["models"]["mdscm"]["ua"]["mean"] == 50.0
    table = compare_table(comparison)
    assert "| good | 1 | 100.0 | 100.0 | 100.0 | 50.0 |" in table
    assert "| *chosen per fold by its validation speaker* | 1 | 50.0 | 50.0 | 50.0 | 75.0 |" in table
    assert table.endswith("\n\nProtocol: leave-one-speaker-out.")
    assert compare([good])["nested"] is None


def test_a_table_says_what_its_runs_say_of_themselves(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good", [0, 0, 1, 1], {"a": 0.9})
    sharing = write_run(tmp_path / "sharing", [0, 0, 1, 1], {"a": 0.9})
    (path,) = (sharing / "evaluation").glob("*.json")
    fold = json.loads(path.read_text()) | {
        "protocol": "cross-corpus", "shares_speakers": True, "leakage": "NOT apart", "notes": ["joy counts as yes"],
    }  # fmt: skip
    path.write_text(json.dumps(fold))
    table = compare_table({**compare([sharing]), "runs": compare([good])["runs"] | compare([sharing])["runs"]})
    assert "\n\nProtocols: good leave-one-speaker-out; sharing cross-corpus.\n" in table
    assert "\n\n**sharing: NOT apart.**\n\nsharing: joy counts as yes." in table


def test_a_run_against_another(tmp_path: Path) -> None:
    base = read_run(write_run(tmp_path / "base", [0, 0, 1, 1], {"a": 0.9, "b": 0.1}))
    run = read_run(write_run(tmp_path / "run", [0, 1, 1, 1], {"b": 0.1, "c": 0.2}))
    found = against(run, base)
    assert (found["seeds"], found["ua"]) == (1, -25.0) and found["interval"][0] <= -25.0 <= found["interval"][1]
    assert changes(run, base) == {"name": "run"}
    with pytest.raises(ValueError, match="other: expected folds that base has too, got none"):
        against(read_run(write_run(tmp_path / "other", [0, 1, 1, 1], {"c": 0.2})), base)


def test_the_run_with_the_most_of_the_changes() -> None:
    def run(name: str, **settings: float) -> Run:
        return Run(name, {"name": "recipe", "level": 1, **settings}, {}, [])

    base, others = run("recipe"), [run("a", a=1), run("ab", a=1, b=[2]), run("c", c=3), run("level", level=0)]
    other_recipe = Run("x", {"name": "x", "level": 1, "a": 1, "b": [2], "d": 4}, {}, [])
    for made, expected in (
        (run("a", a=1), "recipe"),
        (run("ab", a=1, b=[2]), "a"),
        (run("ab2", a=1, b=[3]), "a"),
        (run("abd", a=1, b=[2], d=4), "ab"),
        (run("bc", b=[2], c=3), "c"),
        (run("quiet", level=0, a=2), "level"),
        (other_recipe, "recipe"),
    ):
        assert closest(made, base, [*others, other_recipe]).name == expected


def test_a_collected_run_says_the_same(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [0, 1, 1, 1], {"a": 0.9, "b": 0.1})
    collect(folder, tmp_path / "kept" / "run.json")
    assert read_run(tmp_path / "kept" / "run.json") == read_run(folder)
    kept = json.loads((tmp_path / "kept" / "run.json").read_text())
    assert kept["summary"]["models"]["mdscm"]["ua"]["mean"] == 75.0 and kept["settings"]["name"] == "run"


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: expected finished folds in evaluation/, got none"):
        read_run(tmp_path / "nothing")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="x.json: expected a file of collected folds, got one without"):
        read_run(tmp_path / "x.json")
    run = write_run(tmp_path / "run", [0, 1, 1, 1], {"a": 0.9})
    with pytest.raises(ValueError, match="run: expected folds of the model fusion, got none"):
        compare([run], "fusion")
