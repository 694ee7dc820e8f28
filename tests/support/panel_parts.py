"""What tests of several panels need: their widgets, and projects with images or with a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ipywidgets as widgets
from hub_runs import make_run
from PIL import Image


def all_widgets(box: widgets.Widget) -> Iterator[widgets.Widget]:
    """A widget and all that is in it."""
    yield box
    for child in getattr(box, "children", ()):
        yield from all_widgets(child)


def texts(box: widgets.Widget) -> str:
    """All HTML that a box shows."""
    return "".join(widget.value for widget in all_widgets(box) if isinstance(widget, widgets.HTML))


def image(path: Path, size: tuple[int, int] = (64, 48), color: tuple[int, int, int] = (200, 80, 40)) -> None:
    """An image of one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def make_jets(folder: Path) -> Path:
    """A project of 18 images: 15 with the caption in their name, and three in a folder, with caption files."""
    for number in range(15):
        image(folder / "input" / f"a jet_{number:02}.png")
    for number in range(3):
        image(folder / "input" / "night" / f"{number}.jpg", size=(48, 64))
        (folder / "input" / "night" / f"{number}.txt").write_text("a jet at night, sky, dark")
    return folder


def make_run_project(folder: Path) -> Path:
    """A project with a run of one checkpoint."""
    make_run(folder / "logs")
    (folder / "input").mkdir()
    (folder / "input" / "a.txt").write_text("a jet")
    return folder
