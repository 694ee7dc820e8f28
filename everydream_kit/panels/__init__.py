"""Widget panels for notebooks: `edk.panels.train("workspace/jets")` and the others.

Each function opens the project folder and returns its panel, which shows itself as the last line of a cell. Panels work
under ipywidgets 7.7.1 (Colab) and 8; they use core widgets, and anywidget for the clock and the upload area, with a
fallback for each. They compute nothing: their buttons call the library and show its reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everydream_kit.panels.pictures import DatasetPanel
    from everydream_kit.panels.training import TrainPanel

__all__ = ["dataset", "train"]


def dataset(project: str | Path) -> DatasetPanel:
    """Upload, look through, caption, tag, report; problems and undo."""
    from everydream_kit.panels.pictures import DatasetPanel

    return DatasetPanel(project)


def train(project: str | Path, **options: Any) -> TrainPanel:
    """Settings, start, stop, resume, and the live view of a run. Options as `TrainPanel`."""
    from everydream_kit.panels.training import TrainPanel

    return TrainPanel(project, **options)
