"""Disk: the saves are gone through as the saver goes through them, and what is short is said."""

from pathlib import Path

import pytest
from memory_stand_in import LinearMemory

from everydream_kit.config import TrainConfig
from everydream_kit.preflight.disk import estimate_disk, num_samples, save_steps

GB = 10**9
WEIGHTS, STATE, FILE = 4 * GB, 2 * GB, 2.132 * GB  # of the stand-in: 1.066e9 parameters in half precision


def config(**settings):
    return TrainConfig(**{"resume_ckpt": "base", "sample_steps": None, "no_save_ckpt": True, **settings})


def use(num_steps=1000, seconds=None, free=None, **settings):
    settings = config(logdir="runs", **settings)
    free = free or {Path("runs"): 10**15, Path("."): 10**15, Path("models"): 10**15}
    return estimate_disk(
        settings, LinearMemory()(settings), num_steps=num_steps, steps_per_epoch=100, seconds=seconds, free=free
    )


@pytest.mark.parametrize(
    ("settings", "seconds", "expected"),
    [
        ({}, None, [1000]),
        ({}, 3600, [333, 667, 1000]),  # every 20 minutes where nothing is said
        ({"ckpt_every_n_minutes": 30}, 3600, [500, 1000]),
        ({"save_every_n_steps": 400}, 3600, [400, 800, 1000]),
        ({"save_every_n_epochs": 3}, 3600, [300, 600, 900, 1000]),
        ({"save_every_n_epochs": 3, "save_ckpts_from_n_epochs": 5}, 3600, [600, 900, 1000]),
        ({"save_every_n_epochs": 5, "save_every_n_steps": 250}, None, [250, 500, 750, 1000]),
    ],
)
def test_steps_that_are_saved(settings, seconds, expected):
    assert save_steps(config(**settings), 1000, 100, seconds) == expected


def test_one_save_is_weights_and_state():
    disk = use()
    assert [item.name for item in disk.items] == ["checkpoints"]
    assert (disk.most_bytes, disk.last_bytes) == (WEIGHTS + STATE, WEIGHTS + STATE)


def test_the_two_latest_stay_resumable_and_a_third_is_there_while_it_is_written():
    disk = use(save_every_n_steps=250)  # four saves
    assert disk.last_bytes == 4 * WEIGHTS + 2 * STATE
    assert disk.most_bytes == 4 * WEIGHTS + 3 * STATE


def test_all_states_stay_with_save_optimizer():
    disk = use(save_every_n_steps=250, save_optimizer=True)
    assert disk.most_bytes == disk.last_bytes == 4 * (WEIGHTS + STATE)


def test_pruning_bounds_the_disk_whatever_the_length():
    short, long = (use(num_steps=n, save_every_n_steps=100, keep_last_n=2) for n in (1000, 50_000))
    assert short.last_bytes == long.last_bytes == 2 * (WEIGHTS + STATE)
    assert short.most_bytes == long.most_bytes == 3 * (WEIGHTS + STATE)


def test_the_best_stays_next_to_them():
    assert use(validation_split_mode="automatic").last_bytes == 2 * WEIGHTS + STATE


def test_single_files_go_with_their_checkpoints():
    every = {"save_every_n_steps": 250, "no_save_ckpt": False, "save_ckpt_dir": "models"}
    for keep, last, most in ((None, 4, 4), (1, 1, 2), (2, 2, 3), (9, 4, 4)):
        files = next(item for item in use(**every, keep_last_n=keep).items if item.name == "single files")
        assert files.folder == Path("models")
        assert (files.last_bytes, files.most_bytes) == pytest.approx((last * FILE, most * FILE))
    full = use(no_save_ckpt=False, save_full_precision=True)
    assert full.items[1].last_bytes == pytest.approx(2 * FILE)
    averaged = use(no_save_ckpt=False, ema_decay_rate=0.99)
    assert averaged.items[1].last_bytes == pytest.approx(2 * FILE)


def test_samples_are_counted_by_their_samples():
    settings = config(sample_steps=300, sample_before_training=True)
    assert num_samples(settings, 1000) == 5  # before, 300, 600, 900, the end
    assert num_samples(config(sample_steps=250), 1000) == 4
    disk = estimate_disk(
        config(sample_steps=250, logdir="runs"),
        LinearMemory()(settings),
        num_steps=1000,
        steps_per_epoch=100,
        seconds=None,
        grid_pixels=1_000_000,
        free={Path("runs"): 0},
    )
    assert disk.items[-1].most_bytes == 4 * 2_000_000


def test_what_will_not_fit_is_said_with_the_cure():
    free = {Path("runs"): 5 * GB, Path("models"): 10**15}
    disk = use(free=free, no_save_ckpt=False, save_ckpt_dir="models")
    (warning,) = disk.warnings
    assert warning.startswith(
        "runs: the run needs 6.0 GB, and 5.0 GB are free there. Keep fewer checkpoints (keep_last_n)"
    )
    assert not use(no_save_ckpt=False, save_ckpt_dir="models").warnings


def test_folders_on_one_file_system_share_its_room(tmp_path):
    settings = config(logdir=str(tmp_path / "a" / "runs"), save_ckpt_dir=str(tmp_path / "b"), no_save_ckpt=False)
    disk = estimate_disk(settings, LinearMemory()(settings), num_steps=10, steps_per_epoch=10, seconds=None)
    (place,) = disk.places
    assert place.needed_bytes == disk.most_bytes == WEIGHTS + STATE + 2 * LinearMemory()(settings).num_file_parameters
    assert place.free_bytes > 0
