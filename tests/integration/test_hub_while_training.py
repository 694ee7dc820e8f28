"""Uploads in the background of a training, and continuing with the run on another machine."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_runs import TOKEN, hashes, make_run, write_checkpoint
from hub_stand_in import HubStandIn

from everydream_kit.errors import CheckpointError, HubError
from everydream_kit.export.hub import HubUploader, fetch_run, push_to_hub
from everydream_kit.runs import RunFolder
from everydream_kit.training.checkpoints import verify_checkpoint


@pytest.fixture(autouse=True)
def by_lfs_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.001)))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path / "hub") as server:
        server.add_user(TOKEN, "me")
        yield server


class StatusWriter(list[tuple[str, int, str]]):
    def __call__(self, kind: str, step: int, message: str) -> None:
        self.append((kind, step, message))

    def kinds(self) -> list[tuple[str, int]]:
        return [(kind, step) for kind, step, _ in self]


def uploader(hub: HubStandIn, reported: StatusWriter, every: int | None = 1) -> HubUploader:
    return HubUploader(
        "me/jets", every, report=reported, token=TOKEN, license="openrail", api=_api(hub), sleep=time.sleep
    )


def fetch(hub: HubStandIn, target: Path, reference: str = "hf://me/jets", **options: Any) -> Path:
    return fetch_run(reference, target, api=_api(hub), sleep=time.sleep, **{"token": TOKEN} | options)


def _api(hub: HubStandIn) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.url)


def test_every_second_checkpoint_and_the_last_are_uploaded_with_their_resume_state(
    hub: HubStandIn, tmp_path: Path
) -> None:
    run, reported = make_run(tmp_path), StatusWriter()
    uploads = uploader(hub, reported, every=2)
    sent = []
    for step in (40, 60, 80):
        sent.append(uploads.submit(write_checkpoint(run, step, seed=step), step))
        uploads.close()
    assert sent == [False, True, False]
    assert uploads.submit(run.last_checkpoint, 80, last=True)
    uploads.close()
    assert reported.kinds() == [("uploading", 60), ("uploaded", 60), ("uploading", 80), ("uploaded", 80)]
    titles = ["initial commit", "Step 60 (jets-ep01-gs00060)", "Step 80 (jets-ep01-gs00080)"]
    assert hub.titles("me/jets") == titles
    there = {path: hub.sha256_of("me/jets", path) for path in hub.files("me/jets")}
    assert hashes(run.last_checkpoint).items() <= there.items()
    assert not (run.folder / ".uploading" / "jets-ep01-gs00080").exists()


def test_only_the_last_is_uploaded_by_default(hub: HubStandIn, tmp_path: Path) -> None:
    run, reported = make_run(tmp_path), StatusWriter()
    uploads = uploader(hub, reported, every=None)
    assert not uploads.submit(run.last_checkpoint, 20)
    assert hub.requests == []
    assert uploads.submit(run.last_checkpoint, 20, last=True)
    assert uploads.close(timeout_seconds=60)
    assert reported.kinds() == [("uploading", 20), ("uploaded", 20)]


def test_a_checkpoint_that_is_pruned_on_its_way_arrives_all_the_same(hub: HubStandIn, tmp_path: Path) -> None:
    run, reported = make_run(tmp_path), StatusWriter()
    wanted = hashes(run.last_checkpoint)
    hub.fail("GET", "whoami", stall_seconds=0.5)
    uploads = uploader(hub, reported)
    uploads.submit(run.last_checkpoint, 20)
    shutil.rmtree(run.last_checkpoint)
    uploads.close()
    assert reported.kinds() == [("uploading", 20), ("uploaded", 20)]
    assert wanted.items() <= {path: hub.sha256_of("me/jets", path) for path in hub.files("me/jets")}.items()


def test_a_slow_line_skips_to_the_latest_checkpoint(hub: HubStandIn, tmp_path: Path) -> None:
    run, reported = make_run(tmp_path), StatusWriter()
    hub.fail("GET", "whoami", stall_seconds=1)
    uploads = uploader(hub, reported)
    for step in (40, 60, 80):
        uploads.submit(write_checkpoint(run, step, seed=step), step)
        deadline = time.monotonic() + 60
        while ("uploading", 40) not in reported.kinds() and time.monotonic() < deadline:
            threading.Event().wait(0.01)
    uploads.close()
    assert [entry for entry in reported.kinds() if entry[0] == "uploaded"] == [("uploaded", 40), ("uploaded", 80)]
    assert ("warning", 60) in reported.kinds()


def test_a_hub_that_fails_is_a_warning_and_the_next_checkpoint_is_tried_anew(hub: HubStandIn, tmp_path: Path) -> None:
    run, reported = make_run(tmp_path), StatusWriter()
    uploads = uploader(hub, reported)
    hub.fail("POST", "/commit/", status=500, times=3)
    uploads.submit(run.last_checkpoint, 20)
    uploads.close()
    uploads.submit(write_checkpoint(run, 40, seed=40), 40)
    uploads.close()
    assert reported.kinds() == [("uploading", 20), ("warning", 20), ("uploading", 40), ("uploaded", 40)]
    assert "Upload of step 20 failed, training continues. Could not commit to me/jets (tried 3 times)" in reported[1][2]
    assert TOKEN not in "".join(message for _, _, message in reported)


def test_training_does_not_wait_for_an_upload_longer_than_it_says(hub: HubStandIn, tmp_path: Path) -> None:
    run, reported = make_run(tmp_path), StatusWriter()
    hub.fail("GET", "whoami", stall_seconds=2)
    uploads = uploader(hub, reported)
    started = time.monotonic()
    uploads.submit(run.last_checkpoint, 20)
    assert time.monotonic() - started < 1
    assert not uploads.close(timeout_seconds=0.05)
    assert "everydream push RUN me/jets" in reported[-1][2]
    assert uploads.close()


# Another machine ----------------------------------------------------------------------------------


@pytest.fixture
def uploaded(hub: HubStandIn, tmp_path: Path) -> RunFolder:
    run = make_run(tmp_path / "here")
    uploads = uploader(hub, StatusWriter())
    uploads.submit(run.last_checkpoint, 20)
    uploads.close()
    return run


def test_a_run_comes_back_whole_on_another_machine(hub: HubStandIn, tmp_path: Path, uploaded: RunFolder) -> None:
    seen: list[int] = []
    folder = fetch(hub, tmp_path / "there", progress=lambda done, total, doing: seen.append(done))
    run = RunFolder.open(folder)
    assert run.name == uploaded.name
    assert run.last_checkpoint.name == uploaded.last_checkpoint.name
    assert hashes(run.last_checkpoint) == hashes(uploaded.last_checkpoint)
    assert verify_checkpoint(run.last_checkpoint) == {"step": 20}
    here, there = (json.loads(one.config_path.read_text()) for one in (run, uploaded))
    assert {name: here[name] for name in ("resolution", "lr", "clip_skip", "flip_p")}.items() <= there.items()
    losses = [(event["step"], event["loss"], event["lr"]) for event in uploaded.events("loss")]
    assert [(event["step"], event["loss"], event["lr"]) for event in run.events("loss")] == losses
    assert len(losses) == 20
    assert seen == sorted(seen)
    assert [path.name for path in (tmp_path / "there").iterdir()] == [run.name]


def test_fetching_again_fetches_nothing_and_a_newer_checkpoint_joins_the_run(
    hub: HubStandIn, tmp_path: Path, uploaded: RunFolder
) -> None:
    folder = fetch(hub, tmp_path / "there")
    before = hub.count("GET", "/resolve/")
    assert fetch(hub, tmp_path / "there") == folder
    assert hub.count("GET", "/resolve/") == before + 1  # only the name of the run

    uploads = uploader(hub, StatusWriter())
    uploads.submit(write_checkpoint(uploaded, 40, seed=40), 40)
    uploads.close()
    assert fetch(hub, tmp_path / "there") == folder
    assert [c.step for c in RunFolder(folder).checkpoints()] == [20, 40]


@pytest.mark.parametrize(
    ("path_part", "fault"),
    [
        ("optimizer.safetensors", {"drop_reply_after": 30_000, "times": 2}),
        ("optimizer.safetensors", {"status": 500, "times": 2}),
        ("/tree/", {"status": 503}),
        ("/api/models/me/jets", {"status": 500}),
    ],
)
def test_a_bad_line_is_outlasted(
    hub: HubStandIn, tmp_path: Path, uploaded: RunFolder, path_part: str, fault: dict[str, Any]
) -> None:
    armed = hub.fail("GET", path_part, **fault)
    run = RunFolder(fetch(hub, tmp_path / "there"))
    assert armed.times == 0
    assert hashes(run.last_checkpoint) == hashes(uploaded.last_checkpoint)


def test_a_fetch_that_failed_leaves_no_run_and_goes_on_where_it_stopped(
    hub: HubStandIn, tmp_path: Path, uploaded: RunFolder
) -> None:
    armed = hub.fail("GET", "unet/model.safetensors", status=500, times=99)
    with pytest.raises(HubError, match=r"tried 3 times.*Call again; files that have arrived are kept"):
        fetch(hub, tmp_path / "there")
    assert [path for path in (tmp_path / "there").iterdir() if not path.name.startswith(".")] == []
    armed.times = 0
    before = hub.count("GET", "/resolve/")
    run = RunFolder(fetch(hub, tmp_path / "there"))
    assert hub.count("GET", "/resolve/") == before + 1
    assert hashes(run.last_checkpoint) == hashes(uploaded.last_checkpoint)


def test_an_older_state_is_fetched_by_its_commit(hub: HubStandIn, tmp_path: Path, uploaded: RunFolder) -> None:
    older = hub.repos["me/jets"].refs["main"][-1].oid
    push_to_hub(uploaded, "me/jets", token=TOKEN, license="openrail", api=_api(hub))
    with pytest.raises(HubError, match="holds no resume state"):
        fetch(hub, tmp_path / "there")
    run = RunFolder(fetch(hub, tmp_path / "there", f"hf://me/jets@{older}"))
    assert verify_checkpoint(run.last_checkpoint) == {"step": 20}


@pytest.mark.parametrize("name", ["../../evil", ".hidden", "", "a/b", 7])
def test_names_from_the_hub_do_not_lead_outside(
    hub: HubStandIn, tmp_path: Path, uploaded: RunFolder, name: object
) -> None:
    repo = hub.repos["me/jets"]
    tree = dict(hub.files("me/jets"))
    tree["training/run.json"] = repo.add_blob(json.dumps({"run": name, "checkpoint": "jets-ep01-gs00020"}).encode())
    repo.commit("main", "tampered with", tree)
    with pytest.raises(CheckpointError, match="names no usable run"):
        fetch(hub, tmp_path / "there")


@pytest.mark.parametrize(
    ("reference", "token", "words"),
    [
        ("me/jets", TOKEN, "is written hf://owner/name"),
        ("hf://me/other", TOKEN, "does not know this repository or revision"),
        ("hf://me/jets@nowhere", TOKEN, "does not know this repository or revision"),
        ("hf://me/jets", "hf_notmytoken", "does not accept the token"),
    ],
)
def test_what_cannot_be_fetched_is_said(
    hub: HubStandIn, tmp_path: Path, uploaded: RunFolder, reference: str, token: str, words: str
) -> None:
    with pytest.raises(HubError, match=words):
        fetch(hub, tmp_path / "there", reference, token=token)
