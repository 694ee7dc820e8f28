"""Packages of the host that our libraries look for by themselves, and that the kit does not need.

diffusers, transformers, peft and TensorBoard import whatever is installed of a long list: xformers, torchvision, TensorFlow,
hqq. An image of a notebook host carries many of them, built for another torch or another CUDA, and then the import ends a
run that never needed the package; or it costs seconds. A process of our own therefore hides them. In somebody's
kernel the packages are theirs: there only those that cannot be imported are hidden, with a warning.

A package is hidden with `sys.modules[name] = None`: `import` raises ModuleNotFoundError, and `find_spec` finds nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from types import ModuleType

logger = logging.getLogger(__name__)

UNUSED = ("xformers", "hqq", "kernels", "tensorflow", "jax", "flax", "flash_attn", "gptqmodel", "torchao")
"""What our libraries look for and nothing of ours needs; bitsandbytes asks the Hub at each start where `kernels` is there.

Not torchvision: some captioners need it.
"""
IMPORTED_BY_LIBRARIES = ("torchvision", "xformers", "hqq")
"""Those of them that diffusers or transformers import as soon as they are installed."""
_ERRORS = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, SyntaxError)
"""What a package built for other versions raises while it is imported."""


def hide_unused() -> None:
    """Hide what a run does not need, in a process of our own. What is imported already stays."""
    drop_irrelevant_records()
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None is how Python marks a missing module


def hide_broken() -> None:
    """Hide what cannot be imported here, in a process that may be somebody's kernel. A package that works stays."""
    drop_irrelevant_records()
    for name in IMPORTED_BY_LIBRARIES:
        if name in sys.modules or importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except _ERRORS as error:
            sys.modules[name] = None  # type: ignore[assignment]
            logger.warning(
                "%s is installed but cannot be imported (%s: %s). The kit works without it.",
                name,
                type(error).__name__,
                str(error).strip().partition("\n")[0],
            )


def keep_tensorflow_out_of_tensorboard() -> None:
    """Let TensorBoard's writer use its own stub: by default it imports TensorFlow where that is installed, for seconds."""
    name = "tensorboard.compat.notf"
    sys.modules.setdefault(name, ModuleType(name))


def drop_irrelevant_records() -> None:
    """On some CPUs bitsandbytes warns of a kernel for 4-bit layers that it would fetch from the Hub. Nothing uses it."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_relevant)


def _is_relevant(record: logging.LogRecord) -> bool:
    return "from kernels-community" not in record.getMessage()
