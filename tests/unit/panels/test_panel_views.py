"""Charts, the incremental reader of events, and the words of panels."""

import json
import re
from xml.etree import ElementTree

import pytest

from everydream_kit.panels.chart import bar_chart, line_chart, nice_ticks
from everydream_kit.panels.live import RunView, smooth, thin
from everydream_kit.panels.words import duration, size


def write(folder, *events, end="\n"):
    with (folder / "events.jsonl").open("a") as file:
        file.write("\n".join(json.dumps(event) for event in events) + end)


def loss(step, value=1.0, **more):
    return {"kind": "loss", "step": step, "loss": value, "lr": {"unet": 1e-6, "text_encoder": 5e-7}, **more}


def test_only_what_is_new_is_read_and_a_half_line_waits(tmp_path):
    view = RunView(tmp_path)
    assert not view.update()
    write(tmp_path, loss(1, 0.5), loss(2, 0.4), end="\n")
    write(tmp_path, loss(3, 0.3), end="")
    assert view.update()
    assert view.loss == [(1, 0.5), (2, 0.4)]
    assert not view.update()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write("\n")
    assert view.update()
    assert view.loss[-1] == (3, 0.3)
    assert set(view.learning_rates) == {"unet", "text_encoder"}


def test_a_resumed_run_replaces_the_points_after_its_checkpoint(tmp_path):
    write(tmp_path, loss(1), loss(2), loss(3), loss(2, 0.5))
    view = RunView(tmp_path)
    view.update()
    assert view.loss == [(1, 1.0), (2, 0.5)]


def test_samples_are_found_by_step(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("gs00020-000-a.jpg", "gs00010-000-a.jpg", "gs00010-001-b.jpg", "other.jpg"):
        (tmp_path / "samples" / name).touch()
    found = RunView(tmp_path).sample_steps()
    assert {step: len(paths) for step, paths in found.items()} == {10: 2, 20: 1}
    assert list(found) == [10, 20]


def test_smoothing_a_constant_gives_the_constant():
    assert [value for _, value in smooth([(1, 2.0), (2, 2.0), (3, 2.0)])] == pytest.approx([2.0, 2.0, 2.0])


def test_thinning_keeps_the_last_point():
    points = [(step, float(step)) for step in range(1000)]
    kept = thin(points, 100)
    assert len(kept) == 100 and kept[-1] == points[-1] and kept[0] == points[0]


def test_a_chart_is_well_formed_and_says_its_last_value():
    svg = line_chart({"loss": [(1, 0.5), (2, float("nan")), (3, 0.25)], "empty": []}, title="Loss <x>")
    root = ElementTree.fromstring(svg)
    assert "0.25 at step 3" in root.attrib["aria-label"]


def test_a_chart_of_one_point_is_a_dot_and_of_none_a_sentence():
    assert "<circle" in line_chart({"loss": [(1, 0.5)]}, title="Loss")
    assert "begins with the first" in line_chart({"loss": []}, title="Loss")


@pytest.mark.parametrize(
    ("last", "labels"), [(1, ["1", "2"]), (2, ["1", "2"]), (4, ["1", "2", "3", "4"]), (80, ["20", "40", "60", "80"])]
)
def test_the_axis_names_whole_steps_only(last, labels):
    svg = line_chart({"loss": [(step, 0.5) for step in range(1, last + 1)]}, title="Loss")
    assert re.findall(r'text-anchor="middle">([^<]+)<', svg) == labels


def test_bars_are_well_formed():
    ElementTree.fromstring(bar_chart([("512 × 512", 3, "3"), ("a <b>", 1, "<1")], title="Buckets"))


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.011, 0.34), (5.0, 5.0), (1e-7, 3e-6), (-2.0, 7.0), (0.0, 0.0)])
def test_ticks_enclose_the_values(low, high):
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low and ticks[-1] >= high and ticks == sorted(ticks) and 2 <= len(ticks) <= 8


@pytest.mark.parametrize(
    "seconds, words", [(None, "–"), (7.4, "7 s"), (95, "1 min 35 s"), (3000, "50 min"), (7260, "2 h 01 min")]
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("num_bytes, words", [(None, "–"), (12, "12 B"), (2_132_625_150, "2.1 GB"), (5e6, "5 MB")])
def test_sizes_in_words(num_bytes, words):
    assert size(num_bytes) == words
