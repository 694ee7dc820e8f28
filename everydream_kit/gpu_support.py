"""Whether the installed torch has code for a GPU.

torch is built for a list of architectures. On a GPU outside that list it still finds the device and allocates memory, and then
the first kernel fails. A P100 (6.0) or V100 (7.0) meets this with builds for CUDA 13, which begin at 7.5.
Architectures: "sm_80" is machine code, which runs on every later minor version of 8; "compute_90" is PTX, which the driver
compiles for every later GPU (CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility").
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LAST_FOR_OLD_GPUS = "https://download.pytorch.org/whl/cu126"
"""Builds for CUDA 12.6 still have code for Pascal (6.x) and Volta (7.0)."""
_OLDEST_OF_CUDA_13 = (7, 5)


def has_code_for(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether a torch that is built for these architectures runs on a GPU of this compute capability.

    Args:
        capability: (major, minor), as `torch.cuda.get_device_capability` gives it.
        architectures: as `torch.cuda.get_arch_list` gives them; an empty list (a build that does not say) counts as yes.
    """
    if not architectures:
        return True
    for architecture in architectures:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture)
        if found is None:
            continue
        version = (int(found[2]), int(found[3]))
        if version <= capability and (found[1] == "compute" or version[0] == capability[0]):
            return True
    return False


def describe_unsupported(
    name: str, capability: tuple[int, int], architectures: Sequence[str], torch_version: str
) -> str:
    """The problem and its fix, or an empty text where this torch runs on this GPU."""
    if has_code_for(capability, architectures):
        return ""
    problem = (
        f"torch {torch_version} has no code for this GPU: {name} has compute capability {capability[0]}.{capability[1]}, and "
        f"torch is built for {', '.join(architectures)}. "
    )
    if capability < _OLDEST_OF_CUDA_13:
        return f"{problem}Install a build for CUDA 12.6: pip install torch --index-url {LAST_FOR_OLD_GPUS}"
    return f"{problem}Install a later torch: pip install --upgrade torch"
