"""What a LoRA file does to one weight, for every kind of layer, and its arithmetic.

LoRA and LoCon (arXiv 2106.09685; a Tucker core `mid` between the two, LyCORIS 2309.14859), LoHa (a product of two
LoRAs, 2108.06098), LoKr (a Kronecker product), whole differences, and DoRA's lengths on either axis (2402.09353).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from everydream_kit.errors import ModelError
from everydream_kit.models.family import ModelFiles
from everydream_kit.models.lora.forms import FORMS
from everydream_kit.models.lora.injection import FactorLayer, Layer, LoraLayer
from everydream_kit.models.tensors import LazyTensor, Tensors


@dataclass(frozen=True)
class Change:
    """A change of one weight.

    Attributes:
        kind: "LoRA", "LoHa", "LoKr" or "difference".
        parts: its tensors, by the names in `layer_names.PARTS`.
        scale: of the change: alpha / rank.
        alpha: as the file says it, or None where the scale is 1.
        magnitude: DoRA's lengths, or None.
        on_input: the lengths are of the input's columns, not of the output's rows.
    """

    kind: str
    parts: Tensors
    scale: float = 1.0
    magnitude: LazyTensor | None = None
    on_input: bool = False
    alpha: float | None = None

    @property
    def can_be_trained(self) -> bool:
        """Whether it is a layer as the forms that are trained have them (`forms.FORMS`)."""
        titles = {form.title: set(form.parts.values()) for form in FORMS.values()}
        known = titles.get(self.kind, set())
        lengths = self.magnitude is not None and (self.kind != "LoRA" or self.on_input)
        return self.parts.keys() <= known and not lengths

    def delta(self) -> torch.Tensor:
        """The change in float32, before DoRA; (out, in) or (out, in, k, k), or flat in that order."""
        parts = {name: tensor.read().float() for name, tensor in self.parts.items()}
        if self.kind == "LoRA":
            change = _tucker(parts["up"].flatten(1).T, parts["down"], parts.get("mid"))
        elif self.kind == "LoHa":
            change = _hadamard(parts, "1") * _hadamard(parts, "2")
        elif self.kind == "LoKr":
            change = _kronecker(_factor(parts, "1"), _factor(parts, "2"))
        else:
            return parts["diff"] * self.scale  # another tensor: the difference itself may be in memory
        return change.mul_(self.scale)

    def apply(self, original: torch.Tensor, strength: float) -> torch.Tensor:
        """The changed weight in float32.

        Args:
            original: (out, in, ...), float32.
        """
        changed = self.delta().reshape(original.shape).add_(original)  # in place: the largest weights take 50 MB each
        if self.magnitude is not None:
            # DoRA (equation 5): the direction of W + change, the learned length of each row (or column).
            axes = [axis for axis in range(original.dim()) if axis != int(self.on_input)]
            length = torch.linalg.vector_norm(changed, dim=axes, keepdim=True)
            changed = changed * (self.magnitude.read().float().reshape(length.shape) / length)
        return changed if strength == 1 else changed.sub_(original).mul_(strength).add_(original)


@dataclass
class LoraFile:
    """A LoRA file, understood.

    Attributes:
        changes: component -> parameter by its diffusers name, `.weight` or `.bias` included -> change.
        embeddings: bundled words: name -> vectors (n, D) for each text encoder.
    """

    changes: dict[str, dict[str, Change]] = field(default_factory=dict)
    embeddings: dict[str, list[LazyTensor]] = field(default_factory=dict)


def change_of(layer: Layer) -> Change:
    """A trained layer as a change."""
    if isinstance(layer, FactorLayer):
        scale = 1.0 if layer.rank is None else layer.alpha / layer.rank
        return Change(layer.kind, dict(layer.parts), scale, alpha=layer.alpha)
    return Change("LoRA", {"down": layer.down, "up": layer.up}, layer.alpha / layer.rank, layer.magnitude)


def delta(layer: LoraLayer) -> torch.Tensor:
    """alpha / rank * up @ down, float32, (out, in * k * k)."""
    return change_of(layer).delta().flatten(1)


def apply_changes(base: ModelFiles, changes: Mapping[str, Mapping[str, Change]], strength: float = 1.0) -> ModelFiles:
    """A base with changes merged into it, lazily: each weight is changed when it is read."""
    tensors = {component: dict(weights) for component, weights in base.tensors.items()}
    for component, of_weights in changes.items():
        for name, change in of_weights.items():
            key = base_key(base, component, name)
            if key is None:
                raise ModelError(f"{base.source}: has no layer {component}.{name} for the LoRA.")
            tensors[component][key] = _changed(tensors[component][key], change, strength)
    return dataclasses.replace(base, tensors=tensors)


def base_key(base: ModelFiles, component: str, name: str) -> str | None:
    """A parameter's name in the base's own files: transformers 5 leaves `text_model.` off."""
    own = base.tensors.get(component, {})
    return next((key for key in (name, name.removeprefix("text_model.")) if key in own), None)


def _changed(weight: LazyTensor, change: Change, strength: float) -> LazyTensor:
    return LazyTensor(
        weight.shape, weight.dtype, lambda: change.apply(weight.read().float(), strength).to(weight.dtype)
    )


def _tucker(up: torch.Tensor, down: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """(out, in, ...) from up (r, out), down (r, in, ...) and a core (r, r, k, k) between them."""
    if core is None:
        return up.T @ down.flatten(1)
    return torch.einsum("ij...,ip,jr->pr...", core, up, down.flatten(1))


def _hadamard(parts: Mapping[str, torch.Tensor], half: str) -> torch.Tensor:
    a, b, core = parts[f"hada_w{half}_a"], parts[f"hada_w{half}_b"], parts.get(f"hada_t{half}")
    # With a core, `a` is stored (r, out).
    return _tucker(a.flatten(1).T if core is None else a, b, core)


def _factor(parts: Mapping[str, torch.Tensor], half: str) -> torch.Tensor:
    """One factor of a Kronecker product: whole, or as two matrices, with a core between them for convolutions."""
    if f"lokr_w{half}" in parts:
        return parts[f"lokr_w{half}"]
    a, b, core = parts[f"lokr_w{half}_a"], parts[f"lokr_w{half}_b"], parts.get(f"lokr_t{half}")
    if core is not None:
        return _tucker(a, b, core)
    return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


def _kronecker(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    one = one.reshape(*one.shape, *[1] * (other.dim() - one.dim()))
    return torch.kron(one, other.contiguous())
