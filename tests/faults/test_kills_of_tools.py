"""Killed at any moment: export, tidy, fetch and the queue lose nothing. Training has its own file, `test_kills.py`.

A fork server has the imports done, so a kill costs as long as the work that it interrupts.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_hostile import serve, stranger_files, tree_of
from hub_stand_in import HubStandIn
from PIL import Image
from safetensors.torch import load_file

from everydream_kit.actions.converting import export
from everydream_kit.data.changes import undo
from everydream_kit.data.tagging import edit_tags
from everydream_kit.export.hub import fetch_run
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.jobs.queue import Queue
from everydream_kit.runs import list_runs
from everydream_kit.training.checkpoints import verify_checkpoint

KILLS = {"export": 8, "folder": 5, "tidy": 6, "fetch": 5, "queue": 6}
"""With the thirty of `test_kills.py` sixty."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _begin(ready: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    ready.send("begins")
    work(*arguments)


@pytest.fixture(scope="module")
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class Killer:
    """Runs work in a process, and kills it at a random moment of what the work takes when it is let be."""

    def __init__(self, context: Any, seed: int) -> None:
        self.context, self.chance, self.seconds, self.kills = context, random.Random(seed), 0.0, 0

    def let_be(self, work: Callable[..., Any], *arguments: Any) -> None:
        process, began = self._start(work, arguments)
        process.join()
        assert process.exitcode == 0
        self.seconds = time.monotonic() - began

    def kill(self, work: Callable[..., Any], *arguments: Any) -> None:
        process, _ = self._start(work, arguments)
        time.sleep(self.chance.random() * self.seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            self.kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)

    def _start(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, float]:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_begin, args=(theirs, work, arguments))
        process.start()
        assert ours.poll(120)
        return process, time.monotonic()


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".edk-")]


def test_an_export_is_the_old_file_or_the_new_one(server: Any, tiny_model_folder: Path, tmp_path: Path) -> None:
    killer, out = Killer(server, 1), tmp_path / "model.safetensors"
    killer.let_be(export_checkpoint, tiny_model_folder, out, "fp32")
    new = {name: value.clone() for name, value in load_file(out).items()}  # `load_file` maps the file
    for _ in range(KILLS["export"]):
        out.unlink()
        out.write_bytes(b"the old one")
        killer.kill(export_checkpoint, tiny_model_folder, out, "fp32")
        if out.read_bytes() != b"the old one":
            found = load_file(out)
            assert all(torch.equal(found[name], value) for name, value in new.items())
    export_checkpoint(tiny_model_folder, out, "fp32")
    assert (leftovers(tmp_path), killer.kills > 2) == ([], True)


def export_folder(model: Path, out: Path, precision: Any) -> None:
    export(model, out, format="diffusers", precision=precision)


def test_an_exported_folder_is_there_as_a_whole_or_not_at_all(
    server: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    killer, out = Killer(server, 2), tmp_path / "folder"
    killer.let_be(export_folder, tiny_model_folder, out, "fp32")
    whole = tree_of(out)
    for _ in range(KILLS["folder"]):
        shutil.rmtree(out, ignore_errors=True)
        killer.kill(export_folder, tiny_model_folder, out, "fp32")
        assert not out.exists() or tree_of(out) == whole
    shutil.rmtree(out, ignore_errors=True)
    export_folder(tiny_model_folder, out, "fp32")
    assert (leftovers(tmp_path), killer.kills > 1) == ([], True)


def tidy(folder: Path, journal: Path) -> None:
    edit_tags(folder, add=["by foo"], journal=journal)


def test_a_step_of_tidying_that_was_killed_can_be_undone(server: Any, tmp_path: Path) -> None:
    killer, folder = Killer(server, 3), tmp_path / "images"
    folder.mkdir()
    for number in range(150):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a cat, number {number}")
    before = tree_of(folder)
    journal = tmp_path / "journal.jsonl"
    killer.let_be(tidy, folder, journal)
    assert tree_of(folder) != before
    for number in range(KILLS["tidy"]):
        undo(journal)
        assert tree_of(folder) == before
        journal = tmp_path / f"journal-{number}.jsonl"
        killer.kill(tidy, folder, journal)
        if not journal.is_file():
            assert tree_of(folder) == before
            tidy(folder, journal)
    assert killer.kills > 2


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    with HubStandIn(tmp_path / "hub") as hub:
        serve(hub, "stranger/jets", stranger_files(tmp_path / "stranger"))
        yield hub


def fetch(url: str, logdir: Path) -> None:
    from huggingface_hub import HfApi

    given = {"resume_ckpt": "embedded", "data_root": "images"}
    fetch_run("hf://stranger/jets", logdir, api=HfApi(endpoint=url), given=given)


def test_a_fetched_run_is_there_as_a_whole_or_not_at_all(server: Any, hub: HubStandIn, tmp_path: Path) -> None:
    killer, logdir = Killer(server, 4), tmp_path / "logs"
    killer.let_be(fetch, hub.url, logdir)
    whole = tree_of(list_runs(logdir)[0].checkpoints_folder)
    for _ in range(KILLS["fetch"]):
        shutil.rmtree(logdir)
        killer.kill(fetch, hub.url, logdir)
        for run in list_runs(logdir):
            for checkpoint in run.checkpoints():
                verify_checkpoint(checkpoint.folder)
        fetch(hub.url, logdir)
        assert tree_of(list_runs(logdir)[0].checkpoints_folder) == whole
    assert killer.kills > 1


def fill(path: Path, confirmed: Path, count: int) -> None:
    queue = Queue(path)
    for _ in range(count):
        entry = queue.add({"resume_ckpt": "embedded"})
        with confirmed.open("a") as file:
            file.write(f"{entry}\n")


def test_no_entry_of_a_queue_is_lost(server: Any, tmp_path: Path) -> None:
    killer, path, confirmed = Killer(server, 5), tmp_path / "queue.json", tmp_path / "confirmed.txt"
    killer.let_be(fill, path, confirmed, 15)
    for _ in range(KILLS["queue"]):
        killer.kill(fill, path, confirmed, 15)
        entries = [entry["id"] for entry in Queue(path).entries]
        known = confirmed.read_text().splitlines()
        assert set(known) <= set(entries)
        assert len(set(entries)) == len(entries)
    assert killer.kills > 2
