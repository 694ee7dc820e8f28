"""Tests of what only a GPU shows. Without one they are skipped, and say so.

`EVERYDREAM_GPU_TESTS=cpu` runs those that need no CUDA by themselves on the CPU, which shows that the tests are right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # for `deterministic`: torch reads it once, at its first product

ON_CPU = os.environ.get("EVERYDREAM_GPU_TESTS") == "cpu"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker(pytest.mark.gpu)
        if torch.cuda.is_available():  # what torch says once of a GPU that these tests have not seen
            item.add_marker(pytest.mark.filterwarnings("default::UserWarning:torch.*"))
        needs_cuda = item.get_closest_marker("needs_cuda") is not None
        if not torch.cuda.is_available() and (needs_cuda or not ON_CPU):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch's deterministic kernels; one that there is none of is an error.

    As mere warnings (`warn_only`) they would leave attention's backward pass as it is.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
