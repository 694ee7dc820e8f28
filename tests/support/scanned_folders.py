"""Folders of small images and texts, and what a scan without problems finds in them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from everydream_kit.data.dataset import DatasetImage
from everydream_kit.data.scanning import scan_dataset


def put(root: Path, name: str, content: str | None = None) -> Path:
    """Write a text file, or a small image where there is no content."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        Image.new("RGB", (48, 32)).save(path)
    else:
        path.write_text(content, encoding="utf-8")
    return path


def scan(root: Path, **settings) -> dict[str, DatasetImage]:
    """Images by key; there must be no problems."""
    dataset = scan_dataset(root, **settings)
    assert dataset.problems == []
    return {dataset.key(i): dataset.image(i) for i in range(len(dataset))}
