"""Forms of a low-rank adapter: what each is made of, and how peft makes it. A new form is one record here.

What a form's tensors do to a weight is in `weight_changes.py`, which knows them from files already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everydream_kit.models.lora.adapter_settings import LoraSettings


@dataclass(frozen=True)
class LoraForm:
    """One form.

    Attributes:
        title: as messages and `weight_changes.Change.kind` name it.
        parts: peft's name of each tensor -> the part of a layer, as `layer_names.PARTS` calls it.
        config: (peft, settings, layers) -> peft's config.
        network: what kohya-style metadata calls it: module and arguments.
    """

    title: str
    parts: Mapping[str, str]
    config: Callable[[Any, LoraSettings, Sequence[str]], Any]
    network: tuple[str, dict[str, str]]


def _lora(peft: Any, settings: LoraSettings, layers: Sequence[str]) -> Any:
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.dora,
        target_modules=list(layers),
    )


def _loha(peft: Any, settings: LoraSettings, layers: Sequence[str]) -> Any:
    return peft.LoHaConfig(r=settings.rank, alpha=settings.alpha, target_modules=list(layers))


def _lokr(peft: Any, settings: LoraSettings, layers: Sequence[str]) -> Any:
    return peft.LoKrConfig(r=settings.rank, alpha=settings.alpha, target_modules=list(layers))


_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_KRONECKER = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")

FORMS: dict[str, LoraForm] = {
    "lora": LoraForm(
        "LoRA", {"lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude"}, _lora, ("networks.lora", {})
    ),
    "loha": LoraForm("LoHa", {name: name for name in _HADAMARD}, _loha, ("lycoris.kohya", {"algo": "loha"})),
    "lokr": LoraForm("LoKr", {name: name for name in _KRONECKER}, _lokr, ("lycoris.kohya", {"algo": "lokr"})),
}
"""By the setting `lora_form`."""

_MARKS = tuple(f".{name}." for form in FORMS.values() for name in form.parts)


def is_adapter_weight(name: str) -> bool:
    """Whether a parameter of a module with an adapter is the adapter's own."""
    return any(mark in name for mark in _MARKS)
