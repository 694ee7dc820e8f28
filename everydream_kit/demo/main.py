"""The main job in small: draw with the embedded base, fine-tune it on the demo's images, draw again, show both.

Everything goes through the same functions that a real run uses. What the demo reports does not look at the training
loss alone: the loss is measured on fixed noise and timesteps before and after, and the samples are scored by a feature
    network.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from everydream_kit.config import EMBEDDED_MODEL, TrainConfig, default_of
from everydream_kit.demo import images_path
from everydream_kit.errors import JobError
from everydream_kit.runs import RunFolder

if TYPE_CHECKING:
    from PIL import Image

TAUGHT = ("red apple", "penguin", "guitar", "rocket")
UNTAUGHT = ("pear", "owl", "airplane", "lion")
SUBJECTS = (*TAUGHT, *UNTAUGHT)
"""Drawn before and after, each as "<subject>, ink drawing"; of the second four, the demo's images hold no ink
drawing."""
RESOLUTION = 128
GUIDANCE_SCALE = 3.0
NUM_INFERENCE_STEPS = 20
NUM_SHEET_STEPS = 12
"""Of the samples while a project trains on the demo's images: they score as those of 20 steps (docs/experiments.md)."""
TRAINING = {
    "resolution": RESOLUTION,
    "batch_size": 8,
    "max_epochs": 40,
    "lr": 3e-4,
    "lr_scheduler": "cosine",
    "cond_dropout": 0.1,
    "cache_variants": 1,
    "sample_steps": None,
    "log_step": 5,
}
"""What the demo trains with, found by trying: see docs/experiments.md."""


@dataclass(frozen=True)
class DemoOutcome:
    """What the demo made.

    Attributes:
        run: the run folder.
        single_file: the checkpoint as one file.
        before_after: the image of samples before and after.
        loss_before, loss_after: on the demo's images, with fixed noise and timesteps.
        style_before, style_after: the feature network's score, -1 as the base draws, +1 as the new images.
        seconds: the whole demo.
    """

    run: RunFolder
    single_file: Path
    before_after: Path
    loss_before: float
    loss_after: float
    style_before: float
    style_after: float
    seconds: float

    def describe(self) -> dict[str, str]:
        """The outcome for a person, name by name."""
        return {
            "run folder": str(self.run.folder),
            "checkpoint": str(self.run.last_checkpoint),
            "single file": str(self.single_file),
            "samples": str(self.run.samples_folder),
            "before and after": str(self.before_after),
            "loss": f"{self.loss_before:.4f} before, {self.loss_after:.4f} after (fixed noise and timesteps)",
            "style score": f"{self.style_before:+.2f} before, {self.style_after:+.2f} after (-1 the base's look, +1 the new one)",
            "time": f"{self.seconds:.0f} s",
        }


def run_demo(out: Path, *, max_epochs: int | None = None, seed: int = default_of("seed")) -> DemoOutcome:
    """Run the demo.

    Args:
        out: folder for everything that it makes; earlier demos in it stay.
        max_epochs: train for another number of epochs than the demo's own.
        seed: of the training and of the samples.

    Raises:
        JobError: it was stopped before its end.
        KitError: as `train`.
    """
    from everydream_kit.demo.score import score
    from everydream_kit.generation import open_for_sampling
    from everydream_kit.sessions import train

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    epochs = {} if max_epochs is None else {"max_epochs": max_epochs}
    prompts = out / "sample_prompts.txt"
    prompts.write_text("".join(f"{subject}, ink drawing\n" for subject in SUBJECTS), encoding="utf-8")
    config = TrainConfig(
        **{
            "resume_ckpt": EMBEDDED_MODEL,
            "data_root": str(images_path()),
            "project_name": "demo",
            "logdir": str(out / "logs"),
            "save_ckpt_dir": str(out),
            "sample_prompts": str(prompts),
            "seed": seed,
            # validation measures the training images themselves: the demo shows that something was learned
            "validation_split_mode": "manual",
            "validation_data_root": str(images_path()),
            "validation_every_n_epochs": epochs.get("max_epochs", TRAINING["max_epochs"]),
            "validation_batch_size": 8,
            **TRAINING,
            **epochs,
        }
    )
    before = generate_subjects(open_for_sampling(EMBEDDED_MODEL), seed)
    run = train(config)
    if run.status()["state"] != "finished":
        raise JobError(
            f"The demo was stopped. Start it again, or continue with its training: everydream resume {run.folder}"
        )
    after = generate_subjects(open_for_sampling(run), seed)
    path = out / "before-after.png"
    before_after_grid(before, after).save(path)
    path_in_run = run.samples_folder / "before-after.png"
    path_in_run.write_bytes(path.read_bytes())
    losses = [loss for event in run.events("validation") if (loss := event.get("loss")) is not None]
    return DemoOutcome(
        run=run,
        single_file=Path([event for event in run.events("saved") if event["files"]][-1]["files"][0]),
        before_after=path,
        loss_before=losses[0],
        loss_after=losses[-1],
        style_before=score(before, SUBJECTS).style,
        style_after=score(after, SUBJECTS).style,
        seconds=time.monotonic() - started,
    )


def generate_subjects(model: object, seed: int) -> list[Image.Image]:
    """One image of each subject, as an ink drawing."""
    from everydream_kit.models.sampling import SamplePrompt, sample_images

    prompts = [
        SamplePrompt(f"{subject}, ink drawing", seed=seed, width=RESOLUTION, height=RESOLUTION, cfgs=(GUIDANCE_SCALE,))
        for subject in SUBJECTS
    ]
    return sample_images(model, prompts, num_inference_steps=NUM_INFERENCE_STEPS, batch_size=len(prompts))  # type: ignore[arg-type]


def before_after_grid(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> Image.Image:
    """Two rows of images: the base's, and the fine-tuned model's from the same noise."""
    from everydream_kit.models.sampling import label_grid

    return label_grid(
        [list(before), list(after)],
        column_labels=list(SUBJECTS),
        row_labels=["before: the embedded base", "after: fine-tuned on 32 ink drawings"],
        title='"…, ink drawing", same seeds',
    )
