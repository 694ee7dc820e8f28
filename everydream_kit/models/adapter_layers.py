"""Optional packages of the host that peft looks for by itself, and must not stumble over.

Images of notebook hosts carry packages that nothing of ours asks for: torchao, gptqmodel, hqq, bitsandbytes. For each layer,
peft asks whether it belongs to one of them, and what it meets there ends the run: peft 0.18.1 and newer raise ImportError for a
torchao older than 0.16 (Colab has 0.10), peft 0.18 fails with torchao 0.18, and bitsandbytes may lack its library for the
installed CUDA. The models here consist of torch's own layers while adapters are added, so none of the answers is needed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from everydream_kit.errors import ModelError

_QUESTION = re.compile(r"is_(\w+)_available")
_NO_LAYERS = {"xpu", "torch_tpu", "diffusers", "transformers"}
"""What peft asks about that is not a package of quantized layers."""


def import_peft() -> ModuleType:
    """Import peft.

    Raises:
        ModelError: peft, or a package that it imports on this host, is broken; the message names the cause.
    """
    try:
        import peft
        import peft.tuners.lora
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # what broken native packages raise
        raise ModelError(
            f"LoRA needs peft, which cannot be imported on this machine ({type(error).__name__}: {error}). "
            'Install a version that fits the other packages: pip install --upgrade peft. "everydream doctor" lists them.'
        ) from error
    return peft


@contextmanager
def torch_layers_only() -> Iterator[None]:
    """While this holds, peft treats every layer as torch's own and asks no optional package of the host."""
    import_peft()
    replaced: list[tuple[ModuleType, str, Any]] = []
    for name, module in list(sys.modules.items()):
        if not name.startswith("peft.tuners"):
            continue
        for attribute, question in list(vars(module).items()):
            found = _QUESTION.fullmatch(attribute)
            if found and found[1] not in _NO_LAYERS and callable(question):
                replaced.append((module, attribute, question))
                setattr(module, attribute, _not_available)
    try:
        yield
    finally:
        for module, attribute, question in replaced:
            setattr(module, attribute, question)


def _not_available(*_: Any, **__: Any) -> bool:
    return False
