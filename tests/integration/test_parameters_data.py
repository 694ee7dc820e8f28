"""What the parameters of the base model, the data and the captions do, seen in what reaches the trainer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rehearsals import plain_settings, prepared, rehearse, square_images

from everydream_kit.config import TrainConfig
from everydream_kit.data.epoch_plan import plan_epoch
from everydream_kit.data.records import Batch
from everydream_kit.errors import ConfigError, ModelError
from everydream_kit.training.base_model import find_base


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path) -> dict[str, Any]:
    images = square_images(tmp_path / "pictures")
    return {**plain_settings(tmp_path, tiny_model_folder, images), "cache_latents": "off"}


def batches_of(num_steps: int = 1, **settings: Any) -> list[Batch]:
    """The first steps' batches."""
    with prepared(**{**settings, "max_steps": num_steps}) as rehearsal:
        work = rehearsal.run.batches()
        loaded = [batch for _ in range(num_steps) for batch in next(work).batches]
        work.close()
    return loaded


def by_path(batch: Batch) -> dict[str, Any]:
    assert batch.pixels is not None
    return {Path(path).name: pixels for path, pixels in zip(batch.paths, batch.pixels, strict=True)}


# Base model -----------------------------------------------------------------------------------------------------------


def test_findlast_is_the_latest_checkpoint_of_the_project(tmp_path: Path) -> None:
    for run in ("cats-20260101-000000", "cats-20260102-000000", "dogs-20260103-000000"):
        for step in (5, 10):
            checkpoint = tmp_path / run / "ckpts" / f"x-ep01-gs{step:05}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "model_index.json").write_text("{}", "utf-8")
        (tmp_path / run / "config.json").write_text("{}", "utf-8")
    config = TrainConfig(resume_ckpt="findlast", project_name="cats", logdir=str(tmp_path))
    assert find_base(config) == tmp_path / "cats-20260102-000000" / "ckpts" / "x-ep01-gs00010"
    assert Path(find_base(TrainConfig(resume_ckpt="embedded"))).exists()


def test_a_hub_model_is_asked_for_with_its_revision_folder_and_variant(
    settings: dict[str, Any], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    def fetch(source: str, **what: Any) -> Path:
        asked.append((source, what))
        return tiny_model_folder

    monkeypatch.setattr("everydream_kit.models.loading.fetch_model", fetch)
    where = {"base_revision": "v2", "base_subfolder": "sub", "base_variant": "fp16"}
    with prepared(**{**settings, "resume_ckpt": "me/model", **where}):
        pass
    assert asked == [("me/model", {"revision": "v2", "subfolder": "sub", "variant": "fp16", "token": None})]


def test_subfolder_and_variant_choose_the_files_of_a_folder(
    settings: dict[str, Any], tmp_path: Path, tiny_model_folder: Path
) -> None:
    folder = tmp_path / "models" / "inner"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    )
    inside = {**settings, "resume_ckpt": str(tmp_path / "models")}
    with prepared(**inside, base_subfolder="inner", base_variant="fp16") as rehearsal:
        assert rehearsal.run.learner.model.family.name == "sd1"
    with pytest.raises(ModelError, match="no weights here"), prepared(**inside, base_subfolder="inner"):
        pass
    with pytest.raises(ModelError, match="not a diffusers model"), prepared(**inside, base_variant="fp16"):
        pass


def test_family_and_prediction_type_win_over_what_the_files_say(settings: dict[str, Any]) -> None:
    with prepared(**settings) as recognized:
        model = recognized.run.learner.model
        assert (model.family.name, model.prediction_type) == ("sd1", "epsilon")
    with prepared(**settings, family="sd2", prediction_type="v_prediction") as said:
        model = said.run.learner.model
        assert (model.family.name, model.prediction_type) == ("sd2", "v_prediction")
        assert said.run.learner.objective.prediction_type == "v_prediction"


# Data -----------------------------------------------------------------------------------------------------------------


def test_the_dataset_may_be_several_folders(settings: dict[str, Any], tmp_path: Path) -> None:
    other = square_images(tmp_path / "others", 3)
    with prepared(**{**settings, "data_root": [settings["data_root"], str(other)]}) as rehearsal:
        event = next(iter(rehearsal.folder.events("dataset")))
    assert event["images"] == 7
    assert event["captions"] == {
        "different_captions": 4,
        "images_without_caption": 0,
        "images_with_tags": 7,
        "median_words_in_a_caption": 7,
    }


def test_every_resolution_has_its_batches(settings: dict[str, Any]) -> None:
    loaded = batches_of(2, **{**settings, "resolution": [64, 80]})
    assert {tuple(batch.pixels.shape) for batch in loaded} == {(4, 3, 64, 64), (4, 3, 80, 80)}


def test_batch_size_is_the_images_that_go_together_and_auto_is_refused_in_words(settings: dict[str, Any]) -> None:
    assert [len(batch.captions) for batch in batches_of(2, **{**settings, "batch_size": 2})] == [2, 2]
    with (
        pytest.raises(ConfigError, match="batch_size: auto: becomes a number when a run starts"),
        prepared(**{**settings, "batch_size": "auto"}),
    ):
        pass


def test_images_are_mirrored_with_their_probability(settings: dict[str, Any]) -> None:
    [never], [always] = (batches_of(**{**settings, "flip_p": p}) for p in (0.0, 1.0))
    straight, mirrored = by_path(never), by_path(always)
    assert straight.keys() == mirrored.keys()
    assert all(torch.equal(straight[name].flip(-1), mirrored[name]) for name in straight)


def test_crop_jitter_trims_more_than_the_bucket_asks_for(settings: dict[str, Any]) -> None:
    [still] = batches_of(**settings)
    [jittered] = batches_of(**{**settings, "crop_jitter": 0.2})
    assert set(still.crop_top_lefts) == {(0, 0)}
    assert len(set(jittered.crop_top_lefts)) > 1


def test_transparent_images_stand_on_the_background(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "clear").mkdir()
    Image.new("RGBA", (80, 80), (255, 0, 0, 0)).save(tmp_path / "clear" / "a.png")
    clear = {**settings, "data_root": str(tmp_path / "clear")}
    for given, expected in (({}, (255, 255, 255)), ({"background": "#102030"}, (16, 32, 48))):
        [batch] = batches_of(**{**clear, **given})
        assert batch.pixels[0, :, 0, 0].tolist() == list(expected)


def test_the_loss_is_weighed_by_the_mask_that_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    images = square_images(tmp_path / "masked", 4, "RGBA")
    for image in list(images.glob("?.png")):
        half = np.zeros((80, 80), np.uint8)
        half[:, 40:] = 255
        Image.fromarray(half).save(image.with_suffix(".mask.png"))
    losses = {}
    for kind in ("off", "file", "alpha"):
        masked = {**settings, "data_root": str(images), "loss_mask": kind, "max_steps": 1}
        [batch] = batches_of(**masked)
        assert (batch.mask is None) is (kind == "off")
        if kind == "file":
            assert (batch.mask[0, 0, 0, 0], batch.mask[0, 0, 0, -1]) == (0.0, 1.0)
        losses[kind] = rehearse(**masked).losses[0]
    assert len(set(losses.values())) == 3


@pytest.mark.parametrize(("kind", "words"), [("file", "no image has a mask"), ("alpha", "no image is transparent")])
def test_masks_that_no_image_has_are_a_warning(
    settings: dict[str, Any], tmp_path: Path, kind: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    images = square_images(tmp_path / "plain", 2, "RGB")
    batches_of(**{**settings, "data_root": str(images), "loss_mask": kind})
    assert f"loss_mask {kind}: {words}" in caplog.text
    (next(images.glob("?.png"))).with_suffix(".mask.png").write_bytes(next(images.glob("?.png")).read_bytes())
    caplog.clear()
    batches_of(**{**settings, "data_root": str(images), "loss_mask": "file"})
    assert "no image" not in caplog.text


def test_the_cache_keeps_so_many_crops_where_it_is_reported_to(settings: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    counts = []
    for variants in (1, 3):
        cached = {"cache_latents": "disk", "cache_variants": variants, "latent_cache_dir": str(place)}
        with prepared(**{**settings, "crop_jitter": 0.25, **cached}) as rehearsal:
            cache, image = rehearsal.run.latent_cache, rehearsal.run.dataset.image(0)
            crops = [cache.draw_crop(0, image, (64, 64), seed=1, address=("use", use)) for use in range(30)]
            counts.append(len(set(crops)))
    assert counts == [1, 3]
    assert any(place.rglob("*.safetensors"))
    assert not (Path(settings["logdir"]) / ".edk_cache" / "latents").exists()


def test_crops_vary_in_the_cache_where_only_the_trim_leaves_room(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (80, 88, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide" / "a.png")
    wide = {"data_root": str(tmp_path / "wide"), "cache_latents": "memory", "cache_variants": 4, "crop_jitter": 0.0}
    with prepared(**{**settings, **wide}) as rehearsal:
        cache, image = rehearsal.run.latent_cache, rehearsal.run.dataset.image(0)
        crops = {cache.draw_crop(0, image, (64, 64), seed=1, address=("use", use)) for use in range(30)}
    assert len(crops) > 1


@pytest.mark.parametrize(("rated", "expected"), [({}, 4), ({"rated_dataset_target_dropout_percent": 75}, 1)])
def test_ratings_leave_out_the_asked_share_by_the_last_epoch(
    settings: dict[str, Any], rated: dict[str, int], expected: int
) -> None:
    changes = {"rated_dataset": bool(rated), **rated, "max_epochs": 10, "batch_size": 1}
    with prepared(**{**settings, **changes}) as rehearsal:
        run = rehearsal.run
        assert plan_epoch(run.dataset, run.plan_settings, 0).num_images == 4
        assert plan_epoch(run.dataset, run.plan_settings, 9).num_images == expected


def test_an_image_that_breaks_while_training_is_reported_once(settings: dict[str, Any]) -> None:
    broken = Path(settings["data_root"]) / "2.png"
    with prepared(**{**settings, "max_steps": 3}) as rehearsal:
        broken.write_bytes(broken.read_bytes()[:2000])
        work = rehearsal.run.batches()
        for _ in range(3):
            next(work)
        work.close()
    assert rehearsal.warnings.count("2.png") == 1


# Captions -------------------------------------------------------------------------------------------------------------


def test_dropped_captions_are_empty(settings: dict[str, Any]) -> None:
    [whole] = batches_of(**settings)
    [dropped] = batches_of(**{**settings, "cond_dropout": 1.0})
    assert all(caption.startswith("picture") for caption in whole.captions)
    assert dropped.captions == [""] * 4


def test_tags_are_shuffled_behind_those_that_are_kept(settings: dict[str, Any]) -> None:
    written = ["one", "two", "three", "four", "five"]
    [as_written] = batches_of(**settings)
    [shuffled] = batches_of(**{**settings, "shuffle_tags": True})
    [kept] = batches_of(**{**settings, "shuffle_tags": True, "keep_tags": 4})
    orders = [[caption.split(", ")[1:] for caption in batch.captions] for batch in (as_written, shuffled, kept)]
    assert all(order == written for order in orders[0])
    assert all(sorted(order) == sorted(written) for order in orders[1])
    assert any(order != written for order in orders[1])
    assert all(order[:4] == written[:4] for order in orders[2])


def test_caption_variants_are_the_orders_that_each_caption_has(settings: dict[str, Any]) -> None:
    orders = []
    for changes in ({}, {"caption_variants": 1}):
        batches = batches_of(2, **{**settings, "shuffle_tags": True, **changes})
        orders.append([dict(zip(batch.paths, batch.captions, strict=True)) for batch in batches])
    assert orders[0][0] != orders[0][1]
    assert orders[1][0] == orders[1][1]


def test_lines_of_a_caption_file_are_one_caption_or_one_each(settings: dict[str, Any]) -> None:
    for text in Path(settings["data_root"]).glob("*.txt"):
        text.write_text("first line\nsecond line", "utf-8")
    [joined] = batches_of(**settings)
    chosen = batches_of(4, **{**settings, "caption_lines": "choose"})
    assert set(joined.captions) == {"first line second line"}
    assert {caption for batch in chosen for caption in batch.captions} == {"first line", "second line"}
