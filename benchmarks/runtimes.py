"""One network in the runtimes that people deploy it with, at every precision and setting that could be the best."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .peers import Build, Check, Peers

Run = Callable[[], np.ndarray]


class Deployed:
    """A folded network ((N, channels, frames, bands) clips -> (N, classes) logits) and what was made of it so far.

    ``calibration``: the batches of clips that int8 is calibrated on.
    """

    def __init__(self, folded: nn.Module, calibration: list[np.ndarray]):
        self.folded = folded.eval().requires_grad_(False)
        self.calibration = calibration
        self._made: dict[tuple[Any, ...], Any] = {}

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def onnx(self, count: int) -> bytes:
        """For exactly ``count`` clips."""

        def make() -> bytes:
            clips = torch.zeros(count, *self.calibration[0].shape[1:])
            buffer = io.BytesIO()
            torch.onnx.export(
                self.folded, (clips,), buffer, input_names=["clips"], output_names=["logits"], dynamo=False
            )
            return buffer.getvalue()

        return self._once(("onnx", count), make)

    def onnx_int8(self, count: int) -> bytes:
        """Static, one scale per output channel, in the form that ONNX Runtime advises."""

        def make() -> bytes:
            from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
            from onnxruntime.quantization.shape_inference import quant_pre_process

            class Reader(CalibrationDataReader):  # type: ignore[misc]
                def __init__(self, batches: Iterator[np.ndarray]):
                    self.batches = batches

                def get_next(self) -> dict[str, np.ndarray] | None:
                    clips = next(self.batches, None)
                    return None if clips is None else {"clips": clips}

            everything = np.concatenate(self.calibration)
            batches = (np.resize(everything[i:], (count, *everything.shape[1:])) for i in range(0, 40, 5))
            with tempfile.TemporaryDirectory() as folder:
                plain, ready, done = (str(Path(folder) / f"{n}.onnx") for n in ("plain", "ready", "done"))
                Path(plain).write_bytes(self.onnx(count))
                quant_pre_process(plain, ready, skip_symbolic_shape=True)
                quantize_static(
                    ready,
                    done,
                    Reader(batches),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
                return Path(done).read_bytes()

        return self._once(("onnx int8", count), make)

    def openvino(self, kind: str, count: int) -> Any:
        """The model, ``kind`` one of float32, int8, 'int8 transformer'."""
        import openvino as ov

        def read(clips: int) -> Any:
            return ov.Core().read_model(io.BytesIO(self.onnx(clips)))

        def quantize() -> Any:
            import logging

            import nncf

            nncf.set_log_level(logging.ERROR)
            options: dict[str, Any] = {}
            if kind == "int8 transformer":
                # Smoothing spoils this network: its error is ten times that of plain int8.
                smooth = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
                options = {
                    "model_type": nncf.ModelType.TRANSFORMER,
                    "advanced_parameters": nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth),
                }
            data = nncf.Dataset(self.calibration, lambda clips: {"clips": clips})
            clips = len(self.calibration[0])
            return nncf.quantize(read(clips), data, subset_size=len(self.calibration), **options)

        if kind == "float32":
            return self._once(("openvino", kind, count), lambda: read(count))
        model = self._once(("openvino", kind), quantize).clone()
        model.reshape({0: [count, *self.calibration[0].shape[1:]]})
        return model


def _chunked(call: Callable[[np.ndarray], np.ndarray], clips: np.ndarray, count: int) -> Run:
    if count == len(clips):
        return lambda: call(clips)
    parts = [clips[i : i + count] for i in range(0, len(clips), count)]
    return lambda: np.concatenate([call(part) for part in parts])


def _counts(clips: np.ndarray) -> list[int]:
    """Clips per call: all of them, or parts whose activations stay in the caches."""
    return [n for n in (len(clips), 20, 5) if n <= len(clips) and len(clips) % n == 0]


def _openvino(network: Deployed, kind: str, hint: str, clips: np.ndarray, count: int, threads: int) -> Build:
    def build() -> Run:
        import openvino as ov

        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": hint,
        }
        request = ov.Core().compile_model(network.openvino(kind, count), "CPU", options).create_infer_request()

        def call(part: np.ndarray) -> np.ndarray:
            # What comes back is the request's own memory: kept beyond the next call it must be copied.
            result = next(iter(request.infer({0: part}, share_inputs=True, share_outputs=True).values()))
            return result if count == len(clips) else result.copy()

        return _chunked(call, clips, count)

    return build


def _openvino_streams(network: Deployed, kind: str, hint: str, clips: np.ndarray, count: int, threads: int) -> Build:
    """One stream per thread, parts of the batch in flight together."""

    def build() -> Run:
        import openvino as ov

        options = {
            "PERFORMANCE_HINT": "THROUGHPUT",
            "NUM_STREAMS": threads,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": hint,
        }
        queue = ov.AsyncInferQueue(ov.Core().compile_model(network.openvino(kind, count), "CPU", options), threads)
        result = np.empty((len(clips), 0), np.float32)

        def store(request: Any, begin: int) -> None:
            nonlocal result
            values = request.get_output_tensor(0).data
            if result.shape[1] != values.shape[1]:
                result = np.empty((len(clips), values.shape[1]), np.float32)
            result[begin : begin + count] = values

        queue.set_callback(store)

        def run() -> np.ndarray:
            for begin in range(0, len(clips), count):
                queue.start_async({0: clips[begin : begin + count]}, begin, share_inputs=True)
            queue.wait_all()
            return result

        run_once = run()  # the first call makes room for the results
        assert len(run_once) == len(clips)
        return run

    return build


def openvino_settings(network: Deployed, precision: str, clips: np.ndarray, threads: int) -> dict[str, Build]:
    if precision == "int8":
        kinds = [("int8", "f32"), ("int8", "bf16"), ("int8 transformer", "bf16")]
    else:
        kinds = [("float32", {"float32": "f32", "bf16": "bf16"}[precision])]
    settings: dict[str, Build] = {}
    for kind, hint in kinds:
        name = f"{kind}, rest {hint}" if precision == "int8" else "whole batch"
        for count in _counts(clips):
            part = name if count == len(clips) else f"{name}, {count} clips per call"
            settings[part] = _openvino(network, kind, hint, clips, count, threads)
        if threads > 1 and len(clips) > 20:
            settings[f"{name}, {threads} streams of 10 clips"] = _openvino_streams(
                network, kind, hint, clips, 10, threads
            )
    return settings


def onnxruntime_settings(network: Deployed, precision: str, clips: np.ndarray, threads: int) -> dict[str, Build]:
    def setting(count: int) -> Build:
        def build() -> Run:
            import onnxruntime as ort

            options = ort.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            data = network.onnx_int8(count) if precision == "int8" else network.onnx(count)
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
            return _chunked(lambda part: session.run(None, {"clips": part})[0], clips, count)

        return build

    return {
        "whole batch" if count == len(clips) else f"{count} clips per call": setting(count)
        for count in _counts(clips)
        if precision != "int8" or count <= 20  # calibrating a large batch takes long and wins nothing
    }


def eager_settings(network: Deployed, precision: str, clips: np.ndarray, threads: int) -> dict[str, Build]:
    tensor = torch.from_numpy(clips)

    def setting(memory_format: Any, cast: bool, autocast: bool) -> Build:
        def build() -> Run:
            import copy

            model = copy.deepcopy(network.folded).to(memory_format=memory_format)
            if cast:
                model = model.bfloat16()

            def run() -> np.ndarray:
                torch.set_num_threads(threads)
                with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    return model(tensor.bfloat16() if cast else tensor).float().numpy()

            return run

        return build

    if precision == "float32":
        return {
            "channels-last": setting(torch.channels_last, False, False),
            "contiguous": setting(torch.contiguous_format, False, False),
        }
    return {
        "weights in bf16, channels-last": setting(torch.channels_last, True, False),
        "autocast, channels-last": setting(torch.channels_last, False, True),
    }


def compiled_settings(network: Deployed, precision: str, clips: np.ndarray, threads: int) -> dict[str, Build]:
    tensor = torch.from_numpy(clips)

    def build() -> Run:
        import copy

        import torch._inductor.config as inductor

        torch.set_num_threads(threads)
        torch._dynamo.reset()
        model = copy.deepcopy(network.folded).to(memory_format=torch.channels_last)
        compiled = torch.compile(model)

        def run() -> np.ndarray:
            torch.set_num_threads(threads)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return compiled(tensor).float().numpy()

        with inductor.patch(freezing=True):
            run()
        return run

    return {"inductor, freezing, channels-last": build}


def network_peers(
    network: Deployed, precision: str, clips: np.ndarray, check: Check, threads: int, which: str = "default"
) -> Peers:
    """``check`` gets the clip logits.  ``which``: 'default', or 'all' with the peers that take long to start."""
    case = (network, precision, clips, threads)
    peers = Peers()
    package = "openvino+nncf" if precision == "int8" else "openvino"
    peers.best("OpenVINO", openvino_settings(*case), check, package)
    if precision == "bf16":
        peers.missing["ONNX Runtime"] = "its CPU provider has no bf16"
    else:
        peers.best("ONNX Runtime", onnxruntime_settings(*case), check, "onnxruntime")
    if precision == "int8":
        peers.missing["PyTorch eager"] = "no int8 convolution without a further package"
        return peers
    peers.best("PyTorch eager", eager_settings(*case), check, "torch")
    if which == "all":
        peers.best("PyTorch compiled", compiled_settings(*case), check, "torch")
    else:
        peers.missing["PyTorch compiled"] = "takes long to start, measured with --peers all"
    return peers
