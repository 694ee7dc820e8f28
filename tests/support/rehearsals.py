"""Short runs for tests of single parameters: build a run, take a few steps, keep what was seen, write no checkpoint."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from everydream_kit.config import TrainConfig
from everydream_kit.runs import RunFolder


def plain_settings(folder: Path, model: Path, images: Path) -> dict[str, Any]:
    """The settings that a test changes one of: nothing is drawn but noise, timesteps and the order."""
    return {
        "resume_ckpt": str(model),
        "data_root": str(images),
        "resolution": 64,
        "batch_size": 4,
        "lr": 1e-4,
        "optimizer": "adamw",
        "cond_dropout": 0.0,
        "crop_jitter": 0.0,
        "num_workers": 0,
        "cache_variants": 1,
        "max_steps": 2,
        "log_step": 1,
        "seed": 7,
        "sample_steps": None,
        "no_save_ckpt": True,
        "logdir": str(folder / "logs"),
    }


def square_images(folder: Path, count: int = 4, mode: str = "RGB") -> Path:
    """A folder of square noise images, each with tags: one bucket, so that batches are full."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 255, (80, 80, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels, mode).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}, one, two, three, four, five", "utf-8")
    return folder


@dataclass
class Rehearsal:
    """A run that has taken some steps, and what went by."""

    run: Any
    folder: RunFolder
    losses: list[float] = field(default_factory=list)
    reports: list[Any] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)

    @property
    def warnings(self) -> str:
        return "\n".join(event["message"] for event in self.folder.events("warning"))


@contextmanager
def prepared(**settings: Any):
    """A run that stands at its beginning."""
    from everydream_kit.config import config_warnings
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.ranks import Ranks
    from everydream_kit.training.run_builder import build_run

    config = TrainConfig(**settings)
    folder = RunFolder.create(config.logdir, config.project_name)
    journal = Journal(folder)
    try:
        for warning in config_warnings(config):
            journal.warn(warning)
        yield Rehearsal(build_run(config, folder, journal, Ranks.find(config.gpuid)), folder)
    finally:
        journal.close()


def rehearse(**settings: Any) -> Rehearsal:
    """Take a run's steps with the real loop."""
    from everydream_kit.training.control import StopSignal
    from everydream_kit.training.loop import train_loop

    with prepared(**settings) as rehearsal:
        run = rehearsal.run
        predict = run.learner.predict

        def noted(batch: Any, noisy_latents: Any, timesteps: Any, conditioning: Any) -> Any:
            rehearsal.timesteps += timesteps.tolist()
            return predict(batch, noisy_latents, timesteps, conditioning)

        run.learner.predict = noted
        train_loop(run, [lambda run, report: rehearsal.reports.append(report)], StopSignal())
        rehearsal.losses = [report.losses.mean for report in rehearsal.reports]
    return rehearsal


class NotingPlugin:
    """A plug-in that writes down which hooks are called, and changes captions."""

    calls: ClassVar[list[str]] = []

    def __init__(self) -> None:
        NotingPlugin.calls.clear()

    def on_training_start(self, run: Any) -> None:
        self.calls.append("training start")

    def on_epoch_start(self, run: Any, epoch: int) -> None:
        self.calls.append(f"epoch {epoch} start")

    def on_step_start(self, run: Any, step: int) -> None:
        self.calls.append(f"step {step} start")

    def on_step_end(self, run: Any, report: Any) -> None:
        self.calls.append(f"step {report.step} end")

    def on_epoch_end(self, run: Any, epoch: int) -> None:
        self.calls.append(f"epoch {epoch} end")

    def on_training_end(self, run: Any) -> None:
        self.calls.append("training end")

    def transform_caption(self, caption: str) -> str:
        return caption.upper()
