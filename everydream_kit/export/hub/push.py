"""Pushing a run or checkpoint to the Hub, and saying beforehand what would go."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from everydream_kit.config import EMBEDDED_MODEL
from everydream_kit.errors import ConfigError
from everydream_kit.export.checkpoint_formats import DEFAULT_PRECISION, Precision
from everydream_kit.export.curves import draw_curves
from everydream_kit.export.hub.access import base_license, check_repo_id, open_repo
from everydream_kit.export.hub.connection import HubConnection, quiet_client, redact
from everydream_kit.export.hub.repository_contents import (
    DEFAULT_WHAT,
    Source,
    UploadFile,
    What,
    check_what,
    checkpoint_files,
    config_file,
    find_samples,
    find_source,
    resume_files,
    without_folders,
)
from everydream_kit.export.hub.upload import Progress, Target, Upload, size_words
from everydream_kit.export.license import local_license
from everydream_kit.export.model_card import CardFacts, make_model_card, read_base, read_kind
from everydream_kit.runs import RunFolder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushPreview:
    """What a push would upload.

    Attributes:
        repo_id, revision: where to.
        create_pr: as a pull request.
        private: of a repository that would be created.
        files: in order of upload. A single file that would be written first has its estimated size.
        card: the README.md.
        message: of the commit.
    """

    repo_id: str
    revision: str | None
    files: tuple[UploadFile, ...]
    card: str
    message: str
    create_pr: bool = False
    private: bool = True

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def text(self) -> str:
        """The preview for reading: one file a line, largest last, then the card."""
        lines = [f"{size_words(file.num_bytes):>10}  {file.path}" for file in self.files]
        where = self.repo_id + (f" at {self.revision}" if self.revision else "")
        size = size_words(self.num_bytes)
        kind = "pull request" if self.create_pr else "commit"
        head = f"Would push {len(self.files)} files, {size}, to {where} as one {kind}: {self.message}"
        visibility = "private" if self.private else "public"
        new = [] if self.create_pr else [f"If {self.repo_id} does not exist, it is created {visibility}."]
        return "\n".join([head, *new, *lines, "", "README.md:", self.card])


def preview_push(
    run_or_checkpoint: str | Path | RunFolder,
    repo_id: str,
    *,
    private: bool = True,
    what: Iterable[What] = DEFAULT_WHAT,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    message: str | None = None,
) -> PushPreview:
    """What `push_to_hub` would upload, without uploading, a token, or a network.

    The license of a base on the Hub is looked up only when pushing.

    Raises:
        ExportError, CheckpointError: there is nothing to push.
    """
    check_repo_id(repo_id)
    source = find_source(run_or_checkpoint)
    wish = _Wish(repo_id, check_what(what, source), license, base_model, message)
    return _preview(source, wish, revision, create_pr=create_pr, private=private)


def _preview(source: Source, wish: _Wish, revision: str | None, *, create_pr: bool, private: bool) -> PushPreview:
    license = {"license": wish.license} if wish.license else _license_on_disk(source, wish.base_model)
    files, card = _collect(source, wish, found_license=license, token=None, scratch=None)
    where, message = (wish.repo_id, revision), wish.message_for(source)
    return PushPreview(*where, tuple(files), card, message, create_pr=create_pr, private=private)


def push_to_hub(
    run_or_checkpoint: str | Path | RunFolder,
    repo_id: str,
    *,
    private: bool | None = None,
    what: Iterable[What] = DEFAULT_WHAT,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    message: str | None = None,
    precision: Precision | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    api: HfApi | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Upload a run's latest checkpoint, or a given checkpoint or file, with a model card, as one commit.

    Args:
        run_or_checkpoint: run folder (its latest checkpoint goes), checkpoint folder, or single file; in Python also an
            object with a `.folder`.
        repo_id: `me/jets`; created if it does not exist.
        private: a repository that is created is private, which is the default. An existing one stays as it is.
        what: the parts that go. `diffusers` of a LoRA run is the LoRA, `training` the settings and curves, `resume` what
            another machine needs to continue. The model card always goes.
        revision: branch to push to; created if it does not exist.
        create_pr: open a pull request instead of changing the branch.
        dry_run: upload nothing and return what would go, as text.
        license: Hub name of the license; by default the base model's, from its card on the Hub, its folder's card, or
            its file's header.
        base_model: Hub id of the base; by default the one the run started from.
        message: of the commit.
        precision: of the single file that is written for the push; by default fp16.
        token: by default huggingface_hub's login or HF_TOKEN.
        progress: called with (bytes done, bytes in all, what is being done).
        api: another Hub than the usual one.
        sleep: waits between tries.

    Returns:
        Address of the repository, branch or pull request; in a dry run the preview's text.

    Raises:
        ConfigError: arguments that do not go together.
        ExportError, CheckpointError: there is nothing to push.
        HubError: the Hub refused, or could not be reached in three tries; what is on disk stays, and pushing again goes
            on where it stopped.
    """
    check_repo_id(repo_id)
    precision = _check_together(what, precision, private=private, create_pr=create_pr)
    source = find_source(run_or_checkpoint)
    wish = _Wish(repo_id, check_what(what, source), license, base_model, message, precision)
    if dry_run:
        return _preview(source, wish, revision, create_pr=create_pr, private=private is not False).text()
    connection = HubConnection(token, api=api, sleep=sleep)
    with ExitStack() as stack:
        stack.enter_context(quiet_client())
        if not create_pr:
            wish = replace(wish, repo_id=_open_repo(connection, repo_id, private is not False, revision))
        found_license = _find_license(source, wish, connection)
        writes_file = "single_file" in wish.what and source.single_file is None
        scratch = stack.enter_context(_scratch_next_to(source.place)) if writes_file else None
        files, _ = _collect(source, wish, found_license=found_license, token=connection.token, scratch=scratch)
        target = Target(
            repo_id=wish.repo_id,
            revision=revision,
            create_pr=create_pr,
            message=redact(wish.message_for(source), connection.token),
            replaces=bool({"diffusers", "lora", "resume"} & set(wish.what)),
            keeps_resume="resume" in wish.what,
        )
        advice = f"Nothing is lost: {source.place} is untouched. Push again; what has arrived is not sent twice."
        return Upload(connection, target, files, advice=advice, progress=progress).run()


def _check_together(
    what: Iterable[str], precision: Precision | None, *, private: bool | None, create_pr: bool
) -> Precision:
    """The precision of a single file. Raises ConfigError for arguments that do not go together."""
    if precision is not None and "single_file" not in what:
        raise ConfigError("precision: is that of the single file which is written; add single_file to what.")
    if create_pr and private is not None:
        flag = "private" if private else "public"
        raise ConfigError(f"{flag}: is for a new repository; a pull request (create_pr) goes to one that exists.")
    return precision or DEFAULT_PRECISION


def _open_repo(connection: HubConnection, repo_id: str, private: bool, revision: str | None) -> str:
    """The full id of the repository, which is there afterwards."""
    access = open_repo(connection, repo_id, private=private, revision=revision)
    if private != access.private:
        now, wanted = ("private", "public") if access.private else ("public", "private")
        logger.warning("%s is %s already and is not changed; %s is for new repositories.", access.repo_id, now, wanted)
    return access.repo_id


def _find_license(source: Source, wish: _Wish, connection: HubConnection) -> dict[str, str]:
    """What the caller says, else what is on this disk, else what the base model's card on the Hub says."""
    if wish.license:
        return {"license": wish.license}
    base = wish.base_model or read_base(source.config)
    return _license_on_disk(source, wish.base_model) or base_license(connection, base)


def _license_on_disk(source: Source, base_model: str | None) -> dict[str, str]:
    """What the base that the run started from states, else the pushed model itself; nothing where the Hub is asked."""
    if base_model is not None or read_base(source.config) is not None:
        return {}
    start = source.config.get("resume_ckpt")
    if start == EMBEDDED_MODEL:
        from everydream_kit.demo import base_model_path

        start = base_model_path()
    return local_license(Path(start).expanduser() if start else None) or local_license(source.place)


@dataclass(frozen=True)
class _Wish:
    """What the caller asked for, checked."""

    repo_id: str
    what: tuple[What, ...]
    license: str | None
    base_model: str | None
    message: str | None
    precision: Precision = DEFAULT_PRECISION

    def message_for(self, source: Source) -> str:
        return self.message or f"Upload {source.place.resolve().name} with EveryDream Kit"


def _collect(
    source: Source,
    wish: _Wish,
    *,
    found_license: dict[str, str],
    token: str | None,
    scratch: Path | None,
) -> tuple[list[UploadFile], str]:
    """All files of a push, smallest first, and the text of the card among them."""
    what, files = wish.what, []
    if source.checkpoint is not None and ("diffusers" in what or "lora" in what):
        files += checkpoint_files(source.checkpoint, keep_paths="resume" in what)
    if "single_file" in what:
        files.append(_single_file(source, scratch, wish.precision))
    if "resume" in what:
        files += resume_files(source, token)
    samples = find_samples(source.run) if "samples" in what else []
    files += [UploadFile.of(sample.path_in_repo, sample.path) for sample in samples]
    events = list(source.run.events()) if source.run else []
    curves = draw_curves(source.run) if source.run and "training" in what else None
    if "training" in what or "resume" in what:
        config = config_file(source, token, keep_paths="resume" in what)
        files += [config] if config else []
    if curves is not None:
        files.append(UploadFile.of("training/curves.png", curves))
    card = make_model_card(
        CardFacts(
            title=source.title,
            repo_id=wish.repo_id,
            base_model=wish.base_model or read_base(source.config),
            license=found_license,
            config=without_folders(source.config),
            events=events,
            is_lora="lora" in what or _is_lora_file(source),
            single_file=next((f.path for f in files if f.path == _single_file_name(source)), None),
            has_folder="diffusers" in what and not source.learned_tokens,
            learned_tokens=source.learned_tokens if "diffusers" in what else {},
            samples=[(sample.path_in_repo, sample.prompt, sample.negative_prompt) for sample in samples],
            curves="training/curves.png" if curves is not None else None,
            **read_kind(source.checkpoint, source.single_file),
        )
    )
    card = redact(card, token)
    files.append(UploadFile.of("README.md", card.encode()))
    return sorted(files, key=lambda file: (file.num_bytes, file.path)), card


def _is_lora_file(source: Source) -> bool:
    if source.single_file is None:
        return False
    from everydream_kit.models.lora.files import is_lora

    return is_lora(source.single_file)


def _single_file_name(source: Source) -> str:
    return source.single_file.name if source.single_file else f"{source.title}.safetensors"


def _single_file(source: Source, scratch: Path | None, precision: str) -> UploadFile:
    """The given file, or one written from the checkpoint; without a scratch folder only its estimated size."""
    name = _single_file_name(source)
    if source.single_file is not None:
        return UploadFile.of(name, source.single_file)
    assert source.checkpoint is not None
    if scratch is None:
        weights = sum(path.stat().st_size for path in source.checkpoint.glob("*/*.safetensors"))
        return UploadFile(name, source.checkpoint, weights)
    from everydream_kit.export.single_file_export import export_checkpoint

    return UploadFile.of(name, Path(export_checkpoint(source.checkpoint, scratch / name, precision=precision)))


@contextmanager
def _scratch_next_to(place: Path) -> Iterator[Path]:
    """A folder on the checkpoint's own disk, for a single file on its way up."""
    with tempfile.TemporaryDirectory(prefix=".push-", dir=place.resolve().parent) as folder:
        yield Path(folder)
