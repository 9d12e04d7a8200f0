"""One item of a batch becomes a mono waveform: float32 samples at int16 scale, and their rate.

Scales.  Integers are scaled by their dtype (int8 x 256, int16 x 1, int32 / 65536, uint8 is unsigned PCM around 128);
floats in [-1, 1] times 32768.  Up to MAX_CHANNELS channels are averaged.  Nothing is clipped, normalised or trimmed.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from ..config import INT16_SCALE
from ..errors import InputError

#: Floats may pass full scale this far.  Decoders of lossy formats, resamplers and the sum of two full-scale voices stay
#: below 2; 4 leaves them a factor of two, while speech left at int8 or int16 scale peaks at tens to thousands.
MAX_FLOAT_PEAK = 4.0
MAX_CHANNELS = 8
MIN_RATE, MAX_RATE = 4000, 384000

_BLOCK = 1 << 18  # samples per channel read from a file at once
_INTEGER_SCALES = {"int8": 256.0, "uint8": 256.0, "int16": 1.0, "int32": 1.0 / 65536.0}
_FORMATS = "wav, flac, ogg, mp3, ..."
_SAMPLES = "int8, int16, int32, uint8 or float samples"


@dataclass(frozen=True)
class Waveform:
    """samples: (n,) float32 at int16 scale, n >= 1; rate in hertz."""

    samples: np.ndarray
    rate: int

    @property
    def duration_s(self) -> float:
        return len(self.samples) / self.rate


def item_name(index: int, item: Any) -> str:
    """How messages call an item: its place in the batch, counted from 0, and its file name or kind."""
    try:
        if isinstance(item, (str, os.PathLike)):
            shown = repr(os.fsdecode(item))
        elif isinstance(item, (bytes, bytearray, memoryview)):
            shown = f"{memoryview(item).nbytes} bytes"
        elif isinstance(item, Mapping):
            path = item.get("path")
            shown = repr(path) if isinstance(path, str) else "mapping"
        else:
            named = hasattr(item, "read") and isinstance(getattr(item, "name", None), str)
            shown = repr(item.name) if named else type(item).__name__
    except Exception:  # the item's own methods may be what is wrong with it
        shown = type(item).__name__
    return f"item {index} ({shown})"


def load_item(item: Any, sampling_rate: Any, name: str) -> Waveform:
    """The waveform of an item: path, bytes, file object, mapping or array (see ``infer``).

    ``sampling_rate`` is the rate of arrays that bring none; a file says its own.  Raises InputError with one sentence
    that starts with ``name``.
    """
    try:
        return _load_item(item, sampling_rate, name)
    except InputError:
        raise
    except Exception as error:  # whatever an item's own methods or a decoder raise must not end the batch
        raise InputError(f"{name}: could not be read ({type(error).__name__}: {error})") from error


def _load_item(item: Any, sampling_rate: Any, name: str) -> Waveform:
    if isinstance(item, (str, os.PathLike)):
        return _read_path(os.fsdecode(item), name)
    if isinstance(item, (bytes, bytearray)):
        return _read_bytes(bytes(item), name)
    if isinstance(item, memoryview):
        if item.ndim != 1 or item.itemsize != 1:
            raise InputError(
                f"{name}: expected a memoryview of the bytes of a file, got items of format {item.format!r}"
            )
        return _read_bytes(bytes(item), name)
    if isinstance(item, Mapping):
        if "array" not in item:
            keys = ", ".join(map(str, item)) or "none"
            raise InputError(f"{name}: expected the keys 'array' and 'sampling_rate', got {keys}")
        rate = item.get("sampling_rate")
        if rate is None and sampling_rate is None:
            raise InputError(f"{name}: expected the key 'sampling_rate' beside 'array', got none")
        return _from_array(_as_array(item["array"], name), sampling_rate if rate is None else rate, name)
    if hasattr(item, "read"):
        data = item.read()
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise InputError(f"{name}: expected a file opened in binary mode, got {type(data).__name__} from read()")
        return _read_bytes(bytes(data), name)
    array = _as_array(item, name)
    if sampling_rate is None:
        raise InputError(
            f"{name}: expected sampling_rate= for an array, got none; pass infer(..., sampling_rate=16000) or "
            "{'array': ..., 'sampling_rate': ...}"
        )
    return _from_array(array, sampling_rate, name)


# Arrays


def _as_array(value: Any, name: str) -> np.ndarray:
    torch = sys.modules.get("torch")  # a tensor can only come from a torch that is already imported
    if torch is not None and isinstance(value, torch.Tensor):
        if value.is_sparse or value.layout != torch.strided or value.is_meta:
            raise InputError(f"{name}: expected a dense tensor with values, got layout {value.layout}, {value.device}")
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            value = value.float()
        return value.resolve_conj().resolve_neg().numpy()
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise InputError(
            f"{name}: expected an array without masked samples, got {int(np.ma.count_masked(value))} masked"
        )
    if isinstance(value, np.ndarray):
        return np.asarray(value)
    if hasattr(value, "__array__") and not isinstance(value, np.generic):
        return np.asarray(value)
    if isinstance(value, (list, tuple)):
        raise InputError(
            f"{name}: expected a path, bytes, file object, array or mapping, got a {type(value).__name__}; "
            "wrap samples in numpy.array(..., dtype=...), whose dtype says their scale"
        )
    raise InputError(f"{name}: expected a path, bytes, file object, array or mapping, got {type(value).__name__}")


def check_rate(rate: Any, name: str) -> int:
    """A sampling rate as int; InputError unless it is a whole number of hertz from MIN_RATE to MAX_RATE."""
    value: Any = rate
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise InputError(f"{name}: expected sampling_rate to be a whole number of hertz, got {rate!r}")
    if not MIN_RATE <= value <= MAX_RATE:
        raise InputError(f"{name}: expected sampling_rate from {MIN_RATE} to {MAX_RATE} hertz, got {int(value)}")
    return int(value)


def _from_array(array: np.ndarray, sampling_rate: Any, name: str) -> Waveform:
    rate = check_rate(sampling_rate, name)
    shape = tuple(array.shape)
    if array.ndim not in (1, 2):
        raise InputError(f"{name}: expected shape (samples,) or (channels, samples), got {shape}")
    kind = array.dtype.newbyteorder("=").name
    if kind not in _INTEGER_SCALES and array.dtype.kind != "f":
        hint = ""
        if array.dtype.kind in "iu":
            hint = ", whose full scale is not known; cast 16-bit samples with .astype('int16')"
        raise InputError(f"{name}: expected {_SAMPLES}, got {array.dtype}{hint}")
    if array.size == 0:
        raise InputError(f"{name}: expected at least 1 sample, got an empty array of shape {shape}")
    rows = array[None, :] if array.ndim == 1 else array
    if len(rows) > MAX_CHANNELS:
        hint = "; it looks like (samples, channels): pass array.T" if rows.shape[1] <= MAX_CHANNELS else ""
        raise InputError(
            f"{name}: expected (channels, samples) with at most {MAX_CHANNELS} channels, got {shape}{hint}"
        )
    if array.dtype.kind == "f":
        _check_floats(_peak(rows), name)
        scale = INT16_SCALE
    else:
        scale = _INTEGER_SCALES[kind]
    # One channel of these is exact in float32; averages and longer samples are rounded once, at the end.
    exact = len(rows) == 1 and kind in ("int8", "uint8", "int16", "float16", "float32")
    total = rows[0].astype(np.float32 if exact else np.float64)
    for row in rows[1:]:
        total += row
    if len(rows) > 1:
        total /= len(rows)
    if kind == "uint8":
        total -= 128.0
    if scale != 1.0:
        total *= scale
    return Waveform(total.astype(np.float32, copy=False), rate)


def _peak(values: np.ndarray) -> float:
    """Largest magnitude; NaN when there is one."""
    return float(np.maximum(values.max(), -values.min()))


def _check_floats(peak: float, name: str) -> None:
    if np.isnan(peak):
        raise InputError(f"{name}: expected finite samples, got NaN")
    if np.isinf(peak):
        raise InputError(f"{name}: expected finite samples, got infinity")
    if peak > MAX_FLOAT_PEAK:
        raise InputError(
            f"{name}: expected float samples in [-1, 1], got a peak of {peak:g}; divide them by their full scale "
            "(32768 for 16-bit samples) or cast them to int16"
        )


# Files


def _read_path(path: str, name: str) -> Waveform:
    if "\0" in path or not path:
        raise InputError(f"{name}: expected the path of an audio file, got {path!r}")
    try:
        with open(path, "rb") as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return _read_file(file, name)
            return _read_bytes(file.read(), name)  # a pipe or a device: what it gives, it gives once
    except FileNotFoundError:
        raise InputError(f"{name}: expected an audio file, found no such file") from None
    except IsADirectoryError:
        raise InputError(f"{name}: expected an audio file, got a directory") from None
    except PermissionError:
        raise InputError(f"{name}: expected a readable audio file, got one without permission to read it") from None
    except OSError as error:
        raise InputError(f"{name}: expected a readable audio file, got an error ({error.strerror or error})") from error


def _read_bytes(data: bytes, name: str) -> Waveform:
    return _read_file(io.BytesIO(data), name)


def _read_file(file: IO[bytes], name: str) -> Waveform:
    head = file.read(12)
    if not head:
        raise InputError(f"{name}: expected an audio file, got 0 bytes")
    file.seek(0)
    if head[:4] in (b"RIFF", b"RF64", b"RIFX") and head[8:12] == b"WAVE":
        _check_wav(file, name)
        file.seek(0)
    elif head[:4] == b"OggS":
        _check_ogg(file, name)
        file.seek(0)
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the module is there, its library is not
        return _read_wave(file, head, error, name)
    source: Any = file
    if isinstance(file, io.BufferedReader):
        # A descriptor is read by libsndfile itself; a file object is read through Python, one thread at a time.
        source = file.fileno()
        os.lseek(source, 0, os.SEEK_SET)
    try:
        sound = soundfile.SoundFile(source, closefd=False)
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise InputError(
            f"{name}: expected an audio file ({_FORMATS}), got something else ({_reason(error)})"
        ) from error
    try:
        with sound:
            dtype = "int16" if sound.subtype == "PCM_16" else "float32"  # as they are, the same samples in less time
            waveform = _collect(
                lambda: sound.read(_BLOCK, dtype=dtype, always_2d=True),
                sound.frames,
                sound.channels,
                sound.samplerate,
                name,
            )
            # Other formats estimate their length, or have it corrected to what is there.
            if sound.format == "FLAC" and len(waveform.samples) < sound.frames:
                raise InputError(
                    f"{name}: expected the {sound.frames} samples its header announces, got {len(waveform.samples)}: "
                    "the file is truncated or damaged"
                )
            return waveform
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise InputError(
            f"{name}: expected a whole audio file, got a truncated or damaged one ({_reason(error)})"
        ) from error


def _reason(error: Exception) -> str:
    """What libsndfile says, without the representation of the file object that stands before it."""
    return str(error).rpartition(": ")[2].strip().rstrip(".")


def _collect(read: Callable[[], np.ndarray], frames: int, channels: int, sampling_rate: int, name: str) -> Waveform:
    """Join blocks of (frames, channels) until there are ``frames`` or no more, averaging the channels block by block.

    The blocks hold floats in [-1, 1] or int16.
    """
    rate = check_rate(sampling_rate, name)
    if channels > MAX_CHANNELS:
        raise InputError(f"{name}: expected at most {MAX_CHANNELS} channels, got {channels}")
    blocks, peak, got = [], 0.0, 0
    while got < frames and len(block := read()):
        scale = 1.0 if block.dtype == np.int16 else INT16_SCALE
        if block.dtype != np.int16:
            peak = float(np.maximum(peak, _peak(block)))
        if channels == 1:  # exact in float32
            mono = block[:, 0].astype(np.float32)
        else:
            mono = np.zeros(len(block), np.float64)
            for column in block.T:
                mono += column
            mono /= channels
        mono *= scale
        blocks.append(mono.astype(np.float32, copy=False))
        got += len(block)
    if not got:
        raise InputError(f"{name}: expected at least 1 sample, got an audio file without samples")
    _check_floats(peak, name)
    return Waveform(np.concatenate(blocks) if len(blocks) > 1 else blocks[0], rate)


def _check_wav(file: IO[bytes], name: str) -> None:
    """Refuse a wav whose data chunk announces more than the file holds: half an utterance must not be scored as one.

    Sizes of 0 and near the largest value are what programs write that stream into a pipe; such a file ends where it
    ends.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    form = file.read(12)[:4]
    order = ">" if form == b"RIFX" else "<"
    long_size = None
    frame = 0
    while len(header := file.read(8)) == 8:
        chunk, length = header[:4], struct.unpack(order + "I", header[4:])[0]
        if chunk == b"ds64" and length >= 24:
            body = file.read(16)
            if len(body) < 16:
                break
            long_size = struct.unpack("<Q", body[8:16])[0]
            length -= 16
        elif chunk == b"fmt " and length >= 14:
            body = file.read(14)
            if len(body) < 14:
                break
            tag, frame = struct.unpack(order + "H10xH", body)
            frame = frame if tag in (1, 3, 0xFFFE) else 0  # only of PCM is a block one sample of each channel
            length -= 14
        elif chunk == b"data":
            there = size - file.tell()
            if form == b"RF64" and length == 0xFFFFFFFF and long_size is not None:
                length = long_size
            elif length == 0 or length >= 0x7FFFFF00:
                return
            if length > there:
                unit = max(frame, 1)
                what = "samples" if frame else "bytes"
                raise InputError(
                    f"{name}: expected the {length // unit} {what} its header announces, got {there // unit}: "
                    "the wav is truncated"
                )
            return
        file.seek(length + (length & 1), os.SEEK_CUR)
    raise InputError(f"{name}: expected a wav with samples, got one that ends before its data")


def _check_ogg(file: IO[bytes], name: str) -> None:
    """Refuse an ogg without its last page, the one that carries the end-of-stream flag."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 17)))  # a page has at most 65307 bytes
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[27 : 27 + page[26]] if len(page) > 26 else b""
    whole = len(page) > 26 and len(page) >= 27 + page[26] + sum(segments)
    if not whole or not page[5] & 4:
        raise InputError(f"{name}: expected a whole ogg, got one without its last page: the file is truncated")


def _read_wave(file: IO[bytes], head: bytes, cause: Exception, name: str) -> Waveform:
    """PCM wav through the standard library, for installations without soundfile."""
    import wave

    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise InputError(
            f"{name}: expected a wav, the one format that is read without soundfile, got something else; "
            f"pip install soundfile ({cause})"
        ) from cause
    try:
        with wave.open(file) as sound:
            width = sound.getsampwidth()
            channels = sound.getnchannels()
            if width not in (1, 2, 3, 4) or channels < 1:
                raise InputError(
                    f"{name}: expected samples of 8 to 32 bits, got {8 * width} bits in {channels} channels"
                )

            def read() -> np.ndarray:
                raw = sound.readframes(_BLOCK)
                raw = raw[: len(raw) - len(raw) % (width * channels)]
                return _pcm(raw, width).reshape(-1, channels)

            return _collect(read, sound.getnframes(), channels, sound.getframerate(), name)
    except (wave.Error, EOFError) as error:
        raise InputError(
            f"{name}: expected a wav of integer samples, all that is read without soundfile, got another ({error}); "
            "pip install soundfile"
        ) from error


def _pcm(raw: bytes, width: int) -> np.ndarray:
    """Little-endian PCM bytes to float32 in [-1, 1)."""
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float32) - 128.0) / 128.0
    if width == 3:
        padded = np.zeros((len(raw) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return (padded.view("<i4")[:, 0] / 2.0**31).astype(np.float32)
    samples = np.frombuffer(raw, "<i2" if width == 2 else "<i4")
    return (samples / 2.0 ** (8 * width - 1)).astype(np.float32)
