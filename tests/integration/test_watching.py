"""What reaches a run from outside while it trains, and what several runs have in common: requests, prompts, plug-ins, chains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rehearsals import plain_settings, prepared, square_images

from everydream_kit.cli import main
from everydream_kit.runs import RunFolder, list_runs
from everydream_kit.sessions import resume, train
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.run import Run


@pytest.fixture
def settings(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One step an epoch, words only; the working folder is the test's own."""
    monkeypatch.chdir(tmp_path)
    images = square_images(tmp_path / "pictures")
    plain = plain_settings(tmp_path, tiny_model_folder, images)
    return {**plain, "project_name": "t", "disable_unet_training": True}


def warnings_of(run: RunFolder) -> str:
    return "\n".join(event["message"] for event in run.events("warning"))


class Asking(Listener):
    """Writes a request after each step; the trainer takes it within the next."""

    def __init__(self, prompts: Path) -> None:
        self.prompts = prompts

    def __call__(self, run: Run, report: StepReport) -> None:
        if report.step == 3:
            self.prompts.write_text('{"samples": [{"promt": "red"}]}', "utf-8")
        if report.step == 5:
            (run.folder.folder / "control.json").write_text('["stop"', "utf-8")
        request = {1: "save", 2: "sample", 3: "sample", 4: "dance"}.get(report.step)
        if request is not None:
            run.folder.request(request)


def test_requests_are_obeyed_within_a_step_and_a_broken_prompt_file_is_a_warning(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    prompts = tmp_path / "p.json"
    drawn = {"cfgs": [1.0], "num_inference_steps": 1, "samples": [{"prompt": "red"}]}
    prompts.write_text(json.dumps(drawn), "utf-8")
    run = train({**settings, "max_steps": 6, "sample_prompts": str(prompts)}, listeners=[Asking(prompts)])
    assert run.status()["state"] == "finished"
    assert [(event["step"], event["action"]) for event in run.events("request")] == [
        (2, "save"),
        (3, "sample"),
        (4, "sample"),
        (5, "dance"),
        (6, '["stop"'),
    ]
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 6]
    assert [event["step"] for event in run.events("sample")] == [3]  # at 4 the file was broken
    assert "promt" in warnings_of(run)
    assert "No samples were generated" in warnings_of(run)
    assert "control.json: unknown action 'dance'; known are stop, save, sample" in warnings_of(run)


def test_a_drawing_tells_how_far_it_is(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = []
    write = RunFolder.write_status
    monkeypatch.setattr(
        RunFolder, "write_status", lambda folder, status: (reported.append(dict(status)), write(folder, status))
    )
    prompts = tmp_path / "p.json"
    drawn = {"cfgs": [1.0], "num_inference_steps": 4, "samples": [{"prompt": "red"}, {"prompt": "blue"}]}
    prompts.write_text(json.dumps(drawn), "utf-8")
    train({**settings, "max_steps": 1, "sample_prompts": str(prompts), "sample_steps": 1})
    shares = [status["progress"] for status in reported if status["state"] == "sampling"]
    assert shares == sorted(shares)
    assert shares[0] == 0 and shares[1] == 1 / 4 and shares[-1] == 1  # both are drawn together, in four steps
    assert all(status["progress"] is None for status in reported if status["state"] != "sampling")


class Inverting:
    """A plug-in that changes images."""

    def transform_pil_image(self, image: Any) -> Any:
        return image.point(lambda value: 255 - value)


def test_a_plugin_changes_images_and_switches_the_latent_cache_off(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    pixels = {}
    for name, plugins in (("plain", []), ("inverted", ["test_watching.Inverting"])):
        with prepared(**{**settings, "plugins": plugins, "cache_latents": "off"}) as rehearsal:
            pixels[name] = next(iter(rehearsal.run.batches())).batches[0].pixels.numpy().astype(int)
    assert np.abs(pixels["plain"] + pixels["inverted"] - 255).max() <= 2  # resizing rounds
    with prepared(**{**settings, "plugins": ["test_watching.Inverting"], "cache_latents": "memory"}) as rehearsal:
        assert rehearsal.run.latent_cache is None


def test_chained_configs_are_trained_in_turn_and_a_change_on_resume_is_spelled_out(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        config = {**settings, "project_name": name, "max_steps": 1, "logdir": str(tmp_path / name)}
        (tmp_path / f"{name}.json").write_text(json.dumps(config), "utf-8")
    (tmp_path / "wrong.json").write_text('{"lr": -1}', "utf-8")
    assert main(["chain", "first.json", "wrong.json"]) == 1
    assert not list_runs(tmp_path / "first")  # all are checked before the first one starts
    assert main(["chain", "first.json", "second.json"]) == 0
    [first], [second] = list_runs(tmp_path / "first"), list_runs(tmp_path / "second")
    assert (first.status()["state"], second.status()["state"]) == ("finished", "finished")
    assert main(["resume", str(first.folder), "--set", "lr=5e-5", "--set", "max_steps=2"]) == 0
    assert [event["lr"]["text encoder"] for event in first.events("loss")] == pytest.approx([1e-4, 5e-5])
    assert json.loads((first.folder / "config-00001.json").read_text("utf-8"))["lr"] == 1e-4
    assert json.loads(first.config_path.read_text("utf-8"))["lr"] == 5e-5
    capsys.readouterr()


def test_a_checkpoint_names_the_versions_it_was_made_with_and_others_are_reported(settings: dict[str, Any]) -> None:
    run = train({**settings, "max_steps": 1})
    path = run.last_checkpoint / "resume" / "state.json"
    state = json.loads(path.read_text("utf-8"))
    assert {"torch", "diffusers", "transformers"} <= state["versions"].keys()
    resume(run.folder, changes={"max_steps": 2})
    assert "other versions" not in warnings_of(run)
    made_elsewhere(run)
    resume(run.folder, changes={"max_steps": 3})
    assert "This was saved with torch 1.0: with other versions the run may differ in the last digits." in warnings_of(
        run
    )


def made_elsewhere(run: RunFolder) -> None:
    """Let the latest checkpoint say that it was made with another torch, its manifest agreeing."""
    import hashlib

    path, manifest_path = (run.last_checkpoint / "resume" / name for name in ("state.json", "manifest.json"))
    state = json.loads(path.read_text("utf-8"))
    state["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(state), "utf-8")
    content = path.read_bytes()
    manifest = json.loads(manifest_path.read_text("utf-8"))
    manifest["files"]["resume/state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest_path.write_text(json.dumps(manifest), "utf-8")
