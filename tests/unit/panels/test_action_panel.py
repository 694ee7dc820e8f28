"""The panel of any action: its form comes from the record, its work runs in the background, its report is shown."""

import html

import pytest
from panel_parts import image, texts
from PIL import Image

from everydream_kit import panels
from everydream_kit.actions.table import ACTIONS, TIDY_STEPS
from everydream_kit.errors import ConfigError


def finish(panel):
    panel.task.job.watch(interval_seconds=0.05)
    panel.refresh()


@pytest.mark.parametrize("name", [*ACTIONS, *TIDY_STEPS])
def test_every_action_has_a_form_with_a_control_for_each_argument(name, tmp_path):
    panel = panels.action(tmp_path / "jets", name)
    arguments = {**ACTIONS, **TIDY_STEPS}[name].arguments
    assert panel.controls.keys() == arguments.keys()
    shown = html.unescape(texts(panel.box))
    assert [one.name for one in arguments.values() if one.help.replace("`", "") not in shown] == []


def test_what_is_left_as_it_is_is_left_to_the_function(tmp_path):
    panel = panels.action(tmp_path / "jets", "sample")
    panel.controls["checkpoint"].value, panel.controls["prompts"].value = "a\nb\n", "a jet, at night"
    assert panel.given()["checkpoint"] == ["a", "b"]
    assert panel.given()["prompts"] == ["a jet, at night"]
    assert panel.given()["scheduler"] == "ddim"
    assert not {"cfgs", "num_inference_steps", "width", "lora", "progress"} & panel.given().keys()
    panel.controls["cfgs"].value, panel.controls["width"].value = "3, 7.5", "96"
    assert (panel.given()["cfgs"], panel.given()["width"]) == ([3.0, 7.5], 96)
    push = panels.action(tmp_path / "jets", "push")
    push.controls["run_or_checkpoint"].value, push.controls["repo_id"].value = "x", "me/x"
    assert "precision" not in push.given() and push.given()["what"] == ["diffusers", "samples", "training"]
    push.controls["precision"].value = "bf16"
    assert push.given()["precision"] == "bf16"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "Folder: is needed: dataset folder."),
        ({"folder": "x", "target": "y", "megapixels": "many"}, "Megapixels: must be a number (got &#x27;many&#x27;)"),
        ({"folder": "x", "target": "y", "quality": "9.5"}, "Quality: must be a whole number (got &#x27;9.5&#x27;)"),
    ],
)
def test_what_cannot_be_read_is_said_and_nothing_starts(tmp_path, values, words):
    panel = panels.action(tmp_path / "jets", "resize")
    for name, value in values.items():
        panel.controls[name].value = value
    panel.start_button.click()
    assert words in panel.message.value
    assert panel.task.job is None


def test_an_unknown_action_names_those_that_there_are(tmp_path):
    with pytest.raises(ConfigError, match=r"fly: no such action; there are prepare, .*, undo\."):
        panels.action(tmp_path / "jets", "fly")


@pytest.mark.background
def test_a_step_runs_in_the_background_and_its_report_is_shown(tmp_path):
    for number in range(3):
        image(tmp_path / "photos" / f"{number}.png", size=(640, 480))
    panel = panels.action(tmp_path / "jets", "resize")
    panel.controls["folder"].value, panel.controls["target"].value = str(tmp_path / "photos"), str(tmp_path / "small")
    panel.controls["megapixels"].value = "0.1"
    panel.start_button.click()
    assert panel.start_button.disabled and not panel.stop_button.disabled
    finish(panel)
    assert "<pre" in panel.result.value and "3 resized" in panel.result.value, panel.message.value
    assert not panel.start_button.disabled and panel.bar.value == panel.bar.max
    with Image.open(tmp_path / "small" / "0.png") as small:
        assert small.size == (365, 274)
    panel.controls["folder"].value = str(tmp_path / "nowhere")
    panel.start_button.click()
    finish(panel)
    assert "nowhere" in panel.message.value
