"""`speed: auto`: what is measured before the first step, and that the run is the one with the choice set by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from replayed_passes import allow_on_cpu, settings_of_a_run
from safetensors.torch import load_file
from stop_after import StopAfter
from tiny_models import tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.runs import RunFolder
from everydream_kit.sessions import resume, train
from everydream_kit.training import cuda_graphs
from everydream_kit.training.control import StopSignal
from everydream_kit.training.journal import Journal
from everydream_kit.training.loop import train_loop
from everydream_kit.training.measured_passes import NUM_TIMED, NUM_WARM
from everydream_kit.training.objectives import DiffusionObjective
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.run_builder import build_run
from everydream_kit.training.speed_choice import CANDIDATES, Candidate, SpeedTrial

GRAPHS = CANDIDATES[1]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {**settings_of_a_run(tmp_path), "max_steps": 5, "log_step": 1, "flat_weights": "on"}


class Clock:
    """Gives each measurement's passes the seconds that are written for it."""

    def __init__(self, *seconds: float) -> None:
        self.seconds, self.calls, self.now = seconds, 0, 0.0

    def __call__(self, device: torch.device) -> float:
        measurement, call = divmod(self.calls, 2 * (NUM_WARM + NUM_TIMED))
        self.calls += 1
        self.now += self.seconds[measurement] if call % 2 else 0.0
        return self.now


@contextmanager
def built(trial: SpeedTrial | None = None, **settings: Any) -> Iterator[Any]:
    """A run before its first step; nothing that it begins with was touched by a measurement."""
    config = TrainConfig(**settings)
    folder = RunFolder.create(config.logdir, config.project_name)
    journal = Journal(folder)
    torch.manual_seed(1)
    try:
        run = build_run(config, folder, journal, Ranks.find(), speed_trial=trial)
        assert torch.rand(1).item() == pytest.approx(0.7576, abs=1e-4)  # the first after this seed
        assert all(parameter.grad is None for parameter in run.learner.parameters())
        assert not run.learner.optimizer.state and run.learner.ema is None and not run.listeners
        yield run
    finally:
        journal.close()


def trained(trial: SpeedTrial | None = None, **settings: Any) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Losses, weights and the run."""
    losses: list[float] = []
    with built(trial, **settings) as run:
        train_loop(run, [lambda run, report: losses.extend(report.losses.losses)], StopSignal())
        weights = {
            f"{part}.{name}": value.clone()
            for part, state in run.learner.trained_weights().items()
            for name, value in state.items()
        }
    return losses, weights, run


def the_event(run: Any) -> dict[str, Any]:
    (event,) = run.folder.events("speed")
    return event


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0] == other[0]
    assert [name for name in one[1] if not torch.equal(one[1][name], other[1][name])] == []


CHOICES = {
    "both": ((0.2, 0.16, 0.1, 0.2, 0.05), {"cuda_graphs": "on", "channels_last": True}),
    "none: 2 % are less than 3": ((0.2, 0.196), {}),
}
"""Seconds of a pass by measurement, and what is chosen."""


@pytest.mark.parametrize("case", CHOICES)
def test_a_run_is_the_one_with_its_choice_set_by_hand(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], case: str
) -> None:
    caplog.set_level("INFO")
    seconds, chosen = CHOICES[case]
    if "cuda_graphs" in chosen:
        allow_on_cpu(monkeypatch)
    clock = Clock(*seconds)
    found = trained(SpeedTrial(clock=clock, min_passes=5), **settings, speed="auto")
    event = the_event(found[2])
    assert event["chosen"] == chosen
    assert {name: getattr(found[2].config, name) for name in chosen} == chosen and found[2].config.speed == "manual"
    assert "about 180 s before the first pass do not pay in 1 s" in event["not_used"]["torch_compile"]
    assert "speed auto: a pass of 2 images of 64 x 64 px takes plain " in caplog.text
    assert f"Using {' and '.join(chosen) or 'plain passes'} for the 5 passes of the run." in caplog.text
    assert_same(found, trained(**settings, **chosen))


def test_a_choice_is_kept_by_a_resumed_run(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, "max_steps": 2500, "max_epochs": 2500}
    run = train(TrainConfig(**settings, speed="auto"), listeners=[StopAfter(2)])
    written = json.loads(run.config_path.read_text("utf-8"))
    (event,) = run.events("speed")  # one
    assert {"plain", "channels_last"} <= event["seconds"].keys()
    assert written["speed"] == "manual" and written["channels_last"] == bool(event["chosen"])
    resume(run.folder, listeners=[StopAfter(4)])
    assert list(run.events("speed")) == [event]
    by_hand = {**settings, **event["chosen"], "logdir": str(tmp_path / "by hand")}
    other = train(TrainConfig(**by_hand), listeners=[StopAfter(4)])
    losses, theirs = ({e["step"]: e["loss"] for e in one.events("loss")} for one in (run, other))
    assert losses == theirs and len(losses) == 5
    one, other_weights = (load_file(next(r.last_checkpoint.rglob("unet/*.safetensors"))) for r in (run, other))
    assert all(torch.equal(one[name], other_weights[name]) for name in one)


class Stale:
    """A graph that always gives what it gave when it was captured."""

    def __init__(self, call: Any) -> None:
        self.result = call()

    def replay(self) -> None:
        pass


def test_a_candidate_that_computes_something_else_is_dropped(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setitem(cuda_graphs.CAPTURES, "cpu", lambda: Stale)
    wrong = Candidate({"loss_type": "huber"})
    trial = SpeedTrial(candidates=(wrong, GRAPHS), clock=Clock(0.2, 0.1, 0.1), min_passes=1)
    with built(trial, **settings, speed="auto") as run:
        event = the_event(run)
    assert event["chosen"] == {} and event["seconds"].keys() == {"plain"}
    assert "its losses differ from plain ones by " in event["not_used"]["loss_type"]
    assert "its losses differ from plain ones by " in event["not_used"]["cuda_graphs"]
    warnings = " ".join(one["message"] for one in run.folder.events("warning"))
    assert "speed auto: loss_type is not used: " in warnings and "speed auto: cuda_graphs is not used: " in warnings


def test_a_candidate_that_fails_is_dropped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    allow_on_cpu(monkeypatch)
    monkeypatch.setattr(
        DiffusionObjective, "weight", lambda self, timesteps: torch.ones(len(timesteps)) * float(timesteps[0] >= 0)
    )
    trial = SpeedTrial(candidates=(GRAPHS,), clock=Clock(0.2, 0.1), min_passes=1)
    found = trained(trial, **settings, speed="auto")
    assert the_event(found[2])["not_used"]["cuda_graphs"].startswith("it failed (cuda_graphs: the step cannot be cap")
    assert_same(found, trained(**settings))


UNMEASURED = {
    "short": ({}, "the run has 6 passes, and it pays from about 2,000 on"),
    "fused": ({"fused_backward": True}, "fused_backward updates weights within a pass"),
    "dropout": ({"training_kind": "lora", "lora_rank": 2, "lora_dropout": 0.1}, "with dropout, two passes cannot"),
    "plug-ins": ({"plugins": ["rehearsals.NotingPlugin"]}, "a plug-in's hooks would be called"),
    "blocks": ({"training_kind": "lora", "lora_rank": 2, "blocks_to_swap": 1}, "blocks are kept in host memory"),
}


@pytest.mark.parametrize("case", UNMEASURED)
def test_what_is_not_measured_says_why(settings: dict[str, Any], case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    changes, reason = UNMEASURED[case]
    clock = Clock()
    with built(SpeedTrial(clock=clock), **{**settings, **changes, "max_steps": 6}, speed="auto") as run:
        pass
    assert the_event(run)["reason"].startswith(reason) and f"nothing was measured: {reason}" in caplog.text
    assert clock.calls == 0 and run.config.speed == "manual"


def test_a_candidate_is_not_tried_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    trial = SpeedTrial(clock=Clock(0.2), min_passes=1)
    flow = {**settings, "resume_ckpt": str(tiny_folder("flux1")), "training_kind": "lora"}
    with built(trial, **flow, speed="auto") as run:
        not_used = the_event(run)["not_used"]
    assert (
        not_used["channels_last"] == "the denoiser has no convolutions" and not_used["cuda_graphs"] == "a CPU has none"
    )
    allow_on_cpu(monkeypatch)
    trial = SpeedTrial(lambda config: "it would need 20 GiB", clock=Clock(0.2), min_passes=1)
    with built(trial, **settings, speed="auto", channels_last=True) as run:
        not_used = the_event(run)["not_used"]
    assert not_used["cuda_graphs"] == "it would need 20 GiB"
    assert not_used["channels_last"] == "it is set, and plain passes have it"
    assert run.config.channels_last
