"""What a LoRA adapter was made with: part of a model, of its checkpoint, and of what is requested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from everydream_kit.errors import ModelError

MAX_RANK = 1024


@dataclass(frozen=True)
class LoraSettings:
    """How a model's adapter was made; kept in its checkpoint.

    Attributes:
        rank, alpha: the adapter's output is scaled by alpha / rank.
        targets: names or regular expressions of UNet layers, or None for the attention projections.
        form: by name (`lora_forms.FORMS`).
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    text_encoder: bool = False
    dora: bool = False
    form: str = "lora"

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: object) -> LoraSettings:
        """Settings from an adapter's file.

        Raises:
            ModelError: a value is not of its kind.
        """
        if not isinstance(values, Mapping):
            raise ModelError("adapter: its LoRA settings must be an object.")
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        rank, alpha, dropout = known.get("rank", 16), known.get("alpha", 16.0), known.get("dropout", 0.0)
        good = [type(rank) is int and 1 <= rank <= MAX_RANK]
        good += [isinstance(one, (int, float)) and not isinstance(one, bool) for one in (alpha, dropout)]
        good += [0 <= dropout < 1] if good[-1] else []
        good += [isinstance(known.get(name, False), bool) for name in ("text_encoder", "dora")]
        good += [isinstance(known.get("form", "lora"), str)]
        targets = known.get("targets")
        good += [targets is None or (isinstance(targets, list) and all(isinstance(one, str) for one in targets))]
        if not all(good):
            raise ModelError(f"adapter: its LoRA settings cannot be used (got {str(known)[:200]}).")
        if targets is not None:
            known["targets"] = tuple(targets)
        return cls(**known)
