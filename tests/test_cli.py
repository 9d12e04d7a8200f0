"""The command: what it prints, where, and how it exits."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import avser_fast
from avser_fast import cli, config
from avser_fast.inference.weights import random_tensors, write_model

SPEECH = [str(p) for p in sorted((Path(__file__).parent.parent / "data" / "emodb4").glob("*.flac"))]
SMALL = config.MDSCM(mel_bands=24, stem=(4, 8), blocks=(8,), attention_reduction=2, encoder_layers=0)
SPEC = config.ModelSpec(front_end=config.FrontEnd(mel_bands=24), clip_rule=config.ClipRule("even", None), network=SMALL)
COMMAND = [sys.executable, "-m", "avser_fast"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    write_model(path, SPEC, random_tensors(SMALL))
    return str(path)


def test_table(run: Any, model: str) -> None:
    code, out, err = run("infer", *SPEECH[:3], "--model", model)
    expected = avser_fast.infer(SPEECH[:3], model=model)
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert lines[0].split() == ["file", "label", "score", "seconds", "scores"] and len(lines) == 4
    column = lines[0].index("label")
    for line, file, result in zip(lines[1:], SPEECH, expected):
        assert line.startswith(file + "  ") and line[column:].startswith(f"{result.label} ")
        words = line.split()
        assert words[2:4] == [f"{result.score:.3f}", f"{result.duration_s:.2f}"]
        assert words[4:] == [w for label, p in result.scores.items() for w in (label, f"{p:.3f}")]


def test_json(run: Any, model: str) -> None:
    code, out, err = run("infer", "--json", "--model", model, *SPEECH[:3])
    assert code == 0 and err == ""
    expected = avser_fast.infer(SPEECH[:3], model=model)
    assert json.loads(out) == [{"file": f, **r.to_dict()} for f, r in zip(SPEECH, expected)]
    lines = out.splitlines()  # one object per line, so that line tools can read it too
    assert (lines[0], lines[-1]) == ("[", "]")
    assert [json.loads(line.rstrip(","))["file"] for line in lines[1:-1]] == SPEECH[:3]


def test_csv(run: Any, model: str) -> None:
    code, out, err = run("infer", "--csv", "--model", model, *SPEECH[:2])
    assert code == 0 and err == ""
    rows = list(csv.DictReader(io.StringIO(out)))
    for row, file, result in zip(rows, SPEECH, avser_fast.infer(SPEECH[:2], model=model)):
        assert (row["file"], row["label"], row["backend"], row["error"]) == (file, result.label, "engine", "")
        assert {label: float(row[label]) for label in SPEC.labels} == result.scores
        for name in ("score", "duration_s", "padded_fraction"):
            assert float(row[name]) == getattr(result, name)
    assert len(rows) == 2


def test_top_k_and_batch_size(run: Any, model: str) -> None:
    whole = json.loads(run("infer", "--json", "--model", model, *SPEECH[:3])[1])
    code, out, _ = run("infer", "--json", "--model", model, "--top-k", "2", "--batch-size", "1", *SPEECH[:3])
    assert code == 0
    for few, all_ in zip(json.loads(out), whole):
        assert list(few["scores"].items()) == list(all_["scores"].items())[:2]
    rows = list(csv.DictReader(io.StringIO(run("infer", "--csv", "--model", model, "--top-k", "1", SPEECH[0])[1])))
    assert sum(rows[0][label] != "" for label in SPEC.labels) == 1


@pytest.mark.parametrize("form", ["--json", "--csv", None])
def test_some_inputs_failed(run: Any, model: str, tmp_path: Path, form: str | None) -> None:
    text = tmp_path / "text.wav"
    text.write_text("no sound")
    files = [SPEECH[0], str(text), SPEECH[1], str(tmp_path / "no.wav")]
    code, out, err = run("infer", *files, "--model", model, *([form] if form else []))
    assert code == 3
    errors = err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith(f"avser-fast: item 1 ({str(text)!r}): expected an audio file (wav, flac")
    assert errors[1] == f"avser-fast: item 3 ({files[3]!r}): expected an audio file, found no such file"
    good = avser_fast.infer([files[0], files[2]], model=model)
    if form == "--json":
        found = json.loads(out)
        assert [f["file"] for f in found] == files
        assert [found[0]["scores"], found[2]["scores"]] == [r.scores for r in good]
        assert [f["error"] is None for f in found] == [True, False, True, False] and found[1]["label"] is None
    elif form == "--csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [row["file"] for row in rows] == files and [row["error"] != "" for row in rows] == [
            False,
            True,
            False,
            True,
        ]
        assert [rows[1][k] for k in ("label", "score", "ang", "duration_s")] == [""] * 4
    else:
        assert [line.split()[0] for line in out.splitlines()] == ["file", files[0], files[2]]
    code, out, err = run("infer", str(text), "--model", model, *([form] if form else []))
    assert code == 3 and len(err.splitlines()) == 1
    if form == "--json":
        assert len(json.loads(out)) == 1


def test_failed(run: Any, tmp_path: Path, model: str) -> None:
    code, out, err = run("infer", SPEECH[0], "--model", str(tmp_path / "no.safetensors"))
    assert (code, out) == (1, "") and err.endswith("no such file\n") and len(err.splitlines()) == 1
    code, out, err = run("infer", SPEECH[0], "--model", model, "--device", "cuda:99")
    assert (code, out) == (1, "") and err.startswith("avser-fast: device 'cuda:99': ") and len(err.splitlines()) == 1
    code, out, err = run("infer", SPEECH[0], "--model", model, "--precision", "int8")
    assert (
        (code, out) == (1, "") and "expected a model file with calibrated ranges" in err and len(err.splitlines()) == 1
    )
    assert "avser-fast convert MODEL --precision int8 --calibrate DIR" in err
    code, _, err = run("infer", SPEECH[0], "--model", model, "--precision", "fp8")
    sentence = "precision: expected 'auto', 'float32', 'bf16' or 'int8' with backend 'engine', got 'fp8'"
    assert code == 1 and sentence in err
    code, _, err = run("infer", SPEECH[0], "--model", model, "--output", str(tmp_path / "no" / "x.json"))
    assert code == 1 and "No such file or directory" in err and err.rstrip().endswith("/no/x.json'")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["infer"],
        ["no-such-command"],
        ["infer", "a.wav", "--json", "--csv"],
        ["infer", "a.wav", "--top-k", "0"],
        ["infer", "a.wav", "--top-k", "two"],
        ["infer", "a.wav", "--batch-size", "-1"],
        ["infer", "a.wav", "--no-such-option"],
        ["infer", "-", "-"],
        ["doctor", "extra"],
        ["convert"],
        ["convert", "default"],
        ["convert", "default", "--precision", "float32"],
        ["convert", "default", "--precision", "int8"],
        ["convert", "default", "--precision", "bf16"],
        ["convert", "default", "--precision", "bf16", "--calibrate", "."],
        ["convert", "default", "--precision", "int8", "--calibrate", ".", "--limit", "0"],
        ["convert", "mdscm.pth", "--calibrate", "."],
    ],
)
def test_usage(run: Any, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and "avser-fast" in err


def test_help_lists_what_exists(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "") and "exit codes: 0 ok" in out
    assert all(name in out for name in ("infer", "convert", "doctor", "prepare"))
    for name in ("stream", "bench"):
        assert name not in out
    code, out, _ = run("infer", "--help")
    for option in ("--json", "--csv", "--model", "--top-k", "--device", "--precision", "--batch-size", "--output"):
        assert option in out
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert "train" not in run("--help")[1]
    for name in ("prepare", "train", "evaluate"):
        code, out, err = run(name, "--dataset", "emodb4")
        assert (code, out) == (2, "") and len(err.splitlines()) == 1
        assert err.startswith(f"avser-fast {name}: expected the package python_training")


@pytest.mark.parametrize(
    ("body", "code"),
    [("", 0), ("sys.exit(5)", 5), ("sys.exit()", 0), ("sys.exit('no corpus')", 1), ("sys.exit(True)", 1)],
)
def test_training_commands_are_forwarded(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, code: int
) -> None:
    package = tmp_path / "python_training"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(f"import sys\nprint(sys.argv[1:])\n{body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.split(".")[0] == "python_training"]:
        monkeypatch.delitem(sys.modules, name)
    assert "train" in run("--help")[1]
    before = sys.argv
    found, out, err = run("train", "--dataset", "emodb4", "--help")
    assert (found, out) == (code, "['train', '--dataset', 'emodb4', '--help']\n") and sys.argv is before
    assert err == ("no corpus\n" if "corpus" in body else "")
    for name in [n for n in sys.modules if n.split(".")[0] == "python_training"]:
        del sys.modules[name]


def test_version(run: Any) -> None:
    assert run("--version") == (0, f"avser-fast {avser_fast.__version__}\n", "")
    assert avser_fast.__version__[0].isdigit()


def test_doctor_fails_when_the_engine_cannot_be_loaded(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avser_fast.info._engine", lambda: {"error": "undefined symbol: x"})
    code, out, _ = run("doctor")
    assert code == 1 and "undefined symbol: x" in out


def test_doctor(run: Any) -> None:
    code, out, err = run("doctor")
    assert (code, err) == (0, "") and len(out.splitlines()) > 3
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "") and isinstance(json.loads(out), dict)


def test_output_file_is_whole_or_not_there(run: Any, model: str, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    assert run("infer", "--json", "--model", model, "--output", str(target), *SPEECH[:2]) == (0, "", "")
    assert target.read_text() == run("infer", "--json", "--model", model, *SPEECH[:2])[1]
    before = target.read_bytes()
    assert run("infer", "--json", "--model", str(tmp_path / "no"), "--output", str(target), SPEECH[0])[0] == 1
    assert target.read_bytes() == before and os.listdir(tmp_path) == ["out.json"]
    code, out, err = run("infer", "--csv", "--model", model, "--output", str(target), SPEECH[0], "no.wav")
    assert (code, out) == (3, "") and "no such file" in err and len(target.read_text().splitlines()) == 3


def test_standard_input(run: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(SPEECH[1]).read_bytes())))
    code, out, err = run("infer", "--json", "--model", model, SPEECH[0], "-", SPEECH[2])
    assert (code, err) == (0, "")
    assert [f["scores"] for f in json.loads(out)] == [r.scores for r in avser_fast.infer(SPEECH[:3], model=model)]
    assert json.loads(out)[1]["file"] == "-"


def test_names_that_are_not_text(run: Any, model: str, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b'/\xff\xe4 ,"\n.flac'
    os.symlink(SPEECH[0], odd)
    name = os.fsdecode(odd)
    for form in ("--json", "--csv", None):
        code, out, err = run("infer", name, "--model", model, *([form] if form else []))
        assert (code, err) == (0, "") and "flac" in out
    assert json.loads(run("infer", name, "--json", "--model", model)[1])[0]["file"] == name
    target = tmp_path / "out.csv"
    assert run("infer", name, "--csv", "--model", model, "--output", str(target)) == (0, "", "")
    assert target.read_text() == run("infer", name, "--csv", "--model", model)[1]
    umlaut = tmp_path / "Ä.flac"
    os.symlink(SPEECH[0], umlaut)
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for form in ("--json", "--csv", "--top-k=1"):
        command = [*COMMAND, "infer", form, "--model", model, str(umlaut), SPEECH[0]]
        done = subprocess.run(command, capture_output=True, env=ascii_only)
        assert (done.returncode, done.stderr) == (0, b"") and SPEECH[0].encode() in done.stdout


def test_as_a_module_without_torch(model: str) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['avser-fast', *sys.argv[1:]]\n"
        "runpy.run_module('avser_fast', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "infer", "--json", "--model", model, SPEECH[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["backend"] == "engine"
    done = subprocess.run([*COMMAND, "infer", "--model", model, "no.wav"], capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_reader_that_goes_away(model: str) -> None:
    files = SPEECH[:1] * 3000  # more than a pipe holds
    with subprocess.Popen(
        [*COMMAND, "infer", "--json", "--model", model, *files], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"[\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


def test_interruption(model: str, tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    command = [
        *COMMAND,
        "infer",
        "--csv",
        "--output",
        str(target),
        "--batch-size",
        "1",
        "--model",
        model,
        "no.wav",
        "-",
    ]
    pipe = subprocess.PIPE

    def listen() -> None:  # a job in the background inherits that SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=listen) as process:
        assert process.stderr is not None
        assert b"no such file" in process.stderr.readline()  # now it waits for its standard input
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b"avser-fast: interrupted\n"
    assert os.listdir(tmp_path) == []
