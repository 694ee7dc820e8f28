"""Bucket tables and the choice among them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everydream_kit.data.buckets import assign_bucket, assign_buckets, bucket_table, default_bucket_step, upscale_needed
from everydream_kit.errors import ConfigError

resolutions = st.integers(64, 2048)
steps = st.sampled_from([None, 8, 16, 32, 64])


@given(resolutions, steps)
def test_buckets_stay_within_the_area_on_the_grid_and_mirrored(resolution, step):
    table = bucket_table(resolution, step)
    grid = step or default_bucket_step(resolution)
    assert len(table) == len(set(table)) >= 1
    for width, height in table:
        assert width * height <= resolution**2
        assert width % grid == height % grid == 0
        assert max(width, height) <= 4.5 * min(width, height)
        assert (height, width) in table


@given(st.integers(4, 32).map(lambda n: 64 * n))
def test_every_bucket_could_not_be_one_step_taller(resolution):
    for width, height in bucket_table(resolution):
        long, short = max(width, height), min(width, height)
        assert long * (short + 64) > resolution**2


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [
        (64, [(64, 64), (80, 48), (96, 32), (112, 32), (128, 32)]),
        (256, [(256, 256), (320, 192), (384, 128), (448, 128), (512, 128)]),
        (320, [(320, 320), (384, 256), (448, 192), (512, 192), (576, 128)]),  # EveryDream 2 had 576 x 640 here
    ],
)
def test_small_tables_are_as_worked_out_by_hand(resolution, expected):
    assert [size for size in bucket_table(resolution) if size[0] >= size[1]] == expected


@pytest.mark.parametrize("resolution", [256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024, 1088, 1152])
def test_the_resolutions_of_everydream_2_have_square_and_wide_buckets(resolution):
    table = bucket_table(resolution)
    assert (resolution, resolution) in table
    assert max(width / height for width, height in table) >= 3.5


def test_entries_that_everydream_2_had_wrong_are_right():
    assert (1152, 1408) in bucket_table(1280)
    assert (1408, 1344) not in bucket_table(1280)
    assert (128, 576) in bucket_table(320)
    assert all(side % 64 == 0 for size in bucket_table(960) for side in size)


def test_128_px_has_seventeen_aspect_ratios():
    assert len(bucket_table(128)) == 17


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([64, 128, 512, 768, 1280]))
def test_the_nearest_aspect_ratio_wins_and_portraits_mirror_landscapes(width, height, resolution):
    table = bucket_table(resolution)
    bucket = assign_bucket(width, height, table)
    distances = {size: abs(math.log(width / height) - math.log(size[0] / size[1])) for size in table}
    assert distances[bucket] <= min(distances.values()) + 1e-9
    assert assign_bucket(height, width, table) == bucket[::-1]


@pytest.mark.parametrize(
    ("size", "expected"),
    # log(1.2) = 0.182; 576/448 = 0.251 and 1 = 0 away by 0.069 and 0.182. |w/h difference| would say the same here.
    [((600, 500), (576, 448)), ((500, 600), (448, 576)), ((512, 512), (512, 512)), ((9000, 10), (1024, 256))],
)
def test_chosen_buckets_at_512(size, expected):
    assert assign_bucket(*size, bucket_table(512)) == expected


def test_many_images_at_once_are_assigned_as_one_by_one():
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(1, 3000, (2, 500))
    table = bucket_table(512)
    together = assign_buckets(widths, heights, table)
    assert [table[i] for i in together] == [assign_bucket(w, h, table) for w, h in zip(widths, heights, strict=True)]


def test_no_buckets_and_too_small_resolutions_are_refused():
    with pytest.raises(ConfigError, match="the table is empty"):
        assign_bucket(10, 10, ())
    with pytest.raises(ConfigError, match="resolution 48: buckets on a grid of 64 px"):
        bucket_table(48, 64)


def test_the_enlargement_needed_is_that_of_the_shorter_side():
    scale = upscale_needed(np.array([512, 520]), np.array([470, 520]), np.array([512, 512]), np.array([512, 512]))
    assert scale.tolist() == [512 / 470, 512 / 520]


def test_of_two_equally_near_buckets_the_squarer_and_of_one_shape_the_larger_is_taken():
    table = [(64, 64), (256, 64), (64, 256), (128, 128)]
    assert assign_bucket(200, 100, table) == assign_bucket(100, 200, table) == (128, 128)
