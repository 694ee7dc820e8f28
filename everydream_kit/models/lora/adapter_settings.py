"""What a LoRA adapter was made with: part of a model, of its checkpoint, and of what is requested."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from everydream_kit.errors import ModelError

MAX_RANK = 1024


@dataclass(frozen=True)
class LoraSettings:
    """How a model's adapter was made; kept in its checkpoint.

    Attributes:
        rank, alpha: the adapter's output is scaled by alpha / rank.
        targets: names or regular expressions of UNet layers, or None for the attention projections.
        form: by name (`forms.FORMS`).
    """

    rank: Annotated[int, Field(ge=1, le=MAX_RANK)] = 16
    alpha: float = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
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
        try:
            return TypeAdapter(cls).validate_json(json.dumps(known), strict=True)
        except ValidationError as error:
            raise ModelError(f"adapter: its LoRA settings cannot be used (got {str(known)[:200]}).") from error
