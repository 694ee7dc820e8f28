"""Plug-ins with the kit's signature and with EveryDream 2's, in real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from rehearsals import plain_settings, square_images

from everydream_kit.errors import ConfigError
from everydream_kit.sessions import train
from everydream_kit.training.plugins import caption_transform, has_hook, image_transform, load_plugins

HERE = Path(__file__).parent


class OldBase:
    """Shaped like the base class of EveryDream 2's plug-ins: every hook, and none does anything."""

    def on_training_start(self, **kwargs):
        pass

    def on_training_end(self, **kwargs):
        pass

    def on_epoch_start(self, **kwargs):
        pass

    def on_epoch_end(self, **kwargs):
        pass

    def on_step_start(self, **kwargs):
        pass

    def on_step_end(self, **kwargs):
        pass

    def transform_caption(self, caption):
        return caption

    def transform_pil_image(self, img):
        return img


class Recording(OldBase):
    """Every life-cycle hook, with keyword arguments."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def on_training_start(self, **kwargs):
        self.calls.append(("on_training_start", kwargs))

    def on_training_end(self, **kwargs):
        self.calls.append(("on_training_end", kwargs))

    def on_epoch_start(self, epoch, **kwargs):
        self.calls.append(("on_epoch_start", {"epoch": epoch, **kwargs}))

    def on_epoch_end(self, **kwargs):
        self.calls.append(("on_epoch_end", kwargs))

    def on_step_start(self, *, global_step, local_step, batch, ed_state):
        facts = {"global_step": global_step, "local_step": local_step, "batch": batch, "ed_state": ed_state}
        self.calls.append(("on_step_start", facts))

    def on_step_end(self, **kwargs):
        self.calls.append(("on_step_end", kwargs))


class Ours:
    calls: ClassVar[list[tuple[Any, ...]]] = []

    def on_epoch_end(self, run, epoch):
        self.calls.append(("on_epoch_end", run.config.project_name, epoch))

    def on_step_end(self, run, report):
        self.calls.append(("on_step_end", report.step))


class Array(OldBase):
    def transform_pil_image(self, img):
        return 255 - np.asarray(img)


class WithOtherHooks(Array):
    def on_model_load(self, **kwargs):
        pass

    def modify_sample_prompt(self, prompt):
        return f"{prompt}, in oil"


class Steering(OldBase):
    def on_epoch_end(self, **kwargs):
        kwargs["arg_update_callback"]("grad_accum", 4)


class Raising:
    def on_step_start(self, **kwargs):
        return kwargs["nothing_of_this_name"]


class CaptionOfNone:
    def transform_caption(self, caption):
        caption.upper()


class RaisingCaption:
    def transform_caption(self, caption):
        raise ZeroDivisionError("oh")


class WrongArray:
    def transform_pil_image(self, img):
        return np.asarray(img, np.float32) / 255


class InheritsWork(Array):
    pass


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.chdir(tmp_path)
    images = square_images(tmp_path / "pictures")
    return {**plain_settings(tmp_path, tiny_model_folder, images), "project_name": "t", "disable_unet_training": True}


def plugins(*names: str) -> list[str]:
    return [f"test_plugins.{name}" for name in names]


def test_hooks_are_called_with_either_signature(settings):
    import test_plugins

    test_plugins.Recording.calls.clear()
    test_plugins.Ours.calls.clear()
    settings |= {"plugins": plugins("Recording", "Ours"), "batch_size": 2, "max_epochs": 2, "max_steps": None}
    settings |= {"cache_latents": "off", "resolution": 64}
    run = train(settings)
    assert run.status()["state"] == "finished"
    calls = test_plugins.Recording.calls
    epoch = ["on_epoch_start", *["on_step_start", "on_step_end"] * 2, "on_epoch_end"]
    assert [name for name, _ in calls] == ["on_training_start", *epoch, *epoch, "on_training_end"]
    ends = [facts for name, facts in calls if name == "on_step_end"]
    assert [(f["epoch"], f["global_step"], f["local_step"]) for f in ends] == [
        (0, 0, 0),
        (0, 1, 1),
        (1, 2, 0),
        (1, 3, 1),
    ]
    assert [f["global_step"] for name, f in calls if name == "on_step_start"] == [0, 1, 2, 3]
    last = ends[-1]
    assert (last["project_name"], last["log_folder"], last["data_root"]) == (
        "t",
        str(run.folder),
        settings["data_root"],
    )
    assert len(last["batch"]["captions"]) == 2
    begins = [facts for name, facts in calls if name == "on_step_start"]
    assert [f["batch"]["captions"] for f in begins] == [f["batch"]["captions"] for f in ends]
    assert begins[0]["batch"]["tokens"].shape == (2, 77)
    assert begins[0]["batch"]["image"].shape == (2, 3, 64, 64)
    assert begins[0]["ed_state"].scheduler is last["run"].learner.model.noise_scheduler
    assert calls[0][1]["max_epochs"] == 2
    assert tuple(last["batch"]["loss_scale"]) == (1.0, 1.0)
    assert last["ed_state"].unet is last["run"].learner.model.unet
    starts = [facts for name, facts in calls if name == "on_epoch_start"]
    assert [(f["epoch"], f["epoch_length"], f["global_step"]) for f in starts] == [(0, 2, 0), (1, 2, 2)]
    steps = [("on_step_end", 1), ("on_step_end", 2), ("on_epoch_end", "t", 0)]
    assert test_plugins.Ours.calls == [*steps, ("on_step_end", 3), ("on_step_end", 4), ("on_epoch_end", "t", 1)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Raising", r"plugins: test_plugins\.Raising\.on_step_start raised KeyError: .*docs/differences\.md"),
        ("CaptionOfNone", r"plugins: test_plugins\.CaptionOfNone\.transform_caption returned a NoneType"),
        ("RaisingCaption", r"plugins: test_plugins\.RaisingCaption\.transform_caption raised ZeroDivisionError: oh"),
        ("WrongArray", r"plugins: test_plugins\.WrongArray\.transform_pil_image returned an array of float32"),
        ("Steering", r"grad_accum: a plug-in cannot set it to 4 while a run continues"),
    ],
)
def test_a_plugin_that_fails_is_named(settings, name, message):
    with pytest.raises(ConfigError, match=message):
        train({**settings, "plugins": plugins(name), "max_steps": 1, "max_epochs": 1})


def test_a_hook_that_the_kit_does_not_have_is_warned_of(settings, caplog):
    load_plugins(plugins("WithOtherHooks"))
    assert "plugins: test_plugins.WithOtherHooks.modify_sample_prompt is never called here" in caplog.text
    assert "on_model_load" not in caplog.text  # it does nothing


def test_a_hook_that_does_nothing_is_no_hook(settings):
    old, array = load_plugins(plugins("Recording", "InheritsWork"))
    assert caption_transform([old, array]) is None
    assert image_transform([old]) is None
    assert not has_hook(old, "transform_pil_image")
    assert has_hook(array, "transform_pil_image")  # inherited, and it does something
    with pytest.raises(ConfigError, match="is not a plug-in"):
        load_plugins(plugins("OldBase"))


def test_an_array_that_comes_back_is_an_image(settings):
    transform = image_transform(load_plugins(plugins("Array")))
    assert transform is not None
    image = transform(Image.new("RGB", (8, 8), (255, 0, 100)))
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (8, 8), (0, 255, 155))


def test_its_base_class_that_is_not_there_is_answered(tmp_path, monkeypatch):
    (tmp_path / "old_plugin.py").write_text("from plugins.plugins import BasePlugin\nclass A(BasePlugin):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="EveryDream 2's BasePlugin is not needed: remove its import"):
        load_plugins(["old_plugin.A"])
