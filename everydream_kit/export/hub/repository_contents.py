"""What a push consists of: which files of a run or checkpoint go where in the repository.

    README.md                   the model card
    model_index.json  unet/ ..  the checkpoint at the root, so that `from_pretrained("me/jets")` loads it
    resume/                     its optimizer and position (background uploads only, unless requested)
    <project>.safetensors       the single file, if requested
    pytorch_lora_weights...     a LoRA, where the run trained one
    samples/                    latest sample images
    training/                   config.json, curves.png; with resume/ also events.jsonl and run.json

What is copied into text files is cleaned: tokens are cut out, and folders of this machine too, except where a resume
needs them. Nothing here talks to the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, cast, get_args

from everydream_kit.errors import ExportError
from everydream_kit.export.hub.connection import redact
from everydream_kit.runs import Checkpoint, RunFolder
from everydream_kit.runs.layout import ADAPTER_FILE, LORA_FILE, TOKENS_FILE
from everydream_kit.runs.run_folder import is_checkpoint, is_run
from everydream_kit.strict_json import read_json

What = Literal["diffusers", "lora", "single_file", "samples", "training", "resume"]
DEFAULT_WHAT: tuple[What, ...] = ("diffusers", "samples", "training")
LORA_FILES = (LORA_FILE, "adapter_model.safetensors")
SINGLE_FILE_SUFFIXES = (".safetensors", ".ckpt")
SAMPLE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_SAMPLES = 12
RUN_FACTS = "training/run.json"


@dataclass(frozen=True)
class UploadFile:
    """One file of a push: its place in the repository, and where its bytes are."""

    path: str
    source: Path | bytes
    num_bytes: int

    @classmethod
    def of(cls, path: str, source: Path | bytes) -> UploadFile:
        return cls(path, source, len(source) if isinstance(source, bytes) else source.stat().st_size)


@dataclass(frozen=True)
class Sample:
    """A sample image with the text it was generated from."""

    path: Path
    path_in_repo: str
    prompt: str
    negative_prompt: str = ""


@dataclass(frozen=True)
class Source:
    """What a person wants to push, found on disk.

    Attributes:
        run: the run folder, where there is one around the checkpoint.
        checkpoint: a model folder (diffusers or LoRA), or None where a single file was given.
        single_file: a `.safetensors` or `.ckpt` that was given instead.
    """

    run: RunFolder | None
    checkpoint: Path | None
    single_file: Path | None = None

    @property
    def place(self) -> Path:
        """What to name in messages: it is still there after a push that failed."""
        place = self.checkpoint or self.single_file
        assert place is not None
        return place

    @property
    def is_lora(self) -> bool:
        """The checkpoint holds LoRA weights and no model of its own."""
        from everydream_kit.models.model_files import denoiser_folders

        folder = self.checkpoint
        if folder is None or not any((folder / name).is_file() for name in LORA_FILES):
            return False
        return not any((folder / name).is_dir() for name in denoiser_folders())

    @property
    def learned_tokens(self) -> dict[str, int]:
        """Learned tokens in the checkpoint, each with the number of text encoders that know it."""
        from safetensors import SafetensorError, safe_open

        path = self.checkpoint / TOKENS_FILE if self.checkpoint else None
        if path is None or not path.is_file():
            return {}
        try:
            with safe_open(path, framework="np") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{path}: damaged: {error}. Push another checkpoint.") from error
        tokens = [name for name in names if "|" not in name]
        return {token: sum(name.partition("|")[0] == token for name in names) for token in tokens}

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings; empty without a run."""
        if self.run is None:
            return {}
        try:
            return dict(read_json(self.run.config_path, error=ExportError))
        except ExportError as error:
            raise ExportError(f"{error} The settings are damaged: fix them, or push the checkpoint alone.") from error

    @property
    def title(self) -> str:
        """The project's name, else the folder's or file's."""
        return str(self.config.get("project_name") or self.place.stem)


def find_source(given: Any) -> Source:
    """Find out what was given: a run, a checkpoint, a single file, or an object with a `.folder`.

    Raises:
        ExportError: nothing there can be pushed.
        CheckpointError: the run holds no complete checkpoint yet.
    """
    path = Path(getattr(given, "folder", given)).expanduser()
    if path.is_file() and path.suffix in SINGLE_FILE_SUFFIXES:
        return Source(None, None, path)
    if is_checkpoint(path) or any((path / name).is_file() for name in LORA_FILES):
        return Source(Checkpoint.at(path).run, path)
    if is_run(path):
        run = RunFolder(path)
        return Source(run, run.last_checkpoint)
    found = "is not there" if not path.exists() else "is neither a run folder, a checkpoint, nor a .safetensors file"
    raise ExportError(f"{path}: {found}. Give a run folder (it has a config.json), or a checkpoint under its ckpts/.")


def check_what(what: Iterable[str], source: Source) -> tuple[What, ...]:
    """The parts to push, checked against what there is.

    Raises:
        ExportError: an unknown part, or one that this source does not have.
    """
    parts = (what,) if isinstance(what, str) else tuple(what)
    known = get_args(What)
    for part in parts:
        if part not in known:
            raise ExportError(f"what: {part!r} is unknown; it may hold {', '.join(known)}.")
    if source.single_file is not None:
        return ("single_file",)
    if source.is_lora:
        parts = tuple("lora" if part == "diffusers" else part for part in parts)
    elif "lora" in parts:
        raise ExportError(f"what: {source.place} holds no LoRA ({' or '.join(LORA_FILES)}). Omit `lora`.")
    assert source.checkpoint is not None
    if "resume" in parts and not Checkpoint.at(source.checkpoint).resumable:
        raise ExportError(
            f"what: {source.checkpoint} holds no resume state; only the latest checkpoints of a run do. "
            "Push a newer one, or omit `resume`."
        )
    return cast("tuple[What, ...]", parts)


def checkpoint_files(folder: Path, *, keep_paths: bool) -> list[UploadFile]:
    """The model's own files, at the repository's root: everything but `resume/`, hidden files and a card.

    Args:
        keep_paths: an adapter names its base by its full path, as its manifest says; else that is cut to its name.
    """
    return [
        UploadFile.of(path.relative_to(folder).as_posix(), path if keep_paths else _without_paths(path))
        for path in Checkpoint.at(folder).model_files()
        if path.relative_to(folder).parts[0] != "README.md"
    ]


def _without_paths(path: Path) -> Path | bytes:
    return _json(without_folders(read_json(path, error=ExportError))) if path.name == ADAPTER_FILE else path


def resume_files(source: Source, token: str | None) -> list[UploadFile]:
    """Resume state, and what a run folder on another machine is rebuilt from."""
    assert source.checkpoint is not None
    folder = source.checkpoint
    files = [UploadFile.of(path.relative_to(folder).as_posix(), path) for path in Checkpoint.at(folder).resume_files()]
    run_name = source.run.name if source.run else folder.resolve().name
    facts = {"version": 1, "run": run_name, "checkpoint": folder.resolve().name}
    files.append(UploadFile.of(RUN_FACTS, _json(facts)))
    if source.run is not None and source.run.events_path.is_file():
        events = source.run.events_path.read_text("utf-8")
        events = events[: events.rfind("\n") + 1]  # a last line may still be being written
        files.append(UploadFile.of("training/events.jsonl", redact(events, token).encode()))
    return files


def config_file(source: Source, token: str | None, *, keep_paths: bool) -> UploadFile | None:
    """The run's settings, loadable as `--config`; folders of this machine are cut to their names unless kept."""
    if source.run is None:
        return None
    config = source.config if keep_paths else without_folders(source.config)
    return UploadFile.of("training/config.json", redact(_json(config).decode(), token).encode())


def without_folders(value: Any) -> Any:
    """A JSON value in which every absolute path is cut to its last part: whose machine it was is nobody's business."""
    if isinstance(value, dict):
        return {key: without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_folders(each) for each in value]
    if isinstance(value, str) and re.match(r"([/~]|[A-Za-z]:[\\/]|\\\\)", value):
        return PureWindowsPath(value).name or "/"  # splits at both kinds of slash
    return value


def find_samples(run: RunFolder | None) -> list[Sample]:
    """The latest grid of each prompt, latest step only, at most `MAX_SAMPLES`; live weights before averaged ones."""
    if run is None or not run.samples_folder.is_dir():
        return []
    images = [path for path in run.samples_folder.iterdir() if path.suffix.lower() in SAMPLE_SUFFIXES]
    steps = {path: int(match[1]) for path in images if (match := re.match(r"gs(\d+)", path.name))}
    latest = max(steps.values(), default=None)
    chosen = sorted(path for path in images if steps.get(path) == latest)[:MAX_SAMPLES]
    return [_sample(number, path) for number, path in enumerate(chosen)]


def _sample(number: int, path: Path) -> Sample:
    name = re.match(r"gs\d+", path.name)
    place = f"samples/{name[0] if name else 'sample'}-{number:03}{path.suffix.lower()}"
    notes = path.with_suffix(".txt")
    lines = notes.read_text("utf-8", errors="replace").splitlines() if notes.is_file() else []
    marker = next((n for n, line in enumerate(lines) if line.startswith("negative prompt:")), len(lines))
    negative = lines[marker].partition(":")[2].strip() if marker < len(lines) else ""
    return Sample(path, place, " ".join(lines[:marker]).strip() or path.stem, negative)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
