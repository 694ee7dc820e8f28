"""Tests of what only a GPU shows. Without one they are skipped, and say so.

`EVERYDREAM_GPU_TESTS=cpu` runs those that need no CUDA by themselves on the CPU, which shows that the tests are right.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ON_CPU = os.environ.get("EVERYDREAM_GPU_TESTS") == "cpu"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.gpu)
        needs_cuda = item.get_closest_marker("needs_cuda") is not None
        if not torch.cuda.is_available() and (needs_cuda or not ON_CPU):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
