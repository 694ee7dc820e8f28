"""Scripts and style sheets that lie next to the panels, as text."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


@lru_cache
def read_asset(name: str) -> str:
    """Text of a file in `assets/`."""
    return (ASSETS / name).read_text("utf-8")
