"""The settings form from outside: it is the declaration, it checks at every key stroke, and it can show every value."""

import html
import json
import re

import ipywidgets as widgets
import pytest

from everydream_kit.actions.presets import PRESETS
from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.panels.form import SettingsForm
from everydream_kit.params import parameters


@pytest.fixture
def form():
    return SettingsForm({"resume_ckpt": "embedded"})


def texts(widget):
    """All HTML below a widget."""
    if isinstance(widget, widgets.HTML):
        return widget.value
    return "".join(texts(child) for child in getattr(widget, "children", ()))


def test_every_parameter_has_a_control_with_label_help_and_range(form):
    for record in parameters():
        field = form.field(record.name)
        assert field.control.description == record.name
        hint = html.unescape(re.sub("</?(span|div|code)[^>]*>", "", texts(field.box)))
        assert record.help.replace("`", "") in hint
        assert record.range_text in hint


def test_basic_parameters_are_open_and_the_others_folded(form):
    assert not any(fold.is_open for fold in form.folds)
    assert set(form._fields) == {record.name for record in parameters() if record.knob.basic}


def test_a_folded_group_is_made_when_it_is_opened(form):
    fold = form.folds[0]
    assert fold.content.children == ()
    fold.title.click()
    assert fold.is_open and len(fold.content.children) > 0
    fold.title.click()
    assert not fold.is_open


def test_an_invalid_learning_rate_is_named_next_to_its_field_and_in_words(form):
    form.field("lr").control.value = "fast"
    assert form.errors == {"lr": "must be a number (got 'fast')"}
    assert "must be a number" in texts(form.field("lr").box)
    form.field("lr").control.value = "-1"
    assert "must be greater than 0" in form.errors["lr"]
    with pytest.raises(ConfigError, match="lr: must be greater than 0"):
        form.config()
    form.field("lr").control.value = "2e-6"
    assert form.errors == {}
    assert "edk-error" not in texts(form.field("lr").box)
    assert form.config().lr == 2e-6


def test_a_rule_about_two_settings_is_shown_at_both(form):
    form.field("timestep_start").control.value = "500"
    form.field("timestep_end").control.value = "400"
    assert set(form.errors) == {"timestep_start", "timestep_end"}
    for name in ("timestep_start", "timestep_end"):
        assert "the start must be below the end" in texts(form.field(name).box)
    form.field("timestep_end").control.value = "900"
    assert form.errors == {}


def test_a_value_that_a_slider_cannot_show_turns_it_into_a_text_field(form):
    field = form.field("resolution")
    assert isinstance(field.control, widgets.IntSlider)
    form.set_values({"resolution": [512, 768]})
    assert isinstance(field.control, widgets.Text)
    assert form.config().resolutions == (512, 768)
    field.control.value = "640"
    assert form.config().resolution == 640


def test_an_emptied_field_means_none_where_none_is_allowed(form):
    form.field("sample_steps").control.value = ""
    assert form.config().sample_steps is None
    form.field("max_epochs").control.value = ""
    assert "max_epochs" in form.errors


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_a_config_that_could_start(form, name):
    form.preset.value = name
    assert form.errors == {}
    for key, value in PRESETS[name].settings.items():
        assert getattr(form.config(), key) == value


def test_saved_settings_come_back_whole(form, tmp_path):
    form.set_values({"lr": 3e-6, "batch_size": "auto", "new_tokens": {"<cat>": "cat"}, "flip_p": 0.25})
    path = form.save_file(tmp_path / "train.json")
    other = SettingsForm({"resume_ckpt": "elsewhere"})
    assert other.load_file(path) == []
    assert other.config() == form.config()
    assert json.loads(path.read_text())["batch_size"] == "auto"


def test_loading_a_file_puts_everything_else_back_to_its_default(form, tmp_path):
    form.set_values({"grad_accum": 8})
    path = tmp_path / "train.json"
    path.write_text('{"lr": 1e-5}')
    form.load_file(path)
    assert form.config() == TrainConfig(resume_ckpt="embedded", lr=1e-5)


def test_an_everydream2_file_loads_with_its_warnings_and_a_broken_one_changes_nothing(form, tmp_path):
    old = tmp_path / "old.json"
    old.write_text('{"useadam8bit": true, "lr": 1.5e-6, "resume_ckpt": "sd15"}')
    form.file_path.value = str(old)
    form.load_button.click()
    assert form.config().lr == 1.5e-6
    assert "useadam8bit" in texts(form.box)
    broken = tmp_path / "broken.json"
    broken.write_text('{"lr": 1e-5,')
    form.file_path.value = str(broken)
    form.load_button.click()
    assert form.config().lr == 1.5e-6
    assert "not valid JSON" in texts(form.box)


def test_what_was_typed_is_escaped(form):
    form.field("lr").control.value = "<b>x"
    assert "<b>x" not in texts(form.box)


def test_a_warning_about_an_odd_value_does_not_stop_anything(form):
    form.set_values({"cond_dropout": 0.5})
    assert form.errors == {}
    assert "bleed" in texts(form.box)
