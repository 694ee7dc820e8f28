"""The epoch plan: laws that hold for every dataset and every setting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everydream_kit.data.buckets import bucket_table, upscale_needed
from everydream_kit.data.dataset import Dataset, DatasetBuilder, Defaults
from everydream_kit.data.epoch_plan import PlanSettings, num_empty_epochs, plan_epoch
from everydream_kit.errors import ConfigError, DataError
from everydream_kit.training.step import share_of_step

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

images_of_a_dataset = st.lists(
    st.fixed_dictionaries(
        {
            "width": st.sampled_from([64, 100, 128, 200, 256, 512]),
            "height": st.sampled_from([64, 100, 128, 200, 256, 512]),
            "multiply": st.sampled_from([0, 0.25, 0.5, 1, 1, 1, 1.75, 2, 3]),
            "batch_id": st.sampled_from([None, None, "a", "b"]),
            "rating": st.sampled_from([0.5, 1.0, 2.0]),
        }
    ),
    min_size=1,
    max_size=40,
).filter(lambda rows: any(row["multiply"] >= 1 for row in rows))
plan_settings = st.builds(
    PlanSettings,
    batch_size=st.integers(1, 5),
    grad_accum=st.integers(1, 4),
    resolutions=st.sampled_from([(128,), (64, 128), (128, 256)]),
    seed=st.integers(0, 3),
    num_ranks=st.integers(1, 3),
)


def make_dataset(rows: list[dict]) -> Dataset:
    builder = DatasetBuilder(["/images"])
    for number, row in enumerate(rows):
        builder.add(f"p{number}.png", **row)
    return builder.build(Defaults())


def square_dataset(count: int, **columns: float) -> Dataset:
    return make_dataset([{"width": 128, "height": 128, **columns} for _ in range(count)])


def all_steps(plan, rank=0):
    return [plan.step(k, rank) for k in range(plan.num_steps)]


def all_draws(plan):
    """Every use with its bucket, over all ranks, fillers skipped."""
    return [
        (draw.image, draw.repeat, batch.bucket)
        for rank in range(plan.settings.num_ranks)
        for step in all_steps(plan, rank)
        for batch in step
        for draw in batch.draws
        if not draw.filler
    ]


@quick
@given(images_of_a_dataset, st.integers(1, 5), st.integers(1, 4))
def test_a_plan_uses_each_image_exactly_its_repeats(rows, batch_size, grad_accum):
    for row in rows:
        row["multiply"] = int(row["multiply"])
    if not any(row["multiply"] for row in rows):
        rows[0]["multiply"] = 1
    plan = plan_epoch(make_dataset(rows), PlanSettings(batch_size, grad_accum, (128,)), epoch=1)
    uses = Counter(image for image, _, _ in all_draws(plan))
    assert [uses[i] for i in range(len(rows))] == [row["multiply"] for row in rows]
    assert plan.num_uses().tolist() == [row["multiply"] for row in rows]
    assert plan.num_images == sum(row["multiply"] for row in rows)


@quick
@given(images_of_a_dataset, plan_settings, st.integers(0, 5))
def test_addresses_are_unique_and_repeats_count_from_zero(rows, chosen, epoch):
    draws = all_draws(plan_epoch(make_dataset(rows), chosen, epoch))
    repeats: dict[int, set[int]] = {}
    for image, repeat, _ in draws:
        assert repeat not in repeats.setdefault(image, set())
        repeats[image].add(repeat)
    assert all(seen == set(range(len(seen))) for seen in repeats.values())


@quick
@given(images_of_a_dataset, plan_settings)
def test_a_batch_holds_images_of_its_bucket_only(rows, chosen):
    dataset = make_dataset(rows)
    plan = plan_epoch(dataset, chosen, 0)
    for image, _, bucket in all_draws(plan):
        row = rows[image]
        tables = [bucket_table(r, chosen.bucket_step) for r in chosen.resolutions]
        distance = abs(np.log(row["width"] / row["height"]) - np.log(bucket[0] / bucket[1]))
        best = min(
            abs(np.log(row["width"] / row["height"]) - np.log(w / h))
            for table in tables
            if bucket in table
            for w, h in table
        )
        assert distance <= best + 1e-9


@quick
@given(images_of_a_dataset, plan_settings, st.integers(0, 3))
def test_no_batch_or_window_is_larger_than_asked_and_images_in_step_counts_them(rows, chosen, epoch):
    plan = plan_epoch(make_dataset(rows), chosen, epoch)
    for k in range(plan.num_steps):
        shares = [plan.step(k, rank) for rank in range(chosen.num_ranks)]
        assert len({len(share) for share in shares}) == 1
        assert 1 <= len(shares[0]) <= chosen.grad_accum
        assert all(1 <= len(batch.draws) <= chosen.batch_size for share in shares for batch in share)
        real = sum(not draw.filler for share in shares for batch in share for draw in batch.draws)
        assert plan.images_in_step(k) == real > 0
    assert sum(plan.images_in_step(k) for k in range(plan.num_steps)) == plan.num_images


@quick
@given(images_of_a_dataset, plan_settings, st.integers(0, 3))
def test_the_gradient_of_every_use_has_the_same_weight_whatever_its_bucket_and_step(rows, chosen, epoch):
    plan = plan_epoch(make_dataset(rows), chosen, epoch)
    weights = []
    for k in range(plan.num_steps):
        for batch in (batch for rank in range(chosen.num_ranks) for batch in plan.step(k, rank)):
            losses = torch.ones(len(batch.draws), requires_grad=True)
            scale = torch.tensor([float(not draw.filler) for draw in batch.draws])
            share_of_step(losses, scale, plan.images_in_fullest_step).backward()
            weights += [g for g, draw in zip(losses.grad.tolist(), batch.draws, strict=True) if not draw.filler]
    assert len(weights) == plan.num_images
    assert max(weights) <= 1.0001 * min(weights)
    # the fullest step is a mean over its images
    assert max(plan.images_in_step(k) for k in range(plan.num_steps)) * weights[0] == pytest.approx(1, rel=1e-5)


@quick
@given(images_of_a_dataset, plan_settings)
def test_positions_number_the_images_of_a_step_through(rows, chosen):
    plan = plan_epoch(make_dataset(rows), chosen, 0)
    for k in range(plan.num_steps):
        taken = [
            batch.position + row
            for rank in range(chosen.num_ranks)
            for batch in plan.step(k, rank)
            for row, draw in enumerate(batch.draws)
            if not draw.filler
        ]
        assert sorted(taken) == list(range(plan.images_in_step(k)))


@quick
@given(images_of_a_dataset, plan_settings, st.integers(0, 3), st.data())
def test_resuming_at_any_step_gives_the_tail(rows, chosen, epoch, data):
    dataset = make_dataset(rows)
    whole = all_steps(plan_epoch(dataset, chosen, epoch))
    start = data.draw(st.integers(0, len(whole) - 1))
    again = plan_epoch(dataset, chosen, epoch)
    assert [again.step(k) for k in range(start, again.num_steps)] == whole[start:]


@quick
@given(images_of_a_dataset, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_ranks_together_make_the_steps_of_one_rank_with_their_batch_size(rows, num_ranks, per_rank, grad_accum):
    dataset = make_dataset(rows)
    one = plan_epoch(dataset, PlanSettings(per_rank * num_ranks, grad_accum, (128,)), 0)
    many = plan_epoch(dataset, PlanSettings(per_rank, grad_accum, (128,), num_ranks=num_ranks), 0)
    assert one.num_steps == many.num_steps
    for k in range(one.num_steps):
        for index, whole in enumerate(one.step(k)):
            shares = [many.step(k, rank)[index] for rank in range(num_ranks)]
            assert {share.bucket for share in shares} == {whole.bucket}
            real = [draw for share in shares for draw in share.draws if not draw.filler]
            assert tuple(real) == whole.draws


@quick
@given(images_of_a_dataset, plan_settings, st.integers(0, 3))
def test_adding_an_image_changes_neither_the_uses_nor_the_order_of_the_others(rows, chosen, epoch):
    before = plan_epoch(make_dataset(rows), chosen, epoch)
    after = plan_epoch(make_dataset([*rows, {"width": 128, "height": 128, "multiply": 1}]), chosen, epoch)
    assert after.num_uses()[:-1].tolist() == before.num_uses().tolist()


@quick
@given(st.floats(0, 4, allow_nan=False), st.integers(1, 40), st.integers(0, 50))
def test_a_fractional_multiply_gives_every_image_its_exact_share_over_epochs(multiply, num_epochs, seed):
    rows = [{"width": 128, "height": 128, "multiply": multiply}] * 7 + [{"width": 128, "height": 128, "multiply": 1}]
    dataset = make_dataset(rows)
    chosen = PlanSettings(2, 1, (128,), seed)
    uses = sum(plan_epoch(dataset, chosen, epoch).num_uses() for epoch in range(num_epochs))
    assert np.all(np.abs(uses[:7] - multiply * num_epochs) <= 1)
    assert uses[7] == num_epochs


@quick
@given(st.lists(st.floats(0, 2, allow_nan=False), min_size=1, max_size=8), st.integers(1, 30), st.integers(0, 9))
def test_fractions_take_turns_so_that_an_epoch_has_their_sum_rounded(multiplies, num_epochs, seed):
    dataset = make_dataset([{"width": 128, "height": 128, "multiply": m} for m in [*multiplies, 1]])
    uses = [plan_epoch(dataset, PlanSettings(2, 1, (128,), seed), epoch).num_uses() for epoch in range(num_epochs)]
    shares = np.sum(uses, axis=0) - np.array([*multiplies, 1]) * num_epochs
    assert np.all(np.abs(shares) <= 1)
    total = sum(multiplies) + 1
    for in_epoch in np.sum(uses, axis=1):
        assert np.floor(total - 1e-6) <= in_epoch <= np.ceil(total)


def test_three_halves_are_two_uses_and_one_in_turn():
    # EveryDream 2 draws floor(1.5) = 1; phases of their own gave 3, 0, 3, 0 with this seed, and the run ended
    dataset = square_dataset(3, multiply=0.5)
    plans = [plan_epoch(dataset, PlanSettings(2, 1, (128,), seed=555), epoch) for epoch in range(6)]
    assert [plan.num_images for plan in plans] == [2, 1, 2, 1, 2, 1]
    assert sum(plan.num_uses() for plan in plans).tolist() == [3, 3, 3]


def test_an_epoch_without_an_image_is_a_plan_without_steps():
    dataset = square_dataset(1, multiply=0.5)
    plans = [plan_epoch(dataset, PlanSettings(2, 2, (128,)), epoch) for epoch in range(4)]
    assert [plan.num_steps for plan in plans] == [1, 0, 1, 0]
    assert [num_empty_epochs(dataset, PlanSettings(2), range(e, 4)) for e in range(4)] == [0, 1, 0, 1]


def test_a_fraction_takes_turns_evenly_over_the_images():
    dataset = square_dataset(4000, multiply=0.3)
    chosen = PlanSettings(4, 1, (128,))
    first = plan_epoch(dataset, chosen, 0).num_uses()
    # 0.3 of each quarter of the list, to 4 standard deviations: sqrt(1000 * 0.3 * 0.7) = 14.5
    assert all(abs(quarter.sum() - 300) < 58 for quarter in np.split(first, 4))
    ten = sum(plan_epoch(dataset, chosen, epoch).num_uses() for epoch in range(10))
    assert set(ten.tolist()) == {3}


def test_multiply_zero_switches_off_and_everything_off_is_an_error():
    dataset = make_dataset([{"width": 128, "height": 128, "multiply": m} for m in (0, 1)])
    assert plan_epoch(dataset, PlanSettings(2, 1, (128,)), 0).num_uses().tolist() == [0, 1]
    with pytest.raises(DataError, match=r"all 3 images are switched off"):
        plan_epoch(square_dataset(3, multiply=0), PlanSettings(2), 0)
    with pytest.raises(DataError, match="no usable image"):
        plan_epoch(make_dataset([]), PlanSettings(2), 0)


@quick
@given(images_of_a_dataset, st.integers(1, 4), st.integers(0, 3))
def test_a_full_window_mixes_buckets_only_when_no_bucket_can_fill_it(rows, grad_accum, epoch):
    for row in rows:
        row["batch_id"] = None
    plan = plan_epoch(make_dataset(rows), PlanSettings(2, grad_accum, (128,)), epoch)
    full = Counter()
    mixed = Counter()
    for step in all_steps(plan):
        same = len({batch.bucket for batch in step}) == 1 and all(len(batch.draws) == 2 for batch in step)
        for batch in step:
            full[batch.bucket] += 1
            mixed[batch.bucket] += not (same and len(step) == grad_accum)
    # what is left over of a bucket: fewer than grad_accum full batches, and one short one
    assert all(count <= (grad_accum - 1) + 1 for count in mixed.values())
    assert plan.num_steps == -(-plan.num_batches // grad_accum)


def test_full_batches_of_a_bucket_fill_windows_of_their_own_first():
    # 4 full batches of each of two buckets, windows of 3: one pure window each, and the two that are left over together
    rows = [{"width": w, "height": 128} for w in (128, 256) for _ in range(8)]
    plan = plan_epoch(make_dataset(rows), PlanSettings(2, 3, (128,)), 0)
    windows = sorted(sorted(batch.bucket[0] for batch in step) for step in all_steps(plan))
    assert windows == [[128, 128, 128], [128, 176], [176, 176, 176]]


@quick
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6),
    st.integers(0, 20),
    st.integers(1, 3),
    st.integers(1, 5),
)
def test_batches_of_a_name_share_windows_whatever_their_buckets(names, num_unnamed, batch_size, grad_accum):
    """Each name has so many whole batches in each of two buckets."""
    rows = [
        {"width": 128, "height": height, "batch_id": f"n{number}"}
        for number, counts in enumerate(names)
        for height, count in zip((128, 256), counts, strict=True)
        for _ in range(count * batch_size)
    ] + [{"width": 128, "height": 128} for _ in range(num_unnamed + 1)]
    plan = plan_epoch(make_dataset(rows), PlanSettings(batch_size, grad_accum, (128,)), 0)
    windows = [Counter(rows[batch.draws[0].image].get("batch_id") for batch in step) for step in all_steps(plan)]
    for number, counts in enumerate(names):
        found = sorted(window[f"n{number}"] for window in windows if window[f"n{number}"])
        full, left = divmod(sum(counts), grad_accum)
        assert found == [left] * (left > 0) + [grad_accum] * full
    assert plan.num_steps <= -(-plan.num_batches // grad_accum) + len(names)


def test_batches_of_one_batch_id_share_a_window_in_every_epoch():
    # two batches of each name, one square and one upright, among unnamed ones: as EveryDream 2, 50 of 50 epochs
    rows = [
        {"width": 128, "height": height, "batch_id": name}
        for name in ("a", "b", None, None)
        for height in (128, 256)
        for _ in range(2)
    ]
    for epoch in range(50):
        plan = plan_epoch(make_dataset(rows), PlanSettings(2, 2, (128,)), epoch)
        windows = [{rows[d.image]["batch_id"] for batch in step for d in batch.draws} for step in all_steps(plan)]
        assert sorted(windows, key=str) == sorted([{"a"}, {"b"}, {None}, {None}], key=str)
        assert plan.num_steps == 4


def test_a_name_with_fewer_batches_than_a_window_is_not_divided_and_the_unnamed_fill_it_up():
    # windows of 3: two batches of "a" and two of "b" cannot share one; 2 unnamed batches fill both
    rows = [{"width": 128, "height": 128, "batch_id": name} for name in ("a", "b", None) for _ in range(4)]
    for epoch in range(10):
        plan = plan_epoch(make_dataset(rows), PlanSettings(2, 3, (128,)), epoch)
        windows = [sorted(rows[batch.draws[0].image]["batch_id"] or "" for batch in step) for step in all_steps(plan)]
        assert sorted(windows) == [["", "a", "a"], ["", "b", "b"]]


def test_epochs_seeds_and_purposes_give_different_orders():
    dataset = square_dataset(50)
    orders = {
        tuple(plan_epoch(dataset, PlanSettings(5, 1, (128,), seed), epoch).images.tolist())
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_named_batches_stay_together_and_their_rest_joins_the_unnamed():
    rows = [{"width": 128, "height": 128, "batch_id": "a" if i % 2 else None} for i in range(14)]  # 7 of each
    plan = plan_epoch(make_dataset(rows), PlanSettings(3, 1, (128,)), 0)
    names = [sorted(rows[d.image]["batch_id"] or "-" for d in step[0].draws) for step in all_steps(plan)]
    assert names.count(["a", "a", "a"]) == 2
    assert sum(len(name) for name in names) == 14
    assert sorted(len(name) for name in names) == [2, 3, 3, 3, 3]  # the seventh "a" joined the others


def test_ratings_leave_the_asked_share_out_by_the_last_epoch_and_prefer_the_better():
    rows = [{"width": 128, "height": 128, "rating": 1 if i < 500 else 9} for i in range(1000)]
    dataset = make_dataset(rows)
    chosen = PlanSettings(4, 1, (128,), rated_dropout_percent=50, max_epochs=11)
    counts = [plan_epoch(dataset, chosen, epoch).num_images for epoch in range(11)]
    assert counts == [1000 - 50 * epoch for epoch in range(11)]
    last = plan_epoch(dataset, chosen, 10).num_uses()
    assert last.max() == 1  # without replacement
    assert last[:500].sum() < 150 < 350 < last[500:].sum()


def test_equal_ratings_are_drawn_evenly():
    dataset = square_dataset(400)
    chosen = PlanSettings(4, 1, (128,), rated_dropout_percent=50, max_epochs=2)
    uses = sum(
        plan_epoch(dataset, PlanSettings(4, 1, (128,), seed, rated_dropout_percent=50, max_epochs=2), 1).num_uses()
        for seed in range(100)
    )
    assert plan_epoch(dataset, chosen, 1).num_images == 200
    # 100 seeds * 100 images * 1/2 = 5000 a quarter; standard deviation about 43
    assert all(abs(quarter.sum() - 5000) < 200 for quarter in np.split(uses, 4))


def test_an_image_goes_into_every_class_that_it_is_big_enough_for_and_at_least_the_smallest():
    rows = [{"width": side, "height": side, "multiply": 2} for side in (64, 128, 200, 256)]
    plan = plan_epoch(make_dataset(rows), PlanSettings(2, 1, (256, 128)), 0)
    found = Counter((rows[image]["width"], bucket[0]) for image, _, bucket in all_draws(plan))
    assert found == {(64, 128): 2, (128, 128): 2, (200, 128): 2, (256, 128): 2, (256, 256): 2}
    assert upscale_needed(np.array([200]), np.array([200]), np.array([256]), np.array([256]))[0] == 256 / 200


def test_the_schedule_names_step_size_and_path_of_every_use(tmp_path):
    dataset = make_dataset([{"width": 128, "height": 128, "multiply": m} for m in (1, 2)])
    plan = plan_epoch(dataset, PlanSettings(2, 1, (128,)), 0)
    plan.write_schedule(tmp_path / "ep0_batch_schedule.txt", dataset)
    lines = (tmp_path / "ep0_batch_schedule.txt").read_text().splitlines()
    assert sorted(line.rpartition("path:")[2] for line in lines) == ["/images/p0.png"] + ["/images/p1.png"] * 2
    assert {line.partition(" path:")[0] for line in lines} == {
        f"step:{k:05}, wh:[128, 128], r:{plan.images_in_step(k) == 1}," for k in (0, 1)
    }
    plan.write_ledger(tmp_path / "ledger.txt", dataset)
    assert (tmp_path / "ledger.txt").read_text() == "1\t/images/p0.png\n2\t/images/p1.png\n"


@pytest.mark.parametrize("name", ["batch_size", "grad_accum", "num_ranks", "max_epochs"])
def test_counts_below_one_are_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"{name}: must be at least 1 "):
        PlanSettings(**{"batch_size": 1, name: 0})


def test_impossible_resolutions_shares_and_steps_are_refused():
    with pytest.raises(ConfigError, match="resolutions: at least one"):
        PlanSettings(1, resolutions=())
    with pytest.raises(ConfigError, match="rated_dropout_percent: must be 0 to 100"):
        PlanSettings(1, rated_dropout_percent=101)
    plan = plan_epoch(square_dataset(3), PlanSettings(1, resolutions=(128,)), 0)
    with pytest.raises(IndexError, match="step 3, rank 0"):
        plan.step(3)
    with pytest.raises(IndexError, match="step 0, rank 1"):
        plan.step(0, rank=1)
