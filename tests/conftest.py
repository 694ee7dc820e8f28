"""Fixtures that many tests share: a tiny real model, a folder of real captioned images."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

SUBJECTS = [("red square", (220, 40, 40)), ("green square", (40, 180, 60)), ("blue square", (50, 70, 220))]
SIZES = [(96, 96), (144, 96), (96, 144), (128, 72)]


def pytest_collection_finish() -> None:
    """What is imported by now stays, so the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of Stable Diffusion 1.x shape with seeded random weights, small enough to train in seconds."""
    from small_architecture import small_model

    from everydream_kit.models.model_saving import save_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(small_model(), folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of four aspect ratios, each with tags in a .txt next to it."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        subject, color = SUBJECTS[number % 3]
        width, height = SIZES[number % 4]
        pixels = np.random.default_rng(number).integers(200, 255, (height, width, 3), dtype=np.uint8)
        pixels[height // 4 : -height // 4, width // 4 : -width // 4] = color
        suffix = ".png" if number % 2 else ".jpg"
        Image.fromarray(pixels).save(folder / f"{number:02}{suffix}", quality=95)
        (folder / f"{number:02}.txt").write_text(f"a {subject}, plain, flat, number {number}", encoding="utf-8")
    return folder


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    """Name of the family that a test trains: Stable Diffusion 1.x, unless it is parametrized with others (`indirect`)."""
    return str(getattr(request, "param", "sd1"))


@pytest.fixture
def family_folder(family: str, tiny_model_folder: Path) -> Path:
    """A diffusers folder of that family, with seeded random weights."""
    from tiny_models import tiny_folder

    return tiny_model_folder if family == "sd1" else tiny_folder(family)
