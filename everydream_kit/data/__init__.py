"""Everything between a folder of images and a batch: files, captions, buckets, plan, pixels, caches, loader, report.

Importing the package loads none of its rooms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everydream_kit.data.preparation import prepare_dataset as prepare_dataset
    from everydream_kit.data.scanning import scan_dataset as scan_dataset

_HOMES = {"prepare_dataset": "preparation", "scan_dataset": "scanning"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
