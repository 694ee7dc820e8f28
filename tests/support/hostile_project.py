"""A project in which everything that a stranger can name carries a script: for tests of what panels put into a page."""

from __future__ import annotations

import json
from pathlib import Path

from hub_runs import make_run
from PIL import Image

SCRIPT = "\"'><img src=x onerror=window.taken=1>"
"""Runs wherever it is put into a page as HTML. As a file name it is fine on Linux."""


def make_hostile_project(place: Path) -> Path:
    """A project folder with images, captions, folders, a run, a checkpoint, samples and settings of such names."""
    project = place / f"jets {SCRIPT}"
    images = project / "input"
    folder = images / f"folder {SCRIPT}"
    folder.mkdir(parents=True)
    for path in (images / f"a {SCRIPT}.png", folder / f"b {SCRIPT}.png", images / f"{SCRIPT}_1.png"):
        Image.new("RGB", (64, 48), (90, 60, 30)).save(path)
    (images / f"copy {SCRIPT}.png").write_bytes((images / f"a {SCRIPT}.png").read_bytes())
    (images / f"a {SCRIPT}.txt").write_text(f"a jet {SCRIPT}, {SCRIPT}, sky")
    (folder / f"b {SCRIPT}.yaml").write_text(json.dumps({"main_prompt": SCRIPT, SCRIPT: 1}))
    (images / f"broken {SCRIPT}.png").write_bytes(b"no image")
    (images / f"stray {SCRIPT}.txt").write_text("belongs to no image")
    run = make_run(project / "logs", secret=SCRIPT)
    checkpoint = next(run.checkpoints_folder.iterdir())
    checkpoint.rename(checkpoint.with_name(f"{SCRIPT}-ep01-gs00020"))
    for sample in list((run.folder / "samples").glob("*.jpg")):
        sample.with_suffix(".txt").write_text(f"{SCRIPT}\n")
        sample.rename(sample.with_name(sample.name.replace("a jet", SCRIPT)))
    (run.folder / "train.log").write_text(f"{SCRIPT}\n")
    (run.folder / "status.json").write_text(json.dumps({"state": "finished", "step": 20, "message": SCRIPT}))
    run.folder.rename(run.folder.with_name(f"{SCRIPT}-20261122-120000"))
    (project / "sample_prompts.txt").write_text(f"{SCRIPT}\n")
    settings = {"resume_ckpt": f"{SCRIPT}", "data_root": str(images), "run_name": SCRIPT, "max_epochs": 1}
    (project / "settings.json").write_text(json.dumps(settings))
    given = {**settings, "given": ["resume_ckpt", "run_name", "max_epochs"]}
    entry = {"id": "a", "settings": given, "state": "failed", "run": None, "message": SCRIPT}
    queue = {"command": None, "entries": [entry]}
    (project / "queue.json").write_text(json.dumps(queue))
    return project
