"""After every command, no file, line, event, process or exception holds the access token."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hub_runs import TOKEN, make_run
from hub_stand_in import HubStandIn, use_as_hub

from everydream_kit import jobs
from everydream_kit.cli import COMMANDS, main
from everydream_kit.errors import KitError

REFUSED = "hf_" + "rEfUsEd" * 5
PARTS = (TOKEN[3:], REFUSED[3:])
"""Found in whatever form: with or without the prefix."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    from huggingface_hub import constants

    with HubStandIn(tmp_path / "hub") as server:
        server.add_user(TOKEN, "me")
        use_as_hub(monkeypatch, server)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield server


Setting = tuple[Path, Path, Path]
"""Working folder, a tiny model, a folder of images."""
WORDS: dict[str, Callable[[Setting], list[list[object]]]] = {
    "demo": lambda s: [["--out", s[0] / "demo", "--max_epochs", "none"]],
    "train": lambda s: [
        ["--resume_ckpt", s[1], "--data_root", s[2], "--resolution", 64, "--max_steps", 1, "--batch_size", 1,
         "--sample_steps", "none", "--no_save_ckpt", "--num_workers", 0, "--project_name", "tiny"],
        ["--resume_ckpt", "me/nothing", "--data_root", s[2]],
    ],
    "resume": lambda s: [["hf://me/jets", "--data_root", s[2]], ["hf://me/nothing"], ["nowhere"]],
    "chain": lambda s: [["nowhere.json"]],
    "plan": lambda s: [["--resume_ckpt", "me/nothing", "--data_root", s[2]]],
    "bench": lambda s: [["--help"]],
    "prepare": lambda s: [[s[2]]],
    "tidy": lambda s: [["--help"]],
    "sample": lambda s: [["me/nothing", "--out", s[0] / "samples"]],
    "export": lambda s: [["nowhere", "out.safetensors"]],
    "merge": lambda s: [["me/nothing", "me/nothing", "out.safetensors"]],
    "extract": lambda s: [["me/nothing", "me/nothing", "out.safetensors"]],
    "push": lambda s: [
        [s[0] / "logs" / "jets-20261122-120000", "me/jets", "--license", "mit", "--what", "diffusers", "training", "resume"],
        [s[0] / "logs" / "jets-20261122-120000", "somebody/jets", "--license", "mit"],
    ],
    "fetch": lambda s: [["hf://me/jets", s[0] / "fetched"], ["hf://me/nothing"]],
    "runs": lambda s: [["--logdir", s[0] / "logs"], []],
    "doctor": lambda s: [[]],
    "parameters": lambda s: [[]],
    "notebooks": lambda s: [[s[0] / "copied"]],
}  # fmt: skip
"""For every command, what it is called with: something that works and is cheap, or that goes wrong at the Hub."""


def hold_no_token(texts: dict[str, str]) -> None:
    assert [name for name, text in texts.items() if any(part in text for part in PARTS)] == []


def files_below(folder: Path) -> dict[str, str]:
    """Every file that the kit wrote, as text; the stand-in's own store is not the kit's."""
    paths = [path for path in folder.rglob("*") if path.is_file() and folder / "hub" not in path.parents]
    return {str(path): path.read_bytes().decode("latin-1") for path in paths}


def test_every_command_is_called() -> None:
    assert WORDS.keys() == COMMANDS.keys()


def test_after_every_command_nothing_holds_the_token(
    hub: HubStandIn,
    tmp_path: Path,
    tiny_model_folder: Path,
    image_folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one test: the run that `push` uploads is the one that `resume` fetches and `runs` lists."""
    caplog.set_level(logging.DEBUG, "everydream_kit")
    make_run(tmp_path / "logs", secret=TOKEN)
    config = tmp_path / "logs" / "jets-20261122-120000" / "config.json"
    setting = (tmp_path, tiny_model_folder, image_folder)
    order = ["push", *(name for name in COMMANDS if name != "push")]
    for token in (TOKEN, REFUSED):
        monkeypatch.setenv("HF_TOKEN", token)
        for name in order if token == TOKEN else ("push", "resume", "plan"):
            for words in WORDS[name](setting):
                said = run(name, words)
                shown = capsys.readouterr()
                hold_no_token({f"{name} raised": said, f"{name} out": shown.out, f"{name} err": shown.err})
                hold_no_token({f"{name} log": caplog.text, "arguments": str(sys.argv)})
    assert any("/resolve/" in path and status == 200 for _, path, status in hub.requests)  # `resume` fetched the run
    written = files_below(tmp_path)
    assert str(config) in written
    for mine in (str(config), str(config.with_name("events.jsonl"))):  # a plug-in wrote it there, in this test
        del written[mine]
    hold_no_token(written)
    repository = hub.repos["me/jets"]
    hold_no_token({oid: content.decode("latin-1") for oid, content in repository.blobs.items()})
    hold_no_token({commit.oid: commit.title for history in repository.refs.values() for commit in history})


def run(name: str, words: list[object]) -> str:
    """Call a command; returns the traceback that its error would print."""
    try:
        main([name, *map(str, words)])
    except SystemExit:
        return ""
    except KitError as error:  # `main` prints them; a bug would come here
        return "".join(traceback.format_exception(error))
    return ""


def test_no_process_list_and_no_job_file_holds_the_token(tmp_path: Path) -> None:
    settings = {"resume_ckpt": "embedded", "logdir": str(tmp_path / "logs")}
    sleep = [sys.executable, "-c", "import time; time.sleep(60)", "{run}"]
    job = jobs.start(settings, command=sleep, environment={"HF_TOKEN": TOKEN})
    try:
        record = json.loads((job.folder / "job.json").read_text())
        assert psutil.Process(record["pid"]).environ()["HF_TOKEN"] == TOKEN  # it has it, and in its environment alone
        hold_no_token({str(one.pid): " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])})
        hold_no_token(files_below(tmp_path))
    finally:
        job.kill()


@pytest.mark.parametrize("token", [TOKEN + "\n", f" {TOKEN}", TOKEN + "\u200b"])
def test_an_exception_holds_no_token_however_it_was_given(hub: HubStandIn, tmp_path: Path, token: str) -> None:
    from huggingface_hub import HfApi

    from everydream_kit.export.hub import push_to_hub

    found = make_run(tmp_path / "logs", unet_bytes=2000)
    api = HfApi(endpoint=hub.url)
    url = push_to_hub(found.folder, "me/jets", token=token, license="mit", api=api, sleep=lambda _: None)
    assert url == f"{hub.url}/me/jets"
    with pytest.raises(KitError) as caught:
        push_to_hub(found.folder, "me/jets", token=token.replace(TOKEN, REFUSED), api=api, sleep=lambda _: None)
    hold_no_token({"error": "".join(traceback.format_exception(caught.value))})
