"""The validation pass on a real (tiny) model and real files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny_folder

from everydream_kit.config.objective_settings import ObjectiveGroup
from everydream_kit.config.sample_settings import ValidationGroup
from everydream_kit.data.epoch_plan import PlanSettings
from everydream_kit.data.loader import make_loader
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.errors import ConfigError
from everydream_kit.models.encoding import encode_captions, encode_moments, latents_from_moments
from everydream_kit.models.family import Sizes
from everydream_kit.models.loading import load_model
from everydream_kit.training.held_out_images import split_dataset
from everydream_kit.training.objectives import OBJECTIVES
from everydream_kit.training.validation import content_groups, once_each, split_indices, validate

TIMESTEPS = [250, 750]


@pytest.fixture(scope="module", params=["sd1", "z_image"])
def model(request, tiny_model_folder):
    return load_model(tiny_model_folder if request.param == "sd1" else tiny_folder(request.param))


def objective_of(model, **settings):
    return OBJECTIVES[model.family.objective](model.noise_scheduler, model.prediction_type, ObjectiveGroup(**settings))


@pytest.fixture(scope="module")
def dataset(image_folder):
    return once_each(scan_dataset(image_folder))


def measure(model, dataset, *, batch_size=4, seed=555, num_ranks=1, rank=0, timesteps=TIMESTEPS, objective=None):
    settings = PlanSettings(batch_size=batch_size, resolutions=(64,), num_ranks=num_ranks)

    def encode(batch):
        moments = encode_moments(model, batch.pixels)
        height, width = (side * 8 for side in moments.shape[2:])
        mean = torch.zeros(len(moments), *model.family.latent_space.shape(model, width, height))
        return latents_from_moments(model, moments, mean), encode_captions(model, batch.captions)

    def predict(batch, steps, conditioning, noisy_latents):
        sizes = Sizes(batch.original_sizes, batch.crop_top_lefts, batch.planned.bucket)
        return model.family.predict(model, noisy_latents, steps, conditioning, sizes)

    with make_loader(dataset, settings, seed=seed, rank=rank, fixed=True) as loader:
        return validate(
            (batch for work in loader for batch in work.batches),
            keys=lambda batch: [dataset.key(draw.image) for draw in batch.planned.draws],
            encode=encode,
            predict=predict,
            objective=objective or objective_of(model),
            timesteps=timesteps,
            seed=seed,
            modules=[model.unet, *model.text_encoders],
        )


def test_two_passes_give_the_same_number_and_leave_no_trace(model, dataset):
    torch.manual_seed(1)
    model.unet.train()
    model.text_encoders[0].eval()
    first = measure(model, dataset)
    state = torch.get_rng_state()
    second = measure(model, dataset)
    assert first == second
    assert first.num_images == 12
    assert list(first.by_timestep) == TIMESTEPS
    assert first.mean == pytest.approx(sum(first.by_timestep.values()) / 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.unet.training
    assert not model.text_encoders[0].training
    assert all(parameter.grad is None for parameter in model.unet.parameters())


def test_the_batch_size_changes_nothing(model, dataset):
    whole, single = measure(model, dataset), measure(model, dataset, batch_size=1)
    assert whole.num_images == single.num_images == 12
    assert whole.mean == pytest.approx(single.mean, rel=1e-5)


def test_two_ranks_measure_what_one_measures_and_fillers_do_not_count(model, dataset):
    some = dataset.subset([0, 4, 8])  # one bucket, three images: the second rank gets a filler
    whole = measure(model, some, batch_size=2)
    parts = [measure(model, some, batch_size=1, num_ranks=2, rank=rank) for rank in (0, 1)]
    assert sorted(part.num_images for part in parts) == [1, 2]
    together = sum(part.mean * part.num_images for part in parts) / 3
    assert together == pytest.approx(whole.mean, rel=1e-5)


def test_every_image_weighs_alike_whatever_its_batch(model, dataset):
    singles = [measure(model, dataset.subset([index])).mean for index in range(5)]
    together = measure(model, dataset.subset(range(5)), batch_size=3)
    assert together.mean == pytest.approx(sum(singles) / 5, rel=1e-5)


def test_another_seed_and_other_timesteps_are_other_measurements(model, dataset):
    some = dataset.subset([0, 1])
    assert measure(model, some, seed=1).mean != measure(model, some, seed=2).mean
    one = measure(model, some, timesteps=[250])
    assert one.mean == pytest.approx(measure(model, some).by_timestep[250])


def test_the_objective_is_the_trainings_own(model, dataset):
    some = dataset.subset([0, 1])
    huber = objective_of(model, loss_type="huber")
    assert measure(model, some, objective=huber).mean < measure(model, some).mean


@pytest.mark.parametrize("model", ["sd1"], indirect=True)  # flow matching has no table of timesteps to exceed
def test_modes_come_back_after_an_error(model, dataset):
    model.unet.train()
    with pytest.raises(IndexError):
        measure(model, dataset.subset([0]), timesteps=[5000])
    assert model.unet.training


def test_without_images_there_is_nothing_to_measure(model):
    with pytest.raises(ConfigError, match="no images to validate with"):
        validate(
            [],
            keys=list,
            encode=lambda batch: (torch.zeros(1), None),
            predict=lambda *arguments: torch.zeros(1),
            objective=objective_of(model),
            timesteps=[1],
            seed=1,
        )


def draw_images(folder, count):
    """Images that do not look alike: coarse colored noise, enlarged smoothly."""
    folder.mkdir()
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((160, 160), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}", encoding="utf-8")
    return folder


def test_a_copy_that_was_resized_and_compressed_again_is_never_on_the_other_side(tmp_path):
    images = draw_images(tmp_path / "pictures", 12)
    for path in sorted(images.glob("*.png")):
        with Image.open(path) as image:
            image.resize((112, 112)).save(images / f"copy of {path.stem}.jpg", quality=70)
    config = ValidationGroup(validation_split_mode="automatic", validation_split_proportion=0.25)
    for seed in range(5):
        dataset = scan_dataset(images)
        training, (held_out,) = split_dataset(dataset, config.model_copy(update={"seed": seed}), scan_dataset)
        numbers = [
            {Path(path).stem[-2:] for path in map(side.path, range(len(side)))} for side in (training, held_out.dataset)
        ]
        assert len(held_out.dataset) == 6
        assert not numbers[0] & numbers[1]
        assert numbers[0] | numbers[1] == {f"{number:02}" for number in range(12)}


def test_the_same_image_in_two_folders_is_never_on_both_sides(tmp_path):
    images = draw_images(tmp_path / "first", 12)
    shutil.copytree(images, tmp_path / "second")
    renamed = tmp_path / "second" / "00.png"
    renamed.rename(renamed.with_name("another name.png"))
    dataset = scan_dataset(tmp_path)
    groups = content_groups(dataset)
    assert len(groups) == 24
    assert len(set(groups)) == 12
    for seed in range(5):
        stays, taken = split_indices(groups, 0.25, seed)
        contents = [{Path(dataset.path(index)).read_bytes() for index in side} for side in (stays, taken)]
        assert len(taken) == 6
        assert not contents[0] & contents[1]


def test_a_multiplied_image_is_measured_once(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "pictures")
    (tmp_path / "pictures" / "multiply.txt").write_text("3", encoding="utf-8")
    dataset = scan_dataset(tmp_path)
    assert dataset.image(0).multiply == 3.0
    assert once_each(dataset).image(0).multiply == 1.0
    assert dataset.image(0).multiply == 3.0  # the training's own stays
