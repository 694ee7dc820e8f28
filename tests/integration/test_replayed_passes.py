"""Passes that are captured once and replayed: the same losses as eager ones, and nothing read that a replay cannot know."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsals import prepared
from replayed_passes import allow_on_cpu, record, settings_of_a_run
from safetensors.torch import load_file
from stop_after import StopAfter
from tiny_models import tiny_folder
from torch.utils._pytree import tree_leaves

from everydream_kit.config import TrainConfig
from everydream_kit.data.records import StepBatches
from everydream_kit.errors import ConfigError, NonFiniteLossError
from everydream_kit.sessions import resume, train
from everydream_kit.training.control import StopSignal
from everydream_kit.training.loop import train_loop
from everydream_kit.training.objectives import DiffusionObjective
from everydream_kit.training.reports import Listener
from everydream_kit.training.run import Run


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {**settings_of_a_run(tmp_path), "max_steps": 20}


def trained(*, listeners: Sequence[Any] = (), **settings: Any) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """Losses and weights of a run, and the run."""
    losses: list[float] = []
    with prepared(**settings) as rehearsal:
        run = rehearsal.run
        train_loop(run, [*listeners, lambda run, report: losses.extend(report.losses.losses)], StopSignal())
        weights = {
            f"{part}.{name}": value.clone()
            for part, state in run.learner.trained_weights().items()
            for name, value in state.items()
        }
    return losses, weights, rehearsal


LORA = {"training_kind": "lora", "lora_rank": 2}
CASES = {
    "sd1, all weights": ("sd1", {"input_perturbation": 0.1, "embedding_perturbation": 1.0}, 17),
    "sd1, flat, accumulated": (
        "sd1",
        {"flat_weights": "on", "optimizer": "adamw8bit", "grad_accum": 2, "clip_grad_norm": 0.1, "max_steps": 6},
        9,
    ),
    "sd1, LoRA, float16": ("sd1", {**LORA, "lora_text_encoder": True, "amp_dtype": "fp16", "max_steps": 8}, 5),
    "sdxl, LoRA, captions dropped, checkpointing": (
        "sdxl",
        {**LORA, "lora_text_encoder": True, "cond_dropout": 0.4, "gradient_checkpointing": True, "max_steps": 8},
        5,
    ),
    "new words": ("sd1", {"training_kind": "textual_inversion", "new_tokens": {"<one>": "one"}, "max_steps": 6}, 3),
    "flow, next to a frozen encoder with dropout": ("flux1", {**LORA, "optimizer": "adamw", "max_steps": 5}, 2),
    "flow": ("flux2_klein", {**LORA, "optimizer": "adamw", "max_steps": 8}, 5),
}
"""Family, changes, and how many passes of how many are replayed: all but three."""


@pytest.mark.parametrize("case", CASES)
def test_replayed_passes_train_as_eager_ones(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], case: str
) -> None:
    caplog.set_level(logging.INFO)
    family, changes, num_replays = CASES[case]
    settings = {**settings, "resume_ckpt": str(tiny_folder(family)), **changes}
    eager, weights, _ = trained(**settings)
    allow_on_cpu(monkeypatch)
    replayed, theirs, rehearsal = trained(**settings, cuda_graphs="on")
    assert rehearsal.run.learner.graphs.num_replays == num_replays
    assert replayed == eager
    assert weights.keys() == theirs.keys()
    assert [name for name in weights if not torch.equal(weights[name], theirs[name])] == []
    assert caplog.text.count("CUDA graph 1: a pass of 2 images with latents of") == 1


def read_a_value(self: DiffusionObjective, timesteps: torch.Tensor) -> torch.Tensor:
    return torch.full_like(timesteps, 1.0, dtype=torch.float32) * float(timesteps[0] >= 0)


def test_a_pass_that_reads_a_value_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    allow_on_cpu(monkeypatch)
    monkeypatch.setattr(DiffusionObjective, "weight", read_a_value)
    with pytest.raises(ConfigError, match=r"cuda_graphs: the step cannot be captured .*Set cuda_graphs off and resume"):
        trained(**settings, cuda_graphs="on")


def test_what_a_call_reads_past_its_inputs_stays_as_it_was() -> None:
    """Of the stand-in: the tests above fail where a replay could not know something."""
    static, count, other = torch.ones(2), itertools.count(1), [torch.full((2,), 10.0)]
    total = torch.zeros(2)

    def call() -> torch.Tensor:
        total.add_(static)
        return static.clone().mul_(next(count)) + other[0].view(2)

    captured = record(call)
    assert total.tolist() == [0.0, 0.0]  # a capture changes nothing
    static.fill_(3.0)
    other[0] = torch.full((2,), 100.0)
    captured.replay()
    captured.replay()
    assert captured.result.tolist() == [13.0, 13.0]
    assert total.tolist() == [6.0, 6.0]


class WorseThanNothing(Listener):
    """Latents that are NaN in one step."""

    def __init__(self, step: int, note: Callable[[], None]) -> None:
        self.step, self.note = step, note

    def before_step(self, run: Run, work: StepBatches) -> None:
        if run.position.step == self.step:
            self.note()
            for batch in work.batches:
                batch.moments = torch.full_like(batch.moments, torch.nan)


def test_a_replayed_step_that_is_not_finite_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    allow_on_cpu(monkeypatch)
    before: dict[str, Any] = {}
    with prepared(**settings, cuda_graphs="on", flat_weights="on") as rehearsal:
        run = rehearsal.run
        learner = run.learner

        def state() -> list[torch.Tensor]:
            everything = tree_leaves((learner.trained_weights(), learner.optimizer.state_dict()))
            return [leaf for leaf in everything if isinstance(leaf, torch.Tensor)]

        listener = WorseThanNothing(5, lambda: before.update(state=[one.clone() for one in state()]))
        with pytest.raises(NonFiniteLossError, match=r"step 5: loss is NaN or infinite for .*Nothing was updated"):
            train_loop(run, [listener], StopSignal())
        assert learner.graphs.num_replays == 3
        assert all(torch.equal(one, other) for one, other in zip(before["state"], state(), strict=True))
        assert all(not p.grad.any() for p in learner.parameters())  # not even in the gradients that stay


def test_graphs_are_captured_anew_where_a_weight_has_moved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    class Moves(Listener):
        def before_step(self, run: Run, work: StepBatches) -> None:
            if run.position.step == 5:
                weight = next(iter(run.learner.model.unet.parameters()))
                weight.data = weight.data.clone()

    caplog.set_level(logging.INFO)
    settings = {**settings, "max_steps": 7}
    eager, *_ = trained(**settings)
    allow_on_cpu(monkeypatch)
    replayed, _, rehearsal = trained(**settings, cuda_graphs="on", listeners=[Moves()])
    assert replayed == eager
    assert rehearsal.run.learner.graphs.num_replays == 4
    assert "weights have moved" in caplog.text


def test_a_run_resumes_to_the_bit_with_graphs_and_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    allow_on_cpu(monkeypatch)
    settings = {**settings, **LORA, "max_steps": 14, "log_step": 1, "flat_weights": "on"}
    complete = train(TrainConfig(**settings))
    config = TrainConfig(**{**settings, "logdir": str(tmp_path / "parted"), "cuda_graphs": "on"})
    parted = train(config, listeners=[StopAfter(4)])
    resume(parted.folder, changes={"cuda_graphs": "off"}, listeners=[StopAfter(7)])
    assert parted.status()["state"] == "stopped"
    resume(parted.folder, changes={"cuda_graphs": "on"})
    losses, theirs = ({e["step"]: e["loss"] for e in run.events("loss")} for run in (complete, parted))
    assert losses == theirs
    one, other = (load_file(next(run.last_checkpoint.rglob("*.safetensors"))) for run in (complete, parted))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert caplog.text.count("CUDA graph 1: ") == 2


@pytest.mark.parametrize(
    ("changes", "on_cpu", "reason"),
    [
        ({}, False, "cuda_graphs: has no effect: a CPU has none"),
        ({**LORA, "lora_dropout": 0.1}, True, "cuda_graphs: has no effect: dropout draws"),
        ({"plugins": ["rehearsals.NotingPlugin"]}, True, "cuda_graphs: has no effect: a plug-in may"),
    ],
)
def test_what_cannot_be_captured_stays_eager_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], changes: dict[str, Any], on_cpu: bool, reason: str
) -> None:
    if on_cpu:
        allow_on_cpu(monkeypatch)
    with prepared(**{**settings, **changes}, cuda_graphs="on") as rehearsal:
        assert rehearsal.run.learner.graphs is None
        assert reason in rehearsal.warnings
