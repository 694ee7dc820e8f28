"""Fetching a run from the Hub, so that `everydream resume hf://me/jets` goes on with it on another machine.

What a background upload left in the repository (`contents.py` has the layout) is put back as a run folder with one
whole checkpoint: the files that its manifest lists. It appears under its name only when every file is there and its
hash is right. Files are fetched one by one, each with its own tries: the client's own snapshot download takes an
incomplete folder for a whole one when the Hub is away.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from everydream_kit.errors import CheckpointError, HubError
from everydream_kit.export.hub.connection import HubConnection, quiet_client
from everydream_kit.export.hub.contents import RUN_FACTS, read_json
from everydream_kit.export.hub.upload import Progress, heartbeat, size_words, tell_nobody
from everydream_kit.workspace import CHECKPOINT_MANIFEST, RunFolder

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

_NAME = re.compile(r"[\w.,@+ -]{1,200}")


def parse_run_reference(reference: str) -> tuple[str, str | None]:
    """`hf://me/jets` or `hf://me/jets@branch` as (repo_id, revision).

    Raises:
        HubError: it has another form.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", reference)
    if not match:
        raise HubError(f"{reference!r}: a run on the Hub is written hf://owner/name, or hf://owner/name@branch.")
    return match[1], match[2]


def fetch_run(
    reference: str,
    target_folder: str | Path,
    *,
    token: str | None = None,
    progress: Progress | None = None,
    api: HfApi | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch the newest uploaded checkpoint of a run, with its resume state.

    Args:
        reference: `hf://me/jets`, or `hf://me/jets@branch-or-commit` for an older one.
        target_folder: where run folders live, such as `logs`.
        token: by default huggingface_hub's login or HF_TOKEN; a public repository needs none.
        progress: told (bytes done, bytes in all, what is being done).
        api: another Hub than the usual one.
        sleep: waits between tries.

    Returns:
        The run folder: `<target_folder>/<name of the run>`. If it is there already with this checkpoint, nothing is
        fetched and it is returned as it is; if it is there without, the checkpoint is added to it.

    Raises:
        HubError: the Hub cannot be reached, refuses, or holds no run that can be resumed.
        CheckpointError: what the repository says about the run makes no sense, or a run folder of that name has other
            settings.
    """
    repo_id, revision = parse_run_reference(reference)
    connection = HubConnection(token, api=api, sleep=sleep, needs_token=False)
    with quiet_client():
        return _Fetch(connection, repo_id, revision, Path(target_folder), progress).run()


class _Fetch:
    """One download under way."""

    def __init__(
        self,
        connection: HubConnection,
        repo_id: str,
        revision: str | None,
        target: Path,
        progress: Progress | None,
    ) -> None:
        self.connection = connection
        self.repo_id = repo_id
        self.revision = revision
        self.target = target
        self.progress = progress if progress is not None else tell_nobody

    def run(self) -> Path:
        api = self.connection.api
        doing = f"look at {self.repo_id}"
        info = self.connection.step(doing, lambda: api.model_info(self.repo_id, revision=self.revision))
        self.revision = commit = str(info.sha)  # one state of the repository, even if somebody pushes meanwhile
        files = self._list_files()
        if CHECKPOINT_MANIFEST not in files or RUN_FACTS not in files:
            raise HubError(
                f"hf://{self.repo_id}: holds no resume state; only uploads made while training do (push_every). "
                f"Start a new run from its weights: --resume_ckpt {self.repo_id}"
            )
        self.target.mkdir(parents=True, exist_ok=True)
        partial = self.target / f".partial-{self.repo_id.replace('/', '--')}-{commit[:12]}"
        partial.mkdir(exist_ok=True)  # files of an interrupted fetch of the same state are taken up
        facts = self._run_facts(files, partial)
        run = RunFolder(self.target / facts["run"])
        if (run.checkpoints_folder / facts["checkpoint"] / CHECKPOINT_MANIFEST).is_file():
            shutil.rmtree(partial)
            return run.folder
        self._fetch_all(self._files_of_run(files, partial), partial)
        self._put_in_place(partial, run, facts["checkpoint"])
        return run.folder

    def _list_files(self) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        def read() -> dict[str, RepoFile]:
            tree = self.connection.api.list_repo_tree(self.repo_id, recursive=True, revision=self.revision)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

        return self.connection.step(f"list the files of {self.repo_id}", read)

    def _run_facts(self, files: dict[str, RepoFile], partial: Path) -> dict[str, str]:
        """Names of the run and its checkpoint. They become folders here, so they are looked at closely."""
        facts: dict[str, Any] = read_json(self._fetch(files[RUN_FACTS], partial))
        for key in ("run", "checkpoint"):
            name = facts.get(key)
            if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith("."):
                raise CheckpointError(f"hf://{self.repo_id}: {RUN_FACTS} names no usable {key} (got {name!r}).")
        return facts

    def _files_of_run(self, files: dict[str, RepoFile], partial: Path) -> list[RepoFile]:
        """What the checkpoint's manifest lists, and the run's settings and events."""
        listed = read_json(self._fetch(files[CHECKPOINT_MANIFEST], partial)).get("files", {})
        missing = [path for path in listed if path not in files]
        if missing:
            raise CheckpointError(
                f"hf://{self.repo_id}: {missing[0]} is missing there, though {CHECKPOINT_MANIFEST} lists it. "
                f"Take an older state: hf://{self.repo_id}@COMMIT"
            )
        paths = {*listed, CHECKPOINT_MANIFEST, "training/config.json", "training/events.jsonl"}
        return [files[path] for path in sorted(paths) if path in files]

    def _fetch_all(self, wanted: list[RepoFile], partial: Path) -> None:
        total, done = sum(file.size for file in wanted), 0
        free = shutil.disk_usage(partial).free
        if total > free:
            raise HubError(
                f"hf://{self.repo_id}: needs {size_words(total)}, and {partial.parent} has {size_words(free)} free. "
                "Free some disk, or give another logdir."
            )
        for file in sorted(wanted, key=lambda file: file.size):
            doing = f"fetch {file.path} ({size_words(file.size)}) from {self.repo_id}"
            self.progress(done, total, doing)
            with heartbeat(doing):
                self._fetch(file, partial)
            done += file.size
        self.progress(total, total, f"fetched {self.repo_id}")

    def _fetch(self, file: RepoFile, partial: Path) -> Path:
        """Fetch one file and check its content; a file that is there and right is kept."""
        path = partial / PurePosixPath(file.path)  # the client refuses paths that lead outside
        if _is_right(path, file):
            return path

        def fetch() -> Path:
            from huggingface_hub import hf_hub_download

            hf_hub_download(
                self.repo_id,
                file.path,
                revision=self.revision,
                local_dir=partial,
                token=self.connection.token or False,
                endpoint=self.connection.endpoint,
            )
            if not _is_right(path, file):
                path.unlink()
                raise ConnectionError("the file arrived damaged")
            return path

        advice = "Call again; files that have arrived are kept."
        return self.connection.step(f"fetch {file.path} from {self.repo_id}", fetch, advice=advice)

    def _put_in_place(self, partial: Path, run: RunFolder, checkpoint: str) -> None:
        """Make a run folder of what was fetched, the checkpoint last, so that it is whole when it has its name."""
        self._check_same_run(partial / "training" / "config.json", run)
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        run.checkpoints_folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "samples").mkdir(exist_ok=True)
        for name in ("config.json", "events.jsonl"):
            source = partial / "training" / name
            if source.is_file() and not (run.folder / name).exists():
                os.replace(source, run.folder / name)
        shutil.rmtree(partial / "training")
        final = run.checkpoints_folder / checkpoint
        if final.exists():  # without resume state, or it would have been returned
            shutil.rmtree(final)
        os.replace(partial, final)

    def _check_same_run(self, fetched: Path, run: RunFolder) -> None:
        if fetched.is_file() and run.config_path.is_file() and read_json(fetched) != read_json(run.config_path):
            raise CheckpointError(
                f"{run.folder}: is there already, with other settings than hf://{self.repo_id}. "
                "Rename it, or fetch into another logdir."
            )


def _is_right(path: Path, file: RepoFile) -> bool:
    """Size and hash as the Hub has them: SHA-256 for large files, git's own for small ones."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest() == (file.lfs.sha256 if file.lfs else file.blob_id)
