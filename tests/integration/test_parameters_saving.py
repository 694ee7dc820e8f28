"""What the parameters of EMA, samples, validation, saving and logging leave behind in the run folder and next to it."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hub_runs import TOKEN
from hub_stand_in import HubStandIn, use_as_hub
from rehearsals import NotingPlugin, plain_settings, prepared, rehearse, square_images
from safetensors.torch import load_file

from everydream_kit.cli import main
from everydream_kit.errors import ConfigError, HubError
from everydream_kit.runs import RunFolder
from everydream_kit.sessions import train
from everydream_kit.training import run_builder
from everydream_kit.training.base_model import choose_idle_modules
from everydream_kit.training.checkpoint_saving import Saver
from everydream_kit.training.offload import IdleModels
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.run import Run

DRAW_FAST = {"cfgs": [1.0], "num_inference_steps": 1}


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One step an epoch; the working folder is the test's own."""
    monkeypatch.chdir(tmp_path)
    images = square_images(tmp_path / "pictures")
    return {**plain_settings(tmp_path, tiny_model_folder, images), "project_name": "t"}


def names(run: RunFolder) -> list[str]:
    return [checkpoint.folder.name for checkpoint in run.checkpoints()]


def warnings_of(run: RunFolder) -> str:
    return "\n".join(event["message"] for event in run.events("warning"))


def unet_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "unet" / "diffusion_pytorch_model.safetensors")


# EMA ------------------------------------------------------------------------------------------------------------------


def test_averaged_weights_are_saved_drawn_with_and_taken_up_again(
    settings: dict[str, Any], tmp_path: Path, tiny_model_folder: Path
) -> None:
    (tmp_path / "p.json").write_text(json.dumps({**DRAW_FAST, "samples": [{"prompt": "x"}]}), "utf-8")
    ema = {"ema_decay_rate": 0.05, "ema_update_interval": 1, "ema_sample_ema_model": True}
    drawn = {"sample_steps": 2, "sample_prompts": str(tmp_path / "p.json"), "ema_sample_nonema_model": True}
    after_one_step: dict[str, torch.Tensor] = {}

    class Noting(Listener):
        def __call__(self, run: Run, report: StepReport) -> None:
            if report.step == 1:
                weights = run.learner.model.unet.state_dict()
                after_one_step.update({key: value.clone() for key, value in weights.items()})

    run = train({**settings, **ema, **drawn}, listeners=[Noting()])
    assert names(run) == ["last-t-ep02-gs00002", "last-t-ep02-gs00002_ema"]
    folders = (tiny_model_folder, run.last_checkpoint, run.last_checkpoint.with_name("last-t-ep02-gs00002_ema"))
    base, live, averaged = map(unet_of, folders)
    for key in base:
        first = 0.05 * base[key] + 0.95 * after_one_step[key]
        torch.testing.assert_close(averaged[key], 0.05 * first + 0.95 * live[key], rtol=0, atol=1e-6)
    assert any(not torch.equal(averaged[key], live[key]) for key in base)
    assert [path.name for path in run.samples()] == ["gs00002-000-ema-x.jpg", "gs00002-000-x.jpg"]

    with prepared(**{**settings, **ema, "ema_resume_model": "findlast"}) as rehearsal:
        parameters = dict(rehearsal.run.learner.model.unet.named_parameters())
        with rehearsal.run.learner.ema.swapped():
            taken_up = {key: value.detach().clone() for key, value in parameters.items()}
    assert all(torch.equal(taken_up[key], averaged[key]) for key in averaged)


def test_the_average_follows_its_decay_its_target_and_its_interval(settings: dict[str, Any]) -> None:
    common = {**settings, "ema_strength_target": 0.1, "max_steps": 4}
    with prepared(**{**common, "ema_update_interval": 2, "ema_device": "meta"}) as rehearsal:
        assert rehearsal.run.learner.ema.decay == pytest.approx(0.1**0.5)  # two updates leave a tenth
        assert {average.device.type for average in rehearsal.run.learner.ema.averages} == {"meta"}
    for interval, moved in ((3, False), (2, True)):
        after = rehearse(**{**common, "ema_update_interval": interval, "max_steps": 2}).run
        with prepared(**common) as before:
            start = before.run.learner.ema.averages
        assert any(not torch.equal(a, b) for a, b in zip(after.learner.ema.averages, start, strict=True)) is moved


def test_after_twenty_steps_of_a_run_each_decay_has_its_own_average(
    settings: dict[str, Any], tiny_model_folder: Path
) -> None:
    """The saved averages are those computed by hand from the weights of every step."""
    key = "conv_in.weight"
    start = unet_of(tiny_model_folder)[key].double()
    distance = {}
    for decay, interval in ((0.9, 1), (0.99, 1), (0.9999, 1), (0.9, 5)):
        by_hand = start.clone()

        class ByHand(Listener):
            def __call__(self, run: Run, report: StepReport, decay: float = decay, interval: int = interval) -> None:
                if report.step % interval == 0:
                    weights = run.learner.model.unet.state_dict()[key].double()
                    by_hand.mul_(decay).add_((1 - decay) * weights)  # noqa: B023 - the run ends within this turn

        ema = {"ema_decay_rate": decay, "ema_update_interval": interval, "lr": 1e-2, "optimizer": "adamw"}
        ema["disable_textenc_training"] = True
        run = train({**settings, **ema, "max_steps": 20, "max_epochs": 20}, listeners=[ByHand()])
        averaged = unet_of(run.checkpoints(averaged=True)[-1].folder)[key].double()
        torch.testing.assert_close(averaged, by_hand, rtol=0, atol=1e-5)
        distance[decay, interval] = float((averaged - start).abs().mean())
    assert distance[0.9, 1] > 2 * distance[0.99, 1] > 20 * distance[0.9999, 1] > 0
    assert distance[0.9, 1] > distance[0.9, 5] > 0


def test_the_command_names_the_single_files_of_live_and_averaged_weights(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ema = {"ema_decay_rate": 0.5, "ema_update_interval": 1}
    saving = {"max_steps": 1, "no_save_ckpt": False, "save_ckpt_dir": "S"}
    (tmp_path / "c.json").write_text(json.dumps({**settings, **ema, **saving}), "utf-8")
    assert main(["train", "--config", "c.json"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("single file: ")]
    assert [Path(line.removeprefix("single file: ")).name for line in said] == [
        "last-t-ep01-gs00001.safetensors",
        "last-t-ep01-gs00001_ema.safetensors",
    ]


# Samples --------------------------------------------------------------------------------------------------------------


def test_samples_come_before_training_every_so_many_steps_and_from_the_prompt_file(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.json"
    entries = [{"prompt": "a cat", "size": [64, 72], "seed": 3}, {"random_caption": True}]
    prompts.write_text(json.dumps({**DRAW_FAST, "samples": entries}), "utf-8")
    drawn = {"sample_steps": 2, "sample_prompts": str(prompts), "sample_before_training": True}
    run = train({**settings, **drawn, "max_steps": 3})
    events = list(run.events("sample"))
    assert [event["step"] for event in events] == [0, 0, 2, 2, 3, 3]
    assert {event["prompt"] for event in events[::2]} == {"a cat"}
    assert {event["seed"] for event in events} == {3, 7}
    assert all(event["prompt"].startswith("picture") for event in events[1::2])


def test_a_broken_prompt_file_is_a_warning_and_training_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"cfgs": [7,}', "utf-8")
    run = train({**settings, "sample_steps": 1, "sample_prompts": str(tmp_path / "broken.json")})
    assert (run.status()["state"], run.status()["step"], run.samples()) == ("finished", 2, [])
    assert "broken.json, line 1, column " in warnings_of(run)


# Validation -----------------------------------------------------------------------------------------------------------


def test_a_run_whose_validation_loss_stands_still_stops_early(settings: dict[str, Any]) -> None:
    validation = {"validate_training": True, "val_split_mode": "automatic", "auto_split_proportion": 0.3}
    changes = {"validation_config": validation, "early_stopping_patience": 2, "lr": 1e-30, "max_steps": 30}
    run = train({**settings, **changes})
    assert (run.status()["state"], run.status()["step"]) == ("finished", 2)
    assert len(list(run.events("stopping early"))) == 1
    assert [event["step"] for event in run.events("validation")] == [0, 1, 2]


def test_the_averaged_weights_are_validated_next_to_the_live_ones(settings: dict[str, Any]) -> None:
    validation = {"validate_training": True, "val_split_mode": "automatic", "auto_split_proportion": 0.3}
    ema = {"ema_decay_rate": 0.5, "ema_update_interval": 1}
    run = train({**settings, **ema, "validation_config": validation, "max_steps": 1})
    before, after = run.events("validation")
    assert before["ema_loss"] == before["loss"]  # they begin as copies
    assert after["ema_loss"] not in (after["loss"], before["loss"])


# Memory ---------------------------------------------------------------------------------------------------------------


def test_idle_models_are_at_work_for_new_images_and_captions_and_for_sampling_only(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing waits, so the waiting list of a GPU is put in place, and who is called to work is noted."""
    called: list[tuple[int, str]] = []
    step = 0

    def as_on_a_gpu(*arguments: Any, **facts: Any) -> list[torch.nn.Module]:
        assert choose_idle_modules(*arguments, **facts) == []
        config, *others = arguments
        off = config.replace(offload_idle_models=False)
        assert choose_idle_modules(off, *others, **{**facts, "device_type": "cuda"}) == []
        return choose_idle_modules(*arguments, **{**facts, "device_type": "cuda"})

    class Noting(IdleModels):
        def at_work(self, modules: Any) -> Any:
            chosen = [module for module in modules if module in self._users]
            called.extend((step, type(module).__name__) for module in chosen)
            return super().at_work(chosen)

    class Counting(Listener):
        def __call__(self, run: Run, report: StepReport) -> None:
            nonlocal step
            step = report.step

    monkeypatch.setattr(run_builder, "choose_idle_modules", as_on_a_gpu)
    monkeypatch.setattr(run_builder, "IdleModels", Noting)
    (tmp_path / "p.json").write_text(json.dumps({**DRAW_FAST, "samples": [{"prompt": "x"}]}), "utf-8")
    drawn = {"sample_steps": 3, "sample_prompts": str(tmp_path / "p.json"), "disable_textenc_training": True}
    changes = {**drawn, "offload_idle_models": True, "max_steps": 3}
    train({**settings, **changes}, listeners=[Counting()])
    in_the_first_step = [(0, "AutoencoderKL")] * 4 + [(0, "CLIPTextModel")]
    assert called == [
        *in_the_first_step,
        (2, "AutoencoderKL"),
        (2, "CLIPTextModel"),
    ]  # drawn before Counting hears of 3


def test_in_memory_only_what_is_drawn_is_encoded_and_said(settings: dict[str, Any]) -> None:
    rehearsal = rehearse(**{**settings, "cache_latents": "memory", "cache_variants": 8, "crop_jitter": 0.2})
    assert 4 < len(rehearsal.run.latent_cache) <= 8  # two epochs of four images
    [reported] = rehearsal.folder.events("latent cache")
    assert (reported["mode"], reported["variants"]) == ("memory", 8)
    assert [report.encoding_seconds > 0 for report in rehearsal.reports] == [True, True]


def test_speed_and_time_left_are_of_training_alone_and_encoding_is_reported_next_to(settings: dict[str, Any]) -> None:
    class SlowVae(Listener):
        """Says of every step that it encoded for an hour: what is then left of the step's time is less than nothing."""

        def on_start(self, run: Run) -> None:
            load = run.batches

            def batches() -> Any:
                for work in load():
                    work.encoding_seconds = 3600.0
                    yield work

            run.batches = batches  # type: ignore[method-assign]

        def __call__(self, run: Run, report: StepReport) -> None:
            assert report.seconds < 0

    run = train({**settings, "cache_latents": "memory"}, listeners=[SlowVae()])
    assert [round(event["encoding_minutes"]) for event in run.events("epoch")] == [60, 60]
    assert run.status()["state"] == "finished"


# Saving ---------------------------------------------------------------------------------------------------------------


def test_epochs_are_saved_from_the_first_that_counts_as_single_files_too(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    changes = {
        "save_every_n_epochs": 2,
        "save_ckpts_from_n_epochs": 3,
        "max_steps": 5,
        "no_save_ckpt": False,
        "save_ckpt_dir": str(tmp_path / "single"),
        "save_full_precision": True,
        "no_prepend_last": True,
    }
    run = train({**settings, **changes})
    assert run.folder.parent == Path(settings["logdir"])
    assert run.name.startswith("t-")
    assert names(run) == ["t-ep04-gs00004", "t-ep05-gs00005"]
    single = sorted((tmp_path / "single").iterdir())
    assert [path.name for path in single] == ["t-ep04-gs00004.safetensors", "t-ep05-gs00005.safetensors"]
    assert {tensor.dtype for tensor in load_file(single[0]).values() if tensor.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "kept", "resumable"),
    [
        ({}, [1, 2, 3, 4], [3, 4]),
        ({"save_optimizer": True}, [1, 2, 3, 4], [1, 2, 3, 4]),
        ({"keep_last_n": 1}, [4], [4]),
    ],
    ids=["all", "save_optimizer", "keep_last_n"],
)
def test_steps_are_saved_and_as_many_stay_as_were_asked_for(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], kept: list[int], resumable: list[int]
) -> None:
    run = train({**settings, "save_every_n_steps": 1, "max_steps": 4, "disable_unet_training": True, **changes})
    assert [checkpoint.step for checkpoint in run.checkpoints()] == kept
    assert [checkpoint.step for checkpoint in run.checkpoints() if checkpoint.resumable] == resumable
    assert list(tmp_path.rglob("*-gs*.safetensors")) == []  # no_save_ckpt


def test_checkpoints_come_by_the_clock(settings: dict[str, Any]) -> None:
    run = train({**settings, "ckpt_every_n_minutes": 1e-6})
    assert names(run) == ["t-ep01-gs00001", "last-t-ep02-gs00002"]


class SaverWatch(Listener):
    """Gets hold of a run's saver before the first step, and hears of every step."""

    def __init__(self, meet: Any, hear: Any) -> None:
        self.meet, self.hear = meet, hear

    def on_start(self, run: Run) -> None:
        (saver,) = [listener for listener in run.listeners if isinstance(listener, Saver)]
        self.meet(run, saver)

    def __call__(self, run: Run, report: StepReport) -> None:
        self.hear(report.step)


def test_training_goes_on_while_a_checkpoint_is_written(settings: dict[str, Any], tmp_path: Path) -> None:
    went_on, outcomes = threading.Event(), []

    def meet(run: Run, saver: Saver) -> None:
        # The disk takes the file of step 2 only after step 3 has been trained.
        saver.write_single_file = lambda source, target: outcomes.append(went_on.wait(timeout=60))

    def hear(step: int) -> None:
        if step == 3:
            went_on.set()

    given = {"no_save_ckpt": False, "save_ckpt_dir": str(tmp_path / "out"), "save_every_n_steps": 2}
    longer = {"max_epochs": 5, "max_steps": 5}
    run = train({**settings, **given, **longer}, listeners=[SaverWatch(meet, hear)])
    assert outcomes == [True, True, True]
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 4, 5]


@pytest.mark.parametrize(("seconds_of_a_copy", "warnings"), [(20.0, 1), (4.0, 0)])
def test_checkpoints_that_training_waits_for_a_tenth_of_its_time_are_reported_once(
    settings: dict[str, Any], seconds_of_a_copy: float, warnings: int
) -> None:
    now = [0.0]

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    def meet(run: Run, saver: Saver) -> None:
        snapshot = saver.snapshots.take

        def slow(*, copy: bool) -> Any:
            pass_by(seconds_of_a_copy)
            return snapshot(copy=copy)

        saver.clock, saver.snapshots.take = lambda: now[0], slow
        saver.on_start(run)

    given = {"save_every_n_steps": 1, "max_epochs": 5, "max_steps": 5}
    run = train({**settings, **given}, listeners=[SaverWatch(meet, lambda step: pass_by(100.0))])
    found = [event["message"] for event in run.events("warning") if "waited" in event["message"]]
    # A step of 100 s passes after each save: 20 of 20 s at the first one, or 4 of 4, 8 of 108, 12 of 212 and 16 of 316 s.
    assert len(found) == warnings
    assert all("ckpt_every_n_minutes" in message and "faster disk" in message for message in found)
    assert [event["waited_seconds"] for event in run.events("saved")] == [
        seconds_of_a_copy * saves for saves in (1, 2, 3, 4, 4)
    ]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with HubStandIn(tmp_path / "hub") as server:
        server.add_user(TOKEN, "me")
        use_as_hub(monkeypatch, server)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_checkpoints_are_pushed_while_training_as_often_as_asked(settings: dict[str, Any], hub: HubStandIn) -> None:
    pushed = {"push_to": "t", "push_every": 1, "save_every_n_steps": 1, "disable_unet_training": True}
    run = train({**settings, **pushed})
    assert run.status()["state"] == "finished"
    assert [event["step"] for event in run.events("uploaded")] == [1, 2]
    assert len(hub.titles("me/t")) == 1 + 2  # the first is the repository's own


def test_a_repository_that_cannot_be_written_is_reported_before_training(
    settings: dict[str, Any], hub: HubStandIn
) -> None:
    hub.tokens[TOKEN]["role"] = "read"
    with pytest.raises(HubError, match="may only read"):
        train({**settings, "push_to": "t"})
    [folder] = Path(settings["logdir"]).glob("t-*")
    assert list(RunFolder(folder).events("loss")) == []


# Watching and extending -----------------------------------------------------------------------------------------------


def test_points_come_every_log_step_and_at_each_epochs_end(settings: dict[str, Any]) -> None:
    changes = {"batch_size": 1, "disable_unet_training": True, "max_steps": 6}  # four steps an epoch
    run = train({**settings, **changes, "log_step": 3})
    assert [event["step"] for event in run.events("loss")] == [3, 4, 6]


def test_plugins_are_called_at_every_turn_and_change_captions(settings: dict[str, Any]) -> None:
    plugged = {**settings, "plugins": ["rehearsals.NotingPlugin"]}
    with prepared(**plugged) as rehearsal:
        captions = next(rehearsal.run.batches()).batches[0].captions
    assert all(caption.startswith("PICTURE ") for caption in captions)
    train(plugged)
    assert NotingPlugin.calls == [
        "training start",
        *("epoch 0 start", "step 0 start", "step 1 end", "epoch 0 end"),
        *("epoch 1 start", "step 1 start", "step 2 end", "epoch 1 end"),
        "training end",
    ]
    for name, words in (("plain", "not a module.Class"), ("no_such.Class", "there is no module no_such")):
        with pytest.raises(ConfigError, match=words), prepared(**{**settings, "plugins": [name]}):
            pass


def test_live_settings_are_read_at_each_epochs_start_and_a_broken_file_changes_nothing(
    settings: dict[str, Any],
) -> None:
    class Steering(Listener):
        """Writes the file before the epoch after it begins, for the start of the one after that."""

        def __call__(self, run: Run, report: StepReport) -> None:
            texts = {1: '{"lr_factor": 0.5, "save_every_n_steps": 3}', 2: "{broken"}
            if report.step in texts:
                run.folder.live_settings_path.write_text(texts[report.step], "utf-8-sig")  # as Windows' editors do

    live = {"load_settings_every_epoch": True, "max_steps": 4, "disable_textenc_training": True}
    run = train({**settings, **live}, listeners=[Steering()])
    assert [event["lr"]["unet"] for event in run.events("loss")] == pytest.approx([1e-4, 1e-4, 0.5e-4, 0.5e-4])
    assert names(run) == ["t-ep03-gs00003", "last-t-ep04-gs00004"]
    assert "live.json" in warnings_of(run) and "The settings before it stay" in warnings_of(run)


def test_wandb_gets_the_points_under_the_runs_name(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    points: list[str] = []
    reported: dict[str, Any] = {}

    def start(**facts: Any) -> SimpleNamespace:
        reported.update(facts)
        return SimpleNamespace(log=lambda values, step: points.extend(values), finish=lambda: points.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=start))
    train({**settings, "max_steps": 1, "wandb": True, "run_name": "my run", "disable_unet_training": True})
    assert (reported["project"], reported["name"], reported["config"]["lr"]) == ("t", "my run", 1e-4)
    assert "loss/log_step" in points and points[-1] == "end"


def test_wandb_without_its_package_is_one_clear_error(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'everydream-kit\[wandb\]'"):
        train({**settings, "wandb": True})
