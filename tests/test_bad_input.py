"""Each kind of bad input: one sentence that names the item, and the other items of the batch survive unchanged."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import avser_fast
from avser_fast import config
from avser_fast.errors import BackendError, InputError
from avser_fast.inference import audio
from avser_fast.inference.audio import MAX_FLOAT_PEAK, load_item
from avser_fast.inference.weights import random_tensors, write_model

SPEECH = sorted((Path(__file__).parent.parent / "data" / "emodb4").glob("*.flac"))
PCM, RATE = soundfile.read(SPEECH[0], dtype="int16")
SMALL = config.MDSCM(mel_bands=24, stem=(4, 8), blocks=(8,), attention_reduction=2, encoder_layers=0)
SPEC = config.ModelSpec(front_end=config.FrontEnd(mel_bands=24), clip_rule=config.ClipRule("even", None), network=SMALL)


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> avser_fast.Recognizer:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    write_model(path, SPEC, random_tensors(SMALL))
    return avser_fast.load(path, backend="engine")


def encoded(samples: np.ndarray = PCM, rate: int = RATE, form: str = "WAV", subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, subtype=subtype)
    return out.getvalue()


def cut(form: str, share: float = 0.6) -> bytes:
    whole = encoded(form=form)
    return whole[: int(len(whole) * share)]


def resized(size: int) -> bytes:
    """A wav whose data chunk claims ``size`` bytes."""
    data = bytearray(encoded())
    data[40:44] = struct.pack("<I", size)
    return bytes(data)


class Nasty:
    """An item whose own methods fail."""

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise RuntimeError("no values today")


class NastyFile:
    name = "pipe"

    def read(self) -> bytes:
        raise OSError(5, "Input/output error")


class NamelessPath:
    def __fspath__(self) -> str:
        raise RuntimeError("nowhere")


FLOATS = PCM.astype(np.float32) / 32768
NO_AUDIO = r"expected an audio file \(wav, flac, ogg, mp3, \.\.\.\), got something else \(Format not recognised\)"
KINDS = r"expected int8, int16, int32, uint8 or float samples, got "

# name: (item or a function of a folder, what the sentence says after the item's name)
BAD: dict[str, tuple[Any, str]] = {
    "missing file": (lambda d: d / "no.wav", r"/no\.wav'\): expected an audio file, found no such file"),
    "file as a folder": (lambda d: f"{SPEECH[0]}/x.wav", r"expected a readable audio file, got an error \(Not a dir"),
    "directory": (lambda d: d, r"expected an audio file, got a directory"),
    "text file named wav": (lambda d: put(d / "t.wav", b"I am no sound at all\n" * 9), r"/t\.wav'\): " + NO_AUDIO),
    "empty file": (lambda d: put(d / "e.wav", b""), r"/e\.wav'\): expected an audio file, got 0 bytes"),
    "raw samples without header": (lambda d: put(d / "x.raw", PCM.tobytes()), r"/x\.raw'\): expected an audio file"),
    "truncated wav": (
        lambda d: put(d / "half.wav", cut("WAV")),
        rf"/half\.wav'\): expected the {len(PCM)} samples its header announces, got 18214: the wav is truncated",
    ),
    "truncated big-endian wav": (
        lambda d: put(d / "x.wav", rifx()[:-100]),
        rf"expected the {len(PCM)} samples its header announces, got {len(PCM) - 50}: the wav is truncated",
    ),
    "wav truncated in its data header": (encoded()[:42], r"expected a wav with samples, got one that ends before its"),
    "wav truncated in its format": (encoded()[:30], r"expected a wav with samples, got one that ends before its data"),
    "wav of a header alone": (encoded(PCM[:0]), r"expected at least 1 sample, got an audio file without samples"),
    "wav with its data missing": (encoded()[:44], rf"expected the {len(PCM)} samples its header announces, got 0"),
    "truncated flac": (cut("FLAC"), r"expected a whole audio file, got a truncated or damaged one \("),
    "truncated ogg": (
        cut("OGG"),
        r"expected a whole ogg, got one without its last page: the file is truncated",
    ),
    "ogg without its last byte": (encoded(form="OGG")[:-1], r"expected a whole ogg, got one without its last page"),
    "foreign bytes": (b"\x89PNG\r\n\x1a\n" + bytes(99), r"\(107 bytes\): " + NO_AUDIO),
    "no bytes": (b"", r"\(0 bytes\): expected an audio file, got 0 bytes"),
    "no path": ("", r"expected the path of an audio file, got ''"),
    "NUL in a path": ("a\0b", r"expected the path of an audio file, got"),
    "file with NaN": (encoded(np.full(500, np.nan), subtype="FLOAT"), r"expected finite samples, got NaN"),
    "float file at int16 scale": (encoded(PCM.astype("f"), subtype="FLOAT"), r"got a peak of 32767; divide them by"),
    "file of nine channels": (encoded(np.zeros((99, 9))), r"expected at most 8 channels, got 9"),
    "file of 2 kHz": (encoded(rate=2000), r"expected sampling_rate from 4000 to 384000 hertz, got 2000"),
    "text-mode file": (lambda d: open(put(d / "t.txt", b"abc")), r"expected a file opened in binary mode, got str"),
    "empty file object": (io.BytesIO(), r"\(BytesIO\): expected an audio file, got 0 bytes"),
    "file object that fails": (NastyFile(), r"\('pipe'\): could not be read \(OSError: .*Input/output error\)"),
    "closed file object": (lambda d: closed(), r"could not be read \(ValueError: .*closed"),
    "path that fails": (NamelessPath(), r"\(NamelessPath\): could not be read \(RuntimeError: nowhere\)"),
    "zero samples": (PCM[:0], r"\(ndarray\): expected at least 1 sample, got an empty array of shape \(0,\)"),
    "zero samples of two channels": (np.zeros((2, 0), "f"), r"expected at least 1 sample, got .* of shape \(2, 0\)"),
    "zero channels": (np.zeros((0, 5), "f"), r"expected at least 1 sample, got an empty array of shape \(0, 5\)"),
    "NaN": (np.where(np.arange(len(PCM)) == 77, np.nan, FLOATS), r"expected finite samples, got NaN"),
    "NaN beside infinity": (np.array([np.inf, np.nan, 0]), r"expected finite samples, got NaN"),
    "infinity": (np.append(FLOATS, np.float32(np.inf)), r"expected finite samples, got infinity"),
    "minus infinity": (np.append(FLOATS, np.float32(-np.inf)), r"expected finite samples, got infinity"),
    "float32 at int16 scale": (
        PCM.astype(np.float32),
        r"expected float samples in \[-1, 1\], got a peak of 32767; div",
    ),
    "float64 at int16 scale": (PCM.astype(np.float64), r"got a peak of 32767; divide them by their full scale"),
    "float16 at int8 scale": (
        (PCM // 256).astype(np.float16),
        r"got a peak of 12[78]; divide them by their full scale",
    ),
    "float just too far": (np.array([0, -MAX_FLOAT_PEAK * 1.01]), r"in \[-1, 1\], got a peak of 4\.04"),
    "int64": (PCM.astype(np.int64), KINDS + r"int64, whose full scale is not known; cast 16-bit samples with"),
    "uint16": (PCM.astype(np.uint16), KINDS + r"uint16, whose full scale"),
    "bool": (PCM > 0, KINDS + "bool$"),
    "complex": (FLOATS.astype(complex), KINDS + "complex128$"),
    "objects": (np.array([None, 1.0]), KINDS + "object$"),
    "strings": (np.array(["a", "b"]), KINDS + "<U1$"),
    "times": (np.array([1, 2], "m8[s]"), KINDS + r"timedelta64\[s\]$"),
    "scalar array": (np.zeros((), "f"), r"expected shape \(samples,\) or \(channels, samples\), got \(\)"),
    "rank 3": (np.zeros((1, 1, 99), "f"), r"expected shape \(samples,\) or \(channels, samples\), got \(1, 1, 99\)"),
    "transposed": (np.zeros((999, 2), "f"), r"at most 8 channels, got \(999, 2\); it looks like .*pass array\.T"),
    "transposed mono": (np.zeros((999, 1), "f"), r"got \(999, 1\); it looks like \(samples, channels\): pass array\.T"),
    "nine channels": (np.zeros((9, 99), "f"), r"with at most 8 channels, got \(9, 99\)$"),
    "masked": (np.ma.masked_array([0.1, 0.2], [False, True]), r"array without masked samples, got 1 masked"),
    "array that fails": (Nasty(), r"\(Nasty\): could not be read \(RuntimeError: no values today\)"),
    "tensor of rank 3": (torch.zeros(1, 1, 99), r"\(Tensor\): expected shape .*, got \(1, 1, 99\)"),
    "tensor of rank 0": (torch.zeros(()), r"\(Tensor\): expected shape .*, got \(\)"),
    "empty tensor": (torch.zeros(0), r"\(Tensor\): expected at least 1 sample"),
    "tensor with NaN": (torch.tensor([0.0, float("nan")]), r"\(Tensor\): expected finite samples, got NaN"),
    "int64 tensor": (torch.arange(9), r"\(Tensor\): " + KINDS + "int64, whose full scale"),
    "bool tensor": (torch.ones(9, dtype=torch.bool), r"\(Tensor\): " + KINDS + "bool"),
    "complex tensor": (torch.zeros(9, dtype=torch.complex64).conj(), r"\(Tensor\): " + KINDS + "complex64"),
    "sparse tensor": (torch.zeros(1, 9).to_sparse(), r"\(Tensor\): expected a dense tensor with values, got layout"),
    "meta tensor": (torch.zeros(9, device="meta"), r"\(Tensor\): expected a dense tensor with values, got .* meta"),
    "list of floats": ([0.1, 0.2], r"\(list\): expected a path, .*, got a list; wrap samples in numpy\.array\("),
    "tuple of ints": ((1, 2), r"\(tuple\): expected a path, .*, got a tuple; wrap samples in numpy\.array\("),
    "None": (None, r"\(NoneType\): expected a path, bytes, file object, array or mapping, got NoneType"),
    "number": (3.5, r"\(float\): expected a path, bytes, file object, array or mapping, got float"),
    "numpy scalar": (np.float32(0.5), r"\(float32\): expected a path, .*, got float32"),
    "typed memoryview": (
        memoryview(PCM.copy()),
        r"expected a memoryview of the bytes of a file, got items of format 'h'",
    ),
    "mapping without array": ({"path": "x.wav"}, r"\('x\.wav'\): expected the keys 'array' and .*, got path"),
    "empty mapping": ({}, r"\(mapping\): expected the keys 'array' and 'sampling_rate', got none"),
    "mapping with a list": ({"array": [0.1], "sampling_rate": RATE}, r"\(mapping\): expected a path, .* got a list"),
    "mapping with a path": ({"array": "x.wav", "sampling_rate": RATE}, r"\(mapping\): expected a .*, got str"),
    "rate of 0": ({"array": PCM, "sampling_rate": 0}, r"expected sampling_rate from 4000 to 384000 hertz, got 0"),
    "negative rate": ({"array": PCM, "sampling_rate": -RATE}, r"from 4000 to 384000 hertz, got -16000"),
    "rate too low": ({"array": PCM, "sampling_rate": 3999}, r"from 4000 to 384000 hertz, got 3999"),
    "rate too high": ({"array": PCM, "sampling_rate": 384001}, r"from 4000 to 384000 hertz, got 384001"),
    "rate in kilohertz": ({"array": PCM, "sampling_rate": 44.1}, r"to be a whole number of hertz, got 44\.1"),
    "rate of True": ({"array": PCM, "sampling_rate": True}, r"to be a whole number of hertz, got True"),
    "rate of NaN": ({"array": PCM, "sampling_rate": float("nan")}, r"to be a whole number of hertz, got nan"),
    "rate as text": ({"array": PCM, "sampling_rate": "16000"}, r"to be a whole number of hertz, got '16000'"),
}


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def closed() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


def rifx() -> bytes:
    data = PCM.astype(">i2").tobytes()
    form = struct.pack(">4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    body = b"WAVE" + form + struct.pack(">4sI", b"data", len(data)) + data
    return b"RIFX" + struct.pack(">I", len(body)) + body


@pytest.mark.parametrize("name", BAD)
def test_bad_item(name: str, recognizer: avser_fast.Recognizer, tmp_path: Path) -> None:
    item, expected = BAD[name]
    make = item if isinstance(item, type(lambda: 0)) else lambda _: item
    good = [str(SPEECH[1]), PCM, {"array": FLOATS[:4000], "sampling_rate": 8000}]
    alone = [recognizer.infer([g], sampling_rate=RATE)[0] for g in good]

    with pytest.raises(InputError, match=expected) as found:
        recognizer.infer([*good[:2], make(tmp_path)], sampling_rate=RATE)
    text = str(found.value)
    assert text.startswith("item 2 (") and "\n" not in text and len(text) < 400 and "0x" not in text
    with pytest.raises(InputError, match=expected):
        recognizer.embed([make(tmp_path)], sampling_rate=RATE)

    for batch_size in (None, 1, 2):
        batch = [good[0], good[1], make(tmp_path), good[2]]
        results = recognizer.infer(batch, sampling_rate=RATE, on_error="return", batch_size=batch_size)
        assert [results[0], results[1], results[3]] == alone
        bad = results[2]
        assert bad.error == text
        assert not bad.ok and bad.label is None and bad.score is None and bad.scores == {} and bad.segments == ()


def test_bare_arrays_need_a_rate(recognizer: avser_fast.Recognizer) -> None:
    for item in (PCM, FLOATS, torch.from_numpy(FLOATS), FLOATS[None]):
        with pytest.raises(InputError, match=r"item 0 \(\w+\): expected sampling_rate= for an array, got none; pass"):
            recognizer.infer([item])
    with pytest.raises(
        InputError, match=r"item 0 \(mapping\): expected the key 'sampling_rate' beside 'array', got none"
    ):
        recognizer.infer([{"array": PCM}])
    assert recognizer.infer([{"array": PCM}], sampling_rate=RATE) == recognizer.infer([PCM], sampling_rate=RATE)
    for rate in (0, True, "16000", 16000.5, 1e9):
        with pytest.raises(InputError, match=r"item 0 \(ndarray\): expected sampling_rate "):
            recognizer.infer([PCM], sampling_rate=rate)  # type: ignore[arg-type]


def test_a_file_that_may_not_be_read(recognizer: avser_fast.Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(audio, "open", refuse, raising=False)  # the tests may run as root, who may read everything
    result = recognizer.infer([SPEECH[0]], on_error="return")[0]
    assert (
        result.error
        == f"item 0 ({str(SPEECH[0])!r}): expected a readable audio file, got one without permission to read it"
    )


def test_running_out_of_memory_on_one_item(recognizer: avser_fast.Recognizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Huge:
        def __array__(self, *_: Any, **__: Any) -> np.ndarray:
            raise MemoryError

    results = recognizer.infer([Huge(), PCM], sampling_rate=RATE, on_error="return")
    assert "item 0 (Huge): could not be read (MemoryError" in str(results[0].error) and results[1].ok

    def prepare(samples: np.ndarray, front: Any, rule: Any) -> tuple[np.ndarray, np.ndarray]:
        if len(samples) == 7:
            raise MemoryError
        return whole(samples, front, rule)

    whole = recognizer._backend.prepare
    monkeypatch.setattr(recognizer._backend, "prepare", prepare)
    rate = recognizer.spec.front_end.sampling_rate
    results = recognizer.infer([PCM[:7], PCM], sampling_rate=rate, on_error="return")
    assert results[0].error == (
        f"item 0 (ndarray): expected audio whose features fit into memory, got 0 s at {rate} hertz"
    )
    assert results[1].ok


def test_pipes_and_streamed_wavs_are_read_to_their_end(recognizer: avser_fast.Recognizer, tmp_path: Path) -> None:
    expected = recognizer.infer([PCM], sampling_rate=RATE)
    for size in (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000 + 0xF00):
        assert recognizer.infer([resized(size)]) == expected
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(encoded()))
    writer.start()
    assert recognizer.infer([pipe]) == expected
    writer.join()


def test_trailing_chunks_and_odd_sizes(recognizer: avser_fast.Recognizer) -> None:
    eight = encoded(PCM[:4001].astype(np.int16), subtype="PCM_U8")
    assert len(load_item(eight + b"LIST\x04\0\0\0INFO", None, "x").samples) == 4001
    plain = encoded()
    extra = plain[:36] + struct.pack("<4sI", b"note", 3) + b"abc\0" + plain[36:]
    assert recognizer.infer([extra]) == recognizer.infer([plain])
    assert recognizer.infer([rifx()]) == recognizer.infer([plain])


@pytest.mark.parametrize("batch", ["a.wav", Path("a.wav"), b"RIFF", PCM, torch.zeros(9), {"array": PCM}, io.BytesIO()])
def test_one_item_instead_of_a_batch(batch: Any, recognizer: avser_fast.Recognizer) -> None:
    for call in (recognizer.infer, recognizer.embed, recognizer.iter_infer, avser_fast.infer):
        with pytest.raises(
            InputError, match=r"batch: expected a list of items, got one item of type \w+; write \[item\]"
        ):
            call(batch)


@pytest.mark.parametrize("batch", [None, 3, 1.5])
def test_no_batch(batch: Any) -> None:
    with pytest.raises(InputError, match=r"batch: expected a list of items, got (NoneType|int|float)"):
        avser_fast.infer(batch)


def test_bad_arguments(recognizer: avser_fast.Recognizer) -> None:
    for name in ("batch_size", "top_k"):
        for value in (0, -1, 1.5, True, "2"):
            with pytest.raises(InputError, match=rf"^{name}: expected a whole number of at least 1 or None, got"):
                recognizer.infer([], **{name: value})
    with pytest.raises(InputError, match=r"on_error: expected 'raise' or 'return', got 'ignore'"):
        recognizer.infer([], on_error="ignore")
    with pytest.raises(InputError, match=r"progress: expected True or a callable, got 'bar'"):
        recognizer.infer([], progress="bar")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        recognizer.infer([], "raise")  # type: ignore[misc]


def test_bad_loads(recognizer: avser_fast.Recognizer) -> None:
    def refusal(**arguments: Any) -> str:
        with pytest.raises(BackendError) as found:
            avser_fast.load(recognizer.path, **arguments)
        return str(found.value)

    for value in ("gpu", "cuda:", "cuda:x", "CPU", None, 0, "mps"):
        assert refusal(device=value) == f"device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {value!r}"
    for value in ("bfloat16", "INT8", "fp32", None, ["bf16"]):
        sentence = f"precision: expected 'auto', 'float32', 'bf16' or 'int8' with backend 'engine', got {value!r}"
        assert sentence == refusal(precision=value)
    for value in ("bf16", "int8"):
        sentence = "precision: expected 'auto' or 'float32' with backend 'reference', got "
        assert refusal(precision=value, backend="reference") == sentence + repr(value)
    assert "backend: expected 'auto', 'engine', 'cuda', 'triton' or 'reference', got 'onnx'" == refusal(backend="onnx")
    for value in (0, -1, True, 1.5, "2"):
        assert f"threads: expected a whole number from 1 to 1024 or None, got {value!r}" == refusal(threads=value)
    assert "backend 'engine': expected device 'cpu'" in refusal(backend="engine", device="cuda")
    assert "threads: expected None with backend 'reference'" in refusal(backend="reference", threads=2)
    if not torch.cuda.is_available():
        assert "finds no usable CUDA GPU" in refusal(device="cuda", backend="reference")
    with pytest.raises(BackendError, match="expected device and precision to stay 'auto' with a Recognizer"):
        avser_fast.infer([], model=recognizer, device="cpu")


def test_bad_clips(recognizer: avser_fast.Recognizer) -> None:
    good = np.zeros((2, 3, 1, 224, 24), np.float32)
    for clips in (
        good[0],
        good[:, :0],
        good[..., :23],
        good.astype(np.float64),
        good[:, :, :, :100],
        good.astype(int),
        3,
    ):
        with pytest.raises(
            InputError, match=r"forward: clips: expected float32 of shape \(B, L, 1, 224, 24\) with L >= 1"
        ):
            recognizer.forward(clips)
    for valid in (np.ones((2, 2), bool), np.ones((2, 3)), np.array([[True] * 3, [False] * 3])):
        with pytest.raises(InputError, match=r"forward: valid: expected bool of shape \(2, 3\) with a clip that votes"):
            recognizer.forward(good, valid)


def test_without_the_compiled_module(recognizer: avser_fast.Recognizer) -> None:
    """Nothing else runs instead; the real reason is shown; the reference can be asked for."""
    code = (
        "import sys; sys.modules['avser_fast._engine'] = None\n"
        "import avser_fast\n"
        "try: avser_fast.infer([sys.argv[2]], model=sys.argv[1])\n"
        "except avser_fast.BackendError as error: print(error)\n"
        "print(avser_fast.load(sys.argv[1], backend='reference').infer([sys.argv[2]])[0].backend)"
    )
    command = [sys.executable, "-c", code, str(recognizer.path), str(SPEECH[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "backend 'engine': the compiled module avser_fast._engine cannot be imported (" in done.stdout
    assert done.stdout.rstrip().endswith("\nreference")


def test_without_torch(recognizer: avser_fast.Recognizer) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import avser_fast\n"
        "print(avser_fast.infer([sys.argv[2]], model=sys.argv[1])[0].backend)\n"
        "try: avser_fast.load(sys.argv[1], backend='reference')\n"
        "except avser_fast.BackendError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(recognizer.path), str(SPEECH[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("engine\nbackend 'reference': torch cannot be imported (")


def test_without_soundfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer wavs are still read, to the same samples; everything else says what is missing."""
    wavs = [encoded(subtype=s) for s in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32")]
    wavs.append(encoded(np.stack([PCM, PCM[::-1] // 2], 1), rate=44100))
    expected = [load_item(wav, None, "x") for wav in wavs]
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for wav, with_soundfile in zip(wavs, expected):
        without = load_item(wav, None, "x")
        assert without.rate == with_soundfile.rate and np.array_equal(without.samples, with_soundfile.samples)
    cases: list[tuple[bytes, str]] = [
        (
            encoded(form="FLAC"),
            r"^x: expected a wav, the one format that is read without soundfile, got something else; pip",
        ),
        (
            encoded(FLOATS, subtype="FLOAT"),
            r"^x: expected a wav of integer samples, all that is read without soundfile",
        ),
        (encoded(PCM[:0]), r"^x: expected at least 1 sample, got an audio file without samples"),
        (cut("WAV"), r"^x: expected the \d+ samples its header announces, got \d+: the wav is truncated"),
    ]
    for data, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            load_item(data, None, "x")


Load = Callable[[Any], np.ndarray]


def test_scales_that_are_right() -> None:
    """The same sound in every dtype is the same waveform, up to the dtype's own steps."""

    def samples(item: Any) -> np.ndarray:
        return load_item(item, RATE, "x").samples

    exact = PCM.astype(np.float32)
    assert np.array_equal(samples(PCM), exact)
    assert np.array_equal(samples(PCM.astype(np.int32) * 65536), exact)
    assert np.array_equal(samples(FLOATS), exact)
    assert np.array_equal(samples(FLOATS.astype(np.float64)), exact)
    assert np.array_equal(samples(FLOATS.astype(np.longdouble)), exact)
    assert np.array_equal(samples(PCM.astype(">i2")), exact)
    assert np.array_equal(samples(FLOATS.astype(">f8")), exact)
    assert np.array_equal(samples((PCM // 256).astype(np.int8)), (PCM // 256) * 256)
    assert np.array_equal(samples((PCM // 256 + 128).astype(np.uint8)), (PCM // 256) * 256)
    assert np.abs(samples(FLOATS.astype(np.float16)) - exact).max() <= 16  # 11 bits of mantissa
    assert np.abs(samples(torch.from_numpy(FLOATS).bfloat16()) - exact).max() <= 128  # 8 bits
    assert np.array_equal(samples(torch.from_numpy(FLOATS).requires_grad_()), exact)
    assert np.array_equal(samples(torch.from_numpy(PCM)), exact)
    assert np.array_equal(samples(encoded()), exact)
    assert np.array_equal(samples(encoded(form="FLAC")), exact)
    assert np.array_equal(samples(encoded(subtype="PCM_24")), exact)
    assert np.array_equal(samples(encoded(FLOATS, subtype="DOUBLE")), exact)
    # Full scale and a little more is neither clipped nor refused.
    assert np.array_equal(samples(np.array([-1.0, 1.0, 1.5, -MAX_FLOAT_PEAK])), [-32768, 32768, 49152, -131072])
    assert np.array_equal(samples(np.array([-128, 127], np.int8)), [-32768, 32512])
    assert np.array_equal(samples(np.array([0, 255], np.uint8)), [-32768, 32512])
    assert np.array_equal(samples(np.array([-(2**31)], np.int32)), [-32768])


@pytest.mark.parametrize("channels", range(1, 9))
def test_channels_are_averaged(channels: int) -> None:
    random = np.random.default_rng(channels)
    pcm = random.integers(-32768, 32768, (channels, 700)).astype(np.int16)
    expected = pcm.astype(np.float64).mean(0)
    for item in (
        pcm,
        pcm / 32768,
        torch.from_numpy(pcm),
        np.asfortranarray(pcm),
        np.repeat(pcm, 3, axis=1)[:, ::3],
        torch.from_numpy(np.repeat(pcm, 2, axis=0))[::2],
        pcm[:, ::-1][:, ::-1],
        encoded(pcm.T),
        encoded(pcm.T, form="FLAC"),
    ):
        found = load_item(item, RATE, "x").samples
        assert found.dtype == np.float32 and found.shape == (700,)
        assert np.abs(found - expected).max() <= 0.002
    integers, floats = encoded(pcm.T), encoded(pcm.T / 32768, subtype="FLOAT")
    np.testing.assert_array_equal(load_item(integers, RATE, "x").samples, load_item(floats, RATE, "x").samples)
