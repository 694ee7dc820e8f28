"""What kernels take for themselves while they run, next to their inputs and results: nothing in a trace shows it.

On a CPU the figures are measured (`benchmarks/memory_model.py`); on a GPU they are a part of the GPU's allowance.
"""

from __future__ import annotations

from everydream_kit.preflight.tracker import Scratch


def scratch_of(device_type: str) -> Scratch | None:
    """The table of a kind of device."""
    return None
