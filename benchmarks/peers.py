"""What users could pick instead, each at its best setting; a peer that cannot be had is listed with the reason."""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from avser_fast.testing import assert_close

from .compare import Contender

Check = Callable[[Any], None]


class Peers:
    """Collects contenders; ``add`` notes why one is missing instead of raising."""

    def __init__(self) -> None:
        self.contenders: list[Contender] = []
        self.missing: dict[str, str] = {}

    def add(self, name: str, build: Callable[[], Callable[[], Any]], check: Check, package: str = "") -> None:
        try:
            run = build()
        except Exception as error:  # whatever keeps a peer from starting is the reason that the table shows
            self.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            return
        self.contenders.append(Contender(name, run, check, f"{package} {version(package)}" if package else ""))


def log_mel_peers(waveform: np.ndarray, expected: np.ndarray, threads: int) -> Peers:
    """40 log-mel bands of an int16 waveform.  Only python_speech_features computes the published values; the others
    have filters of their own, so they must follow the expected energies (correlation above 0.9), not equal them.  Those
    that know no pre-emphasis get a waveform that has it already, which is not timed."""

    def same(result: Any) -> None:
        assert_close(result, expected, 1e-6, "log-mel")

    def alike(result: Any) -> None:
        result = np.asarray(result)
        assert result.shape[1] == expected.shape[1], f"expected {expected.shape[1]} bands, got {result.shape}"
        frames = min(len(result), len(expected))
        assert frames >= len(expected) - 3, f"expected about {len(expected)} frames, got {len(result)}"
        correlation = float(np.corrcoef(result[:frames].ravel(), expected[:frames].ravel())[0, 1])
        assert correlation > 0.9, f"expected energies that follow the reference's, got correlation {correlation:.2f}"

    scaled = waveform.astype(np.float32)
    emphasised = np.append(scaled[:1], scaled[1:] - np.float32(0.97) * scaled[:-1])
    peers = Peers()

    def published() -> Callable[[], Any]:
        from python_speech_features import logfbank

        return lambda: logfbank(waveform, 16000, nfilt=40)

    def torchaudio_mel() -> Callable[[], Any]:
        import torch
        import torchaudio

        torch.set_num_threads(threads)
        transform = torchaudio.transforms.MelSpectrogram(
            16000, n_fft=512, win_length=400, hop_length=160, n_mels=40, center=False, window_fn=torch.ones
        )
        tensor = torch.from_numpy(emphasised)

        def run() -> Any:
            with torch.inference_mode():
                return (transform(tensor) / 512 + 2.2e-16).log().T

        return run

    def torchaudio_kaldi() -> Callable[[], Any]:
        import torch
        import torchaudio

        torch.set_num_threads(threads)
        tensor = torch.from_numpy(scaled)[None]

        def run() -> Any:
            with torch.inference_mode():
                return torchaudio.compliance.kaldi.fbank(
                    tensor, num_mel_bins=40, window_type="rectangular", dither=0.0, remove_dc_offset=False, low_freq=0.0
                )

        return run

    def kaldi_native() -> Callable[[], Any]:
        import kaldi_native_fbank as knf

        options = knf.FbankOptions()
        options.frame_opts.dither = 0.0
        options.frame_opts.window_type = "rectangular"
        options.frame_opts.remove_dc_offset = False
        options.mel_opts.num_bins = 40
        options.mel_opts.low_freq = 0.0

        def run() -> Any:
            bank = knf.OnlineFbank(options)
            bank.accept_waveform(16000, scaled)
            bank.input_finished()
            return np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)])

        return run

    def librosa_mel() -> Callable[[], Any]:
        import librosa

        def run() -> Any:
            mel = librosa.feature.melspectrogram(
                y=emphasised,
                sr=16000,
                n_fft=512,
                win_length=400,
                hop_length=160,
                n_mels=40,
                center=False,
                window="boxcar",
            )
            return np.log(mel / 512 + 2.2e-16).T

        return run

    peers.add("python_speech_features (published)", published, same, "python_speech_features")
    peers.add("torchaudio MelSpectrogram", torchaudio_mel, alike, "torchaudio")
    peers.add("torchaudio kaldi.fbank", torchaudio_kaldi, alike, "torchaudio")
    peers.add("kaldi-native-fbank", kaldi_native, alike, "kaldi-native-fbank")
    peers.add("librosa", librosa_mel, alike, "librosa")
    return peers


def network_peers(module: Any, clips: np.ndarray, expected: np.ndarray, threads: int) -> Peers:
    """The same weights and clips through other runtimes, float32; each must give the reference's probabilities."""
    import torch

    def same(result: Any) -> None:
        assert_close(result, expected, 1e-4, "probabilities")

    tensor = torch.from_numpy(clips)

    def eager(memory_format: Any) -> Callable[[], Callable[[], Any]]:
        def build() -> Callable[[], Any]:
            import copy

            model = copy.deepcopy(module).to(memory_format=memory_format)

            def run() -> Any:
                torch.set_num_threads(threads)
                with torch.inference_mode():
                    return model(tensor).probabilities

            return run

        return build

    def onnx_model() -> bytes:
        buffer = io.BytesIO()
        torch.onnx.export(_Probabilities(module), (tensor,), buffer, input_names=["clips"], dynamo=False)
        return buffer.getvalue()

    def onnxruntime() -> Callable[[], Any]:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        session = ort.InferenceSession(onnx_model(), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"clips": clips})[0]

    def openvino() -> Callable[[], Any]:
        import openvino as ov

        core = ov.Core()
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(io.BytesIO(onnx_model())), "CPU", hints)
        request = compiled.create_infer_request()
        return lambda: next(iter(request.infer({0: clips}).values()))

    peers = Peers()
    peers.add("PyTorch eager", eager(torch.contiguous_format), same, "torch")
    peers.add("PyTorch eager channels-last", eager(torch.channels_last), same, "torch")
    peers.add("ONNX Runtime", onnxruntime, same, "onnxruntime")
    peers.add("OpenVINO", openvino, same, "openvino")
    return peers


def _Probabilities(module: Any) -> Any:
    import torch

    class Probabilities(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, clips: torch.Tensor) -> torch.Tensor:
            return self.module(clips).probabilities

    return Probabilities().eval()
