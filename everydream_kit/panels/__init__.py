"""Widget panels for notebooks: `edk.panels.train("workspace/jets")` and the others.

Each name is the class of a panel, which opens the project folder and shows itself as the last line of a cell. Panels work
under ipywidgets 7.7.1 (Colab) and 8; they use core widgets, and anywidget for the clock, the upload area and the token
field, with a fallback for each. They compute nothing: their buttons call the library and show its reports.

No module here has the name of one of these panels: importing it would put the module in the class's place.
"""

# ruff: noqa: N813 - a name here is what is done in the panel

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everydream_kit.panels.action_panel import ActionPanel as action
    from everydream_kit.panels.compare_panel import ComparePanel as compare
    from everydream_kit.panels.dataset_panel import DatasetPanel as dataset
    from everydream_kit.panels.setup_panel import SetupPanel as setup
    from everydream_kit.panels.share_panel import SharePanel as share
    from everydream_kit.panels.train_panel import TrainPanel as train

__all__ = ["action", "compare", "dataset", "setup", "share", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{name}_panel"), f"{name.title()}Panel")
