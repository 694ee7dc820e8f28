"""Which candidate `speed: auto` takes, by seconds that are given; and when two measurements agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everydream_kit.config import TrainConfig
from everydream_kit.runs import RunFolder
from everydream_kit.training.journal import Journal
from everydream_kit.training.measured_passes import Measured, disagreement
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.speed_choice import PLAIN, Candidate, SpeedTrial, _Choice

LAYOUT, GRAPHS = Candidate({"channels_last": True}), Candidate({"cuda_graphs": "on"})
COMPILED = Candidate({"torch_compile": True}, start_seconds=100.0)


class Timed:
    """Passes whose seconds are known: (of one pass, before the first); with each call the next ones of the list."""

    def __init__(self, seconds: dict[str, list[tuple[float, float]]]) -> None:
        self.seconds = {name: iter(each) for name, each in seconds.items()}

    def measure(self, changes: dict[str, Any]) -> Measured:
        of_one, before = next(self.seconds[" + ".join(changes) or PLAIN])
        return Measured(of_one, before, torch.ones(2), torch.ones(3))


def choose(folder: Path, candidates: tuple[Candidate, ...], num_passes: int = 10_000, **seconds: Any) -> _Choice:
    measured = {name.replace("__", " + "): each for name, each in seconds.items()}
    choice = _Choice(
        TrainConfig(resume_ckpt="x"),
        SpeedTrial(candidates=candidates),
        None,
        Ranks(0, 1, torch.device("cpu")),
        Timed(measured),
        num_passes,
        Journal(RunFolder(folder), writes=False),
    )
    choice.chosen = choice.make()
    return choice


def test_the_fastest_is_chosen_and_what_adds_to_it(tmp_path: Path) -> None:
    both = (LAYOUT, GRAPHS)
    seconds = {"plain": [(0.2, 1.0)] * 2, "channels_last": [(0.16, 0.0)], "cuda_graphs": [(0.1, 0.0)]}
    assert choose(tmp_path, both, **seconds, cuda_graphs__channels_last=[(0.05, 0.0)]).chosen == {
        "cuda_graphs": "on",
        "channels_last": True,
    }
    assert choose(tmp_path, both, **seconds, cuda_graphs__channels_last=[(0.098, 0.0)]).chosen == {"cuda_graphs": "on"}


def test_three_percent_are_needed(tmp_path: Path) -> None:
    plain = [(0.2, 0.0)] * 2
    assert choose(tmp_path, (LAYOUT,), plain=plain, channels_last=[(0.195, 0.0)]).chosen == {}
    assert choose(tmp_path, (LAYOUT,), plain=plain, channels_last=[(0.193, 0.0)]).chosen == {"channels_last": True}


def test_a_machine_that_was_busy_at_first_decides_nothing(tmp_path: Path) -> None:
    choice = choose(tmp_path, (LAYOUT,), plain=[(0.2, 0.0), (0.1, 0.0)], channels_last=[(0.1, 0.0)])
    assert choice.chosen == {} and choice.table() == "plain 100 ms, channels_last 100 ms"


@pytest.mark.parametrize(("num_passes", "is_chosen"), [(10_000, True), (6_000, False)])
def test_the_minutes_of_compiling_count(tmp_path: Path, num_passes: int, is_chosen: bool) -> None:
    """0.05 s saved in each of 6,000 passes are 300 s, and compiling took 320."""
    timed = {"plain": [(0.2, 9.0)] * 2, "torch_compile": [(0.15, 320.0)]}
    assert choose(tmp_path, (COMPILED,), num_passes, **timed).chosen == ({"torch_compile": True} if is_chosen else {})


def test_compiling_is_not_tried_where_it_cannot_pay(tmp_path: Path) -> None:
    choice = choose(tmp_path, (COMPILED,), 4_000, plain=[(0.2, 0.0)])
    assert choice.not_used == {
        "torch_compile": "about 100 s before the first pass do not pay in 800 s of training",
    }


def test_settings_that_do_not_go_together_are_not_combined(tmp_path: Path) -> None:
    timed = {"plain": [(0.2, 0.0)] * 2, "cuda_graphs": [(0.1, 0.0)], "torch_compile": [(0.11, 0.0)]}
    choice = choose(tmp_path, (GRAPHS, COMPILED), **timed)
    assert choice.chosen == {"cuda_graphs": "on"}
    assert "may compile again during a capture" in choice.not_used["cuda_graphs + torch_compile"]


@pytest.mark.parametrize(
    ("losses", "norms", "is_half", "problem"),
    [
        ([1.0, 2.0], [3.0, 4.0], False, None),
        ([1.0, 2.001], [3.0, 4.01], False, None),
        ([1.0, 2.01], [3.0, 4.0], False, "its losses differ from plain ones by 0.0045, and 0.001 is allowed"),
        ([1.0, 2.01], [3.0, 4.1], True, None),
        ([1.0, 2.0], [6.0, 8.0], True, "its gradient norms differ from plain ones by 1, and 0.05 is allowed"),
        ([1.0, 2.0], [4.0, 3.0], True, "its gradient norms differ from plain ones by 0.28, and 0.05 is allowed"),
        ([1.0, 2.0], [3.0], True, "it gives 1 gradient norms and plain passes 2"),
        ([1.0, float("nan")], [3.0, 4.0], True, "its losses differ from plain ones by nan, and 0.01 is allowed"),
    ],
)
def test_a_candidate_must_give_plain_numbers(
    losses: list[float], norms: list[float], is_half: bool, problem: str | None
) -> None:
    plain = Measured(1.0, 0.0, torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    found = Measured(0.5, 0.0, torch.tensor(losses), torch.tensor(norms))
    assert disagreement(found, plain, is_half=is_half) == problem
