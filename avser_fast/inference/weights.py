"""Model files: safetensors with one JSON header, read and written without torch and without running code.

The header stands under the metadata key ``avser_fast``: ``format`` (version of this layout), ``kind``, what the kind
needs and ``card`` (licence of the data, protocol, metrics, measured precisions).  The kinds:

* ``mdscm``: ``spec`` is a ``config.ModelSpec`` as a dictionary.  The ranges of precision int8 may stand beside the
  weights as tensors ``calibration.<value>``, (2, channels) float32, lowest and highest; the file is then of format 2.
* ``avre``: ``avre`` is a ``config.AVRE``, ``spec`` what a ``config.EncoderSpec`` needs besides (labels, front end, clip
  rule); a file without it holds an encoder that cannot score speech.  The domain classifier may stand beside it.
* ``fusion``: ``fusion`` is a ``config.Fusion``.
* ``system``, of format 3: ``spec`` is a ``config.SystemSpec``; the tensors of its three networks begin with ``mdscm.``,
  ``avre.`` and ``fusion.``; the domain classifier is left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import AVRE, MDSCM, EncoderSpec, Fusion, ModelSpec, SystemSpec
from ..errors import ConfigError, ModelError
from .whole_files import write_bytes

#: Largest version of the layout that is read.  A file is written in the first one that can say what it holds, so that
#: older versions of this package read all that they can use.
FORMAT = 3
CALIBRATED_FORMAT = 2
SYSTEM_FORMAT = 3
HEADER_KEY = "avser_fast"
KINDS = ("mdscm", "avre", "fusion", "system")
MODELS = Path(__file__).resolve().parent.parent / "models"
#: What the header of a file that scores speech says.
Spec = ModelSpec | EncoderSpec | SystemSpec
#: Before the names of tensors that are ranges.
CALIBRATION = "calibration."
#: Before the names of a system's tensors.
PARTS = ("mdscm.", "avre.", "fusion.")
#: Before the names of an encoder's tensors that inference does not need.
DOMAIN = "domain."
#: Names that mean another name.
ALIASES = {"default": "mdscm-small"}

_SUFFIX = ".safetensors"
_PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".pkl", ".pickle")


def shipped_models() -> list[str]:
    """Names of the models that came with the package."""
    return sorted(p.name[: -len(_SUFFIX)] for p in MODELS.glob("*" + _SUFFIX))


def find_model(name_or_path: str | os.PathLike[str]) -> Path:
    """The file behind a shipped name (``default``, ``mdscm-small``) or a path; ModelError when there is none."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ModelError(f"model: expected a name or a path, got {type(name_or_path).__name__}")
    text = os.fspath(name_or_path)
    if not isinstance(text, str) or "\0" in text or not text:
        raise ModelError(f"model {text!r}: expected a name or a path")
    if isinstance(name_or_path, str):
        name = ALIASES.get(text, text)
        shipped = shipped_models()
        if name in shipped:
            return MODELS / (name + _SUFFIX)
        if not os.path.exists(text) and os.path.basename(text) == text and not os.path.splitext(text)[1]:
            if not shipped:
                raise ModelError(f"model {text!r}: expected a path, because no model came with this copy of avser_fast")
            names = ", ".join([a for a, target in ALIASES.items() if target in shipped] + shipped)
            raise ModelError(f"model {text!r}: expected {names} or a path")
    return Path(text)


def _check_file(path: Path) -> None:
    """Say what stands at ``path`` when it cannot be a safetensors file."""
    where = f"model {str(path)!r}"
    try:
        with open(path, "rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise ModelError(f"{where}: no such file") from None
    except IsADirectoryError:
        raise ModelError(f"{where}: expected a safetensors file, got a directory") from None
    except OSError as error:
        raise ModelError(f"{where}: cannot be read ({error.strerror or error})") from error
    if not head:
        raise ModelError(f"{where}: expected a safetensors file, got an empty file")
    # Pickles of protocol 2 and later start with 0x80 and its number, torch's own files with a zip header.
    pickle = head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5
    if pickle or head[:4] == b"PK\x03\x04" or (path.suffix.lower() in _PICKLE_SUFFIXES and head[8:9] != b"{"):
        raise ModelError(
            f"{where}: expected a safetensors file, got a pickle, which could run code; convert a published checkpoint "
            "with avser_fast.import_av4ser"
        )


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the header; a name that stands twice would mean something else to another reader."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and tensors of a model file of any kind.

    ModelError, one sentence that names the file, for anything that is not a whole file written by ``write_tensors``
    in a format this version knows.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    where = f"model {str(path)!r}"
    _check_file(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            names = file.keys() if HEADER_KEY in metadata else []
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, TypeError, KeyError, ValueError, OSError) as error:
        raise ModelError(f"{where}: is not a whole safetensors file ({error})") from error
    if HEADER_KEY not in metadata:
        raise ModelError(f"{where}: is a safetensors file of another program, without the header {HEADER_KEY!r}")
    try:
        header = json.loads(metadata[HEADER_KEY], object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: the header {HEADER_KEY!r} is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ModelError(f"{where}: the header {HEADER_KEY!r} is not a JSON object")
    version = header.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ModelError(f"{where}: expected the header's format to be 1..{FORMAT}, got {version!r}")
    if version > FORMAT:
        raise ModelError(
            f"{where}: is of format {version}, this version of avser_fast reads up to {FORMAT}; update avser_fast"
        )
    if header.get("kind") not in KINDS:
        raise ModelError(f"{where}: expected the header's kind to be {', '.join(KINDS)}, got {header.get('kind')!r}")
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise ModelError(f"{where}: tensor {name!r} holds NaN or infinity")
    return header, tensors


def write_tensors(path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write a model file of any kind: ``header`` (with ``kind``; ``format`` is set) and arrays or torch tensors.

    The file is written under a temporary name beside ``path`` and renamed, so that ``path`` is either the old file or
    the whole new one.  The same input gives the same bytes.
    """
    from safetensors.numpy import save

    path = Path(path)
    where = f"model {str(path)!r}"
    system = header.get("kind") == "system"
    calibrated = any(map(_is_range, tensors))
    header = {**header, "format": SYSTEM_FORMAT if system else CALIBRATED_FORMAT if calibrated else 1}
    if header.get("kind") not in KINDS:
        raise ModelError(f"{where}: expected header['kind'] to be {', '.join(KINDS)}, got {header.get('kind')!r}")
    arrays: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        array = _as_array(value)
        if array.dtype.kind not in "fiu":
            raise ModelError(f"{where}: tensor {name!r}: expected floats or integers, got {array.dtype}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ModelError(f"{where}: tensor {name!r} holds NaN or infinity")
        # safetensors writes the buffer as it lies in memory, whatever the strides and byte order say.
        arrays[name] = np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True)
    try:
        text = json.dumps(header, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{where}: the header cannot be written as JSON ({error})") from error
    data = save(arrays, metadata={HEADER_KEY: text})
    write_bytes(path, data)


def _as_array(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):  # a torch tensor; bfloat16 has no NumPy dtype
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = value.numpy()
    return np.asarray(value)


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _norm(name: str, width: int) -> Shapes:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{part}", (width,)


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def expected_tensors(network: MDSCM) -> Shapes:
    """Names and shapes of the tensors of one member of the family: the state dict of ``nn.MDSCM`` without counters."""
    widths = (network.in_channels, *network.stem)
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        yield f"body.conv_stem.convs.{i}.weight", (outputs, inputs, 3, 3)
        yield from _norm(f"body.conv_stem.norms.{i}", outputs)
    widths = (network.stem[-1], *network.blocks)
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        block = f"body.blocks.{i}"
        yield f"{block}.depthwise1.weight", (inputs, 1, 3, 3)
        yield f"{block}.pointwise1.weight", (outputs, inputs, 1, 1)
        yield from _norm(f"{block}.norm1", outputs)
        yield f"{block}.depthwise2.weight", (outputs, 1, 3, 3)
        yield f"{block}.pointwise2.weight", (outputs, outputs, 1, 1)
        yield from _norm(f"{block}.norm2", outputs)
        yield f"{block}.shortcut.weight", (outputs, inputs, 1, 1)
        yield f"{block}.shortcut.bias", (outputs,)
        yield from _norm(f"{block}.shortcut_norm", outputs)
    if network.spatial_attention:
        yield "body.attention.spatial.weight", (1, 2, 3, 3)
        yield "body.attention.spatial.bias", (1,)
    if network.channel_attention:
        yield from _linear("body.attention.channel1", network.blocks[-1], network.attention_width)
        yield from _linear("body.attention.channel2", network.attention_width, network.blocks[-1])
    width = network.token_width
    for i in range(network.encoder_layers):
        layer = f"body.encoder.{i}"
        yield from _linear(f"{layer}.qkv", width, 3 * width)
        yield from _linear(f"{layer}.out", width, width)
        yield from _linear(f"{layer}.ff1", width, network.encoder_ff)
        yield from _linear(f"{layer}.ff2", network.encoder_ff, width)
        for part in ("norm1", "norm2"):
            yield f"{layer}.{part}.weight", (width,)
            yield f"{layer}.{part}.bias", (width,)
    if network.statistics:
        yield from _linear("statistics.gate", network.mel_bands, 1)
        yield "statistics.bands.weight", (network.statistics, network.mel_bands)
        yield from _norm("statistics.norm", network.statistics_width)
        yield from _linear("statistics.hidden", network.statistics_width, network.statistics_hidden)
    yield from _linear("head", network.features, network.classes)


def encoder_tensors(encoder: AVRE) -> Shapes:
    """The same of ``nn.AVRE``, without the domain classifier."""
    if encoder.body == "mdscm":
        yield from expected_tensors(encoder.mdscm)
        return
    yield "body.conv.weight", (64, encoder.in_channels, 7, 7)
    yield from _norm("body.norm", 64)
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        block = f"body.blocks.{i}"
        yield f"{block}.conv1.weight", (outputs, inputs, 3, 3)
        yield from _norm(f"{block}.norm1", outputs)
        yield f"{block}.conv2.weight", (outputs, outputs, 3, 3)
        yield from _norm(f"{block}.norm2", outputs)
        if inputs != outputs:
            yield f"{block}.downsample.weight", (outputs, inputs, 1, 1)
            yield from _norm(f"{block}.downsample_norm", outputs)
    yield from _linear("head", encoder.features, encoder.classes)


def domain_tensors(encoder: AVRE) -> Shapes:
    """The same of the domain classifier of ``nn.AVRE``."""
    assert encoder.domain_hidden is not None
    widths = (encoder.features, *encoder.domain_hidden, 1)
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        yield from _linear(f"{DOMAIN}layers.{i}", inputs, outputs)


def fusion_tensors(fusion: Fusion) -> Shapes:
    """The same of ``nn.Fusion``."""
    gates = 4 * fusion.hidden
    for branch, width in (("feature_branch", fusion.features), ("score_branch", fusion.classes)):
        yield f"{branch}.lstm.weight_ih_l0", (gates, width)
        yield f"{branch}.lstm.weight_hh_l0", (gates, fusion.hidden)
        yield f"{branch}.lstm.bias_ih_l0", (gates,)
        yield f"{branch}.lstm.bias_hh_l0", (gates,)
        yield from _linear(f"{branch}.out", fusion.hidden, fusion.classes)


def _spec_tensors(spec: Spec) -> Shapes:
    if isinstance(spec, ModelSpec):
        yield from expected_tensors(spec.network)
    elif isinstance(spec, EncoderSpec):
        yield from encoder_tensors(spec.encoder)
    else:
        shapes = (expected_tensors(spec.network), encoder_tensors(spec.encoder), fusion_tensors(spec.fusion))
        for prefix, part in zip(PARTS, shapes):
            yield from ((prefix + name, shape) for name, shape in part)


def random_tensors(network: MDSCM, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of a member that nobody trained, for tests and benchmarks; activations keep their order of magnitude."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_tensors(network):
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            values = random.uniform(0.5, 1.5, shape)
        else:
            values = random.standard_normal(shape) / math.sqrt(max(1, math.prod(shape[1:])))
        tensors[name] = values.astype(np.float32)
    return tensors


def _check_tensors(where: str, expected: Iterable[tuple[str, tuple[int, ...]]], tensors: Mapping[str, Any]) -> None:
    known = set()
    for name, shape in expected:  # stops at the first that is missing, however long the list
        if name not in tensors:
            raise ModelError(f"{where}: expected a tensor {name!r} of shape {shape}, which is missing")
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != np.float32:
            got = f"{tensor.dtype} {tensor.shape}"
            raise ModelError(f"{where}: tensor {name!r}: expected float32 {shape}, got {got}")
        if name.endswith("running_var") and tensor.min() < 0:
            raise ModelError(f"{where}: tensor {name!r}: expected variances of at least 0, got {tensor.min():g}")
        known.add(name)
    extra = sorted(set(tensors) - known)
    if extra:
        raise ModelError(f"{where}: tensor {extra[0]!r} belongs to no part of the network that the header describes")


def _check_calibration(where: str, calibration: Mapping[str, np.ndarray]) -> None:
    """What can be said without the network's plan; the engine knows which values it needs and how wide they are."""
    for name, ranges in calibration.items():
        what = f"{where}: tensor {CALIBRATION + name!r}"
        if ranges.dtype != np.float32 or ranges.ndim != 2 or len(ranges) != 2 or not ranges.shape[1]:
            raise ModelError(f"{what}: expected float32 (2, channels), got {ranges.dtype} {ranges.shape}")
        if not np.isfinite(ranges).all():
            raise ModelError(f"{what} holds NaN or infinity")
        wrong = np.flatnonzero(ranges[0] > ranges[1])
        if len(wrong):
            low, high = ranges[:, wrong[0]]
            raise ModelError(f"{what}: channel {wrong[0]}: expected low <= high, got {low:g} and {high:g}")


class ModelFile(NamedTuple):
    """What a file of an MDSCM holds, in the order of ``write_model``; ``calibration`` is empty where it has none."""

    spec: ModelSpec
    tensors: dict[str, np.ndarray]
    card: dict[str, Any]
    calibration: dict[str, np.ndarray]


def read_model(name_or_path: str | os.PathLike[str]) -> tuple[ModelSpec, dict[str, np.ndarray], dict[str, Any]]:
    """Specification, float32 tensors and card of an MDSCM, by shipped name or path.

    ModelError, one sentence naming the file, when there is no such model, when it is of another kind or newer, or when
    a tensor is missing, left over, of the wrong shape or not finite.
    """
    return read_model_file(name_or_path)[:3]


def read_model_file(name_or_path: str | os.PathLike[str]) -> ModelFile:
    """``read_model`` with the ranges of precision int8: value -> (2, channels) float32, lowest and highest."""
    spec, *rest = read_any(name_or_path)
    if not isinstance(spec, ModelSpec):
        where = f"model {str(find_model(name_or_path))!r}"
        raise ModelError(f"{where}: expected an MDSCM, got a model of kind {spec.kind!r}; avser_fast.load runs it")
    return ModelFile(spec, *rest)


def read_any(
    name_or_path: str | os.PathLike[str],
) -> tuple[Spec, dict[str, np.ndarray], dict[str, Any], dict[str, np.ndarray]]:
    """Specification, tensors, card and ranges of whatever scores speech: an MDSCM, an audio-visual encoder that knows
    its front end, a system.  Errors as in ``read_model``."""
    path = find_model(name_or_path)
    where = f"model {str(path)!r}"
    header, tensors = read_tensors(path)
    kind = header["kind"]
    described = header.get("spec")
    if kind == "fusion":
        raise ModelError(
            f"{where}: expected an MDSCM, an encoder or a system, which score speech, got a model of kind 'fusion'"
        )
    if kind == "avre":
        if described is None:
            raise ModelError(
                f"{where}: expected an encoder that knows its labels, front end and clip rule, got one without a spec; "
                "write it again with write_avre"
            )
        described = {**described, "encoder": header.get("avre")} if isinstance(described, dict) else described
    card = header.get("card", {})
    if not isinstance(card, dict):
        raise ModelError(f"{where}: expected the header's card to be a JSON object, got {type(card).__name__}")
    try:
        spec: Spec = _SPECS[kind].from_dict(described)  # type: ignore[arg-type]
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{where}: the header's spec is no model of this version ({error})") from error
    calibration = {}
    if isinstance(spec, ModelSpec):
        calibration = {name.removeprefix(CALIBRATION): tensors.pop(name) for name in list(tensors) if _is_range(name)}
        _check_calibration(where, calibration)
    if isinstance(spec, EncoderSpec):
        tensors = _without_domain(where, spec.encoder, tensors)
    _check_tensors(where, _spec_tensors(spec), tensors)
    return spec, tensors, card, calibration


_SPECS: dict[str, type[ModelSpec] | type[EncoderSpec] | type[SystemSpec]] = {
    cls.kind: cls for cls in (ModelSpec, EncoderSpec, SystemSpec)
}


def _without_domain(where: str, encoder: AVRE, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that inference needs; those of the domain classifier are all there and fit, or none is."""
    domain = {name: value for name, value in tensors.items() if name.startswith(DOMAIN)}
    if domain:
        _check_tensors(where, domain_tensors(encoder), domain)
    return {name: value for name, value in tensors.items() if name not in domain}


def _is_range(name: str) -> bool:
    return name.startswith(CALIBRATION)


def write_model(
    path: str | os.PathLike[str],
    spec: ModelSpec,
    tensors: Mapping[str, Any],
    card: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Write an MDSCM: ``tensors`` is the state dict of ``nn.MDSCM(spec.network)``, arrays or torch tensors.

    Floats become float32; batch norm's step counters are left out.  ``calibration``: the ranges that precision int8
    needs.  Raises ModelError for what ``read_model_file`` would refuse; the file appears whole or not at all.
    """
    where = f"model {os.fspath(path)!r}"
    arrays = _float32(tensors)
    _check_tensors(where, _spec_tensors(spec), arrays)
    ranges = {name: np.asarray(value, np.float32) for name, value in (calibration or {}).items()}
    _check_calibration(where, ranges)
    arrays.update({CALIBRATION + name: value for name, value in ranges.items()})
    write_tensors(path, {"kind": "mdscm", "spec": spec.to_dict(), "card": dict(card or {})}, arrays)


def write_avre(
    path: str | os.PathLike[str],
    spec: EncoderSpec,
    tensors: Mapping[str, Any],
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write an audio-visual encoder that scores speech: ``tensors`` is the state dict of ``nn.AVRE(spec.encoder)``,
    with the domain classifier or without.  Otherwise as ``write_model``."""
    where = f"model {os.fspath(path)!r}"
    arrays = _float32(tensors)
    _check_tensors(where, _spec_tensors(spec), _without_domain(where, spec.encoder, arrays))
    described = spec.to_dict()
    header = {"kind": "avre", "avre": described.pop("encoder"), "spec": described, "card": dict(card or {})}
    write_tensors(path, header, arrays)


def write_system(
    path: str | os.PathLike[str],
    spec: SystemSpec,
    mdscm: Mapping[str, Any],
    avre: Mapping[str, Any],
    fusion: Mapping[str, Any],
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a system: the state dicts of ``nn.MDSCM(spec.network)``, ``nn.AVRE(spec.encoder)``, whose domain classifier
    is left out, and ``nn.Fusion(spec.fusion)``.  Otherwise as ``write_model``."""
    where = f"model {os.fspath(path)!r}"
    encoder = _without_domain(where, spec.encoder, _float32(avre))
    states = zip(PARTS, (_float32(mdscm), encoder, _float32(fusion)))
    arrays = {prefix + name: value for prefix, state in states for name, value in state.items()}
    _check_tensors(where, _spec_tensors(spec), arrays)
    write_tensors(path, {"kind": "system", "spec": spec.to_dict(), "card": dict(card or {})}, arrays)


def _float32(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state dict as arrays, without batch norm's step counters."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if name.endswith(".num_batches_tracked"):
            continue
        array = _as_array(value)
        with np.errstate(over="ignore"):  # a weight too large for float32 is named as infinite when it is written
            arrays[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
    return arrays
