"""The settings form from outside: it is the declaration, it checks at every key stroke, and it can show every value."""

import html
import json
import re
import shutil

import ipywidgets as widgets
import pytest

from everydream_kit.actions.bases import BASES, recognize_family, suggested_settings
from everydream_kit.actions.presets import PRESETS
from everydream_kit.config import TrainConfig, facts
from everydream_kit.errors import ConfigError
from everydream_kit.models.families import FAMILIES
from everydream_kit.models.family import configs_folder
from everydream_kit.panels.form import SettingsForm
from everydream_kit.panels.labels import LABELS, label_of
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
        assert field.control.description == label_of(record.name) != record.name
        assert f">{record.name}</code>" in texts(field.box)
        hint = html.unescape(re.sub("</?(span|div|code)[^>]*>", "", texts(field.box)))
        assert record.help.replace("`", "") in hint
        assert record.range_text in hint


def test_the_first_six_settings_are_open_and_the_others_folded(form):
    assert not any(fold.is_open for fold in form.folds)
    assert set(form._fields) == {"resume_ckpt", "data_root", "training_kind", "resolution", "max_epochs", "lr"}
    form.set_values({"resume_ckpt": "some/unknown"})
    assert sum(map(count_of, form.folds)) == len(parameters()) - 6


def count_of(fold):
    return int(fold.title.description.split("(")[1][:-1])


def test_folds_count_what_the_family_has_and_none_opens_to_nothing(form):
    form.set_values({"family": "z_image"})
    for fold in form.folds:
        fold.set_open(True)
        shown = [field for field in fold.content.children if field.layout.display != "none"]
        assert len(shown) == count_of(fold)
        assert (fold.box.layout.display == "none") == (not shown)
    assert any(fold.box.layout.display == "none" for fold in form.folds), "the text encoder's"
    form.set_values({"family": "sdxl"})
    assert all(fold.box.layout.display == "" for fold in form.folds)


def test_labels_are_all_different_and_each_special_one_belongs_to_a_setting():
    assert len({label_of(record.name) for record in parameters()}) == len(parameters())
    assert set(LABELS) <= {record.name for record in parameters()}


def found(form, words):
    form.search.value = words
    return [field.record.name for field in form._fields.values() if field.box in form.found.children]


def test_a_setting_is_found_by_name_label_or_help_wherever_it_is_folded(form):
    assert "ema_decay_rate" in found(form, "EMA rate")
    assert "flip_p" in found(form, "mirror")
    assert found(form, "max_epochs") == ["max_epochs"]
    assert found(form, "no such thing") == [] and "No setting" in texts(form.found)
    form.search.value = "flip_p"
    form.field("flip_p").control.value = 0.5
    assert form.config().flip_p == 0.5
    assert found(form, "") == []


def test_the_base_is_chosen_from_a_list_and_untouched_settings_follow_it(form):
    assert form.base.chooser.value == "embedded" and form.base.field.box.layout.display == "none"
    form.set_values(suggested_settings({"resume_ckpt": "embedded"}))
    sdxl = next(base for base in BASES if "XL" in base.title)
    form.base.chooser.value = sdxl.source
    assert (form.config().resume_ckpt, form.config().resolution, form.config().max_epochs) == (sdxl.source, 1024, 50)
    assert "31.9 GiB" in texts(form.base.box)
    form.field("max_epochs").control.value = "7"
    form.base.chooser.value = BASES[1].source
    assert (form.config().resolution, form.config().max_epochs) == (512, 7), "what was set by hand stays"
    form.base.chooser.value = ""
    assert form.base.field.box.layout.display == ""
    form.base.field.control.value = "my/model"
    assert form.config().resume_ckpt == "my/model" and form.base.chooser.value == ""


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_form_has_only_the_settings_of_the_bases_family(form, family, tmp_path):
    shutil.copy(configs_folder(FAMILIES[family]) / "model_index.json", tmp_path)
    form.set_values({"resume_ckpt": str(tmp_path)})
    shown = {r.name for r in parameters() if form.field(r.name).box.layout.display != "none"}
    form.set_values({})  # what was made just now is looked at as well
    shown = {name for name in shown if form.field(name).box.layout.display != "none"}
    refused = set(FAMILIES[family].refuses)
    meaningless = {name for name, one in facts().items() if family not in one.families}
    assert refused and not shown & (refused | meaningless)
    assert shown | refused | meaningless == {record.name for record in parameters()}
    name = sorted(refused)[0]
    assert name not in found(form, name)
    form.set_values({"resume_ckpt": "some/unknown"})
    assert found(form, "") == [] and name in found(form, name)
    assert all(form.field(one).box.layout.display != "none" for one in refused)
    form.set_values({"family": family})
    assert found(form, "") == [] and name not in found(form, name)


@pytest.mark.parametrize("base", [base for base in BASES if base.source != "embedded"], ids=lambda base: base.title)
def test_the_rate_follows_the_family_and_what_is_trained(form, base):
    is_flow = FAMILIES[base.family].objective == "flow"
    form.set_values(suggested_settings({"resume_ckpt": "embedded"}))
    form.base.chooser.value = base.source
    assert form.config().lr == (1e-5 if is_flow else 1e-6)
    form.field("training_kind").control.value = "lora"
    assert form.config().lr == 1e-4 and form.field("lr").control.value == "0.0001"
    form.field("lr").control.value = "3e-5"
    form.field("training_kind").control.value = "full"
    assert form.config().lr == 3e-5, "what was set by hand stays"


def test_what_training_would_refuse_stands_at_its_setting(form):
    form.set_values({"min_snr_gamma": 5.0})
    field = form.field("min_snr_gamma")
    form.show_refusal("min_snr_gamma: flow matching has weighting_scheme (Z-Image). Leave it out.")
    assert "edk-error" in texts(field.box) and "weighting_scheme" in texts(field.box)
    assert "edk-error" not in texts(form.field("lr").box) and form.errors == {}
    form.show_refusal("")
    assert "edk-error" not in texts(field.box)


def test_a_folder_of_a_family_begins_with_what_its_base_begins_with(form, tmp_path):
    shutil.copy(configs_folder(FAMILIES["flux1"]) / "model_index.json", tmp_path)
    form.set_values(suggested_settings({"resume_ckpt": "embedded"}))
    form.base.chooser.value = ""
    form.base.field.control.value = str(tmp_path)
    config = form.config()
    assert (config.resolution, config.lr, config.cond_dropout) == (1024, 1e-5, 0.0)


def test_a_preset_takes_the_familys_rate_and_sets_nothing_that_the_family_does_not_have(form):
    form.set_values({"resume_ckpt": "Tongyi-MAI/Z-Image", "training_kind": "lora"})
    form.preset.value = "low_memory"
    config = form.config()
    assert (config.gradient_checkpointing, config.disable_textenc_training) == (True, False)
    form.preset.value = "style"
    assert form.config().lr == 2e-4
    form.preset.value = "demo"
    form.preset.value = "person"
    assert (form.config().lr, form.config().resume_ckpt) == (1.5e-4, "Tongyi-MAI/Z-Image"), (
        "of the base that comes back"
    )
    form.preset.value = ""
    form.set_values({"resume_ckpt": "black-forest-labs/FLUX.1-dev", "cond_dropout": 0.0})
    form.preset.value = "style"
    assert form.config().cond_dropout == 0.0, "FLUX.1 is distilled: it has no empty prompt to learn"


def test_a_folder_that_has_a_modular_index_alone_is_recognized(tmp_path):
    shutil.copy(configs_folder(FAMILIES["anima"]) / "model_index.json", tmp_path / "modular_model_index.json")
    assert recognize_family(tmp_path) == "anima"


def test_a_setting_that_is_set_stays_in_sight_though_the_family_refuses_it(form):
    form.set_values({"family": "z_image", "clip_skip": 2})
    assert form.field("clip_skip").box.layout.display != "none"
    form.set_values({"clip_skip": 0})
    assert form.field("clip_skip").box.layout.display == "none"


def test_every_base_of_the_list_says_what_it_needs():
    for base in BASES[1:]:
        assert "GiB" in base.needs and "download" in base.needs and base.resolution in (512, 768, 1024)


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
    field = form.field("clip_skip")
    assert isinstance(field.control, widgets.IntSlider)
    form.set_values({"clip_skip": 9})
    assert isinstance(field.control, widgets.Text) and "clip_skip" in form.errors
    field.control.value = "2"
    assert form.config().clip_skip == 2


@pytest.mark.parametrize("typed", ["512, 768", "512,768", "[512, 768]"])
def test_a_list_is_typed_with_commas_and_none_of_it_is_lost(form, typed):
    control = form.field("resolution").control
    control.value = typed
    assert form.config().resolutions == (512, 768)
    form.set_values({"resolution": [512, 768]})
    assert form.field("resolution").control.value == "512, 768"
    form.field("resolution").control.value = "512, x"
    assert "whole number" in form.errors["resolution"]


def test_presets_replace_each_other_and_say_what_they_changed(form):
    form.set_values({"resume_ckpt": "my/model", "lr": 7e-6, "seed": 3, "resolution": 640})
    mine = dict(form.values)
    form.preset.value = "style"
    assert form.config().flip_p == 0.5 and form.config().lr == 2e-6
    assert "Mirror probability 0 → 0.5" in html.unescape(texts(form.presets.box))
    form.preset.value = "low_memory"
    config = form.config()
    assert (config.flip_p, config.batch_size, config.gradient_checkpointing) == (0.0, 1, True)
    assert config.lr == TrainConfig(resume_ckpt="x").lr, "nothing of the preset before is left"
    assert (config.seed, config.resume_ckpt) == (3, "my/model")
    form.field("max_steps").control.value = "9"
    form.preset.value = ""
    assert form.values == {**mine, "max_steps": 9}, "your own settings are back, with what was set by hand since"


def test_the_kits_defaults_reset_all_but_what_and_where(form):
    form.set_values({"seed": 3, "lr": 1e-3, "data_root": "elsewhere", "project_name": "jets"})
    form.preset.value = "defaults"
    config = form.config()
    assert (config.seed, config.data_root, config.project_name) == (555, "elsewhere", "jets")
    assert config.lr == suggested_settings({"resume_ckpt": "embedded"})["lr"]
    form.preset.value = ""
    assert form.config().seed == 3


def test_a_preset_is_saved_by_name_found_by_the_next_form_and_deleted(tmp_path):
    path = tmp_path / "presets.json"
    form = SettingsForm({"resume_ckpt": "embedded", "data_root": "here"}, presets_path=path)
    form.set_values({"lr": 5e-6, "seed": 9})
    form.presets.name.value = "my look"
    form.presets.save_button.click()
    other = SettingsForm({"resume_ckpt": "embedded", "data_root": "there", "grad_accum": 4}, presets_path=path)
    other.preset.value = "saved: my look"
    config = other.config()
    assert (config.lr, config.seed, config.data_root, config.grad_accum) == (5e-6, 9, "there", 1)
    other.presets.delete_button.click()
    assert "saved: my look" not in [value for _, value in SettingsForm({}, presets_path=path).preset.options]
    other.presets.name.value = "Style"
    other.presets.save_button.click()
    assert "another name" in texts(other.presets.box)
    path.write_text("{")
    broken = SettingsForm({"resume_ckpt": "embedded"}, presets_path=path)
    broken.presets.name.value = "x"
    broken.presets.save_button.click()
    assert "presets.json" in texts(broken.presets.box) and path.read_text() == "{"


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


def test_loading_a_file_keeps_what_belongs_to_the_project(form, tmp_path):
    own = {"data_root": "mine", "project_name": "jets", "logdir": "runs", "sample_prompts": "jets/sample_prompts.txt"}
    form.set_values(own)
    path = tmp_path / "train.json"
    path.write_text('{"lr": 1e-5, "logdir": "elsewhere"}')
    form.load_file(path)
    assert form.config() == TrainConfig(resume_ckpt="embedded", lr=1e-5, **{**own, "logdir": "elsewhere"})


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
