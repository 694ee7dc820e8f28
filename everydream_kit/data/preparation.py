"""`prepare_dataset`: scan, report and plot in one object, for notebooks and the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from everydream_kit.config import default_of
from everydream_kit.data.dataset import Dataset
from everydream_kit.data.dataset_charts import draw_dataset
from everydream_kit.data.epoch_plan import PlanSettings
from everydream_kit.data.report import DatasetReport, fill_buckets, make_report
from everydream_kit.data.scanning import DataRoot, scan_dataset

DEFAULT_RESOLUTION: int = default_of("resolution")


@dataclass(frozen=True)
class PreparedDataset:
    """A scanned dataset, and how it will be cut into batches."""

    dataset: Dataset
    settings: PlanSettings

    def __len__(self) -> int:
        return len(self.dataset)

    def report(self, **options: Any) -> DatasetReport:
        """Look through the dataset: options as `report.make_report`. `report().text` is for people."""
        return make_report(self.dataset, self.settings, **options)

    def plot(self) -> Image.Image:
        """Bucket chart and contact sheet; a notebook shows it by itself, `.save(path)` keeps it."""
        return draw_dataset(self.dataset, fill_buckets(self.dataset, self.settings)[0])


def prepare_dataset(
    data_root: DataRoot,
    *,
    resolution: int | list[int] = DEFAULT_RESOLUTION,
    batch_size: int = default_of("batch_size"),
    grad_accum: int = default_of("grad_accum"),
    cache_dir: str | Path | None = None,
    **scan_settings: Any,
) -> PreparedDataset:
    """Find all images of a dataset and check their headers.

    Args:
        data_root: a folder, a `.json` index, an archive, a Hub dataset id, or a list of these.
        resolution: area class, or several.
        batch_size, grad_accum: that it will be trained at.
        cache_dir: folder that remembers the scan.
        **scan_settings: `scan_dataset`'s other arguments.

    Raises:
        DataError: a root is not there.
        ConfigError: a resolution has no buckets.
    """
    resolutions = tuple(resolution) if isinstance(resolution, (list, tuple)) else (resolution,)
    settings = PlanSettings(batch_size, grad_accum, resolutions)
    return PreparedDataset(scan_dataset(data_root, cache_dir=cache_dir, **scan_settings), settings)
