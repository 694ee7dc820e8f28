"""In which number format each weight of a model is held.

Components whose weights are trained have one format. The others are frozen, and may be held in half precision: their
linear layers and convolutions, which are all but a few percent of them. Those are what mixed precision rounds to half
precision at every use anyway, so a frozen base gives the same numbers as it does in float32. Norms and embeddings stay
float32: autocast computes with them in float32, and what they give is added up over all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from everydream_kit.models.family import Component

NameToDtype = Callable[[str], torch.dtype]
"""Format of a module's parameter, by its name."""

HALF = (torch.float16, torch.bfloat16)
EXACT = ("vae", "text_conditioner")
"""Folders of components that are float32 and run so: several VAEs overflow in float16, and a text conditioner is small, is
used once for each caption, and has norms that take one format alone."""


@dataclass(frozen=True)
class Formats:
    """The formats of a model. Those of `EXACT` are not in it: they stay float32.

    Attributes:
        trained: of the components that are trained.
        frozen: of the matrices in the other components; None: as the trained ones, norms and embeddings included.
        trained_roles: of the components that are trained, where their family trains them: "denoiser", "text_encoder".
        quantization: of the linear layers in a frozen denoiser's blocks, by name (`quantized.FORMS`), or None.
        text_quantization: the same of text encoders that are never trained.
        keeps_precision: checkpoints hold the frozen components too, so that none may lose anything: one is held in half
            precision only where its file holds it so, and then in the file's own format.
    """

    trained: torch.dtype = torch.float32
    frozen: torch.dtype | None = None
    trained_roles: frozenset[str] = field(default_factory=frozenset)
    keeps_precision: bool = False
    quantization: str | None = None
    text_quantization: str | None = None

    def trains(self, component: Component) -> bool:
        """Whether a component is trained as a whole. No language model is, whatever other families train."""
        return component.role in self.trained_roles and "full" in component.trains

    def of(self, component: Component, module: torch.nn.Module, stored: torch.dtype | None) -> NameToDtype:
        """The format of each parameter of a component.

        Args:
            module: with or without values.
            stored: the widest format of its weights in the file; None: not known.
        """
        if component.folder in EXACT:
            return lambda name: torch.float32
        frozen = self.frozen
        if frozen in HALF and self.keeps_precision:
            frozen = stored if stored in HALF else None
        if frozen is None or self.trains(component):
            return lambda name: self.trained
        matrices = {
            f"{name}.{key}" if name else key
            for name, part in module.named_modules()
            if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d))
            for key in ("weight", "bias")
        }
        return lambda name: frozen if name in matrices else torch.float32
