"""Reader of the published checkpoints: ``MDSCM.pth``, ``AVDAL.pth``, ``Domain_MDSCM.pth``, ``FF.pth``.

They are plain state dicts.  Files are read with ``torch.load(weights_only=True)``, which runs no code from the file;
dicts of arrays are taken as they are.  What a checkpoint is, follows from its keys; its configuration follows from
its shapes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config
from .errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from .inference.weights import Spec


def _block(m: re.Match[str]) -> str:
    """Two blocks per ResNet layer, numbered through."""
    return f"body.blocks.{2 * int(m[1]) - 2 + int(m[2])}"


_BODY = [
    (r"conv([12])\.0\.weight", lambda m: f"body.conv_stem.convs.{int(m[1]) - 1}.weight"),
    (r"conv([12])\.1\.(\w+)", lambda m: f"body.conv_stem.norms.{int(m[1]) - 1}.{m[2]}"),
    (r"conv3_residual\.([03])\.(\w+wise)\.weight", lambda m: f"body.blocks.0.{m[2]}{1 + int(m[1]) // 3}.weight"),
    (r"conv3_residual\.([14])\.(\w+)", lambda m: f"body.blocks.0.norm{1 + int(m[1]) // 3}.{m[2]}"),
    (r"conv4_residual\.([14])\.(\w+wise)\.weight", lambda m: f"body.blocks.1.{m[2]}{1 + int(m[1]) // 4}.weight"),
    (r"conv4_residual\.([25])\.(\w+)", lambda m: f"body.blocks.1.norm{1 + int(m[1]) // 4}.{m[2]}"),
    (r"conv([34])_shortcut\.0\.(\w+)", lambda m: f"body.blocks.{int(m[1]) - 3}.shortcut.{m[2]}"),
    (r"conv([34])_shortcut\.1\.(\w+)", lambda m: f"body.blocks.{int(m[1]) - 3}.shortcut_norm.{m[2]}"),
    (r"s_attention\.conv\.(\w+)", lambda m: f"body.attention.spatial.{m[1]}"),
    (r"c_attention\.bottleneck\.([02])\.(\w+)", lambda m: f"body.attention.channel{1 + int(m[1]) // 2}.{m[2]}"),
    (r"transf_encoder\.layers\.(\d+)\.self_attn\.in_proj_(\w+)", lambda m: f"body.encoder.{m[1]}.qkv.{m[2]}"),
    (r"transf_encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", lambda m: f"body.encoder.{m[1]}.out.{m[2]}"),
    (r"transf_encoder\.layers\.(\d+)\.linear([12])\.(\w+)", lambda m: f"body.encoder.{m[1]}.ff{m[2]}.{m[3]}"),
    (r"transf_encoder\.layers\.(\d+)\.norm([12])\.(\w+)", lambda m: f"body.encoder.{m[1]}.norm{m[2]}.{m[3]}"),
    (r"classifier\.(\w+)", lambda m: f"head.{m[1]}"),
]  # fmt: skip
_DOMAIN = [(r"domainFC\.([135])\.(\w+)", lambda m: f"domain.layers.{int(m[1]) // 2}.{m[2]}")]
_RESNET = [
    (r"conv1_\.weight", lambda m: "body.conv.weight"),
    (r"bn1\.(\w+)", lambda m: f"body.norm.{m[1]}"),
    (r"layer(\d)\.(\d)\.conv(\d)\.weight", lambda m: f"{_block(m)}.conv{m[3]}.weight"),
    (r"layer(\d)\.(\d)\.bn(\d)\.(\w+)", lambda m: f"{_block(m)}.norm{m[3]}.{m[4]}"),
    (r"layer(\d)\.(\d)\.downsample\.0\.weight", lambda m: f"{_block(m)}.downsample.weight"),
    (r"layer(\d)\.(\d)\.downsample\.1\.(\w+)", lambda m: f"{_block(m)}.downsample_norm.{m[3]}"),
    (r"fc\.(\w+)", lambda m: f"head.{m[1]}"),
]  # fmt: skip
_FUSION = [
    (r"lstm([12])\.lstm\.(\w+)", lambda m: f"{('feature', 'score')[int(m[1]) - 1]}_branch.lstm.{m[2]}"),
    (r"lstm([12])\.fc\.(\w+)", lambda m: f"{('feature', 'score')[int(m[1]) - 1]}_branch.out.{m[2]}"),
]  # fmt: skip
_Rule = tuple[str, Callable[[Any], str]]
_RULES: dict[str, list[_Rule]] = {
    "mdscm": _BODY,
    "avre-mdscm": _BODY + _DOMAIN,
    "avre-resnet18": _RESNET + _DOMAIN,
    "fusion": _FUSION,
}


def checkpoint_kind(state: Mapping[str, Any], what: str = "checkpoint") -> str:
    """``mdscm``, ``avre-mdscm``, ``avre-resnet18`` or ``fusion``, judged by the keys; ModelError if by none."""
    if "lstm1.lstm.weight_ih_l0" in state:
        return "fusion"
    if "conv1_.weight" in state:
        return "avre-resnet18"
    if "conv1.0.weight" in state:
        return "avre-mdscm" if any(key.startswith("domainFC.") for key in state) else "mdscm"
    shown = ", ".join(list(state)[:3]) or "no keys"
    raise ModelError(f"{what}: expected the keys of MDSCM.pth, AVDAL.pth, Domain_MDSCM.pth or FF.pth, got {shown}")


def _mel_bands(token_width: int, channels: int, what: str) -> int:
    # The width of a token says how many mel rows were left, not how many there were: of the counts that leave as many
    # rows, the published one is taken (3, 5 and 8 rows: 40, 80, 128 bands), else the largest.
    if channels < 1 or token_width % channels:
        raise ModelError(f"{what}: expected a classifier width that is a multiple of {channels}, got {token_width}")
    rows = token_width // channels
    return {3: 40, 5: 80, 8: 128}.get(rows, 16 * rows)


def _network(state: Mapping[str, Tensor], what: str, heads: int, mel_bands: int | None) -> config.MDSCM:
    layers = len({key.split(".")[2] for key in state if key.startswith("transf_encoder.layers.")})
    channels = state["conv4_residual.4.pointwise.weight"].shape[0]
    width = state["classifier.weight"].shape[1]
    return config.MDSCM(
        mel_bands=mel_bands or _mel_bands(width, channels, what),
        in_channels=state["conv1.0.weight"].shape[1],
        classes=state["classifier.weight"].shape[0],
        stem=(state["conv1.0.weight"].shape[0], state["conv2.0.weight"].shape[0]),
        blocks=(state["conv3_residual.3.pointwise.weight"].shape[0], channels),
        spatial_attention="s_attention.conv.weight" in state,
        channel_attention="c_attention.bottleneck.0.weight" in state,
        attention_reduction=(
            channels // state["c_attention.bottleneck.0.weight"].shape[0]
            if "c_attention.bottleneck.0.weight" in state
            else 16
        ),
        encoder_layers=layers,
        encoder_heads=heads,
        encoder_ff=state["transf_encoder.layers.0.linear1.weight"].shape[0] if layers else 512,
    )


def _domain_hidden(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    return (state["domainFC.1.weight"].shape[0], state["domainFC.3.weight"].shape[0])


def _read(source: Any, what: str) -> dict[str, Tensor]:
    import torch

    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise ModelError(
                f"{what} ({path}): expected a .pth file, got {'a directory' if path.is_dir() else 'nothing'}"
            )
        try:
            source = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the loader raises many kinds, all of which mean the same here
            raise ModelError(
                f"{what} ({path}): expected a state dict that can be read without running code, got {error}"
            ) from error
        what = f"{what} ({path})"
    if isinstance(source, Mapping) and isinstance(source.get("state_dict"), Mapping):
        source = source["state_dict"]
    if not isinstance(source, Mapping):
        raise ModelError(f"{what}: expected a path or a dict of arrays, got {type(source).__name__}")
    state: dict[str, Tensor] = {}
    for key, value in source.items():
        try:
            state[str(key).removeprefix("module.")] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelError(f"{what}: {key}: expected an array, got {type(value).__name__}") from error
    return state


def _rename(state: Mapping[str, Tensor], kind: str, what: str) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, name in _RULES[kind]:
            match = re.fullmatch(pattern, key)
            if match:
                renamed[name(match)] = value
                break
        else:
            raise ModelError(f"{what}: {key}: expected a key of a published {kind} checkpoint")
    return renamed


def load_av4ser(
    source: Any, what: str = "checkpoint", *, heads: int = 4, mel_bands: int | None = None
) -> tuple[str, nn.Module]:
    """(kind, module in eval mode) of a published checkpoint: a path to a ``.pth`` or a dict of arrays.

    The floating dtype of the arrays is kept.  ``heads`` is the one fact that no shape tells (4 as published);
    ``mel_bands`` is told only up to rounding (40, 80, 128 are recognised).  Raises ModelError naming the key that does
    not fit.
    """
    import torch

    from . import nn

    state = _read(source, what)
    kind = checkpoint_kind(state, what)
    renamed = _rename(state, kind, what)
    module: torch.nn.Module
    try:
        if kind == "mdscm":
            module = nn.MDSCM(_network(state, what, heads, mel_bands))
        elif kind == "avre-mdscm":
            network = _network(state, what, heads, mel_bands)
            module = nn.AVRE(config.AVRE("mdscm", network.in_channels, network.classes, _domain_hidden(state), network))
        elif kind == "avre-resnet18":
            module = nn.AVRE(
                config.AVRE(
                    "resnet18",
                    in_channels=state["conv1_.weight"].shape[1],
                    classes=state["fc.weight"].shape[0],
                    domain_hidden=_domain_hidden(state),
                )
            )
        else:
            module = nn.Fusion(
                config.Fusion(
                    features=state["lstm1.lstm.weight_ih_l0"].shape[1],
                    classes=state["lstm1.fc.weight"].shape[0],
                    hidden=state["lstm1.lstm.weight_hh_l0"].shape[1],
                )
            )
    except KeyError as error:
        raise ModelError(f"{what}: expected the key {error.args[0]} of a published {kind} checkpoint") from error
    dtypes = {value.dtype for value in renamed.values() if value.is_floating_point()}
    module.to(dtypes.pop() if len(dtypes) == 1 else torch.float32)
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            renamed.setdefault(name, tensor)
        elif name not in renamed:
            raise ModelError(f"{what}: expected an array for {name} of a published {kind} checkpoint, which is missing")
        elif renamed[name].shape != tensor.shape:
            got, want = tuple(renamed[name].shape), tuple(tensor.shape)
            raise ModelError(f"{what}: {name}: expected shape {want}, got {got}")
    module.load_state_dict(renamed)
    return kind, module.eval()


def import_av4ser(
    *,
    mdscm: Any = None,
    avdal: Any = None,
    fusion: Any = None,
    out: str | os.PathLike[str],
    labels: tuple[str, ...] = ("ang", "hap", "neu", "sad"),
    heads: int = 4,
    mel_bands: int | None = None,
) -> dict[str, Path]:
    """Convert published checkpoints into model files; no code of theirs runs.

    mdscm: ``MDSCM.pth``; avdal: ``AVDAL.pth`` (ResNet-18) or ``Domain_MDSCM.pth`` (MDSCM body); fusion: ``FF.pth``;
    each a path or a dict of arrays.  ``out`` is the file to write when one checkpoint is given, else a folder that
    receives ``mdscm.safetensors``, ``avdal.safetensors``, ``fusion.safetensors`` and, where all three are given,
    ``system.safetensors``, the three in one.  Returns the written paths by argument name, the last as ``system``.

    What scores speech (``avser_fast.load``) carries the published front end and clip rule; ``labels`` are the names of
    the classes.  An encoder of ResNet-18, which takes any number of bands, gets ``mel_bands``, else those of the MDSCM
    beside it, else 40.  Raises ModelError, one sentence naming the argument, for anything that is not the checkpoint it
    should be, ConfigError for labels or networks that do not fit; nothing is written then.
    """
    import dataclasses

    from .inference.weights import write_avre, write_model, write_system, write_tensors

    given = {
        name: source for name, source in (("mdscm", mdscm), ("avdal", avdal), ("fusion", fusion)) if source is not None
    }
    if not given:
        raise ModelError("import_av4ser: expected at least one of mdscm=, avdal=, fusion=")
    kinds = {"mdscm": ("mdscm",), "avdal": ("avre-resnet18", "avre-mdscm"), "fusion": ("fusion",)}
    loaded = {}
    for name, source in given.items():
        kind, module = load_av4ser(source, f"{name}=", heads=heads, mel_bands=mel_bands)
        if kind not in kinds[name]:
            raise ModelError(f"{name}=: expected a checkpoint of kind {' or '.join(kinds[name])}, got {kind}")
        loaded[name] = module
    # Every specification is made before anything is written, because it is what can be refused.
    clip_rule = config.ClipRule()
    specs: dict[str, Spec] = {}
    if "mdscm" in loaded:
        network: config.MDSCM = loaded["mdscm"].network  # type: ignore[assignment]
        speech_end = config.FrontEnd(mel_bands=network.mel_bands, channels=network.in_channels)
        specs["mdscm"] = config.ModelSpec(tuple(labels), speech_end, clip_rule, network)
    if "avdal" in loaded:
        encoder: config.AVRE = loaded["avdal"].encoder  # type: ignore[assignment]
        bands = encoder.mdscm.mel_bands if encoder.body == "mdscm" else mel_bands
        bands = bands or (network.mel_bands if "mdscm" in loaded else 40)
        front_end = config.FrontEnd(mel_bands=bands, channels=encoder.in_channels)
        specs["avdal"] = config.EncoderSpec(tuple(labels), front_end, clip_rule, encoder)
    if len(loaded) == 3:
        settings: config.Fusion = loaded["fusion"].fusion  # type: ignore[assignment]
        specs["system"] = config.SystemSpec(tuple(labels), speech_end, clip_rule, network, encoder, settings)
    states = {
        name: {
            key: value.float() if value.is_floating_point() else value
            for key, value in module.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
        for name, module in loaded.items()
    }
    target = Path(out)
    several = len(loaded) > 1
    if several:
        target.mkdir(parents=True, exist_ok=True)
    card = {"source": "converted from a published AV4SER checkpoint", "metrics": None}
    written = {name: target / f"{name}.safetensors" if several else target for name in (*loaded, *specs)}
    for name, path in written.items():
        spec = specs.get(name)
        if isinstance(spec, config.ModelSpec):
            write_model(path, spec, states[name], card)
        elif isinstance(spec, config.EncoderSpec):
            write_avre(path, spec, states[name], card)
        elif isinstance(spec, config.SystemSpec):
            all_three = {**card, "source": "converted from published AV4SER checkpoints: " + ", ".join(spec.networks)}
            write_system(path, spec, states["mdscm"], states["avdal"], states["fusion"], all_three)
        else:
            described = dataclasses.asdict(loaded[name].fusion)  # type: ignore[call-overload]
            write_tensors(path, {"kind": "fusion", "fusion": described, "card": card}, states[name])
    return written
