"""Small run folders for tests of the Hub: plain random weights, so that making and hashing one takes milliseconds."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from everydream_kit.runs import RunFolder
from everydream_kit.runs.layout import RESUME_MANIFEST

TOKEN = "hf_" + "tEsTtOkEn" * 4
KILOBYTE = 1000


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """Every file under a folder, with its hash."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def write_checkpoint(run: RunFolder, step: int, *, seed: int, unet_bytes: int = 200 * KILOBYTE) -> Path:
    """A folder of a checkpoint's shape, with resume state and manifest, under the run's ckpts."""
    folder = run.checkpoints_folder / f"jets-ep01-gs{step:05}"
    noise = random.Random(seed)
    for name, size in {"unet": unet_bytes, "vae": unet_bytes // 4, "text_encoder": unet_bytes // 2}.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"part": name}))
        (folder / name / "model.safetensors").write_bytes(noise.randbytes(size))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (folder / "resume").mkdir()
    (folder / "resume" / "optimizer.safetensors").write_bytes(noise.randbytes(unet_bytes // 2))
    (folder / "resume" / "state.json").write_text(json.dumps({"step": step}))
    listed = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in hashes(folder).items()
    }
    (folder / RESUME_MANIFEST).write_text(json.dumps({"version": 1, "files": listed}))
    return folder


def make_run(logdir: Path, *, step: int = 20, unet_bytes: int = 200 * KILOBYTE, secret: str = "") -> RunFolder:
    """A finished run: config, events, two samples, one checkpoint. `secret` is hidden in config and events."""
    from PIL import Image

    folder = logdir / "jets-20261122-120000"
    (folder / "samples").mkdir(parents=True)
    (folder / "ckpts").mkdir()
    config = {
        "version": 1,
        "project_name": "jets",
        "resume_ckpt": "someone/base-model",
        "data_root": "/home/ada/private images",
        "resolution": 128,
        "lr": 2e-6,
        "clip_skip": 2,
        "flip_p": 0.5,
        "run_name": f"with {secret}",
    }
    (folder / "config.json").write_text(json.dumps(config))
    events: list[dict[str, object]] = [{"kind": "dataset", "pictures": 12, "problems": 0, "steps": step}]
    events += [{"kind": "loss", "step": n, "loss": 1 / n, "lr": {"unet": 2e-6}, "epoch": 0} for n in range(1, step + 1)]
    events.append({"kind": "warning", "message": f"a plugin said {secret}"})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for number, prompt in enumerate(("a red jet", "a <b>blue</b> jet: *fast* | loud")):
        image = folder / "samples" / f"gs{step:05}-{number:03}-a jet.jpg"
        Image.new("RGB", (64, 64), (200, 40 * number, 60)).save(image)
        image.with_suffix(".txt").write_text(f"{prompt}\nnegative prompt: blurry\nseed: 1\n")
    run = RunFolder(folder)
    write_checkpoint(run, step, seed=step, unet_bytes=unet_bytes)
    return run
