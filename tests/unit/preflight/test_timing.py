"""The first steps of a run, timed, say once what the rest takes; next to what was estimated, where a plan is in its
folder."""

import json
from types import SimpleNamespace

import pytest

from everydream_kit.preflight.timing import MeasuredPlan
from everydream_kit.runs import RunFolder
from everydream_kit.training.journal import Journal


@pytest.fixture
def run(tmp_path):
    """What the listener asks of a run: its folder, its journal, and how many steps it has."""
    folder = RunFolder.create(tmp_path, "jets")
    journal = Journal(folder)
    yield SimpleNamespace(folder=folder, journal=journal, num_steps=110, report=journal.report)
    journal.close()


def take_steps(run, seconds):
    listener = MeasuredPlan()
    for step, taken in enumerate(seconds, start=1):
        listener(run, SimpleNamespace(step=step, seconds=taken))
    return list(run.folder.events("plan"))


def test_it_is_reported_once_by_the_median_and_without_the_warming_up(run, caplog):
    with caplog.at_level("INFO", "everydream_kit"):
        events = take_steps(run, [60.0, 30.0, *[2.0] * 7, 50.0, *[9.0] * 30])
    (event,) = events
    assert (event["step"], event["seconds_per_step"], event["seconds_left"]) == (10, 2.0, 200.0)
    assert event["cost_left_usd"] is None
    assert "2.00 s a step: about 3 min 20 s of training left" in caplog.text


def test_a_plan_in_the_folder_gives_price_and_comparison(run):
    plan = {"price": {"usd_per_hour": 1.8}, "step_seconds": {"seconds": 1.5}}
    (run.folder.folder / "plan.json").write_text(json.dumps(plan), "utf-8")
    (event,) = take_steps(run, [2.0] * 10)
    assert (
        event["line"]
        == "2.00 s a step: about 3 min 20 s of training left, about 0.10 USD (the estimate was 1.50 s a step)"
    )
    assert (event["cost_left_usd"], event["estimated_seconds_per_step"]) == (0.1, 1.5)


@pytest.mark.parametrize("text", ["{", "[]", '{"price": null}'])
def test_a_plan_that_cannot_be_read_is_left_out(run, text):
    (run.folder.folder / "plan.json").write_text(text, "utf-8")
    (event,) = take_steps(run, [2.0] * 10)
    assert event["cost_left_usd"] is None


def test_a_run_of_a_few_steps_says_nothing(run):
    assert take_steps(run, [2.0] * 9) == []
