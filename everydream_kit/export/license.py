"""The license of a model on this disk: from a folder's card, or from a single file's header.

The Hub has a short list of license names; single files hold free text. What is on the list is translated, anything else
becomes `other` with a name of its own, as the Hub wants it. Looking a license up on the Hub is `hub/access.py`'s.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from everydream_kit.errors import KitError
from everydream_kit.runs.layout import ADAPTER_FILE
from everydream_kit.strict_json import read_json

FIELDS = ("license", "license_name", "license_link")
MODEL_CARD_NAMES = ("README.md", "MODEL_CARD.md", "model_card.md")
FILE_KEY = "modelspec.license"
"""In a LoRA's or learned tokens' folder: names the base that binds it, too."""

_HUB_NAMES = {
    "creativeml openrail m": "creativeml-openrail-m",
    "creativeml open rail m": "creativeml-openrail-m",
    "creativeml open rail++ m": "openrail++",
    "creativeml openrail++ m": "openrail++",
    "openrail++": "openrail++",
    "openrail": "openrail",
    "apache 2.0": "apache-2.0",
    "apache license 2.0": "apache-2.0",
    "mit": "mit",
    "cc0 1.0": "cc0-1.0",
    "cc by 4.0": "cc-by-4.0",
    "cc by sa 4.0": "cc-by-sa-4.0",
    "cc by nc 4.0": "cc-by-nc-4.0",
    "cc by nc sa 4.0": "cc-by-nc-sa-4.0",
    "bigscience openrail m": "bigscience-openrail-m",
}
"""Words of a license, without punctuation and the word "license" at their end -> the Hub's name of it."""


def local_license(model: Path | None) -> dict[str, str]:
    """License fields of a model folder or single file; none where it states nothing or is not there.

    An adapter's folder answers for its base. A damaged card or header counts as saying nothing: whether the model can
    be read is found out elsewhere.
    """
    if model is None:
        return {}
    if model.is_file():
        return _from_header(model)
    if not model.is_dir():
        return {}
    for name in MODEL_CARD_NAMES:
        found = _from_card(model / name)
        if found:
            return found
    base = _adapter_base(model / ADAPTER_FILE)
    return local_license(base) if base is not None and base.resolve() != model.resolve() else {}


def license_fields(text: str) -> dict[str, str]:
    """Fields for a license in free text: a Hub name where it is known, else `other` and the text's own words."""
    text = text.strip()
    if not text:
        return {}
    link = re.search(r"https?://\S+", text)
    words = re.sub(r"https?://\S+", "", text).lower()
    plain = re.sub(r"\s+(licen[cs]e)?\s*$", "", re.sub(r"[^a-z0-9+.]+", " ", words).strip() + " ")
    if plain in _HUB_NAMES:
        return {"license": _HUB_NAMES[plain]}
    fields = {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", words).strip("-.") or "see-link"}
    return fields | ({"license_link": link[0].rstrip(".,;)")} if link else {})


def _from_card(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    front = re.match(r"\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", path.read_text("utf-8", errors="replace"), re.DOTALL)
    if not front:
        return {}
    try:
        card = yaml.safe_load(front[1])
    except yaml.YAMLError:
        return {}
    if not isinstance(card, dict) or not isinstance(card.get("license"), str):
        return {}
    return {name: card[name] for name in FIELDS if isinstance(card.get(name), str)}


def _from_header(path: Path) -> dict[str, str]:
    return license_fields(header_metadata(path).get(FILE_KEY, ""))


def header_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file's header says of it; nothing for other files, damaged ones and those that are not there."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def _adapter_base(path: Path) -> Path | None:
    """The base that an adapter names, where it is on this disk."""
    if not path.is_file():
        return None
    try:
        note: Any = read_json(path)
        base = Path(note["base"]["source"])
    except (KitError, KeyError, TypeError):
        return None
    return base if base.exists() else None
