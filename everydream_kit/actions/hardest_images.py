"""The images that a model finds hardest, from the losses that the trainer writes for each image and epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from everydream_kit.data.captions import caption_from_file_name
from everydream_kit.data.folders import FolderFiles
from everydream_kit.data.textfiles import TextError, read_text
from everydream_kit.runs import RunFolder
from everydream_kit.runs.history import Point, thin

MOST_IMAGES = 24
MOST_EPOCHS = 12
"""Of a trend: the first and the last epoch, and others evenly between."""


@dataclass(frozen=True)
class HardImage:
    """One image.

    Attributes:
        path: the file, as the trainer names it.
        loss: mean over its uses in the last epoch.
        count: these uses.
        trend: (epoch, mean loss), as far as it was used.
    """

    path: Path
    loss: float
    count: int
    trend: tuple[Point, ...]


class HardestReader:
    """Reads a run's losses; a file of an epoch is read once.

    Attributes:
        epoch: the last epoch that was read; None before the first.
        images: the hardest of that epoch, the hardest first.
    """

    def __init__(self, run: Path) -> None:
        self._run = RunFolder(run)
        self._means: dict[int, dict[str, float]] = {}
        self.epoch: int | None = None
        self.images: list[HardImage] = []

    def update(self) -> bool:
        """Read what is new. Returns whether anything was."""
        epochs = self._run.epochs_with_losses()
        if not epochs or epochs[-1] == self.epoch:
            return False
        rows = self._run.image_losses(epochs[-1])
        if not rows:
            return False
        self.epoch = epochs[-1]
        chosen = thin(epochs, MOST_EPOCHS)
        for epoch in chosen:
            if epoch not in self._means:
                self._means[epoch] = {row["path"]: row["mean_loss"] for row in self._run.image_losses(epoch)}
        self._means = {epoch: self._means[epoch] for epoch in chosen}
        self.images = [
            HardImage(
                Path(row["path"]),
                row["mean_loss"],
                row["count"],
                tuple((epoch, means[row["path"]]) for epoch, means in self._means.items() if row["path"] in means),
            )
            for row in rows[:MOST_IMAGES]
        ]
        return True


def caption_text(image: Path, files: FolderFiles) -> str:
    """The caption next to an image, or the one in its name; or why it cannot be read."""
    try:
        for ending in (".caption", ".txt"):
            if (path := files.find(image, ending)) is not None:
                return read_text(path).strip()
    except (OSError, TextError) as error:
        return f"({error})"
    return caption_from_file_name(image.name).text
