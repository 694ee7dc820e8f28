"""Each key that a settings file next to images may hold, by its effect on the batches that are trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from everydream_kit.data.epoch_plan import PlanSettings
from everydream_kit.data.loader import make_loader
from everydream_kit.data.scanning import scan_dataset

CAPTION = "a cat, red, small, striped"
NUM_EPOCHS = 8
SET = ("0.png", "2.png")
"""The images that get the setting."""


@dataclass
class Uses:
    """What went by of one image in NUM_EPOCHS epochs: an entry for each use, and each epoch's number of uses."""

    captions: list[str] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    neighbors: list[frozenset[str]] = field(default_factory=list)
    by_epoch: list[int] = field(default_factory=lambda: [0] * NUM_EPOCHS)


def train_on(root: Path, **defaults: Any) -> dict[str, Uses]:
    settings = PlanSettings(2, resolutions=(64,), seed=3, rated_dropout_percent=60, max_epochs=NUM_EPOCHS)
    uses: dict[str, Uses] = {}
    with make_loader(
        scan_dataset(root, **{"cond_dropout": 0.0, **defaults}),
        settings,
        seed=3,
        num_epochs=NUM_EPOCHS,
        crop_jitter=0.0,
    ) as loader:
        for step, batch in ((one, batch) for one in loader for batch in one.batches):
            names = [Path(path).name for path in batch.paths]
            for row, name in enumerate(names):
                one = uses.setdefault(name, Uses())
                one.captions.append(batch.captions[row])
                one.pixels.append(batch.pixels[row].numpy())
                one.weights.append(float(batch.loss_scale[row]))
                one.neighbors.append(frozenset(names))
                one.by_epoch[step.epoch] += 1
    return uses


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(CAPTION)
    return tmp_path


def put_yaml(folder: Path, values: dict[str, Any]) -> Path:
    for name in SET:
        (folder / name).with_suffix(".yaml").write_text(yaml.safe_dump(values))
    return folder


def put_json(folder: Path, values: dict[str, Any]) -> Path:
    for name in SET:
        (folder / name).with_suffix(".json").write_text(json.dumps(values))
    return folder


def put_index(folder: Path, values: dict[str, Any]) -> Path:
    """An index of all images; each is found by its `image` key."""
    entries = [{"image": f"{number}.png", **(values if f"{number}.png" in SET else {})} for number in range(4)]
    (folder / "index.json").write_text(json.dumps(entries))
    return folder / "index.json"


def put_folder(file: str) -> Callable[[Path, dict[str, Any]], Path]:
    def put(folder: Path, values: dict[str, Any]) -> Path:
        (folder / "set").mkdir()
        for name in SET:
            for path in (folder / name, (folder / name).with_suffix(".txt")):
                path.rename(folder / "set" / path.name)
        (folder / "set" / file).write_text(yaml.safe_dump(values))
        return folder

    return put


PLACES = {
    "yaml": put_yaml,
    "json": put_json,
    "index": put_index,
    "local": put_folder("local.yaml"),
    "global": put_folder("global.yaml"),
}


def orders(uses: Uses) -> set[str]:
    return set(uses.captions)


def first_tags(uses: Uses) -> set[str]:
    return {caption.split(", ")[1] for caption in uses.captions}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("values", "defaults", "seen"),
    [
        ({"loss_scale": 0.25}, {}, lambda uses: set(uses.weights) == {0.25}),
        ({"multiply": 3}, {}, lambda uses: uses.by_epoch[0] == 3),
        ({"cond_dropout": 1}, {}, lambda uses: set(uses.captions) == {""}),
        ({"flip_p": 1}, {"flip_p": 0.0}, lambda uses: len({p.tobytes() for p in uses.pixels}) == 1),
        ({"rating": 0}, {}, lambda uses: uses.by_epoch[-3:] == [0] * 3),
        ({"max_caption_length": 10}, {}, lambda uses: set(uses.captions) == {"a cat, red"}),
        ({"shuffle_tags": True}, {}, lambda uses: len(orders(uses)) > 2),
        ({"keep_tags": 1}, {"shuffle_tags": True}, lambda uses: first_tags(uses) == {"red"}),
        ({"batch_id": "night"}, {}, lambda uses: set(uses.neighbors[:2]) == {frozenset(SET)}),
        ({"tags": ["wet"]}, {}, lambda uses: all("wet" in caption for caption in uses.captions)),
        ({"tags": [{"tag": "small", "weight": 9}]}, {}, lambda uses: first_tags(uses) == {"small"}),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_each_key_has_its_effect_wherever_it_stands(
    folder: Path, place: str, values: dict[str, Any], defaults: dict[str, Any], seen: Callable[[Uses], bool]
) -> None:
    before = train_on(folder, **defaults)
    after = train_on(PLACES[place](folder, values), **defaults)
    for name in SET:
        assert not seen(before[name]) or "flip_p" in values
        assert seen(after[name])
    if "flip_p" in values:
        assert np.array_equal(after["0.png"].pixels[0], before["0.png"].pixels[0][:, :, ::-1])
    untouched = [caption for name in ("1.png", "3.png") for caption in after[name].captions]
    assert "shuffle_tags" in defaults or set(untouched) == {CAPTION}


@pytest.mark.parametrize("place", ["yaml", "json", "index"])
@pytest.mark.parametrize(
    "values", [{"main_prompt": "a dog"}, {"caption": "a dog, wet"}], ids=["main_prompt", "caption"]
)
def test_a_caption_of_a_settings_file_is_trained(folder: Path, place: str, values: dict[str, Any]) -> None:
    for number in range(4):
        (folder / f"{number}.txt").unlink()
    before = train_on(folder)
    after = train_on(PLACES[place](folder, values))
    [text] = values.values()
    assert set(before["0.png"].captions) == {"0"}
    assert set(after["0.png"].captions) == set(after["2.png"].captions) == {text}
    assert set(after["1.png"].captions) == {"1"}


def test_an_index_has_the_images_that_it_names_and_no_other(folder: Path) -> None:
    (folder / "index.json").write_text(json.dumps([{"image": "1.png"}, {"image": "3.png"}]))
    assert sorted(train_on(folder / "index.json")) == ["1.png", "3.png"]
