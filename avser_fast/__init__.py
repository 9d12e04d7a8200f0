"""Speech emotion recognition with the MDSCM/AVDAL system: fast on CPUs, proven against a reference.

    import avser_fast
    results = avser_fast.infer(["a.wav", "b.flac"])     # one EmotionResult per item

Names are imported when they are first used: ``import avser_fast`` itself loads neither NumPy nor torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import config, errors, nn, ops, reference, testing
    from .av4ser import import_av4ser
    from .errors import AvserError, BackendError, ConfigError, InputError, ModelError
    from .inference.recognizer import Recognizer, infer, load
    from .inference.result import EmotionResult, Segment
    from .inference.weights import read_model, write_avre, write_model, write_system
    from .info import build_info, doctor

__all__ = [
    # speech in, emotions out
    "infer",
    "load",
    "Recognizer",
    "EmotionResult",
    "Segment",
    # model files
    "read_model",
    "write_model",
    "write_avre",
    "write_system",
    "import_av4ser",
    # what was built, what runs
    "build_info",
    "doctor",
    "__version__",
    # errors
    "AvserError",
    "InputError",
    "ModelError",
    "ConfigError",
    "BackendError",
    # the parts, each a module
    "config",
    "errors",
    "nn",
    "ops",
    "reference",
    "testing",
]

#: Where the names live that are not modules themselves.
_HOMES = {
    "inference.recognizer": ("infer", "load", "Recognizer"),
    "inference.result": ("EmotionResult", "Segment"),
    "inference.weights": ("read_model", "write_model", "write_avre", "write_system"),
    "av4ser": ("import_av4ser",),
    "info": ("build_info", "doctor"),
    "errors": ("AvserError", "InputError", "ModelError", "ConfigError", "BackendError"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__version__: str


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    elif name in __all__ and name != "__version__":
        value = import_module(f"{__name__}.{name}")
    elif name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            value = version(__name__)
        except PackageNotFoundError:  # the folder is on the path, but was not installed
            value = "0+not.installed"
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
