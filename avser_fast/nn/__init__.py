"""torch modules of the system; their parameters' names are what model files hold."""

from __future__ import annotations

from .avre import AVRE, AVREOutput
from .fusion import Fusion, FusionOutput
from .gradient_reversal import DomainHead, GradientReversal
from .mdscm import MDSCM, ClipOutput

__all__ = ["AVRE", "AVREOutput", "ClipOutput", "DomainHead", "Fusion", "FusionOutput", "GradientReversal", "MDSCM"]
