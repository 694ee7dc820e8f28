"""Small checkpoints: a LoRA or learned tokens, and the name of the base that they belong to.

`save_model` writes such a folder for a model that has an adapter (megabytes instead of the whole model), and
`load_model` and `open_model` read it like any other: the first with a live adapter, to train on; the second with the
adapter merged.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everydream_kit.errors import ModelError
from everydream_kit.models.model_files import read_json

ADAPTER_FILE = "adapter.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
"""diffusers' own name: `pipe.load_lora_weights(folder)` finds it."""
BASE_FIELDS = ("source", "revision", "subfolder", "variant", "family", "prediction_type")
TOKENS_FILE = "learned_embeds.safetensors"


def is_adapter_folder(folder: Path) -> bool:
    return (folder / ADAPTER_FILE).is_file()


def write_adapter_file(folder: Path, origin: dict[str, Any], **parts: Any) -> None:
    """Note what lies in the folder and which base it needs."""
    content = {"version": 1, "base": origin, **parts}
    (folder / ADAPTER_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_adapter_file(folder: Path) -> dict[str, Any]:
    """The note that `write_adapter_file` wrote.

    Raises:
        ModelError: it does not name its base.
    """
    content = read_json(folder / ADAPTER_FILE)
    base = content.get("base")
    if not isinstance(base, dict) or not isinstance(base.get("source"), str):
        raise ModelError(f"{folder / ADAPTER_FILE}: does not name the base model that the adapter belongs to.")
    wrong = [name for name, value in base.items() if name not in BASE_FIELDS or not isinstance(value, str)]
    if wrong:
        raise ModelError(f"{folder / ADAPTER_FILE}: says {shown_name(wrong[0])} of its base, which means nothing here.")
    if is_adapter_folder(Path(base["source"]).expanduser()):
        raise ModelError(
            f"{folder / ADAPTER_FILE}: its base {base['source']} is an adapter too. An adapter's base is a whole model."
        )
    return content


def shown_name(name: str) -> str:
    """A name from a file, for messages."""
    return repr(name[:60])
