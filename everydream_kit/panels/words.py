"""Times and sizes in the words that people read: the plan's own."""

from __future__ import annotations

from everydream_kit.preflight.words import duration, size

__all__ = ["duration", "size"]
