"""Registers the compiled implementations of ``torch.ops.avser_fast``; ``avser_fast.ops`` imports it, after torch."""

from typing import Any

def build_info() -> dict[str, Any]:
    """The torch whose headers were used, the oldest torch it runs with (``stable_abi``), CUDA architectures."""

def cpu_isa() -> str:
    """Instruction set of the CPU kernels; see ``avser_fast._engine.cpu_isa``."""
