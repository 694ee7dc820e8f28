"""The plan of the training panel: at once what is cheap, in full from a process, and *Make it fit*."""

import json
import time

import pytest
from PIL import Image

from everydream_kit.actions.background_task import BackgroundTask
from everydream_kit.actions.project import Project
from everydream_kit.panels import plan_box
from everydream_kit.panels.plan_box import PlanBox


@pytest.fixture
def project(tmp_path):
    project = Project.open(tmp_path / "jets")
    for number in range(6):
        Image.new("RGB", (64, 64)).save(project.images_folder / f"a jet_{number}.png")
    return project


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(plan_box, "REST_SECONDS", 0.0)


TOO_LARGE = {
    "fits": False,
    "device": "T4",
    "device_bytes": 15 * 2**30,
    "memory": {"peak_bytes": 33 * 2**30},
    "seconds": 3700,
    "cost_usd": 0.4,
    "price": {"read_on": "2026-11-09"},
    "text": "plan  does not fit",
    "advice": {"fits": True, "changes": {"gradient_checkpointing": True}, "reasons": ["gradient_checkpointing: on"]},
}


class Answering(BackgroundTask):
    """Stands for the process: one answer for every wish, at the next look."""

    def __init__(self, folder, answer):
        super().__init__(folder)
        self.answer, self.reported, self.wishes = answer, 0, []

    def begin(self, task, *arguments):
        self.wishes.append(json.loads(arguments[1]))

    def poll(self):
        if self.reported == len(self.wishes):
            return None
        self.reported += 1
        self.folder.mkdir(exist_ok=True)
        (self.folder / "plan.json").write_text(json.dumps({**self.answer, "key": self.wishes[-1]["key"]}))
        return {"alive": False, "state": "finished"}


def plan_for(box, config):
    box.take(config)
    for _ in range(3):
        box.refresh(may_start=True)


def test_what_is_cheap_is_said_at_once_and_the_rest_when_it_is_known(project):
    task = Answering(project.folder / "plan", TOO_LARGE)
    box = PlanBox(project, lambda values: None, lambda *words: None, task=task)
    config = project.config(batch_size=4, max_epochs=10)
    box.take(config)
    assert "6 images × 10 epochs → 20 steps" in box.line.value and "memory" not in box.line.value
    box.refresh(may_start=False)
    assert task.wishes == [], "a run in progress needs the machine"
    plan_for(box, config)
    assert "6 images × 10 epochs → 20 steps · about 1 h 01 min on T4" in box.line.value
    assert (
        "does not fit: 33.0 of 15.0 GiB memory" in box.line.value
        and "about $0.40 at the price of 2026-11-09" in box.line.value
    )
    box.fold.set_open(True)
    assert "plan  does not fit" in box.report.value
    plan_for(box, project.config(batch_size=2))
    plan_for(box, config)
    assert len(task.wishes) == 2, "what was planned once is remembered"


def test_settings_that_are_still_being_typed_are_not_planned(project, monkeypatch):
    monkeypatch.setattr(plan_box, "REST_SECONDS", 3600.0)
    task = Answering(project.folder / "plan", TOO_LARGE)
    box = PlanBox(project, lambda values: None, lambda *words: None, task=task)
    plan_for(box, project.config())
    assert task.wishes == []


def test_what_training_would_refuse_stands_on_the_plan_line(project):
    refused = {"error": "min_snr_gamma: flow matching has weighting_scheme (Z-Image). Leave it out."}
    box = PlanBox(project, lambda values: None, lambda *words: None, task=Answering(project.folder / "plan", refused))
    box.take(project.config())
    assert "edk-note" not in box.line.value and box.refusal == ""
    plan_for(box, project.config())
    assert box.refusal == refused["error"]
    assert "edk-note warn" in box.line.value and "weighting_scheme" in box.line.value and "6 images" in box.line.value


def test_make_it_fit_takes_over_what_is_advised(project):
    applied, said = [], []
    task = Answering(project.folder / "plan", TOO_LARGE)
    box = PlanBox(project, applied.append, lambda *words: said.append(words), task=task)
    box.take(project.config())
    assert box.fit_button.layout.display == "none"
    plan_for(box, project.config())
    assert box.fit_button.layout.display == ""
    box.fit_button.click()
    assert applied == [{"gradient_checkpointing": True}]
    assert "gradient_checkpointing: on" in said[0][0] and said[0][1] == "good"


def test_another_card_and_a_price_are_planned_for(project):
    task = Answering(project.folder / "plan", TOO_LARGE)
    box = PlanBox(project, lambda values: None, lambda *words: None, task=task)
    plan_for(box, project.config())
    box.gpu.value, box.price.value = "T4", "0.35"
    plan_for(box, project.config())
    assert [(wish["gpu"], wish["price"]) for wish in task.wishes] == [(None, None), ("T4", 0.35)]
    box.price.value = "cheap"
    plan_for(box, project.config())
    assert len(task.wishes) == 2 and "must be a number (got &#x27;cheap&#x27;)" in box.report.value


@pytest.mark.background
def test_a_plan_in_the_making_gives_way_to_a_run_and_is_made_after_it(project):
    box = PlanBox(project, lambda values: None, lambda *words: None)
    box.take(project.config())
    box.refresh(may_start=True)
    making = box._task.job
    assert making.is_alive()
    box.refresh(may_start=False)
    assert not making.is_alive() and box._task.job is None
    box.refresh(may_start=True)
    assert box._task.job is not None
    box.refresh(may_start=False)


@pytest.mark.background
def test_the_process_makes_the_real_plan(project):
    box = PlanBox(project, lambda values: None, lambda *words: None)
    box.take(project.config(resolution=64, batch_size=2, max_epochs=3, sample_steps=None))
    end = time.monotonic() + 250
    while "memory" not in box.line.value:
        assert time.monotonic() < end and "error" not in box.report.value, box.report.value
        box.refresh(may_start=True)
        time.sleep(0.1)
    assert "6 images × 3 epochs → 9 steps · about" in box.line.value and "on this CPU" in box.line.value
    assert "GiB memory" in box.line.value and "on disk" in box.line.value
    assert "training step" in box.report.value


LONG = {"fits": True, "seconds": 53545 * 3600, "disk": {"most_bytes": 4.9e15}, "text": "plan"}


@pytest.mark.parametrize("answer", [LONG, TOO_LARGE])
def test_a_run_that_takes_days_or_does_not_fit_is_warned_of_in_color(project, answer):
    box = PlanBox(project, lambda values: None, lambda *words: None, task=Answering(project.folder / "plan", answer))
    plan_for(box, project.config(max_epochs=10))
    assert "edk-note warn" in box.line.value
    if answer is LONG:
        assert "about 2,231 days" in box.caution and "4900.0 TB, and" in box.caution
    else:
        assert "does not fit into the memory of this machine" in box.caution
    box.gpu.value = box.gpu.options[1][1]  # of another GPU nothing is known yet
    assert box.caution == ""


def test_an_ordinary_run_is_not_warned_of(project):
    short = {"fits": True, "seconds": 600, "disk": {"most_bytes": 1e6}, "text": "plan"}
    box = PlanBox(project, lambda values: None, lambda *words: None, task=Answering(project.folder / "plan", short))
    plan_for(box, project.config(max_epochs=10))
    assert box.caution == "" and "warn" not in box.line.value
