"""Compare and share panels."""

import os
import shutil
from pathlib import Path

import pytest
from hub_runs import make_run, write_checkpoint
from panel_parts import make_run_project, texts
from PIL import Image

from everydream_kit.actions.comparison import SAVED_FILE, Comparison
from everydream_kit.actions.converting import export
from everydream_kit.actions.project import Project
from everydream_kit.errors import ConfigError, ExportError, JobError
from everydream_kit.export.checkpoint_formats import FORMATS, count_weights
from everydream_kit.panels.compare_panel import ComparePanel
from everydream_kit.panels.share_panel import SharePanel
from everydream_kit.runs import RunFolder


@pytest.fixture
def project(tmp_path):
    return make_run_project(tmp_path / "jets")


def make_images(comparison):
    for checkpoint in comparison.checkpoints:
        for prompt, cfg in comparison.missing(checkpoint):
            path = comparison.image_path(checkpoint, prompt, cfg)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (90, 90, 200)).save(path)


def test_compare_offers_the_base_and_the_checkpoints_and_shows_what_is_drawn(project):
    panel = ComparePanel(project)
    assert next(iter(panel.choices)) == "base: embedded"
    assert panel.prompts.value == "a jet"
    panel.cfgs.value, panel.size.value = "1, 4.5", 64
    asked = panel.asked()
    assert (len(asked.checkpoints), asked.cfgs, asked.num_images) == (2, (1.0, 4.5), 4)
    make_images(asked)
    panel.generate_button.click()
    assert panel.job is None  # everything already exists
    assert panel.grid.value.count("data:image/jpeg") == 4
    assert panel.pair.value.count("data:image/jpeg") == 2
    assert "before · base: embedded" in panel.pair.value and "after · jets-ep01-gs00020" in panel.pair.value
    again = ComparePanel(project)
    assert again.pair.value.count("data:image/jpeg") == 2


@pytest.mark.parametrize(
    ("base", "cfg", "steps"),
    [("embedded", "4", 20), ("black-forest-labs/FLUX.1-dev", "3.5", 28), ("Tongyi-MAI/Z-Image", "5", 30)],
)
def test_compare_begins_with_what_is_usual_for_the_family_of_the_base(project, base, cfg, steps):
    Project(project).save_settings({"resume_ckpt": base})
    panel = ComparePanel(project)
    assert (panel.cfgs.value, panel.steps.value) == (cfg, steps)


def test_a_checkpoint_that_came_after_the_last_comparison_is_ticked(project):
    run = next((project / "logs").iterdir())
    first = ComparePanel(project)
    make_images(first.asked())
    first.generate_button.click()
    shutil.copytree(run / "ckpts" / "jets-ep01-gs00020", run / "ckpts" / "jets-ep02-gs00040")
    assert [label for label, check in ComparePanel(project).checks.items() if check.value] == [
        "base: embedded",
        "jets-ep01-gs00020",
        "jets-ep02-gs00040",
    ]


def test_compare_says_what_cannot_be_drawn(project):
    panel = ComparePanel(project)
    panel.cfgs.value = "much"
    panel.generate_button.click()
    assert "numbers with commas between" in panel.message.value
    with pytest.raises(ConfigError, match="multiple of 8"):
        Comparison(str(project), ("embedded",), ("a",), size=100)


def test_an_image_depends_on_everything_that_it_is_drawn_from(project):
    one = Comparison(str(project), ("embedded",), ("a jet",), seed=1)
    paths = {one.image_path("embedded", "a jet", 7.0), one.image_path("embedded", "a jet", 4.0)}
    for changes in ({"seed": 2}, {"size": 256}, {"num_inference_steps": 5}, {"clip_skip": 2}):
        other = Comparison(**{**one.__dict__, **changes})
        paths.add(other.image_path("embedded", "a jet", 7.0))
    checkpoint = next((project / "logs").glob("*/ckpts/*"))
    before = one.image_path(str(checkpoint), "a jet", 7.0)
    os.utime(checkpoint / "model_index.json", (1, 1))
    assert one.image_path(str(checkpoint), "a jet", 7.0) != before
    assert len(paths) == 6
    assert Comparison.load(one.save()) == one
    for broken, message in (
        ("{", "line 1"),
        ('{"folder": 1, "banana": 2}', "not a saved comparison"),
        ("[]", "a list"),
    ):
        one.save().write_text(broken, "utf-8")
        with pytest.raises(ConfigError, match=f"{SAVED_FILE}.*{message}"):
            Comparison.load(Path(one.folder) / SAVED_FILE)


ELSEWHERE = {"host": "elsewhere", "pid": 4242, "place": "another boot", "started": "1"}
"""Of a process that cannot be looked at from here: it lives as long as its heartbeat is fresh."""
FOLDERS = {ComparePanel: "compare", SharePanel: "share"}


def pretend(project, kind, **facts):
    """A background task of another machine that shares the disk, and what it says of itself."""
    folder = RunFolder(project / FOLDERS[kind])
    folder.folder.mkdir(exist_ok=True)
    folder.write_status({**ELSEWHERE, "state": "running", **facts})


def test_a_press_that_starts_nothing_keeps_the_last_comparison(project):
    panel = ComparePanel(project)
    make_images(panel.asked())
    panel.generate_button.click()
    saved = project / "compare" / "comparison.json"
    before = saved.read_text()
    pretend(project, ComparePanel)  # another panel has started in between
    panel.prompts.value = "something else"
    panel.generate_button.click()
    assert "still running" in panel.message.value
    assert saved.read_text() == before and not list(saved.parent.glob("request-*"))
    assert panel.comparison.prompts == ("a jet",)


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_panel_that_is_made_again_follows_its_task_to_the_end(project, kind):
    pretend(project, kind, step=3, num_steps=8, message="3 of 8 images.")
    panel = kind(project)
    panel.refresh()
    assert "3 of 8 images." in panel.message.value and panel.bar.layout.visibility == "visible"
    button = panel.generate_button if kind is ComparePanel else panel.push_button
    assert button.disabled
    pretend(project, kind, state="finished", message="All is there.", url="https://hub.example/me/jets")
    panel.refresh()
    assert "All is there." in panel.message.value and not button.disabled
    if kind is SharePanel:
        assert 'href="https://hub.example/me/jets"' in panel.result.value


@pytest.fixture
def look_always(monkeypatch):
    """Each beat looks for checkpoints, however long the last look took."""
    monkeypatch.setattr("everydream_kit.actions.checkpoint_list.LOOKING_SHARE", 1.0)


@pytest.mark.usefixtures("look_always")
def test_the_sentence_of_an_empty_project_goes_with_the_first_checkpoint(project):
    (project / "logs").rename(project / "elsewhere")
    compare = ComparePanel(project)
    assert "no checkpoint yet" in compare.message.value
    (project / "elsewhere").rename(project / "logs")
    compare.refresh()
    assert len(compare.checks) == 2
    assert "no checkpoint yet" not in compare.message.value


@pytest.mark.usefixtures("look_always")
def test_checkpoints_of_the_run_appear_as_they_come(project):
    run = RunFolder(next((project / "logs").iterdir()))
    compare, share = ComparePanel(project), SharePanel(project)
    compare.checks["base: embedded"].value = False
    assert share.checkpoint.value.endswith("gs00020")
    write_checkpoint(run, 40, seed=1)
    compare.refresh()
    share.refresh()
    ticks = {label: check.value for label, check in compare.checks.items()}
    assert ticks == {"base: embedded": False, "jets-ep01-gs00020": True, "jets-ep01-gs00040": True}
    assert compare.winner.value.endswith("gs00040") and share.checkpoint.value.endswith("gs00040")


@pytest.mark.usefixtures("look_always")
def test_choices_of_a_person_stay_when_checkpoints_come(project):
    run = RunFolder(next((project / "logs").iterdir()))
    write_checkpoint(run, 40, seed=1)
    compare, share = ComparePanel(project), SharePanel(project)
    share.checkpoint.value = compare.winner.value = str(run.checkpoints_folder / "jets-ep01-gs00020")
    share.file_name.value = "mine.safetensors"
    write_checkpoint(run, 60, seed=2)
    compare.refresh()
    share.refresh()
    assert len(share.checkpoint.options) == len(compare.winner.options) == 3
    assert share.checkpoint.value.endswith("gs00020") and compare.winner.value.endswith("gs00020")
    assert share.file_name.value == "mine.safetensors"


def test_the_latest_checkpoint_is_preselected_as_the_winner(project):
    write_checkpoint(RunFolder(next((project / "logs").iterdir())), 40, seed=1)
    assert ComparePanel(project).winner.value.endswith("gs00040")


def test_the_comparison_waits_for_the_end_of_training_and_then_begins(project):
    run = RunFolder(next((project / "logs").iterdir()))
    run.write_status({**ELSEWHERE, "state": "running", "step": 5, "num_steps": 20})
    panel = ComparePanel(project)
    panel.run()
    assert "Step 5 of 20. Before and after appears here when training ends." in panel.message.value
    run.write_status({**ELSEWHERE, "state": "stopped", "step": 6, "num_steps": 20})
    panel.refresh()
    assert "has not finished (stopped)" in panel.message.value and panel.comparison is None
    make_images(panel.asked())
    run.write_status({**ELSEWHERE, "state": "finished", "step": 20, "num_steps": 20})
    panel.refresh()
    assert panel.pair.value.count("data:image/jpeg") == 2


def test_a_double_click_on_generate_is_one_sampling_without_an_error(project):
    panel = ComparePanel(project)
    panel.generate_button.click()
    panel.generate_button.click()
    assert "edk-note bad" not in panel.message.value
    panel.stop()


def test_the_first_prompts_are_captions_of_the_dataset_that_the_project_trains_on(project, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.txt").write_text("a boat")
    Project.open(project).save_settings({"data_root": str(tmp_path / "elsewhere")})
    (project / "sample_prompts.txt").unlink(missing_ok=True)
    assert ComparePanel(project).prompts.value == "a boat"


def test_the_winner_is_first_when_sharing(project):
    panel = ComparePanel(project)
    panel.winner_button.click()
    winner = Project.open(project).winner
    assert winner is not None and winner.name == "jets-ep01-gs00020"
    assert SharePanel(project).checkpoint.value == str(winner)


def test_share_estimates_previews_and_names_what_is_missing(project):
    panel = SharePanel(project)
    panel.preview_button.click()
    assert "Give the repository" in panel.message.value
    panel.repo.value = "me/jets"
    panel.preview_button.click()
    assert "nothing is uploaded yet" in panel.message.value and "README.md" in panel.preview_text.value
    panel.file_name.value = "jets.exe"
    panel.export_button.click()
    assert "must end in" in panel.message.value
    assert "is damaged" in panel.size.value  # the run's weights are noise


@pytest.fixture
def lora_project(tmp_path, monkeypatch):
    """A project whose run trained a LoRA: one checkpoint, whose base is a tiny model."""
    import torch
    from tiny_models import tiny_folder

    from everydream_kit.models.loading import load_model
    from everydream_kit.models.lora.injection import add_lora, lora_parameters
    from everydream_kit.models.model_saving import save_model

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = load_model(tiny_folder("sd1"))
    add_lora(model, 2)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    folder = tmp_path / "jets"
    run = make_run(folder / "logs")
    save_model(model, run.checkpoints_folder / "jets-ep02-gs00040")
    return folder


def finish(panel):
    panel.job.watch(interval_seconds=0.05)
    panel.refresh()


@pytest.mark.background
def test_a_lora_run_is_exported_in_both_layouts_and_merged(lora_project):
    from safetensors.numpy import load_file

    panel = SharePanel(lora_project)
    assert [name for _, name in panel.form.options] == ["lora", "diffusers_lora", "single_file", "diffusers"]
    assert panel.file_name.value == "jets-lora.safetensors" and "kB" in panel.size.value
    assert panel.precision.layout.display == "" and panel.strength.layout.display == "none"
    half_size = panel.size.value
    panel.precision.value = "fp32"
    full_size, panel.precision.value = panel.size.value, "fp16"
    kilobytes = [float(words.split("about ")[1].split()[0]) for words in (half_size, full_size)]
    assert kilobytes[1] == pytest.approx(2 * kilobytes[0], rel=0.1)
    panel.export_button.click()
    finish(panel)
    assert "is written" in panel.message.value, panel.message.value
    kohya = load_file(lora_project / "exports" / "jets-lora.safetensors")
    assert any(name.startswith("lora_unet_") for name in kohya)

    panel.form.value, panel.strength.value, panel.precision.value = "single_file", 0.5, "fp32"
    assert panel.precision.layout.display == panel.strength.layout.display == ""
    panel.export_button.click()
    finish(panel)
    half = load_file(lora_project / "exports" / "jets-merged.safetensors")

    checkpoint, out = Path(panel.checkpoint.value), lora_project / "exports"
    export(checkpoint, out / "d.safetensors", format="diffusers_lora")
    assert any(name.startswith("unet.") for name in load_file(out / "d.safetensors"))
    export(checkpoint, out / "whole.safetensors", precision="fp32")
    whole = load_file(out / "whole.safetensors")
    differing = [name for name in whole if abs(whole[name] - half[name]).max() > 1e-4]
    assert any("attn1.to_q" in name for name in differing) and "model.diffusion_model.input_blocks.0.0.weight" in whole


@pytest.mark.background
def test_the_form_follows_the_checkpoint(lora_project):
    panel = SharePanel(lora_project)
    whole = next(path for _, path in panel.checkpoint.options if path.endswith("gs00020"))
    panel.checkpoint.value = whole
    assert [name for _, name in panel.form.options] == ["single_file", "diffusers"]
    assert panel.file_name.value == "jets.safetensors" and panel.precision.layout.display == ""


@pytest.mark.background
def test_a_file_below_home_is_written_there_and_replaced_only_when_asked(lora_project, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    out = tmp_path / "home" / "out" / "x.safetensors"
    panel = SharePanel(lora_project)
    panel.file_name.value = "~/out/x.safetensors"
    panel.export_button.click()
    finish(panel)
    assert out.is_file() and not (lora_project / "exports" / "~").exists()
    out.write_bytes(b"another model")
    panel.export_button.click()
    assert panel.job is None and panel.question.is_open
    assert str(out) in texts(panel.question.box) and out.read_bytes() == b"another model"
    panel.question.buttons[-1].click()  # Cancel
    assert not panel.question.is_open and panel.job is None
    panel.export_button.click()
    panel.question.buttons[0].click()
    finish(panel)
    assert out.read_bytes() != b"another model"


@pytest.fixture
def words_project(tmp_path):
    """A project whose run learned two words of a model with one text encoder."""
    import torch
    from safetensors.torch import save_file

    from everydream_kit.models.adapters import write_adapter_file
    from everydream_kit.runs.layout import TOKENS_FILE

    run = make_run(tmp_path / "cats" / "logs")
    folder = run.checkpoints_folder / "cats-ep02-gs00040"
    folder.mkdir()
    write_adapter_file(folder, {"source": "someone/base"}, fingerprint=None)
    save_file({"<cat>": torch.full((2, 8), 0.5), "<dog>": torch.ones(1, 8)}, folder / TOKENS_FILE)
    return tmp_path / "cats"


@pytest.mark.background
def test_a_learned_word_is_chosen_and_written_as_apps_take_it(words_project):
    from safetensors.numpy import load_file

    panel = SharePanel(words_project)
    assert [name for _, name in panel.form.options] == ["embedding"]
    assert panel.token.layout.display == "" and panel.precision.layout.display == "none"
    assert panel.token.options == ("<cat>", "<dog>") and "about 232 B" in panel.size.value
    panel.token.value = "<dog>"
    panel.export_button.click()
    finish(panel)
    written = load_file(words_project / "exports" / "cats-words.safetensors")
    assert {name: value.shape for name, value in written.items()} == {"emb_params": (1, 8)}


@pytest.mark.background
def test_the_panel_and_the_command_write_the_same_bytes_for_a_form_of_one_name(lora_project, tmp_path):
    from everydream_kit.cli import main

    panel = SharePanel(lora_project)
    for form in FORMATS.keys() - {"embedding", "diffusers", "comfy_lora"}:  # no app reads SD 1's so
        panel.form.value = form
        panel.export_button.click()
        finish(panel)
        mine = lora_project / "exports" / panel.file_name.value
        other = tmp_path / mine.name
        assert main(["export", panel.checkpoint.value, str(other), "--format", form]) == 0
        assert tensors_of(mine) == tensors_of(other), form


def tensors_of(path):
    from safetensors.numpy import load_file

    return {name: (value.dtype.name, value.shape, value.tobytes()) for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    ("form", "option", "takers"),
    [
        ("embedding", {"precision": "fp32"}, "single_file or diffusers or lora or comfy_lora or diffusers_lora"),
        ("lora", {"strength": 0.5}, "single_file or diffusers"),
        ("single_file", {"token": "<cat>"}, "embedding"),
    ],
)
def test_an_option_that_a_form_does_not_take_is_named_with_the_forms_that_do(form, option, takers, tmp_path):
    (name,) = option
    with pytest.raises(ConfigError, match=f"^{name}: does not apply to the form {form}; it goes with {takers}.$"):
        export(tmp_path, tmp_path / "x.safetensors", format=form, **option)


def test_weights_are_counted_from_the_header_alone(tmp_path):
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((3, 4), np.float16), "b": np.zeros((), np.float32)}, tmp_path / "x.safetensors")
    assert count_weights(tmp_path / "x.safetensors") == 13
    (tmp_path / "y.safetensors").write_bytes(b"\xff" * 50)
    with pytest.raises(ExportError, match="damaged"):
        count_weights(tmp_path / "y.safetensors")


def test_an_empty_project_says_to_train_first(tmp_path):
    panel = SharePanel(tmp_path / "new")
    assert "Train first" in panel.message.value and panel.push_button.disabled


def test_a_bare_name_lies_in_the_hosts_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Project.open("jets").folder == tmp_path / "workspace" / "jets"
    assert Project.open("elsewhere/jets").folder == tmp_path / "elsewhere" / "jets"


@pytest.mark.parametrize(
    "name", ["not a repo!!", "jets", "me/jets/more", "me/-jets", "me/je..ts", "me/jets.", "", "mé/jets"]
)
def test_a_repository_that_the_hub_would_refuse_is_refused_at_once(project, name):
    panel = SharePanel(project)
    panel.repo.value = name
    for button in (panel.preview_button, panel.push_button):
        panel.say("")
        button.click()
        assert "such as me/jets" in panel.message.value and panel.job is None


@pytest.mark.parametrize("given", ["", 5])
def test_a_project_without_a_name_is_refused(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match="project: give a name or a folder"):
        Project.open(given)
    assert list(tmp_path.iterdir()) == []
