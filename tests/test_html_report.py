"""The report of a run as one HTML file.  ``python tests/test_html_report.py FOLDER`` writes an example to look at."""

from __future__ import annotations

import json
import re
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from python_training import charts
from python_training.evaluation import read_folds, summarize
from python_training.html_report import principal_plane, write_report
from python_training.run_folder import flatten, read_stages

LABELS = ["anger", "happiness", "neutral", "sadness"]
VOID = {"meta", "br", "hr", "img", "link", "input"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_fold(
    folder: Path, name: str, seed: int, truth: list[int], answers: dict[str, list[int]], **more: Any
) -> Path:
    labels = more.pop("labels", LABELS)
    models = {
        model: [[0.7 if k == p else 0.3 / (len(labels) - 1) for k in range(len(labels))] for p in predicted]
        for model, predicted in answers.items()
    }
    fold = {
        "protocol": "leave one session out",
        "seed": seed,
        "name": name,
        "test_of": "session Ses05",
        "validation_of": "speaker Ses04F",
        "shares_speakers": False,
        "keys": [f"{name}-{i}" for i in range(len(truth))],
        "speakers": ["F" if i % 2 else "M" for i in range(len(truth))],
        "truth": truth,
        "models": models,
        "labels": labels,
        "validation_ua": {},
        **more,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-seed{seed}.json"
    path.write_text(json.dumps(fold), encoding="utf-8")
    return path


def write_log(path: Path, steps: int, per_epoch: int, every: int = 1) -> None:
    rng = np.random.default_rng(0)
    step = np.arange(0, steps, every)
    done = step / steps

    def noisy(values: np.ndarray, noise: float) -> list[float]:
        return [float(f"{v:.5g}") for v in values * np.exp(noise * rng.normal(size=len(values)))]

    speech, face = noisy(1.4 * np.exp(-3 * done) + 0.2, 0.12), noisy(1.5 * np.exp(-2 * done) + 0.35, 0.15)
    domain = noisy(0.69 - 0.4 * np.exp(-((done - 0.15) ** 2) / 0.01), 0.05)
    accuracy = np.clip(0.5 + 0.4 * np.exp(-((done - 0.15) ** 2) / 0.02) + 0.04 * rng.normal(size=len(step)), 0, 1)
    write_rows(
        path,
        [
            {
                "stage": "avdal", "step": int(s), "epoch": int(s) // per_epoch, "loss": speech[i] + face[i] + domain[i],
                "speech_loss": speech[i], "face_loss": face[i], "domain_loss": domain[i],
                "lambda": 2 / (1 + float(np.exp(-10 * done[i]))) - 1,
                "lr": 3e-4 * min(1.0, 20 * float(done[i])) * (1 - float(done[i])),
                "speech_accuracy": float(1 - 0.6 * speech[i] / 1.6), "face_accuracy": float(1 - 0.6 * face[i] / 1.9),
                "domain_accuracy": float(accuracy[i]),
                "gradient_ratio": float(0.05 * np.exp(4 * done[i] + 0.4 * rng.normal())) if i % 5 == 0 else None,
                "seconds": 0.2 * i,
            }
            for i, s in enumerate(step)
        ],
    )  # fmt: skip


def example_run(folder: Path, *, shared: bool = False, labels: list[str] | None = None, steps: int = 6000) -> Path:
    """A plausible run: 20 epochs of adaptation, 2 seeds of 3 folds, three models."""
    rng = np.random.default_rng(1)
    labels = labels or LABELS
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "name": "avdal-iemocap", "stage": "avdal",
        "front_end": {"mel_bands": 40, "channels": 3, "normalization": "global"},
        "optimisation": {"lr": 3e-4, "batch_size": 32, "optimizer": "adamw", "betas": [0.9, 0.999], "refit": False},
        "adversarial": {"schedule": "sigmoid", "gamma": 10.0, "warmup": None},
    }  # fmt: skip
    environment = {
        "corpus": "IEMOCAP", "manifest_sha256": "3f" * 32, "device": "CPU, AVX-512", "threads": 8,
        "versions": {"python": "3.11.7", "torch": "2.7.0", "numpy": "2.2.1"},
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    write_log(folder / "log.jsonl", steps, steps // 20, every=5)
    slow = "The domain head has been right in more than 90 % of the batch for a whole epoch: the encoder loses."
    write_rows(
        folder / "epochs.jsonl",
        [
            {
                "stage": "avdal", "epoch": e, "step": e * steps // 20,
                "validation_wa": 0.66 - 0.4 * float(np.exp(-e / 4)), "validation_loss": 0.9 + float(np.exp(-e / 3)),
                "validation_ua": 0.64 - 0.38 * float(np.exp(-e / 4)) + 0.01 * float(rng.normal()),
                "probe_accuracy": 0.55 + 0.4 * float(np.exp(-e / 5)),
                "warnings": [slow] if e in (2, 3, 4, 7) else ["The probe was not measured."] if e == 12 else [],
            }
            for e in range(1, 21)
        ],
    )  # fmt: skip
    classes, width = len(labels), 64
    truth = {domain: rng.integers(0, classes, 300) for domain in ("speech", "face")}
    centres, shift = 3 * rng.normal(size=(classes, width)), 3 * rng.normal(size=width)
    arrays = {f"{domain}_labels": values for domain, values in truth.items()}
    for domain, sign in (("speech", 1), ("face", -1)):
        noise = rng.normal(size=(2, 300, width))
        arrays[f"{domain}_before"] = 0.5 * centres[truth[domain]] + sign * shift + 1.5 * noise[0]
        arrays[f"{domain}_after"] = centres[truth[domain]] + 0.1 * sign * shift + 1.2 * noise[1]
    np.savez(folder / "embeddings.npz", **arrays)
    for seed in (0, 1):
        for number in (1, 2, 3):
            true = rng.integers(0, classes, 180)
            answers = {}
            for model, right in (("mdscm", 0.55), ("avdal", 0.62), ("fusion", 0.68)):
                near = (true + rng.integers(0, 2, 180)) % classes
                answers[model] = np.where(rng.random(180) < right, true, near).tolist()
            write_fold(
                folder / "evaluation", f"session{number}", seed, true.tolist(), answers, labels=labels,
                test_of=f"session Ses0{number}", validation_of=f"speaker Ses0{number % 3 + 1}F",
                shares_speakers=shared and number == 2,
            )  # fmt: skip
    return folder


class Page(HTMLParser):
    """Well-formed or an AssertionError: every tag is closed in order, every row of a table is as wide as its head."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        for table in self.tables:
            assert len({len(row) for row in table}) == 1, table

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)
        if "table" in self.open and self.open[-1] in ("td", "th", "small"):
            self.tables[-1][-1][-1] += f" {data}" if self.open[-1] == "small" else data

    @property
    def all_text(self) -> str:
        return " ".join(part for tag, parts in self.text.items() if tag != "style" for part in parts)

    def table(self, *head: str) -> list[list[str]]:
        found = [t for t in self.tables if t and t[0][: len(head)] == list(head)]
        assert len(found) == 1, head
        return found[0][1:]


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    text = write_report(example_run(tmp_path_factory.mktemp("example"))).read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_is_well_formed_and_stands_alone(example: tuple[str, Page]) -> None:
    text, page = example
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", text, re.IGNORECASE)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "data", "action", "xlink:href"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(ids) == len(set(ids)) and links == [f"#{name}" for name in ids]


def test_every_part_is_there(example: tuple[str, Page]) -> None:
    _, page = example
    assert page.text["h1"] == ["avdal-iemocap"]
    assert "IEMOCAP" in page.text["b"] and "avdal" in page.text["b"]
    charts_there = [a["aria-label"] for tag, a in page.tags if tag == "svg" and a.get("class") == "chart"]
    assert charts_there == [
        "Loss", "Accuracy in training", "Learning rate", "Validation", "Validation loss",
        "Strength of the reversed gradient", "Accuracy of the domain head", "Gradient norms in the encoder",
        "Fresh linear probe", "Before adaptation", "After adaptation",
    ]  # fmt: skip
    text = page.all_text
    assert "50 %: guessing" in text and "gradient-norm ratio, log axis" in text and "learning rate (×10⁻⁴)" in text
    assert "Epochs 2–4, 7:" in text and "Epoch 12:" in text
    assert "300 points of speech and 300 of faces." in text
    assert "missing" not in {a.get("class") for _, a in page.tags}
    assert "speaker-independent" not in text
    assert ["optimisation.betas", "[0.9, 0.999]"] in [row for table in page.tables for row in table]
    assert ["versions.torch", "2.7.0"] in [row for table in page.tables for row in table]


def test_drawings_stay_inside_their_frames(example: tuple[str, Page]) -> None:
    """Every coordinate and every text of every chart lies within its view box; no two texts of an axis overlap."""
    text, _ = example
    for chart in re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL):
        width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', chart).groups())  # type: ignore[union-attr]
        for d in re.findall(r'<path class="(?:line|band|circles)[^"]*"[^>]* d="([^"]*)"', chart):
            numbers = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", d)
            assert numbers
            for x, y in numbers:
                assert charts.LEFT - 1 <= float(x) <= width - charts.RIGHT + 1
                assert charts.TOP - 1 <= float(y) <= height - charts.BOTTOM + 1
        spans: dict[str, list[tuple[float, float]]] = {}
        for x, y, anchor, name in re.findall(
            r'<text (?:class="\w+" )?x="([\d.]+)" y="([\d.]+)"(?: text-anchor="(\w+)")?>([^<]*)<', chart
        ):
            size = 6.9 * len(name)
            start = float(x) - {"": 0.0, "middle": size / 2, "end": size}[anchor]
            assert start >= 0 and start + size <= width + 2, name
            spans.setdefault(y, []).append((start, start + size))
        for row in spans.values():
            row.sort()
            assert all(a[1] <= b[0] for a, b in zip(row, row[1:])), chart


def test_rates_equal_a_hand_computation(tmp_path: Path) -> None:
    labels = ["a", "b", "c"]
    evaluation = tmp_path / "evaluation"
    # Seed 0: a 2 of 3, b 1 of 2, c absent: WA 3/5, UA (2/3 + 1/2) / 2.  Seed 1: a 3 of 3, b 1 of 2: WA 4/5, UA 3/4.
    write_fold(evaluation, "x", 0, [0, 0, 1], {"mdscm": [0, 0, 0]}, labels=labels)
    write_fold(evaluation, "y", 0, [0, 1], {"mdscm": [2, 1]}, labels=labels)
    write_fold(evaluation, "x", 1, [0, 0, 1], {"mdscm": [0, 0, 0]}, labels=labels)
    write_fold(evaluation, "y", 1, [0, 1], {"mdscm": [0, 1]}, labels=labels)
    summary = summarize(read_folds(evaluation))
    model = summary["models"]["mdscm"]
    assert model["confusion"] == [[5, 0, 1], [2, 2, 0], [0, 0, 0]]
    assert model["wa"] == {"mean": 70.0, "std": 14.14}
    seeds = (100 * (2 / 3 + 1 / 2) / 2, 75.0)
    assert model["ua"]["mean"] == pytest.approx(sum(seeds) / 2, abs=0.01)
    assert model["ua"]["std"] == pytest.approx((seeds[1] - seeds[0]) / 2**0.5, abs=0.01)
    page = page_of(tmp_path)
    assert page.table("model", "", "utterances") == [
        ["MDSCM", "seed 0", "5", "60.0", "", "58.3", "", ""],
        ["MDSCM", "seed 1", "5", "80.0", "", "75.0", "", ""],
        ["MDSCM", "mean", "", "70.0", "14.1", "66.7", "11.8", "{:.1f} .. {:.1f}".format(*model["interval"])],
    ]
    assert page.table("model", "a") == [["MDSCM", "83.3", "50.0", "–"]]
    assert page.table("truth ╲ answer") == [
        ["a", "83 % 5", "0 % 0", "17 % 1"],
        ["b", "50 % 2", "50 % 2", "0 % 0"],
        ["c", "– 0", "– 0", "– 0"],
    ]
    assert page.table("seed", "fold") == [
        ["0", "x", "session Ses05", "speaker Ses04F", "no", "3", "66.7", "50.0"],
        ["0", "y", "session Ses05", "speaker Ses04F", "no", "2", "50.0", "50.0"],
        ["1", "x", "session Ses05", "speaker Ses04F", "no", "3", "66.7", "50.0"],
        ["1", "y", "session Ses05", "speaker Ses04F", "no", "2", "100.0", "100.0"],
    ]


def test_folds_that_are_not_there_yet_are_named(tmp_path: Path) -> None:
    write_fold(tmp_path / "evaluation", "x", 0, [0, 1], {"mdscm": [0, 1], "fusion": [0, 1]})
    write_fold(tmp_path / "evaluation", "x", 1, [0, 1], {"mdscm": [0, 0]})
    write_fold(tmp_path / "evaluation", "y", 0, [0, 1], {"mdscm": [0, 1], "fusion": [1, 1]})
    page = page_of(tmp_path)
    assert "Not complete yet, rates are of what is there: seed 1, y; seed 1, x (fusion)." in page.all_text
    assert ["fusion", "mean", "4"] not in [row[:3] for row in page.table("model", "", "utterances")]
    assert [row[1] for row in page.table("model", "", "utterances") if row[0] == "fusion"] == ["seed 0", "mean"]


def test_protocols_are_not_mixed(tmp_path: Path) -> None:
    write_fold(tmp_path / "evaluation", "x", 0, [0, 1], {"mdscm": [0, 1]}, protocol="one")
    write_fold(tmp_path / "evaluation", "z", 0, [0, 1], {"mdscm": [1, 0]}, protocol="two", labels=["p", "q"])
    page = page_of(tmp_path)
    assert {"one", "two"} <= set(page.text["h3"])
    assert {"UA 100.0 %", "UA 0.0 %"} <= set(page.text["dd"])


def test_shared_speakers_raise_a_banner_at_the_top_and_in_the_section(tmp_path: Path) -> None:
    page = page_of(example_run(tmp_path, shared=True))
    banners = [k for k, (_, a) in enumerate(page.tags) if a.get("class") == "banner"]
    sections = {a["id"]: k for k, (tag, a) in enumerate(page.tags) if tag == "section"}
    assert len(banners) == 2
    assert banners[0] < sections["curves"] and sections["results"] < banners[1] < sections["embeddings"]
    assert page.text["strong"] == ["NOT speaker-independent:"] * 2
    assert " in 2 of 6 folds" in page.all_text
    assert [row[4] for row in page.table("seed", "fold")] == ["no", "yes", "no"] * 2


def test_every_string_is_escaped(tmp_path: Path) -> None:
    evil = """<script>alert("1")</script>&amp;'é漢"""
    run = example_run(tmp_path, labels=[evil, "b<i>", "c&c", 'd"onclick="x'])
    settings = {"name": evil, "stage": evil, evil: {evil: [evil, None, "\ud800"]}, "corpus": evil}
    (run / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({evil: evil}), encoding="utf-8")
    write_rows(run / "epochs.jsonl", [{"stage": evil, "epoch": 1, "step": 0, "warnings": [evil]}])
    write_rows(run / "log.jsonl", [{"stage": evil, "step": 0, "loss": 1.0, "lambda": 0.0}])
    true = [0, 1, 2, 3]
    for path in (run / "evaluation").glob("*"):
        path.unlink()
    write_fold(
        run / "evaluation", "x", 0, true, {evil: true}, labels=[evil, "b<i>", "c&c", 'd"onclick="x'],
        protocol=evil, test_of=evil, validation_of=evil, shares_speakers=True,
    )  # fmt: skip
    page = page_of(run)
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags and "i" not in tags
    assert not any("onclick" in attributes for _, attributes in page.tags)
    assert page.text["h1"] == [evil] == page.text["title"][:1]
    assert [row[0] for row in page.table("truth ╲ answer")] == [evil, "b<i>", "c&c", 'd"onclick="x']
    assert page.table("seed", "fold")[0][2:4] == [evil, evil]


PARTS = {
    "settings.json": "This run has no settings.json with values.",
    "environment.json": "This run has no environment.json with values.",
    "embeddings.npz": "This run has no embeddings.npz, so there are no pictures of the features.",
    "evaluation": "This run has no folds (*-seed*.json) in evaluation, so there are no rates and confusion matrices.",
    "log.jsonl": "Not logged: loss, accuracy, learning rate.",
    "epochs.jsonl": "This run has no epochs.jsonl with values, so no warnings are known.",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named_in_its_section(tmp_path: Path, part: str) -> None:
    run = example_run(tmp_path)
    path = run / part
    path.rename(tmp_path / f"{part}.away")
    assert PARTS[part] in page_of(run).all_text


@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone_is_enough(tmp_path: Path, part: str) -> None:
    example_run(tmp_path / "whole")
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / part).rename(tmp_path / "part" / part)
    page = page_of(tmp_path / "part")
    assert page.text["h1"] == ["avdal-iemocap" if part == "settings.json" else "part"]
    assert sum(a.get("class") == "missing" for _, a in page.tags) >= 4


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected the folder of a run \(settings.json, .*\), got none of these"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        ("settings.json", b"{", r"settings.json: expected JSON, got "),
        ("settings.json", b"[1]", r"settings.json: expected a JSON object, got list"),
        ("environment.json", b"\xff\xfe", r"environment.json: expected readable UTF-8, got "),
        ("log.jsonl", b'{"step": 1}\n{"step"\n', r"log.jsonl: line 2: expected JSON, got "),
        ("log.jsonl", b"3\n", r"log.jsonl: expected a JSON object in every line, got int"),
        ("log.jsonl", b'{"step": 1, "loss": "low"}\n', r"log.jsonl: expected a number or null as 'loss' in every line"),
        ("log.jsonl", b'{"loss": 1}\n', r"log.jsonl: expected a number as 'step' in every line"),
        ("epochs.jsonl", b'{"epoch": 1, "warnings": "a"}\n', r"epochs.jsonl: expected a list as 'warnings', got str"),
        ("embeddings.npz", b"PK", r"embeddings.npz: expected the arrays speech_before, "),
        ("evaluation/x-seed0.json", b"{}", r"x-seed0.json: expected protocol to be a str, got None"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, part: str, content: bytes, message: str) -> None:
    (tmp_path / part).parent.mkdir(exist_ok=True)
    (tmp_path / part).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": [1]}, r"expected models to be a dict, got \[1\]"),
        ({"truth": [0, 4]}, "expected truths from 0 to 3, got 4"),
        ({"models": {"mdscm": [[1, 0, 0, 0]]}}, "expected mdscm of 2 utterances, got 1"),
        ({"models": {"mdscm": [[1, 0, 0, 0], [float("nan"), 0, 0, 1]]}}, "expected mdscm to have 4 finite prob"),
        ({"models": {"mdscm": [[1, 0], [0, 1]]}}, "expected mdscm to have 4 finite probabilities"),
    ],
)
def test_a_fold_that_cannot_be_right(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_fold(tmp_path / "evaluation", "x", 0, [0, 1], {"mdscm": [0, 1]})
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)


def test_an_arrays_that_is_missing_or_of_another_shape(tmp_path: Path) -> None:
    good = {f"{d}_{w}": np.zeros((3, 2)) for d in ("speech", "face") for w in ("before", "after")}
    good |= {f"{d}_labels": np.zeros(3, np.int64) for d in ("speech", "face")}
    for change, message in (
        ({"face_after": np.zeros((4, 2))}, r"face_after \(n, d\) and n whole face_labels"),
        ({"face_after": np.zeros((3, 5))}, "speech_after and face_after of one width"),
        ({"face_labels": np.zeros(3)}, "n whole face_labels"),
        ({"face_after": np.array([None])}, "expected the arrays speech_before"),
    ):
        np.savez(tmp_path / "embeddings.npz", **{**good, **change})
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path)
    np.savez(tmp_path / "embeddings.npz", **good)  # all points in one place
    page_of(tmp_path)


def test_a_long_log_stays_small_and_quick(tmp_path: Path) -> None:
    run = example_run(tmp_path)
    write_log(run / "log.jsonl", 100_000, 5000)
    start = time.process_time()
    out = write_report(run)
    assert time.process_time() - start < 3
    assert out.stat().st_size < 1_500_000
    assert "Line: mean of neighbouring steps; band: their range." in Page(out.read_text(encoding="utf-8")).all_text


def test_thinning_keeps_mean_and_extremes() -> None:
    x = np.arange(10_000.0)
    y = np.sin(x)
    y[1234] = 50
    middle, mean, low, high = charts.thin(x, y, 100)
    assert len(middle) == 100 and high.max() == 50 and low.min() == y.min()
    np.testing.assert_allclose(mean, y.reshape(100, 100).mean(1))
    np.testing.assert_allclose(middle, x.reshape(100, 100).mean(1))


def test_values_that_are_not_finite_or_not_positive_are_counted(tmp_path: Path) -> None:
    rows = [
        {"step": s, "loss": float("nan") if s > 7 else 1.0, "gradient_ratio": 0.0 if s < 3 else 2.0} for s in range(10)
    ]
    write_rows(tmp_path / "log.jsonl", rows)
    text = page_of(tmp_path).all_text
    assert "2 values of total were not finite." in text
    assert "3 values of ratio were 0 or less, which a log axis cannot show." in text
    write_rows(tmp_path / "log.jsonl", [{"step": s, "loss": float("inf")} for s in range(3)])
    assert "3 values of total were not finite." in page_of(tmp_path).all_text


def test_resumed_and_unfinished_logs(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": v} for s, v in ((0, 5.0), (1, 4.0), (2, 9.0), (1, 3.0), (2, None))]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "lo'
    (tmp_path / "log.jsonl").write_text(text)
    x, y, lost = read_stages(tmp_path / "log.jsonl", tmp_path / "epochs.jsonl", "joint")["joint"].log["loss"]
    assert (x.tolist(), y.tolist(), lost) == ([0, 1], [5, 3], 0)


def test_stages_have_their_own_curves(tmp_path: Path) -> None:
    rows = [{"stage": stage, "step": s, "loss": 1.0 + s} for stage in ("fusion", "mdscm") for s in range(5)]
    write_rows(tmp_path / "log.jsonl", rows + [{"stage": "avdal", "step": 0, "lambda": 0.5}])
    page = page_of(tmp_path)
    assert page.text["h3"] == ["Stage mdscm", "Stage avdal", "Stage fusion"]


def test_principal_plane_against_a_covariance() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 7)) * np.arange(1, 8) + 5
    points, shares = principal_plane(x)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    np.testing.assert_allclose(shares, values[::-1][:2] / values.sum())
    np.testing.assert_allclose(np.abs(points), np.abs((x - x.mean(0)) @ vectors[:, :-3:-1]), atol=1e-9)
    for shape in ((1, 5), (2, 5), (5, 1), (3, 2)):
        points, shares = principal_plane(rng.normal(size=shape))
        assert points.shape == (shape[0], 2) and np.isfinite(points).all() and np.isfinite(shares).all()


def test_both_domains_share_one_basis_and_large_sets_are_thinned(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{d}_{w}": rng.normal(size=(n, 8)) for d, n in (("speech", 2000), ("face", 90)) for w in ("before", "after")
    }
    arrays |= {"speech_labels": rng.integers(0, 4, 2000), "face_labels": rng.integers(0, 4, 90)}
    arrays["face_after"][:5] = np.nan
    np.savez(tmp_path / "embeddings.npz", **arrays)
    page = page_of(tmp_path)
    assert "2,000 points of speech and 90 of faces, 890 of them drawn." in page.all_text
    assert "2,000 points of speech and 85 of faces, 885 of them drawn. 5 more were not finite." in page.all_text
    drawn = [
        a["d"] or ""
        for tag, a in page.tags
        if (a.get("class") or "").startswith(("circles", "triangles")) and tag == "path"
    ]
    assert sum(d.count("M") for d in drawn if len(d) > 40) == 890 + 885


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 100), (-3.2, 0.1), (1e-5, 3e-5), (99_000, 99_001), (0, 123_456)])
def test_ticks_are_round_and_few(low: float, high: float) -> None:
    values = charts.ticks(low, high)
    assert 3 <= len(values) <= 7
    assert all(low <= v <= high for v in values)
    assert len({charts.number(v) for v in values}) == len(values)
    assert np.ptp(np.diff(values)) < 1e-6 * (high - low)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (-2.5, "−2.5"), (120_000, "120,000"), (1e6, "10⁶"), (2e-4, "2·10⁻⁴")]
)
def test_numbers_of_ticks(value: float, text: str) -> None:
    assert charts.number(value) == text


def test_steps_and_epochs_have_whole_ticks_and_large_values_fit(tmp_path: Path) -> None:
    write_rows(tmp_path / "epochs.jsonl", [{"epoch": e, "validation_ua": 0.5} for e in (1, 2)])
    write_rows(tmp_path / "log.jsonl", [{"step": s, "loss": 3e7 - s, "gradient_ratio": 3.0} for s in (0, 1)])
    out = write_report(tmp_path).read_text(encoding="utf-8")
    epochs = re.search(r'aria-label="Validation".*?</svg>', out, re.DOTALL).group()  # type: ignore[union-attr]
    assert re.findall(r'text-anchor="middle">([^<]*)', epochs) == ["1", "2"]
    assert "loss (nats) (×10⁷)" in out
    for name in ("Loss", "Gradient norms in the encoder"):
        chart = re.search(rf'aria-label="{name}".*?</svg>', out, re.DOTALL).group()  # type: ignore[union-attr]
        assert len(re.findall(r'text-anchor="end">([^<]*)', chart)) >= 3


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(example: tuple[str, Page], theme: int) -> None:
    """WCAG 2: 4.5 for texts, heat behind them included, 3 for drawings."""
    css = re.findall(r":root\{([^}]*)\}", example[0])[theme]
    colours = dict(re.findall(r"--(\w+):([^;]+)", css))
    colours = {k: "#" + "".join(2 * c for c in v[1:]) if len(v) == 4 else v for k, v in colours.items()}

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    heat, page = map(int, colours["heat"].split(",")), colours["page"]
    hot = [0.75 * h + 0.25 * int(page[k : k + 2], 16) for h, k in zip(heat, (1, 3, 5))]
    assert contrast(colours["ink"], "#" + "".join(f"{round(h):02x}" for h in hot)) >= 4.5
    for name in ("ink", "soft", "warn"):
        assert contrast(colours[name], page) >= 4.5, name
    assert contrast(colours["soft"], colours["panel"]) >= 4.5
    for k in range(len(charts.LIGHT)):
        assert contrast(colours[f"c{k}"], page) >= 3, k


def test_log_ticks() -> None:
    assert charts.log_ticks(0.08, 120) == [0.1, 1, 10, 100]
    assert charts.log_ticks(0.9, 6) == [1, 2, 5]
    assert len(charts.log_ticks(1e-12, 1e12)) <= 7


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}}, "d": [1], "e": {}}) == {"a.b.c": 1, "d": [1], "e": {}}


def test_out_may_lie_elsewhere(tmp_path: Path) -> None:
    run = example_run(tmp_path / "run")
    out = write_report(run, tmp_path / "pages" / "one.html")
    assert out == tmp_path / "pages" / "one.html" and [p.name for p in out.parent.iterdir()] == ["one.html"]
    assert write_report(run) == run / "report.html"


if __name__ == "__main__":
    print(write_report(example_run(Path(sys.argv[1]), shared="--shared" in sys.argv)))
