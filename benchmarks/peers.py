"""What users could pick instead, each at its best setting; a peer that cannot be had is listed with the reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

from avser_fast.testing import assert_close

from .compare import Contender, settle

Check = Callable[[Any], None]
Build = Callable[[], Callable[[], Any]]

#: Before the fastest setting of a peer is chosen, all are timed in turns, for about this long in each.
TRIAL_ROUNDS, TRIAL_S = 3, 0.1


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


class Peers:
    """Collects contenders; ``add`` and ``best`` note why one is missing instead of raising."""

    def __init__(self) -> None:
        self.contenders: list[Contender] = []
        self.missing: dict[str, str] = {}

    def add(self, name: str, build: Build, check: Check, package: str = "") -> None:
        """A peer with one setting: a wrong result is left for ``compare`` to find."""
        try:
            run = build()
        except Exception as error:  # whatever keeps a peer from starting is the reason that the table shows
            self.missing[name] = reason(error)
            return
        self.contenders.append(Contender(name, run, check, versions(package)))

    def best(self, name: str, settings: dict[str, Build], check: Check, package: str = "") -> None:
        """The fastest of a peer's settings, of those whose result passes the check."""
        tried: dict[str, str] = {}
        runs: dict[str, Callable[[], Any]] = {}
        for setting, build in settings.items():
            try:
                run = build()
                check(run())
            except Exception as error:
                tried[setting] = f"refused: {error}" if isinstance(error, AssertionError) else reason(error)
            else:
                runs[setting] = run
        if not runs:
            self.missing[name] = next(iter(tried.values()), "no setting for this case")
            return
        took = dict.fromkeys(runs, float("inf"))
        for _ in range(TRIAL_ROUNDS if len(runs) > 1 else 1):
            for setting, run in runs.items():
                settle()
                took[setting] = min(took[setting], trial(run))
        tried |= {setting: f"{1e3 * seconds:.3f} ms" for setting, seconds in took.items()}
        best = min(took, key=lambda setting: took[setting])
        self.contenders.append(Contender(name, runs[best], check, versions(package), best, tried))


def trial(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few calls."""
    best, calls, begin = float("inf"), 0, time.perf_counter()
    while calls < 2 or (calls < 20 and time.perf_counter() - begin < TRIAL_S):
        start = time.perf_counter()
        run()
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def versions(package: str) -> str:
    """'torch 2.14.1' or 'openvino 2026.4.1 + nncf 3.4.0' from the names of distributions."""
    return " + ".join(f"{name} {version(name)}" for name in package.split("+") if name)


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
