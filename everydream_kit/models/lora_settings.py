"""What a LoRA adapter was made with: part of a model, of its checkpoint, and of what is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class LoraSettings:
    """How a model's adapter was made; kept in its checkpoint.

    Attributes:
        rank, alpha: the adapter's output is scaled by alpha / rank.
        targets: names or regular expressions of UNet layers, or None for the attention projections.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    text_encoder: bool = False
    dora: bool = False

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> LoraSettings:
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        if isinstance(known.get("targets"), list):
            known["targets"] = tuple(known["targets"])  # type: ignore[arg-type]
        return cls(**known)  # type: ignore[arg-type]
