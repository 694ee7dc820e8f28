"""Names and shapes of full-size single files, against lists made by implementations that are not ours
(`published/make_lists.py`)."""

import gzip
from pathlib import Path

import pytest

from everydream_kit.models.convert import to_single_file
from everydream_kit.models.model_saving import files_of
from everydream_kit.models.random_models import build_model

PUBLISHED = Path(__file__).parent / "published"


def published(family):
    lines = gzip.decompress((PUBLISHED / f"{family}.txt.gz").read_bytes()).decode().splitlines()
    pairs = (line.split(" ") for line in lines)
    return {name: tuple(map(int, shape.split(","))) if shape else () for name, shape in pairs}


@pytest.mark.parametrize(("family", "num_tensors"), [("sd1", 1131), ("sd2", 1228), ("sdxl", 2515)])
def test_a_full_size_single_file_has_the_published_names_and_shapes(family, num_tensors):
    model = build_model(family, device="meta")
    ours = {name: tensor.shape for name, tensor in to_single_file(files_of(model)).items()}
    assert len(ours) == num_tensors
    assert ours == published(family)
