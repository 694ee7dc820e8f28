"""Charts, the incremental reader of events, and the words of panels."""

import io
import json
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from everydream_kit.jobs import Job
from everydream_kit.panels.curve_box import CurveBox
from everydream_kit.panels.monitor import RunMonitor, latest_samples
from everydream_kit.panels.svg_charts import bar_chart, line_chart, log_ticks, nice_ticks, smooth
from everydream_kit.panels.thumbnails import image_tag
from everydream_kit.panels.viewer import answer
from everydream_kit.preflight.units import duration, size
from everydream_kit.runs import RunFolder
from everydream_kit.runs.history import RunHistory, thin


def write(folder, *events, end="\n"):
    with (folder / "events.jsonl").open("a") as file:
        file.write("\n".join(json.dumps(event) for event in events) + end)


def loss(step, value=1.0, **more):
    return {"kind": "loss", "step": step, "loss": value, "lr": {"unet": 1e-6, "text_encoder": 5e-7}, **more}


def test_only_what_is_new_is_read_and_a_half_line_waits(tmp_path):
    view = RunHistory(RunFolder(tmp_path))
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
    view = RunHistory(RunFolder(tmp_path))
    view.update()
    assert view.loss == [(1, 1.0), (2, 0.5)]


def write_sample(folder, step, index, prompt, prefix=""):
    (folder / "samples").mkdir(exist_ok=True)
    path = folder / "samples" / f"gs{step:05}-{index:03}-{prefix}{prompt[:10]}.jpg"
    Image.new("RGB", (32, 32), (step, 90, 90)).save(path)
    path.with_suffix(".txt").write_text(f"{prompt}\nnegative prompt: \nseed: 1\n")


def test_samples_know_their_step_prompt_and_weights(tmp_path):
    write_sample(tmp_path, 40, 0, "a jet over the sea")
    write_sample(tmp_path, 40, 0, "a jet over the sea", prefix="ema-")
    write_sample(tmp_path, 0, 1, "a boat")
    found = [(s.step, s.index, s.words) for s in RunHistory(RunFolder(tmp_path)).samples()]
    assert found == [(0, 1, "a boat"), (40, 0, "a jet over the sea"), (40, 0, "a jet over the sea (EMA)")]


def test_the_latest_samples_come_with_those_before_training_in_a_corner(tmp_path):
    for step in (0, 40, 80):
        write_sample(tmp_path, step, 0, "a <jet>")
        write_sample(tmp_path, step, 1, "a boat")
    samples = RunHistory(RunFolder(tmp_path)).samples()
    shown = latest_samples(samples)
    assert "Samples at step 80" in shown and shown.count("<img") == 4 and shown.count("edk-corner") == 2
    assert "a &lt;jet&gt;, before training" in shown and "<jet>" not in shown
    assert latest_samples(samples[:2]).count("<img") == 2  # nothing to compare with yet


def test_one_prompt_is_followed_through_all_steps(tmp_path):
    for step in (0, 40, 80):
        write_sample(tmp_path, step, 0, "a jet")
        write_sample(tmp_path, step, 1, "a boat")
    (tmp_path / "config.json").write_text("{}")
    monitor = RunMonitor()
    monitor.attach(Job(tmp_path))
    monitor.show(Job(tmp_path).status())
    assert monitor.strip.value == "" and monitor.step_image.value.count("<img") == 2
    monitor.prompt_choice.value = "a boat"
    monitor.step_slider.value = 1
    assert monitor.strip.value.count("<img") == 3 and monitor.step_image.value.count("<img") == 1
    assert "a boat, step 40" in monitor.step_image.value
    assert re.findall(r'edk-current".*?<figcaption>(\d+)<', monitor.strip.value) == ["40"]


def test_the_page_gets_images_that_were_shown_and_no_others(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (3000, 1500)).save(path)
    (key,) = re.findall('data-edk-image="([^"]+)"', image_tag(path, 64))
    reply, (data,) = answer({"kind": "image", "key": key, "number": "1"})
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, reply["number"]) == ((1600, 800), "1")
    reply, (data,) = answer({"kind": "file", "key": key, "number": "2"})
    assert (reply["name"], reply["type"], data) == ("a.png", "image/png", path.read_bytes())
    for other in (str(path), "", None):
        reply, buffers = answer({"kind": "file", "key": other, "number": "3"})
        assert "run the cell again" in reply["error"] and not buffers
    path.unlink()
    assert "No such file" in answer({"kind": "file", "key": key})[0]["error"]


def test_curves_are_zoomed_smoothed_and_logarithmic(tmp_path):
    write(tmp_path, *(loss(step, 2.0 ** -(step % 2)) for step in range(1, 9)))
    write(tmp_path, {"kind": "validation", "step": 8, "loss": 0.5, "ema_loss": 0.25})
    view = RunHistory(RunFolder(tmp_path))
    view.update()
    box = CurveBox()
    box.show(view)
    assert "validation 0.5" in box.chart.value and "validation, EMA 0.25" in box.chart.value
    assert "learning rate, text encoder 5e-07 at step 8" in box.chart.value
    assert "loss, smoothed" in box.chart.value and box.zoom.value == (0, 8)
    box.smoothing.value = 0.0
    assert "loss 1 at step 8" in box.chart.value
    box.zoom.value = (2, 5)
    assert "loss 0.5 at step 5" in box.chart.value
    write(tmp_path, loss(9, 0.125))
    view.update()
    box.show(view)
    assert box.zoom.value == (2, 5) and box.zoom.max == 9  # a chosen part stays
    before = box.chart.value
    box.is_log.value = True
    assert box.chart.value != before


def test_memory_is_charted_where_there_is_a_gpu(tmp_path):
    write(tmp_path, loss(1, memory_bytes=2 * 2**30), loss(2, memory_bytes=3 * 2**30))
    for device, shown in (("cpu, 2 threads", False), ("NVIDIA H100", True)):
        (tmp_path / "environment.json").write_text(json.dumps({"device": device}))
        view, box = RunHistory(RunFolder(tmp_path)), CurveBox()
        view.update()
        box.show(view)
        assert ("peak 3 at step 2" in box.memory_chart.value) == shown


@pytest.mark.parametrize(
    ("low", "high", "ticks"), [(0.03, 0.4, [0.02, 0.05, 0.1, 0.2, 0.5]), (1.0, 1.0, [1.0, 10.0]), (1e-4, 100, 7)]
)
def test_logarithmic_ticks_enclose_the_values(low, high, ticks):
    found = log_ticks(low, high)
    assert len(found) == ticks if isinstance(ticks, int) else found == pytest.approx(ticks)


def test_samples_are_found_by_step(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("gs00020-000-a.jpg", "gs00010-000-a.jpg", "gs00010-001-b.jpg", "other.jpg"):
        (tmp_path / "samples" / name).touch()
    found = [path.name for path in RunFolder(tmp_path).samples()]
    assert found == ["gs00010-000-a.jpg", "gs00010-001-b.jpg", "gs00020-000-a.jpg"]


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
