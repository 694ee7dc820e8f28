"""The same seeds give the same losses, weights and samples as when the runs were recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_runs import LOSS_TOLERANCE, PIXEL_TOLERANCE, RUNS, WEIGHT_TOLERANCE, machine, perform

RECORD: dict[str, Any] = json.loads(Path(__file__).with_name("recorded_runs.json").read_text("utf-8"))


def files_of(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(name, file): facts for name, files in result["checkpoints"].items() for file, facts in files.items()}


@pytest.mark.parametrize("name", list(RUNS))
def test_a_run_gives_what_was_recorded(name: str, tmp_path: Path) -> None:
    recorded, now = RECORD[name], perform(name, tmp_path)
    if machine() == RECORD["machine"]:
        assert now == recorded  # to the bit
    for curve in ("losses", "validation"):
        assert now[curve] == pytest.approx(recorded[curve], rel=LOSS_TOLERANCE)
    files, expected_files = files_of(now), files_of(recorded)
    assert files.keys() == expected_files.keys()
    for file, expected in expected_files.items():
        assert files[file]["names"] == expected["names"], f"{file}: other tensors, types or shapes"
        scale = expected["statistics"][1]
        assert files[file]["statistics"] == pytest.approx(expected["statistics"], abs=WEIGHT_TOLERANCE * scale), file
    assert now["samples"].keys() == recorded["samples"].keys()
    for file, expected in recorded["samples"].items():
        assert now["samples"][file]["size"] == expected["size"]
        difference = np.subtract(now["samples"][file]["blocks"], expected["blocks"])
        assert np.abs(difference).max() <= PIXEL_TOLERANCE, file
