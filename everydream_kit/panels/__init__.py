"""Widget panels for notebooks: `edk.panels.train("workspace/jets")` and the others.

Each function opens the project folder and returns its panel, which shows itself as the last line of a cell. Panels work
under ipywidgets 7.7.1 (Colab) and 8; they use core widgets, and anywidget for the clock, the upload area and the token
field, with a fallback for each. They compute nothing: their buttons call the library and show its reports.

No module here has the name of one of these functions: importing it would put the module in the function's place.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everydream_kit.panels.action_panel import ActionPanel
    from everydream_kit.panels.compare_panel import ComparePanel
    from everydream_kit.panels.dataset_panel import DatasetPanel
    from everydream_kit.panels.setup_panel import SetupPanel
    from everydream_kit.panels.share_panel import SharePanel
    from everydream_kit.panels.train_panel import TrainPanel

__all__ = ["action", "compare", "dataset", "setup", "share", "train"]


def setup(project: str | Path, **options: Any) -> SetupPanel:
    """Where am I, what fits here, what is wrong; log in to the Hub. Options as `SetupPanel`."""
    from everydream_kit.panels.setup_panel import SetupPanel

    return SetupPanel(project, **options)


def dataset(project: str | Path, **options: Any) -> DatasetPanel:
    """Upload, look through, caption, tag, report; problems and undo. Options as `DatasetPanel`."""
    from everydream_kit.panels.dataset_panel import DatasetPanel

    return DatasetPanel(project, **options)


def train(project: str | Path, **options: Any) -> TrainPanel:
    """Settings, start, stop, resume, and the live view of a run. Options as `TrainPanel`."""
    from everydream_kit.panels.train_panel import TrainPanel

    return TrainPanel(project, **options)


def compare(project: str | Path, **options: Any) -> ComparePanel:
    """Checkpoints next to each other, before and after, pick a winner. Options as `ComparePanel`."""
    from everydream_kit.panels.compare_panel import ComparePanel

    return ComparePanel(project, **options)


def share(project: str | Path, **options: Any) -> SharePanel:
    """A file for image apps; the model on the Hub with its model card. Options as `SharePanel`."""
    from everydream_kit.panels.share_panel import SharePanel

    return SharePanel(project, **options)


def action(project: str | Path, name: str, **options: Any) -> ActionPanel:
    """The form of a command, such as "merge", or of a step of `tidy`, such as "resize". Options as `ActionPanel`."""
    from everydream_kit.panels.action_panel import ActionPanel

    return ActionPanel(project, name, **options)
