"""The loader over whole runs: what changes nothing, and what a broken image does."""

import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from everydream_kit.data.batches import BatchRequest, LoadSettings, load_batch
from everydream_kit.data.epoch_plan import PlanSettings, plan_epoch
from everydream_kit.data.loader import captions_of_run, make_loader
from everydream_kit.data.scanning import scan_dataset

PLAN = PlanSettings(batch_size=2, grad_accum=2, resolutions=(64,), seed=7)


@pytest.fixture
def dataset(image_folder):
    return scan_dataset(image_folder, flip_p=0.5, shuffle_tags=True, cond_dropout=0.2)


def run(dataset, settings=PLAN, **options):
    options = {"seed": 7, "num_epochs": 3} | options
    with make_loader(dataset, settings, **options) as loader:
        return list(loader)


def facts(steps):
    """Everything of the batches of some steps that can be compared with ==."""
    return [
        (
            (step.epoch, step.step, step.num_steps, step.num_images),
            [
                (
                    *(batch.planned, batch.captions, batch.original_sizes, batch.crop_top_lefts, batch.paths),
                    *(batch.pixels.numpy().tobytes(), batch.loss_scale.tolist()),
                )
                for batch in step.batches
            ],
        )
        for step in steps
    ]


def test_the_number_of_workers_changes_nothing_and_no_global_generator_is_read(dataset):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    alone = run(dataset)
    assert facts(run(dataset, num_workers=2)) == facts(alone)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.random.get_state()[1].tolist() == numpy_state


def test_batches_are_what_the_plan_says(dataset):
    steps = run(dataset, num_epochs=2)
    plans = [plan_epoch(dataset, PLAN, epoch) for epoch in range(2)]
    assert [(s.epoch, s.step) for s in steps] == [(e, k) for e in range(2) for k in range(plans[e].num_steps)]
    for step in steps:
        plan = plans[step.epoch]
        assert tuple(batch.planned for batch in step.batches) == plan.step(step.step)
        assert (step.num_images, step.num_steps) == (plan.images_in_step(step.step), plan.num_steps)
        for batch in step.batches:
            width, height = batch.planned.bucket
            assert batch.pixels.shape == (len(batch.planned.draws), 3, height, width)
            assert batch.pixels.dtype == torch.uint8
            assert batch.moments is None
            assert batch.paths == [dataset.path(draw.image) for draw in batch.planned.draws]
            assert batch.loss_scale.tolist() == [1.0] * len(batch.paths)
            assert batch.mask is None


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_starts_later_gives_the_tail(dataset, num_workers):
    steps = run(dataset)
    at = next(i for i, step in enumerate(steps) if (step.epoch, step.step) == (1, 2))
    assert facts(run(dataset, start_epoch=1, start_step=2, num_epochs=2, num_workers=num_workers)) == facts(steps[at:])


def test_two_ranks_share_what_one_does(dataset):
    alone = run(dataset, PlanSettings(batch_size=4, resolutions=(64,), seed=7), num_epochs=1)
    split = PlanSettings(batch_size=2, num_ranks=2, resolutions=(64,), seed=7)
    ranks = [run(dataset, split, num_epochs=1, rank=rank) for rank in range(2)]
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert whole.num_images == first.num_images == second.num_images
        for batch, *shares in zip(whole.batches, first.batches, second.batches, strict=True):
            counted = [share.pixels[share.loss_scale > 0] for share in shares]
            assert torch.equal(torch.cat(counted), batch.pixels)


def test_epochs_differ_in_crops_tags_and_dropout(dataset):
    seen = {}
    for step in run(dataset, num_epochs=12):
        for batch in step.batches:
            for row, path in enumerate(batch.paths):
                seen.setdefault(path, []).append((batch.captions[row], batch.pixels[row].numpy().tobytes()))
    assert len(seen) == 12
    for uses in seen.values():
        assert len(uses) == 12
        assert len({caption for caption, _ in uses}) >= 4  # six orders of three tags, and the empty prompt
        assert len({pixels for _, pixels in uses}) >= 2  # mirrored or not, at least
        assert all(sorted(c.split(", ")) == sorted(uses[0][0].split(", ")) for c, _ in uses if c and uses[0][0])
    captions = [caption for uses in seen.values() for caption, _ in uses]
    assert 10 <= captions.count("") <= 50  # of 144 at 0.2: mean 29, standard deviation 4.8


def test_nothing_is_drawn_where_all_is_fixed(dataset):
    first, second = (run(dataset, num_epochs=1, fixed=True, seed=seed) for seed in (1, 2))
    assert facts(first) == facts(second)
    captions = {caption for step in first for batch in step.batches for caption in batch.captions}
    assert captions == {dataset.image(i).caption.text for i in range(len(dataset))}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_breaks_later_loses_its_weight_and_not_the_run(tmp_path, num_workers, caplog):
    for number in range(4):
        Image.effect_noise((96, 96), 80).save(tmp_path / f"{number}.png")
    dataset = scan_dataset(tmp_path)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:2000])
    loader = make_loader(
        dataset, PlanSettings(batch_size=2, resolutions=(64,)), seed=1, num_epochs=2, num_workers=num_workers
    )
    steps = list(loader)
    rows = [row for step in steps for b in step.batches for row in zip(b.paths, b.loss_scale, b.pixels, strict=True)]
    assert len(rows) == 8
    for path, weight, pixels in rows:
        broken = path.endswith("2.png")
        assert weight == (0 if broken else 1)
        assert bool((pixels == 128).all()) == broken
    assert [Path(problem.path).name for problem in loader.problems] == ["2.png"]
    assert "cannot be decoded" in loader.problems[0].cause
    assert [step.num_images for step in steps] == [2, 2, 2, 2]
    assert sum("2.png" in record.message for record in caplog.records) == 1


def test_closing_early_ends_the_workers(dataset):
    import multiprocessing

    loader = make_loader(dataset, PLAN, seed=1, num_epochs=1000, num_workers=2)
    next(loader)
    assert len(multiprocessing.active_children()) >= 2
    loader.close()
    assert next(loader, None) is None
    loader.close()
    assert multiprocessing.active_children() == []


def test_masks_and_weights_reach_the_batch(tmp_path):
    for number in range(2):
        Image.effect_noise((64, 64), 80).save(tmp_path / f"{number}.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "0.mask.png")
    (tmp_path / "loss_scale.txt").write_text("0.25")
    dataset = scan_dataset(tmp_path, loss_mask="file")
    (step,) = run(dataset, PlanSettings(batch_size=2, resolutions=(64,)), num_epochs=1, fixed=True)
    (batch,) = step.batches
    assert batch.loss_scale.tolist() == [0.25, 0.25]
    assert batch.mask.shape == (2, 1, 8, 8)
    of = {Path(path).name: row for row, path in enumerate(batch.paths)}
    assert batch.mask[of["0.png"], 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert batch.mask[of["1.png"]].min() == 1


def captions_of(steps):
    return [caption for step in steps for batch in step.batches for caption in batch.captions]


def test_the_captions_of_a_run_are_known_before_it(dataset):
    drawn = list(dict.fromkeys(captions_of(run(dataset))))
    assert captions_of_run(dataset, PLAN, LoadSettings(7), num_epochs=3, most=len(drawn)) == drawn
    assert captions_of_run(dataset, PLAN, LoadSettings(7), num_epochs=3, most=len(drawn) - 1) is None


def test_caption_variants_come_in_turn_and_change_nothing_else(image_folder):
    dataset = scan_dataset(image_folder, shuffle_tags=True, cond_dropout=0.0)
    always_new, in_turn = run(dataset, num_epochs=6), run(dataset, num_epochs=6, caption_variants=2)
    of = {0: {}, 1: {}}
    for step in in_turn:
        for batch in step.batches:
            for path, caption in zip(batch.paths, batch.captions, strict=True):
                assert of[step.epoch % 2].setdefault(path, caption) == caption
    assert of[0] != of[1]
    assert len(set(captions_of(in_turn))) <= 24 < len(set(captions_of(always_new)))
    assert [b.crop_top_lefts for s in in_turn for b in s.batches] == [
        b.crop_top_lefts for s in always_new for b in s.batches
    ]


def shout(caption):
    return caption.upper()


def test_what_goes_to_a_worker_can_be_pickled_and_gives_the_same(dataset):
    """Where processes are spawned (macOS, Windows) requests and settings travel by pickle."""
    planned = plan_epoch(dataset, PLAN, 0).step(0)[0]
    indices = [draw.image for draw in planned.draws]
    request = BatchRequest(planned, tuple(map(dataset.image, indices)), tuple(map(dataset.key, indices)))
    settings = LoadSettings(seed=1, caption_transform=shout)
    again = pickle.loads(pickle.dumps((request, settings)))
    first, second = load_batch(request, settings).batch, load_batch(*again).batch
    assert torch.equal(first.pixels, second.pixels)
    assert first.captions == second.captions
    assert all(caption == caption.upper() for caption in first.captions)


EPOCH_OF_ONE_FOLDER = """
import resource, sys
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.data.loader import make_loader
from everydream_kit.data.epoch_plan import PlanSettings

def run(folder):
    dataset = scan_dataset(folder)
    with make_loader(dataset, PlanSettings(batch_size=2, resolutions=(256,)), seed=1, num_epochs=2) as loader:
        for step in loader:
            pass

run(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_peak_memory_does_not_grow_with_the_size_of_photographs(tmp_path):
    """One epoch of 2 MP JPEGs, then one of 18 MP JPEGs in the same process: decoded whole these take 54 MB each."""
    for name, size in (("small", (1640, 1220)), ("large", (4920, 3660))):
        folder = tmp_path / name
        folder.mkdir()
        base = Image.effect_noise((410, 305), 60).resize(size, Image.Resampling.BILINEAR).convert("RGB")
        for number in range(3):
            base.save(folder / f"{number}.jpg", quality=80)
    command = [sys.executable, "-c", EPOCH_OF_ONE_FOLDER, str(tmp_path / "small"), str(tmp_path / "large")]
    grown_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown_kib < 16 * 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
