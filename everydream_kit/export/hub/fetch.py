"""Fetching a run from the Hub, so that `everydream resume hf://me/jets` continues with it on another machine.

What a background upload left in the repository (`repository_contents` has the layout) is put back as a run folder with one
complete checkpoint: the files that its manifest lists. It appears under its name only when every file is there and its
hash is right. Files are fetched one by one, each with its own tries: the client's own snapshot download takes an
incomplete folder for a complete one when the Hub is away.

The repository may be a stranger's. Only files that a checkpoint may hold are fetched. The run folder is marked with
where it came from, its config holds what a fetched run may bring (`foreign.py`), and a run folder that already exists
is touched only if it came from this repository, or pushes to it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from everydream_kit.atomic import write_atomic
from everydream_kit.config import TrainConfig
from everydream_kit.disk_space import lack_of_room
from everydream_kit.errors import CheckpointError, ConfigError, HubError
from everydream_kit.everydream2.importing import import_side_files
from everydream_kit.export.hub.connection import HubConnection, quiet_client
from everydream_kit.export.hub.fetched_events import write_clean_events
from everydream_kit.export.hub.repository_contents import RUN_FACTS
from everydream_kit.export.hub.upload import Progress, heartbeat, show_no_progress, size_words
from everydream_kit.foreign import (
    FOLLOWS,
    TRAVELS,
    Origin,
    is_plain_patterns,
    read_origin,
    require_given,
    shown,
    split_settings,
    write_origin,
)
from everydream_kit.runs import RunFolder
from everydream_kit.runs.layout import (
    ADAPTER_FILE,
    AVERAGED_SUFFIX,
    CHECKPOINT_FILE,
    CHECKPOINT_NAME,
    PARTIAL,
    REPLACED,
    RESUME_MANIFEST,
    RUN_NAME,
)
from everydream_kit.settings import upgrade
from everydream_kit.strict_json import read_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

RUN_CONFIG, RUN_EVENTS = "training/config.json", "training/events.jsonl"
MAX_BYTES = {
    RUN_FACTS: 100_000,
    ADAPTER_FILE: 2_000_000,
    RUN_CONFIG: 2_000_000,
    RESUME_MANIFEST: 20_000_000,
    RUN_EVENTS: 1_000_000_000,
}
"""Larger than any that the kit writes. What is read at once must be small."""

_PLAIN_NAME = re.compile(r"[^./\\:*?\"<>|][^/\\:*?\"<>|]{0,199}")


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
    target_folder: str | Path = "logs",
    *,
    given: Collection[str] | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    api: HfApi | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Fetch the latest uploaded checkpoint of a run, with its resume state.

    Args:
        reference: `hf://me/jets`, or `hf://me/jets@branch-or-commit` for an older one.
        target_folder: folder of the runs.
        given: settings that a person gives again on this machine. Where one is missing, nothing large is fetched. None:
            fetch, and let whoever resumes the run ask.
        token: by default huggingface_hub's login or HF_TOKEN; a public repository needs none.
        progress: called with (bytes done, bytes in all, what is being done).
        api: another Hub than the usual one.
        sleep: waits between tries.

    Returns:
        The run folder: `<target_folder>/<name of the run>`. If it already exists with this checkpoint, nothing is
        fetched and it is returned as it is; if it is there without, the checkpoint is added to it.

    Raises:
        HubError: the Hub cannot be reached, refuses, or holds no run that can be resumed.
        CheckpointError: what the repository says about the run makes no sense, or a run folder of that name came from
            elsewhere or has other settings.
        ConfigError: the run's settings are wrong, or one of them has to be given again.
    """
    repo_id, revision = parse_run_reference(reference)
    connection = HubConnection(token, api=api, sleep=sleep, needs_token=False)
    with quiet_client():
        return _Fetch(connection, repo_id, revision, Path(target_folder), progress=progress, given=given).run()


class _Fetch:
    """One download under way."""

    def __init__(
        self,
        connection: HubConnection,
        repo_id: str,
        revision: str | None,
        target: Path,
        *,
        progress: Progress | None,
        given: Collection[str] | None,
    ) -> None:
        self.connection = connection
        self.repo_id = repo_id
        self.source = f"hf://{repo_id}"
        self.reference = f"{self.source}@{revision}" if revision else self.source
        self.revision = revision
        self.target = target
        self.progress = progress if progress is not None else show_no_progress
        self.given = given

    def run(self) -> Path:
        api = self.connection.api
        doing = f"look at {self.repo_id}"
        info = self.connection.step(doing, lambda: api.model_info(self.repo_id, revision=self.revision))
        if not info.sha:
            raise HubError(f"{self.source}: the repository has no commit yet, so there is nothing to resume.")
        self.revision = commit = str(info.sha)  # one state of the repository, even if somebody pushes meanwhile
        files = self._list_files()
        if RESUME_MANIFEST not in files or RUN_FACTS not in files:
            raise HubError(
                f"{self.source}: holds no resume state; only uploads made while training do (push_every). "
                f"Start a new run from its weights: --resume_ckpt {self.repo_id}"
            )
        if RUN_CONFIG not in files:
            raise CheckpointError(
                f"{self.source}: {RUN_CONFIG} is missing there, so the run's settings are not known. "
                f"Take an older state: {self.source}@COMMIT"
            )
        self.target.mkdir(parents=True, exist_ok=True)
        partial = self.target / f"{PARTIAL}{self.repo_id.replace('/', '--')}-{commit[:12]}"
        partial.mkdir(exist_ok=True)  # files of an interrupted fetch of the same state are taken up
        facts = self._run_facts(files, partial)
        run = RunFolder(self.target / facts["run"])
        self._check_same_source(run)
        if run.checkpoint(facts["checkpoint"]).resumable:
            shutil.rmtree(partial)
            return run.folder
        config, origin = self._settings(self._read(files[RUN_CONFIG], partial), run, facts["checkpoint"])
        self._check_same_settings(run, config)
        self._fetch_all(self._files_of_run(files, partial), partial)
        self._put_in_place(partial, run, facts["checkpoint"], config, origin)
        return run.folder

    def _list_files(self) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        def read() -> dict[str, RepoFile]:
            tree = self.connection.api.list_repo_tree(self.repo_id, recursive=True, revision=self.revision)
            return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

        return self.connection.step(f"list the files of {self.repo_id}", read)

    def _run_facts(self, files: dict[str, RepoFile], partial: Path) -> dict[str, str]:
        """Names of the run and its checkpoint. They become folders here, so they must be names that the kit gives."""
        facts: dict[str, Any] = self._read(files[RUN_FACTS], partial)
        for key, pattern in (("run", RUN_NAME), ("checkpoint", CHECKPOINT_NAME)):
            name = facts.get(key)
            if (
                not isinstance(name, str)
                or not _PLAIN_NAME.fullmatch(name)
                or not pattern.fullmatch(name)
                or name.endswith(AVERAGED_SUFFIX)
                or not name.isprintable()
            ):
                raise CheckpointError(f"{self.source}: {RUN_FACTS} names no usable {key} (got {shown(name)}).")
        return facts

    def _settings(self, fetched: dict[str, Any], run: RunFolder, checkpoint: str) -> tuple[TrainConfig, Origin]:
        """The config that this run has here, and its mark with what is still missing."""
        try:
            travels, asked, waiting = split_settings(upgrade(fetched)[0])
            origin = Origin(self.source, str(self.revision), self.reference, asked, waiting)
            if self.given is not None and not (run.config_path.is_file()):
                require_given(origin, self.given)
            here: dict[str, Any] = {"logdir": str(self.target)}
            if "resume_ckpt" in asked:  # until it is given: what is there
                here["resume_ckpt"] = str(run.checkpoint(checkpoint).folder)
            if not travels.get("no_save_ckpt"):  # elsewhere a file of the same name might be replaced
                here["save_ckpt_dir"] = str(run.folder)
            return TrainConfig(**import_side_files({**travels, **here}, must_exist=False)[0]), origin
        except ConfigError as error:
            if str(error).startswith(self.source):
                raise
            raise ConfigError(f"{self.source}, {RUN_CONFIG}:\n{error}") from None

    def _files_of_run(self, files: dict[str, RepoFile], partial: Path) -> list[RepoFile]:
        """What the checkpoint's manifest lists, and the run's events."""
        listed = self._read(files[RESUME_MANIFEST], partial).get("files")
        if not isinstance(listed, dict):
            raise CheckpointError(f"{self.source}: {RESUME_MANIFEST} lists no files.")
        strange = [path for path in listed if not CHECKPOINT_FILE.fullmatch(path)]
        if strange:
            raise CheckpointError(
                f"{self.source}: {RESUME_MANIFEST} lists {shown(strange[0])}, which no checkpoint of the kit holds. "
                "Nothing of it was fetched. Do not trust this repository."
            )
        missing = [path for path in listed if path not in files]
        if missing:
            raise CheckpointError(
                f"{self.source}: {missing[0]} is missing there, though {RESUME_MANIFEST} lists it. "
                f"Take an older state: {self.source}@COMMIT"
            )
        if ADAPTER_FILE in listed:
            lora = self._read(files[ADAPTER_FILE], partial).get("lora")
            targets = lora.get("targets") if isinstance(lora, dict) else None
            if targets is not None and not is_plain_patterns(targets):
                raise CheckpointError(f"{self.source}: {ADAPTER_FILE} has patterns that can take forever to match.")
        paths = {*listed, RESUME_MANIFEST, RUN_EVENTS}
        return [files[path] for path in sorted(paths) if path in files]

    def _fetch_all(self, wanted: list[RepoFile], partial: Path) -> None:
        total, done = sum(file.size for file in wanted), 0
        lack = lack_of_room(partial, total)
        if lack is not None:
            raise HubError(f"hf://{self.repo_id}: {lack}. Free some disk, or give another logdir.")
        for file in sorted(wanted, key=lambda file: file.size):
            doing = f"fetch {file.path} ({size_words(file.size)}) from {self.repo_id}"
            self.progress(done, total, doing)
            with heartbeat(doing):
                self._fetch(file, partial)
            done += file.size
        self.progress(total, total, f"fetched {self.repo_id}")

    def _read(self, file: RepoFile, partial: Path) -> dict[str, Any]:
        """Fetch a small file and read the JSON object in it."""
        path = self._fetch(file, partial)
        name = f"{self.source}: {file.path}"
        return dict(read_json(path, error=CheckpointError, name=name, max_bytes=MAX_BYTES[file.path]))

    def _fetch(self, file: RepoFile, partial: Path) -> Path:
        """Fetch one file and check its content; a file that is there and right is kept."""
        most = MAX_BYTES.get(file.path)
        if most is not None and file.size > most:
            raise CheckpointError(
                f"{self.source}: {file.path} has {size_words(file.size)}, and no run of the kit has more than "
                f"{size_words(most)}. Nothing of it was fetched."
            )
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

    def _put_in_place(
        self, partial: Path, run: RunFolder, checkpoint: str, config: TrainConfig, origin: Origin
    ) -> None:
        """Make a run folder of what was fetched, the checkpoint last, so that it is complete when it has its name."""
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        run.make_folders()
        if not run.config_path.is_file():
            write_origin(run.folder, origin)  # first: a config without its mark would count as made here
            write_atomic(run.config_path, config.to_json())
        events = partial / RUN_EVENTS
        if events.is_file() and not run.events_path.exists():
            write_clean_events(events, run.events_path)
        shutil.rmtree(partial / "training")
        final = run.checkpoint(checkpoint).folder
        # one without resume state; `sweep` puts it back after a crash
        replaced = final.with_name(f"{REPLACED}{final.name}")
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        os.replace(partial, final)
        shutil.rmtree(replaced, ignore_errors=True)

    def _check_same_source(self, run: RunFolder) -> None:
        """A run folder of this name is used only if it came from this repository, or uploads to it."""
        if not run.folder.exists():
            return
        cure = "Rename it, or fetch into another logdir (--logdir)."
        mark = read_origin(run.folder)
        if mark is not None and mark.source != self.source:
            raise CheckpointError(f"{run.folder}: already exists, and came from {mark.source}. {cure}")
        held = {} if mark is not None else read_json(run.config_path, error=CheckpointError, missing={})
        if mark is None and held.get("push_to") != self.repo_id:
            raise CheckpointError(f"{run.folder}: already exists, and did not come from {self.source}. {cure}")

    def _check_same_settings(self, run: RunFolder, config: TrainConfig) -> None:
        """Checkpoints of other settings do not belong into one run."""
        if not run.config_path.is_file():
            return
        values, _ = upgrade(read_json(run.config_path, error=CheckpointError))
        here = TrainConfig(**import_side_files(values, must_exist=False)[0])
        names = sorted(TRAVELS - FOLLOWS.keys())
        differing = [name for name in names if getattr(here, name) != getattr(config, name)]
        if differing:
            raise CheckpointError(
                f"{run.folder}: already exists, with other settings than {self.source} ({', '.join(differing)}). "
                "Rename it, or fetch into another logdir (--logdir)."
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
