"""Long work that a panel starts and watches, a process each: any action, and what only panels do, such as unpacking and
inspecting a dataset.

`python -m everydream_kit.actions.background TASK FOLDER ...` does one background task and reports in
FOLDER/status.json as the trainer does, so that `jobs` can watch it. No widgets here.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from everydream_kit.actions.action import text_of
from everydream_kit.actions.table import EXPORT, PUSH, find_action
from everydream_kit.atomic import PREFIX, SUFFIX, write_atomic
from everydream_kit.errors import KitError
from everydream_kit.identity import this_process
from everydream_kit.runs import RunFolder, layout

INSPECTION_FILE, PLAN_FILE, CAPTIONS_FILE = "report.json", layout.PLAN, "captions.jsonl"
POLITE, POLITENESS = ("inspect", "estimate"), 10
"""Work that nobody waits for at this moment leaves the processors to training and sampling."""
REPORT_SECONDS = 0.5
"""Between two reports of progress."""


class StatusWriter:
    """A background task's side of `status.json`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = RunFolder(folder)
        self._facts: dict[str, Any] = this_process().to_json()

    def report(self, state: str, **facts: Any) -> None:
        self._facts.update(facts, state=state)
        self._run.write_status(self._facts)


def fetch(status: StatusWriter, folder: Path, source: str) -> dict[str, Any]:
    """Unpack an archive or download a Hub dataset below the folder."""
    from everydream_kit.data.sources import open_source

    status.report("running", message=f"Fetching {source} …")
    found = open_source(source, folder)
    return {"folder": str(found), "message": f"{source} is in {found}."}


def unpack(status: StatusWriter, folder: Path, archive: str, target: str) -> dict[str, Any]:
    """Unpack an uploaded archive as a folder of the dataset; the archive goes away."""
    from everydream_kit.data.sources import unpack_archive

    path = Path(archive)
    total = count_entries(path)
    try:
        with ThreadPoolExecutor(1) as worker:
            unpacking = worker.submit(unpack_archive, path, path.parent)
            while not unpacking.done():
                done = sum(
                    len(names) for place in path.parent.glob(f"{PREFIX}*{SUFFIX}") for _, _, names in os.walk(place)
                )
                status.report("running", step=done, num_steps=total, message=f"Unpacking: {done:,} of {total:,} files")
                wait([unpacking], timeout=REPORT_SECONDS)
            unpacked = put_in_free_place(unpacking.result(), Path(target))
    finally:
        path.unlink(missing_ok=True)
    count = sum(1 for file in unpacked.rglob("*") if file.is_file())
    return {"step": total, "count": count, "folder": str(unpacked), "message": f"{count:,} files unpacked."}


def count_entries(archive: Path) -> int:
    """Files in a .zip, from its directory; 0 where it cannot be read (unpacking says why)."""
    try:
        with zipfile.ZipFile(archive) as file:
            return sum(not entry.is_dir() for entry in file.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return 0


def put_in_free_place(folder: Path, target: Path) -> Path:
    """Give a folder this name, or the next one that is free: `jets`, `jets-2` ... Returns its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    places = (target if number == 1 else target.with_name(f"{target.name}-{number}") for number in itertools.count(1))
    return folder.replace(next(place for place in places if not place.exists()))


def inspect_folder(status: StatusWriter, folder: Path, source: str, options: str) -> dict[str, Any]:
    """Inspect all images of a dataset for duplicates, broken ones, and captions that are too long."""
    from everydream_kit.actions.dataset_issues import inspect_dataset
    from everydream_kit.data.epoch_plan import PlanSettings
    from everydream_kit.data.scanning import scan_dataset

    values = json.loads(options)
    base = values.pop("base")
    dataset = scan_dataset(source)
    last = 0.0

    def progress(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            status.report("running", step=done, num_steps=len(dataset))

    settings = PlanSettings(**{**values, "resolutions": tuple(values["resolutions"])})
    inspect_dataset(dataset, settings, base, folder / INSPECTION_FILE, progress)
    return {"step": len(dataset), "num_steps": len(dataset), "message": f"{len(dataset):,} images inspected."}


def estimate(status: StatusWriter, folder: Path, config: str, wish: str) -> dict[str, Any]:
    """Make the plan of a run: memory, time, disk, cost, and what to change so that it fits."""
    from everydream_kit.preflight.planning import plan
    from everydream_kit.settings import load_config

    wanted = json.loads(wish)
    values = json.loads(config)
    settings = load_config(None, {name: values[name] for name in values["given"]})[0]
    status.report("running", message="Estimating memory, time and cost …")
    made = plan(settings, wanted["gpu"], wanted["price"])
    write_atomic(folder / PLAN_FILE, json.dumps({**made.to_json(), "text": made.text, "key": wanted["key"]}))
    return {"message": made.line}


def generate_comparison(status: StatusWriter, folder: Path, plan: str) -> dict[str, Any]:
    """Sample the images of a comparison that are not there yet. The file of the request goes away."""
    from everydream_kit.actions.comparison import Comparison, generate_missing

    request = Path(plan)
    comparison = Comparison.load(request)
    request.unlink()
    count = generate_missing(comparison, lambda done, total: status.report("running", step=done, num_steps=total))
    return {"message": f"{count} images generated."}


def export(status: StatusWriter, folder: Path, checkpoint: str, out: str, options: str) -> dict[str, Any]:
    """Write a checkpoint in one of its forms."""
    from everydream_kit.preflight.units import size

    status.report("running", message=f"Writing {Path(out).name} …")
    begin = time.monotonic()
    path = EXPORT.call({"checkpoint": checkpoint, "out": out, **json.loads(options)})
    files = path.rglob("*") if path.is_dir() else [path]
    took = f"{size(sum(file.stat().st_size for file in files if file.is_file()))} in {time.monotonic() - begin:.0f} s"
    return {"path": str(path), "message": f"{path} is written: {took}."}


def push(status: StatusWriter, folder: Path, source: str, repo_id: str, options: str) -> dict[str, Any]:
    """Upload a run or checkpoint to the Hub."""
    from everydream_kit.preflight.units import size

    status.report("running", message=f"Uploading to {repo_id} …")

    def progress(done: int, total: int, doing: str) -> None:
        status.report("running", step=done, num_steps=total, message=f"{doing} · {size(done)} of {size(total)}")

    url = PUSH.call({"run_or_checkpoint": source, "repo_id": repo_id, **json.loads(options)}, progress)
    return {"url": str(url), "message": f"Pushed to {url}"}


def act(status: StatusWriter, folder: Path, name: str, given: str) -> dict[str, Any]:
    """Do any action; what it returns is the last message."""
    status.report("running", message=f"Running {name} …")

    def progress(done: int, total: int, doing: str = "") -> None:
        status.report("running", step=done, num_steps=total, message=doing or f"Running {name} …")

    return {"message": text_of(find_action(name).call(json.loads(given), progress))}


def suggest(status: StatusWriter, folder: Path, options: str) -> dict[str, Any]:
    """Suggest captions of images, a line of JSON each, for review. Nothing in the dataset changes."""
    from everydream_kit.data.captioning import suggest_captions

    values = json.loads(options)
    paths = list(map(Path, values.pop("paths")))
    status.report("running", step=0, num_steps=len(paths), message=f"Loading {values['model']} …")
    count = 0
    with (folder / CAPTIONS_FILE).open("w", encoding="utf-8") as file:
        for done, (path, text) in enumerate(suggest_captions(paths, **values), start=1):
            if text is not None:
                count += 1
                file.write(json.dumps({"path": str(path), "caption": text}) + "\n")
                file.flush()
            words = f"Captioning: {done:,} of {len(paths):,} images"
            status.report("running", step=done, num_steps=len(paths), message=words)
    return {"message": f"{count:,} captions suggested. Look through them, then write them."}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "action": act,
    "fetch": fetch,
    "unpack": unpack,
    "inspect": inspect_folder,
    "estimate": estimate,
    "generate": generate_comparison,
    "export": export,
    "push": push,
    "caption": suggest,
}


def main(arguments: Sequence[str]) -> int:
    """Do one background task; its error goes to the status in words, the traceback of an unexpected one to the log as
    well."""
    name, folder, *rest = arguments
    status = StatusWriter(Path(folder))
    if name in POLITE and hasattr(os, "nice"):
        os.nice(POLITENESS)
    status.report("starting", message="Starting …")
    try:
        facts = TASKS[name](status, Path(folder), *rest)
    except KitError as error:
        status.report("failed", message=str(error))
        return 1
    except Exception as error:  # a bug, or what a library raises: shown in the panel, and raised into the log
        status.report(
            "failed", message=f"{name} failed: {type(error).__name__}: {error}. The log is {folder}/train.log."
        )
        raise
    status.report("finished", **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
