"""One upload under way: large files first, each a step of its own, then one commit of everything.

After a broken connection, or a killed process, the next push finds on the Hub what has arrived and sends only the rest.
The commit names its parent, so a try whose answer was lost is not made twice. Files of an earlier push that would no
longer fit (old weights in the model's folders, a resume state of another step) are removed in the same commit; the
repository's history keeps them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from everydream_kit.export.hub.connection import HubConnection
from everydream_kit.export.hub.repository_contents import UploadFile

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

logger = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, what is being done)."""

OWN_STEP_FROM_BYTES = 8_000_000
"""Files from this size on are uploaded, retried and reported one by one."""
HEARTBEAT_SECONDS = 30.0


def show_no_progress(done: int, total: int, doing: str) -> None:
    """Progress that is not shown."""


@dataclass(frozen=True)
class Target:
    """Where a push goes, and what it leaves there.

    Attributes:
        repo_id: with its owner.
        revision: branch; None is main.
        create_pr: open a pull request against it.
        message: of the commit.
        replaces: the model's folders are replaced: what an earlier push left in them goes.
        keeps_resume: a resume state is part of this push; else an earlier one goes, since it would not fit.
    """

    repo_id: str
    revision: str | None
    create_pr: bool
    message: str
    replaces: bool
    keeps_resume: bool


class Upload:
    """One push under way.

    Args:
        connection: to the Hub.
        target: where to.
        files: smallest first.
        advice: of the message after a failure: what is safe, how to continue.
        progress: called for every file.
    """

    def __init__(
        self,
        connection: HubConnection,
        target: Target,
        files: Sequence[UploadFile],
        *,
        advice: str,
        progress: Progress | None = None,
    ) -> None:
        self.connection = connection
        self.target = target
        self.files = files
        self.advice = advice
        self.progress = progress if progress is not None else show_no_progress
        self.total = sum(file.num_bytes for file in files)
        self.head: str | None = None
        self.requests_before: set[str] = set()

    def run(self) -> str:
        """Upload what the Hub does not have yet, then commit everything at once. Returns the address of what came of it."""
        operations = self._operations()
        self._upload_large_files(operations)
        if self.target.create_pr:
            self.requests_before = self._pull_requests()
        doing = f"commit to {self.target.repo_id}"
        self.progress(self.total, self.total, doing)
        with heartbeat(doing):
            return self.connection.step(doing, lambda: self._commit(operations), advice=self.advice)

    def _operations(self) -> list[CommitOperationAdd]:
        from huggingface_hub import CommitOperationAdd

        doing = "read the files"
        return self.connection.step(
            doing,
            lambda: [CommitOperationAdd(file.path, file.source) for file in self.files],
            advice=self.advice,
            tries=1,
        )

    def _upload_large_files(self, operations: list[CommitOperationAdd]) -> None:
        """Small ones together first, then the others one by one, the largest last."""
        api, target = self.connection.api, self.target
        small = [n for n, file in enumerate(self.files) if file.num_bytes < OWN_STEP_FROM_BYTES]
        groups = [small] if small else []
        groups += [[n] for n, file in enumerate(self.files) if file.num_bytes >= OWN_STEP_FROM_BYTES]
        done = 0
        for group in groups:
            size = sum(self.files[n].num_bytes for n in group)
            name = self.files[group[0]].path if len(group) == 1 else f"{len(group)} small files"
            doing = f"upload {name} ({size_words(size)}) to {target.repo_id}"
            self.progress(done, self.total, doing)

            def upload(group: list[int] = group) -> None:
                additions = [operations[n] for n in group]
                api.preupload_lfs_files(
                    target.repo_id,
                    additions,
                    revision=target.revision,
                    create_pr=target.create_pr,
                    free_memory=False,
                )

            with heartbeat(doing):
                self.connection.step(doing, upload, advice=self.advice)
            done += size

    def _commit(self, operations: list[CommitOperationAdd]) -> str:
        """Commit once. Called again after an error, it first looks whether the earlier try came through after all."""
        api, target = self.connection.api, self.target
        head = api.model_info(target.repo_id, revision=target.revision).sha
        if self.head is not None and target.create_pr and (opened := self._pull_requests() - self.requests_before):
            return f"{self.connection.endpoint}/{target.repo_id}/discussions/{max(opened, key=int)}"
        if self.head not in (None, head):
            # Somebody has committed, perhaps we: new operations are compared with what is there now.
            operations[:] = self._operations()
        self.head = head
        outcome = api.create_commit(
            target.repo_id,
            [*self._stale_files(head), *operations],
            commit_message=target.message,
            revision=target.revision,
            create_pr=target.create_pr,
            parent_commit=head,
        )
        if target.create_pr:
            return str(outcome.pr_url or outcome.commit_url)
        branch = f"/tree/{target.revision}" if target.revision not in (None, "main") else ""
        return f"{self.connection.endpoint}/{target.repo_id}{branch}"

    def _stale_files(self, head: str | None) -> list[CommitOperationDelete]:
        """Files of an earlier push that would not fit this one: in the model's folders, and in resume/."""
        from huggingface_hub import CommitOperationDelete

        if not self.target.replaces:
            return []
        pushed = {file.path for file in self.files}
        folders = {path.partition("/")[0] for path in pushed if "/" in path} - {"samples", "training"} | {"resume"}
        there = self.connection.api.list_repo_files(self.target.repo_id, revision=head)
        stale = {path for path in there if "/" in path and path.partition("/")[0] in folders and path not in pushed}
        if not self.target.keeps_resume:
            stale |= {path for path in there if path in ("training/run.json", "training/events.jsonl")}
        return [CommitOperationDelete(path) for path in sorted(stale)]

    def _pull_requests(self) -> set[str]:
        """Numbers of the repository's pull requests."""
        target = self.target.repo_id
        refs = self.connection.step(
            f"list the pull requests of {target}",
            lambda: self.connection.api.list_repo_refs(target, include_pull_requests=True),
        )
        return {ref.ref.rpartition("/")[2] for ref in refs.pull_requests or []}


@contextmanager
def heartbeat(doing: str) -> Iterator[None]:
    """Say in the log, every half minute, that a long step still continues: without a terminal the client is silent."""
    over, started = threading.Event(), time.monotonic()

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            logger.info("Still busy: %s, %.0f s so far.", doing, time.monotonic() - started)

    threading.Thread(target=beat, name="hub-heartbeat", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def size_words(num_bytes: int) -> str:
    """A size as people say it: 3.4 GB, 120 MB, 12 kB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            value = num_bytes / factor
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{num_bytes} B"
