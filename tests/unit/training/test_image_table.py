"""The table of each image's loss over an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from everydream_kit.runs import RunFolder
from everydream_kit.training.losses import ImageLosses
from everydream_kit.training.reports import ImageTable


def report(losses: dict[int, float], *, ends: bool = False) -> SimpleNamespace:
    seen = ImageLosses(list(losses), list(losses.values()), paths=[f"{number}.png" for number in losses])
    return SimpleNamespace(losses=seen, epoch=3, epoch_ended=ends)


def test_means_and_counts_are_written_at_the_epochs_end_and_the_worst_twenty_come_first(tmp_path: Path) -> None:
    run = SimpleNamespace(
        dataset=SimpleNamespace(key=lambda index: f"key {index}"),
        folder=RunFolder(tmp_path),
    )
    table = ImageTable()
    table(run, report({number: number / 10 for number in range(25)}))
    assert not (tmp_path / "losses").exists()
    resumed = ImageTable()
    resumed.restore(json.loads(json.dumps(table.state())))
    resumed(run, report({0: 9.0, 24: 0.0}, ends=True))
    written = json.loads((tmp_path / "losses" / "ep3.json").read_text("utf-8"))
    assert written["epoch"] == 3
    assert written["images"][0] == {"path": "0.png", "mean_loss": 4.5, "count": 2}  # (0.0 + 9.0) / 2
    assert {"path": "24.png", "mean_loss": 1.2, "count": 2} in written["images"]  # (2.4 + 0.0) / 2
    means = [row["mean_loss"] for row in written["images"]]
    assert means == sorted(means, reverse=True)
    assert len(means) == 25
    assert written["worst"] == written["images"][:20]
    assert resumed.state() == {"rows": {}}
