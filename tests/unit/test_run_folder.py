"""Run folders: names, finding, reading while someone writes."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from everydream_kit.atomic import require_writable
from everydream_kit.errors import CheckpointError, ConfigError, JobError
from everydream_kit.runs import Checkpoint, RunFolder, find_last_checkpoint, find_run, list_runs
from everydream_kit.runs.layout import checkpoint_name
from everydream_kit.strict_json import JsonLines

NOON = datetime(2026, 1, 2, 12, 0, 0)


def make_run(logdir: Path, project: str = "jets", now: datetime = NOON) -> RunFolder:
    run = RunFolder.create(logdir, project, now)
    run.config_path.write_text("{}", "utf-8")
    return run


def add_checkpoint(run: RunFolder, name: str, *, resumable: bool = False) -> Path:
    folder = run.checkpoints_folder / name
    folder.mkdir()
    (folder / "model_index.json").write_text("{}", "utf-8")
    if resumable:
        (folder / "resume").mkdir()
        (folder / "resume" / "manifest.json").write_text("{}", "utf-8")
    return folder


def test_a_run_is_named_by_project_and_time_and_never_shares_a_folder(tmp_path: Path) -> None:
    first, second = make_run(tmp_path), make_run(tmp_path)
    assert first.name == "jets-20260102-120000"
    assert second.name == "jets-20260102-120000-2"
    assert [run.name for run in list_runs(tmp_path)] == [first.name, second.name]


def test_the_latest_run_is_by_the_time_in_its_name(tmp_path: Path) -> None:
    late = make_run(tmp_path, now=datetime(2026, 3, 1))
    make_run(tmp_path, now=datetime(2026, 2, 1))
    make_run(tmp_path, "other", now=datetime(2026, 4, 1))
    assert find_run(None, tmp_path, "jets").folder == late.folder
    assert find_run(late.name, tmp_path).folder == late.folder
    assert find_run(add_checkpoint(late, "jets-ep01-gs00003"), tmp_path).folder == late.folder
    with pytest.raises(JobError, match="no such run folder"):
        find_run("nothing", tmp_path)
    with pytest.raises(JobError, match="holds no run"):
        find_run(None, tmp_path / "empty")


def test_checkpoints_are_listed_by_step_and_half_written_ones_are_not(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    add_checkpoint(run, "jets-ep02-gs00010", resumable=True)
    add_checkpoint(run, "jets-ep01-gs00005")
    add_checkpoint(run, "jets-ep02-gs00010_ema")
    add_checkpoint(run, ".partial-jets-ep03-gs00015")
    (run.checkpoints_folder / "jets-ep04-gs00020").mkdir()  # no model in it
    found = run.checkpoints()
    assert [(c.epoch, c.step, c.resumable) for c in found] == [(1, 5, False), (2, 10, True), (2, 10, False)]
    assert run.last_checkpoint.name == "jets-ep02-gs00010"
    assert find_last_checkpoint(tmp_path, "jets").name == "jets-ep02-gs00010"
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="holds a complete checkpoint"):
        find_last_checkpoint(tmp_path, "cars")


@pytest.mark.parametrize(
    ("status", "is_passed_over"),
    [
        ({"state": "failed"}, True),
        ({"state": "stopped", "step": 0}, True),
        ({"state": "failed", "step": 7}, False),
        ({"state": "starting"}, False),
    ],
)
def test_the_latest_run_is_none_that_failed_before_its_first_step(
    tmp_path: Path, status: dict[str, object], is_passed_over: bool
) -> None:
    real, late = make_run(tmp_path), make_run(tmp_path, now=datetime(2026, 3, 1))
    late.status_path.write_text(json.dumps(status))
    assert find_run(None, tmp_path).folder == (real if is_passed_over else late).folder
    real.status_path.write_text(json.dumps({"state": "failed"}))
    assert find_run(None, tmp_path).folder == late.folder  # and where all failed, the latest


def test_checkpoint_names_are_everydream2s() -> None:
    assert checkpoint_name("jets", 3, 120) == "jets-ep03-gs00120"
    assert checkpoint_name("jets", 120, 123456, prefix="last-") == "last-jets-ep120-gs123456"


def test_an_event_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.events_path.write_text('{"kind": "loss", "step": 1}\n{"kind": "saved"}\n{"kind": "lo', "utf-8")
    assert [event["kind"] for event in run.events()] == ["loss", "saved"]
    assert [event["step"] for event in run.events("loss")] == [1]


def test_a_request_is_taken_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    request = run.request("save")
    taken = run.take_request()
    assert taken is not None
    assert (taken["action"], taken["id"]) == ("save", request)
    assert run.take_request() is None


CUT_OFF = (
    b'{"kind": "loss", "step": 1}\n'
    b'{"kind": "loss", "st{"kind": "loss", "step": 2}\n'
    b"[1]\n"
    b'{"step": 3}\n'
    b'{"kind": "loss", "step": NaN}\n'
    b'{"kind": "loss", "step": 4}\n{"kind": "lo'
)


def test_bad_lines_of_the_events_are_skipped_and_counted(tmp_path):
    (tmp_path / "events.jsonl").write_bytes(CUT_OFF)
    report = JsonLines()
    events = list(RunFolder(tmp_path).events("loss", report=report))
    assert [event["step"] for event in events] == [1, 4]
    assert [int(re.findall(r"line (\d+)", problem)[0]) for problem in report.bad] == [2, 3, 4, 5]
    assert report.unfinished


def test_with_the_report_of_an_earlier_reading_only_what_is_new_is_read(tmp_path):
    path, report = tmp_path / "events.jsonl", JsonLines()
    path.write_bytes(CUT_OFF)
    list(RunFolder(tmp_path).events(report=report))
    with path.open("ab") as file:
        file.write(b'ss", "step": 5}\nbroken\n')
    assert [event["step"] for event in RunFolder(tmp_path).events(report=report)] == [5]
    assert "line 8" in report.bad[-1]
    assert not report.unfinished
    assert list(RunFolder(tmp_path).events(report=report)) == []


@pytest.mark.parametrize(
    ("written", "usable"),
    [
        ({"state": "running", "step": "7"}, {"state": "running"}),
        ({"state": ["x"], "step": True, "loss": None}, {"loss": None}),
        ({"progress": 1, "pid": 4.5, "heartbeat": {}, "message": None}, {"progress": 1, "message": None}),
        ({"state": "running", "of another version": [1]}, {"state": "running", "of another version": [1]}),
    ],
)
def test_what_is_not_of_its_type_in_a_status_is_as_if_it_were_not_there(tmp_path, written, usable):
    (tmp_path / "status.json").write_text(json.dumps(written))
    assert RunFolder(tmp_path).status() == usable


def test_a_checkpoint_knows_its_twin_its_resume_state_and_its_run(tmp_path):
    run = make_run(tmp_path)
    live = Checkpoint.open(add_checkpoint(run, "jets-ep02-gs00010", resumable=True))
    assert not live.averaged.exists
    twin = Checkpoint.open(add_checkpoint(run, "jets-ep02-gs00010_ema"))
    assert (live.averaged, live.averaged.exists, twin.averaged, twin.is_averaged, live.is_averaged) == (
        *(twin, True, twin, True, False),
    )
    assert (twin.step, live.run, twin.run) == (10, run, run)
    assert [path.name for path in live.resume_files()] == ["manifest.json"]
    assert [path.name for path in live.model_files()] == ["model_index.json"]
    assert run.checkpoints(averaged=True) == [twin]
    elsewhere = tmp_path / "copy" / "jets-ep02-gs00010"
    elsewhere.mkdir(parents=True)
    assert Checkpoint.at(elsewhere).run is None


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ('{"action": ["stop"]}', '["stop"]'),
        ('{"action": {"stop": 1}}', '{"stop": 1}'),
        ('{"id": 7}', "null"),
        ('{"action": "stop", "id": [1]}', "stop"),
        ("[1]", "[1]"),
        ("[" * 5000, "[" * 100),
        ("stop", "stop"),
        ('{"action": ' + "7" * 6000 + "}", '{"action": ' + "7" * 89),
        ('{"action": NaN}', '{"action": NaN}'),
        ("", ""),
    ],
)
def test_a_malformed_request_is_an_unknown_action_in_words(tmp_path, text, action):
    run = RunFolder(tmp_path)
    (tmp_path / "control.json").write_text(text)
    assert run.pending_action() in (None, "stop")
    request = run.take_request()
    assert request["action"] == action
    assert isinstance(request.get("id"), str | None)
    assert run.take_request() is None


@pytest.mark.parametrize("text", ["[1]", "[" * 5000, '{"step": ' + "7" * 6000 + "}", "\xff", ""])
def test_a_damaged_status_is_no_status(tmp_path, text):
    (tmp_path / "status.json").write_text(text, encoding="latin-1")
    assert RunFolder(tmp_path).status() == {}


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_cannot_be_written_is_named_with_its_setting(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"save_ckpt_dir: .*file.* cannot be written \((File exists|Not a directory)\)"
    ):
        require_writable(tmp_path / "file" / below, "save_ckpt_dir")


def test_a_folder_is_made_tried_and_left_clean(tmp_path):
    require_writable(tmp_path / "a" / "b", "logdir")
    assert list((tmp_path / "a" / "b").iterdir()) == []
