"""A comparison: the same prompts, seeds and guidance scales generated with several checkpoints, each image kept on
disk.

An image's file name is a hash of everything that it depends on, so asking again generates only what is new, and a
comparison that was cut off continues where it was. No widgets here; a process of its own generates (`background`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from everydream_kit.atomic import write_atomic
from everydream_kit.errors import ConfigError
from everydream_kit.strict_json import read_json

MAX_IMAGES = 400
SAVED_FILE = "comparison.json"
"""The comparison that a panel shows."""


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        folder: where the images go.
        checkpoints: diffusers folders, or what `resume_ckpt` takes, in the order of the columns.
        prompts: one row (for each guidance scale) each.
        cfgs: guidance scales.
        seed: of the starting noise, the same everywhere.
        size: width and height in pixels.
        num_inference_steps: denoising steps.
        clip_skip: as in training.
    """

    folder: str
    checkpoints: tuple[str, ...]
    prompts: tuple[str, ...]
    cfgs: tuple[float, ...] = (7.0,)
    seed: int = 555
    size: int = 512
    num_inference_steps: int = 20
    clip_skip: int = 0

    def __post_init__(self) -> None:
        if not self.checkpoints or not self.prompts or not self.cfgs:
            raise ConfigError("A comparison needs at least one checkpoint, one prompt and one guidance scale.")
        if self.size % 8 or self.size < 64:
            raise ConfigError(f"The size must be a multiple of 8, at least 64 (got {self.size}).")
        if self.num_images > MAX_IMAGES:
            raise ConfigError(f"{self.num_images} images are more than {MAX_IMAGES}; remove some.")

    @property
    def num_images(self) -> int:
        return len(self.checkpoints) * len(self.prompts) * len(self.cfgs)

    def image_path(self, checkpoint: str, prompt: str, cfg: float) -> Path:
        """Where an image is, or will be."""
        facts = (*_identity(checkpoint), prompt, cfg, self.seed, self.size, self.num_inference_steps, self.clip_skip)
        digest = hashlib.blake2b(repr(facts).encode(), digest_size=10).hexdigest()
        return Path(self.folder) / "pictures" / f"{digest}.png"

    def missing(self, checkpoint: str) -> list[tuple[str, float]]:
        """Prompt and scale of the images that this checkpoint has still to generate."""
        return [
            (prompt, cfg)
            for prompt in self.prompts
            for cfg in self.cfgs
            if not self.image_path(checkpoint, prompt, cfg).is_file()
        ]

    def count_missing(self) -> int:
        return sum(len(self.missing(checkpoint)) for checkpoint in self.checkpoints)

    def save(self, name: str = SAVED_FILE) -> Path:
        """Write the comparison into the folder of its images."""
        path = Path(self.folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(asdict(self), indent=1))
        return path

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """A saved comparison. Raises: ConfigError, if the file is damaged."""
        values = read_json(path, error=ConfigError)
        try:
            given: dict[str, Any] = {
                n: tuple(value) if isinstance(value, list) else value for n, value in values.items()
            }
            return cls(**given)
        except TypeError as error:
            raise ConfigError(
                f"{path}: not a saved comparison ({error}). Delete the file to begin a new one."
            ) from error


def generate_missing(comparison: Comparison, progress: Callable[[int, int], object]) -> int:
    """Generate what is missing, checkpoint by checkpoint; `progress` is called with (images done, images in all).

    Raises:
        ModelError: a checkpoint cannot be loaded.
    """
    from everydream_kit.generation import open_for_sampling
    from everydream_kit.models.sampling import SamplePrompt, sample_images, save_image

    total = comparison.count_missing()
    done = 0
    progress(done, total)
    for checkpoint in comparison.checkpoints:
        wanted = comparison.missing(checkpoint)
        if not wanted:
            continue
        model = open_for_sampling(checkpoint)
        for prompt, cfg in wanted:  # one at a time: each appears as soon as it is generated
            size = comparison.size
            request = SamplePrompt(prompt=prompt, seed=comparison.seed, width=size, height=size, cfgs=(cfg,))
            (image,) = sample_images(
                model, [request], num_inference_steps=comparison.num_inference_steps, clip_skip=comparison.clip_skip
            )
            path = comparison.image_path(checkpoint, prompt, cfg)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(image, path)
            done += 1
            progress(done, total)
    return done


def _identity(checkpoint: str) -> tuple[str, int]:
    """A checkpoint's name and when it was written, so that another model under the same name is generated again."""
    index = Path(checkpoint) / "model_index.json"
    return checkpoint, index.stat().st_mtime_ns if index.is_file() else 0
