"""Repositories of strangers, for tests: a run on the stand-in for the Hub, in which any file can be replaced."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hub_runs import hashes, make_run
from hub_stand_in import HubStandIn

from everydream_kit.runs import RunFolder
from everydream_kit.runs.layout import RESUME_MANIFEST

Content = bytes | str | dict[str, Any] | list[Any] | None


def stranger_files(folder: Path) -> dict[str, bytes]:
    """Every file that the upload of a small run leaves in a repository, by path."""
    run = make_run(folder, unet_bytes=2000)
    checkpoint = run.last_checkpoint
    files = {path: (checkpoint / path).read_bytes() for path in hashes(checkpoint)}
    facts = {"version": 1, "run": run.name, "checkpoint": checkpoint.name}
    return files | {
        "training/run.json": json.dumps(facts).encode(),
        "training/config.json": run.config_path.read_bytes(),
        "training/events.jsonl": run.events_path.read_bytes(),
    }


def serve(hub: HubStandIn, repo_id: str, files: Mapping[str, bytes]) -> None:
    """Put files into a public repository, as one commit more."""
    from hub_holdings import Repository

    repo = hub.repos.setdefault(repo_id, Repository(private=False))
    repo.commit("main", "a stranger's", {path: repo.add_blob(content) for path, content in files.items()})


def as_bytes(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode()


def with_files(files: Mapping[str, bytes], changes: Mapping[str, Content]) -> dict[str, bytes]:
    """The files with some replaced, or removed where the change is None; the manifest is made to fit again."""
    changed = {**files, **{path: as_bytes(content) for path, content in changes.items() if content is not None}}
    for path in (path for path, content in changes.items() if content is None):
        del changed[path]
    return changed


def with_config(files: Mapping[str, bytes], **settings: Any) -> dict[str, bytes]:
    config = {**json.loads(files["training/config.json"]), **settings}
    return with_files(files, {"training/config.json": config})


def with_manifest(files: Mapping[str, bytes], edit: Callable[[dict[str, Any]], None]) -> dict[str, bytes]:
    manifest = json.loads(files[RESUME_MANIFEST])
    edit(manifest["files"])
    return with_files(files, {RESUME_MANIFEST: manifest})


def tree_of(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash, and every link with its target: what a test compares before and after."""
    links = {str(path.relative_to(folder)): f"-> {path.readlink()}" for path in folder.rglob("*") if path.is_symlink()}
    return hashes(folder) | links


def run_of(logdir: Path) -> RunFolder:
    """The one run that was fetched."""
    (folder,) = [path for path in logdir.iterdir() if not path.name.startswith(".")]
    return RunFolder(folder)
