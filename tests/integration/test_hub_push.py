"""Pushing with the real huggingface_hub client to a stand-in: what arrives, and what is done about a bad line."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_runs import TOKEN, hashes, make_run, write_checkpoint
from hub_stand_in import HubStandIn

from everydream_kit.errors import ExportError, HubError
from everydream_kit.export.hub import check_hub_access, preview_push, push_to_hub

MEGABYTE = 1_000_000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path / "hub") as server:
        server.add_user(TOKEN, "me", orgs=("studio",))
        yield server


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every wait of kit and client, asked for and not slept."""
    asked: list[float] = []
    sleep = time.sleep

    def nap(seconds: float) -> None:
        asked.append(seconds)
        sleep(min(seconds, 0.001))

    monkeypatch.setattr(time, "sleep", nap)
    return asked


@pytest.fixture(params=["lfs", "xet"])
def transfer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    _use_xet(monkeypatch, request.param == "xet")
    return str(request.param)


@pytest.fixture
def lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    _use_xet(monkeypatch, False)


def _use_xet(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not on)


def push(hub: HubStandIn, source: Any, repo_id: str = "me/jets", **options: Any) -> str:
    from huggingface_hub import HfApi

    options = {"license": "openrail", "token": TOKEN, "sleep": time.sleep} | options
    return push_to_hub(source, repo_id, api=HfApi(endpoint=hub.url), **options)


def assert_model_is_there(hub: HubStandIn, checkpoint: Path, repo_id: str = "me/jets", revision: str = "main") -> None:
    """Every file of the model, with its hash, and no other model file."""
    there = {path: hub.sha256_of(repo_id, path, revision) for path in hub.files(repo_id, revision)}
    others = {
        path for path in there if path.startswith(("samples/", "training/")) or path in ("README.md", ".gitattributes")
    }
    wanted = {path: digest for path, digest in hashes(checkpoint).items() if not path.startswith("resume/")}
    assert {path: digest for path, digest in there.items() if path not in others} == wanted


def test_thirty_megabytes_in_several_files_arrive_as_one_commit(
    hub: HubStandIn, tmp_path: Path, transfer: str, naps: list[float]
) -> None:
    run = make_run(tmp_path, unet_bytes=17 * MEGABYTE)
    seen: list[tuple[int, int, str]] = []
    url = push(hub, run, progress=lambda done, total, doing: seen.append((done, total, doing)))

    assert url == f"{hub.url}/me/jets"
    assert_model_is_there(hub, run.last_checkpoint)
    assert hub.titles("me/jets") == ["initial commit", "Upload jets-ep01-gs00020 with EveryDream Kit"]
    assert hub.repos["me/jets"].private
    assert {path for path in hub.files("me/jets") if path.startswith(("samples", "training"))} == {
        *("samples/gs00020-000.jpg", "samples/gs00020-001.jpg", "training/config.json", "training/curves.png")
    }
    assert bool(hub.bytes_received) == (transfer == "lfs")
    done = [entry[0] for entry in seen]
    assert done == sorted(done) and done[-1] == seen[-1][1] > 29 * MEGABYTE
    assert not naps


def test_a_pushed_model_comes_back_and_draws_the_same_image(
    hub: HubStandIn, tmp_path: Path, tiny_model_folder: Path, transfer: str
) -> None:
    import numpy as np
    from huggingface_hub import snapshot_download

    from everydream_kit.models.loading import load_model
    from everydream_kit.models.sampling import SamplePrompt, sample_images

    push(hub, tiny_model_folder)
    pulled = snapshot_download("me/jets", endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "cache")

    def draw(folder: str | Path) -> np.ndarray:
        prompt = SamplePrompt("a red square", seed=3, width=64, height=64)
        return np.asarray(sample_images(load_model(str(folder)), [prompt], num_inference_steps=2)[0])

    np.testing.assert_array_equal(draw(pulled), draw(tiny_model_folder))


def test_a_single_file_is_written_for_the_push_and_leaves_nothing_behind(
    hub: HubStandIn, tmp_path: Path, tiny_model_folder: Path, lfs: None
) -> None:
    from safetensors import safe_open

    before = set(tiny_model_folder.parent.iterdir())
    push(hub, tiny_model_folder, what=("single_file",))
    name = f"{tiny_model_folder.name}.safetensors"
    assert set(hub.files("me/jets")) == {".gitattributes", "README.md", name}
    with safe_open(hub.lfs_folder / hub.sha256_of("me/jets", name), framework="np") as file:
        assert any(key.startswith("model.diffusion_model.") for key in file.keys())  # noqa: SIM118
    assert set(tiny_model_folder.parent.iterdir()) == before


def test_pushing_the_same_again_makes_no_commit(hub: HubStandIn, tmp_path: Path, lfs: None) -> None:
    run = make_run(tmp_path)
    push(hub, run)
    received = dict(hub.bytes_received)
    push(hub, run)
    assert len(hub.titles("me/jets")) == 2
    assert hub.bytes_received == received


def test_a_newer_checkpoint_replaces_the_older_and_leaves_nothing_of_it(
    hub: HubStandIn, tmp_path: Path, lfs: None
) -> None:
    run = make_run(tmp_path)
    push(hub, run, what=("diffusers", "resume", "training"))
    assert "resume/optimizer.safetensors" in hub.files("me/jets")
    (run.last_checkpoint / "unet" / "old-shard.safetensors").write_bytes(b"old")
    push(hub, run, what=("diffusers", "resume", "training"))
    newer = write_checkpoint(run, 40, seed=40)
    push(hub, run)
    assert_model_is_there(hub, newer)  # neither the shard nor the resume state of step 20
    assert "training/run.json" not in hub.files("me/jets")


# The line and the Hub misbehave -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path_part", "fault"),
    [
        ("PUT", "/_lfs/", {"drop_after": 60_000, "times": 2}),
        ("PUT", "/_lfs/", {"drop_reply_after": 0}),
        ("PUT", "/_lfs/", {"status": 500, "times": 7}),  # more than the client's own retries
        ("PUT", "/_lfs/", {"status": 429, "retry_after": 1}),
        ("POST", "/preupload/", {"status": 503}),
        ("POST", "objects/batch", {"status": 500}),
        ("POST", "/commit/", {"status": 500}),
        ("POST", "/commit/", {"status": 429, "retry_after": 7}),
        ("POST", "/commit/", {"drop_after": 100}),
        ("POST", "/commit/", {"status": 500, "after_work": True}),
        ("POST", "/commit/", {"drop_reply_after": 5}),
        ("POST", "/commit/", {"status": 412}),
        ("POST", "/commit/", {"status": 409, "message": "conflicting operation in progress"}),
        ("POST", "/api/repos/create", {"status": 500}),
        ("POST", "/api/repos/create", {"status": 500, "after_work": True}),
        ("POST", "/api/validate-yaml", {"status": 502}),
        ("GET", "whoami", {"status": 504}),
    ],
    ids=lambda value: (
        " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value).strip("/")
    ),
)
def test_what_passes_by_itself_is_outlasted(
    hub: HubStandIn, tmp_path: Path, lfs: None, naps: list[float], method: str, path_part: str, fault: dict[str, Any]
) -> None:
    run = make_run(tmp_path)
    armed = hub.fail(method, path_part, **fault)
    push(hub, run)
    assert armed.times == 0
    assert_model_is_there(hub, run.last_checkpoint)
    assert len(hub.titles("me/jets")) == 2  # one commit, also where an answer was lost
    if fault.get("retry_after") == 7:
        assert 7 in naps


@pytest.mark.parametrize(
    ("method", "path_part", "fault", "words", "cure"),
    [
        ("GET", "whoami", {"status": 401}, "does not accept the token", "hf auth login"),
        ("PUT", "/_lfs/", {"status": 403}, "may not do this", "role `write`"),
        ("POST", "/commit/", {"status": 401}, "does not accept the token", "untouched. Push again"),
        (
            "POST",
            "/commit/",
            {"status": 409, "message": "locked"},
            "at the same time (409: locked",
            "untouched. Push again",
        ),
        (
            "POST",
            "/commit/",
            {"status": 500},
            "(tried 3 times): the Hub failed with an internal error (500)",
            "Push again",
        ),
        (
            "POST",
            "/commit/",
            {"status": 400, "message": "no such thing"},
            "(400: no such thing",
            "untouched. Push again",
        ),
        ("POST", "/commit/", {"drop_after": 10}, "(tried 3 times): the connection broke off", "internet connection"),
        ("PUT", "/_lfs/", {"drop_after": 10, "times": 999}, "(tried 3 times): the connection broke off", "Push again"),
        ("POST", "/api/repos/create", {"status": 429}, "slow down", "Wait a few minutes"),
    ],
)
def test_what_stays_wrong_is_one_error_with_the_next_step_and_pushing_again_works(
    hub: HubStandIn,
    tmp_path: Path,
    lfs: None,
    naps: list[float],
    method: str,
    path_part: str,
    fault: dict[str, Any],
    words: str,
    cure: str,
) -> None:
    run = make_run(tmp_path)
    armed = hub.fail(method, path_part, **{"times": 99, **fault})
    with pytest.raises(HubError) as caught:
        push(hub, run)
    assert words in str(caught.value)
    assert cure in str(caught.value)
    armed.times = 0
    push(hub, run)
    assert_model_is_there(hub, run.last_checkpoint)
    assert len(hub.titles("me/jets")) == 2


def test_a_refusal_behind_xet_is_reported_as_one(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]
) -> None:
    # Xet raises the built-in ConnectionError, with the status in its text alone. (A 500 it retries for minutes.)
    _use_xet(monkeypatch, True)
    hub.fail("GET", "/xet-write-token/", status=403, times=99)
    with pytest.raises(HubError, match="may not do this"):
        push(hub, make_run(tmp_path))
    assert naps == []


def test_a_hub_that_is_silent_is_given_up_after_the_read_timeout(
    hub: HubStandIn, tmp_path: Path, lfs: None, naps: list[float], impatient: None
) -> None:
    hub.fail("POST", "/commit/", stall_seconds=30, times=3)
    with pytest.raises(HubError, match="did not answer in time"):
        push(hub, make_run(tmp_path))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    from everydream_kit.export.hub import connection

    monkeypatch.setattr(connection, "READ_TIMEOUT_SECONDS", 0.2)
    before = _http._GLOBAL_CLIENT_FACTORY
    set_client_factory(_http.default_client_factory)
    yield
    set_client_factory(before)


def test_the_kit_bounds_every_wait_but_leaves_a_users_own_client_alone(hub: HubStandIn, impatient: None) -> None:
    from huggingface_hub import HfApi, get_session, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    check_hub_access("me/jets", TOKEN, api=HfApi(endpoint=hub.url))
    assert get_session().timeout.read == 0.2
    assert get_session().timeout.connect == 10

    def own() -> Any:
        client = default_client_factory()
        client.timeout = 77
        return client

    set_client_factory(own)
    check_hub_access("me/jets", TOKEN, api=HfApi(endpoint=hub.url))
    assert get_session().timeout.read == 77


def test_a_hub_that_cannot_be_reached_is_reported_as_such(tmp_path: Path, naps: list[float]) -> None:
    with HubStandIn(tmp_path / "hub") as gone:
        pass
    with pytest.raises(HubError, match=r"\(tried 3 times\): the Hub cannot be reached. Check the internet"):
        push(gone, make_run(tmp_path))


def test_offline_mode_is_reported_as_such(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"offline mode is on\. Unset HF_HUB_OFFLINE"):
        push(hub, make_run(tmp_path))


def test_a_killed_push_is_taken_up_by_the_next_one(hub: HubStandIn, tmp_path: Path, lfs: None) -> None:
    run = make_run(tmp_path, unet_bytes=12 * MEGABYTE)
    stall = hub.fail("PUT", "/_lfs/", skip=5, stall_seconds=60)  # the sixth object is on its way when the process dies
    script = (
        "import sys; from huggingface_hub import HfApi; from everydream_kit.export.hub import push_to_hub;"
        f"push_to_hub({str(run.folder)!r}, 'me/jets', api=HfApi(endpoint={hub.url!r}), license='openrail')"
    )
    environment = os.environ | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    deadline = time.monotonic() + 60
    while stall.times and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(hub.bytes_received) == 5
    assert len(hub.titles("me/jets")) == 1

    push(hub, run)
    assert_model_is_there(hub, run.last_checkpoint)
    assert len(hub.titles("me/jets")) == 2
    sizes = {entry.sha256: entry.size for entry in hub.files("me/jets").values() if entry.sha256}
    assert hub.bytes_received == sizes  # nothing came twice


def test_large_files_go_in_parts_where_the_hub_wants_them(tmp_path: Path, lfs: None, naps: list[float]) -> None:
    run = make_run(tmp_path)
    with HubStandIn(tmp_path / "hub", part_bytes=30_000) as hub:
        hub.add_user(TOKEN, "me")
        hub.fail("PUT", "/2", status=503)
        push(hub, run)
        assert_model_is_there(hub, run.last_checkpoint)


# Where it goes ------------------------------------------------------------------------------------


def test_a_branch_is_created_and_main_stays(hub: HubStandIn, tmp_path: Path, lfs: None) -> None:
    run = make_run(tmp_path)
    assert push(hub, run, revision="night-2") == f"{hub.url}/me/jets/tree/night-2"
    assert_model_is_there(hub, run.last_checkpoint, revision="night-2")
    assert list(hub.files("me/jets")) == [".gitattributes"]
    push(hub, run, revision="night-2")


@pytest.mark.parametrize("fault", [None, {"status": 500}, {"status": 500, "after_work": True}, {"drop_reply_after": 0}])
def test_a_pull_request_is_opened_once_and_the_branch_stays(
    hub: HubStandIn, tmp_path: Path, lfs: None, naps: list[float], fault: dict[str, Any] | None
) -> None:
    run = make_run(tmp_path)
    check_hub_access("me/jets", TOKEN, api=_api(hub))
    if fault:
        hub.fail("POST", "/commit/", **fault)
    assert push(hub, run, create_pr=True) == f"{hub.url}/me/jets/discussions/1"
    assert_model_is_there(hub, run.last_checkpoint, revision="refs/pr/1")
    assert list(hub.files("me/jets")) == [".gitattributes"]
    assert "refs/pr/2" not in hub.repos["me/jets"].refs


def test_an_existing_public_repository_is_named_in_a_warning(
    hub: HubStandIn, tmp_path: Path, lfs: None, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path)
    push(hub, run, private=False)
    assert not hub.repos["me/jets"].private
    with caplog.at_level(logging.WARNING):
        push(hub, run)
    assert "me/jets is public already" in caplog.text


def test_a_single_file_goes_alone(hub: HubStandIn, tmp_path: Path, lfs: None) -> None:
    file = tmp_path / "jets.safetensors"
    file.write_bytes(b"weights")
    push(hub, file)
    assert set(hub.files("me/jets")) == {".gitattributes", "README.md", "jets.safetensors"}
    assert "`jets.safetensors` loads in every image app" in hub.text_of("me/jets", "README.md")


# Before anything is uploaded ----------------------------------------------------------------------


def _api(hub: HubStandIn) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.url)


def test_access_is_checked_before_training(hub: HubStandIn) -> None:
    first = check_hub_access("jets", TOKEN, api=_api(hub))
    assert (first.user, first.repo_id, first.url) == ("me", "me/jets", f"{hub.url}/me/jets")
    assert first.private and first.created
    assert not check_hub_access("me/jets", TOKEN, api=_api(hub)).created
    assert check_hub_access("studio/jets", TOKEN, api=_api(hub)).created


@pytest.mark.parametrize(
    ("repo_id", "role", "token", "words"),
    [
        ("me/jets", "read", TOKEN, "may only read. Make one with the role `write`"),
        ("you/jets", "write", TOKEN, "Push to me/jets, or open a pull request"),
        ("me/my jets", "write", TOKEN, "not a repository's name"),
        ("me/jets", "write", "hf_wrongwrongwrong", "does not accept the token"),
    ],
)
def test_what_is_missing_is_said(hub: HubStandIn, repo_id: str, role: str, token: str, words: str) -> None:
    hub.tokens[TOKEN]["role"] = role
    with pytest.raises(HubError, match=words):
        check_hub_access(repo_id, token, api=_api(hub))
    assert hub.repos == {}


def test_a_fine_grained_token_without_write_access_is_found_out(hub: HubStandIn) -> None:
    check_hub_access("me/jets", TOKEN, api=_api(hub))
    hub.fail("GET", "/auth-check/write", status=403)
    with pytest.raises(HubError, match="fine-grained one with write access"):
        check_hub_access("me/jets", TOKEN, api=_api(hub))


def test_without_a_token_the_way_to_log_in_is_said(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="hf auth login"):
        push_to_hub(make_run(tmp_path), "me/jets", api=_api(hub))
    assert hub.requests == []


def test_a_dry_run_needs_neither_network_nor_token(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    text = push_to_hub(run, "me/jets", dry_run=True)
    assert "Would push 12 files, 365 kB, to me/jets as one commit" in text
    assert "unet/model.safetensors" in text and "README.md" in text
    preview = preview_push(run.last_checkpoint, "me/jets", what=("diffusers", "resume", "single_file"))
    paths = [file.path for file in preview.files]
    assert "resume/manifest.json" in paths and "jets.safetensors" in paths
    assert preview.num_bytes == sum(file.num_bytes for file in preview.files)


@pytest.mark.parametrize(
    ("what", "words"),
    [(("weights",), "'weights' is unknown; it may hold diffusers"), (("lora",), "holds no LoRA")],
)
def test_unknown_and_absent_parts_are_refused(tmp_path: Path, what: Any, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        preview_push(make_run(tmp_path), "me/jets", what=what)


def test_what_cannot_be_pushed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not there"):
        preview_push(tmp_path / "nothing", "me/jets")
    with pytest.raises(ExportError, match="neither a run folder"):
        preview_push(tmp_path, "me/jets")


def test_the_token_is_written_nowhere(
    hub: HubStandIn,
    tmp_path: Path,
    lfs: None,
    naps: list[float],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = make_run(tmp_path / "logs", secret=TOKEN)
    hub.fail("POST", "/commit/", status=500, message=f"your token {TOKEN} is fine, we are not", times=3)
    with caplog.at_level(logging.INFO), pytest.raises(HubError) as caught:
        push(hub, run, token=None, what=("diffusers", "samples", "training", "resume"), message=f"for {TOKEN}")
    push(hub, run, token=None, what=("diffusers", "samples", "training", "resume"), message=f"for {TOKEN}")

    import traceback

    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert TOKEN not in shown
    for path in hub.files("me/jets"):
        entry = hub.files("me/jets")[path]
        stored = (hub.lfs_folder / entry.sha256).read_bytes() if entry.sha256 else hub.repos["me/jets"].blobs[entry.oid]
        assert TOKEN.encode() not in stored, path
    assert all(TOKEN not in title for title in hub.titles("me/jets"))
