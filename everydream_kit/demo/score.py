"""A score for the demo that does not look at the training loss: do the samples look like what was taught?

A small network, trained on the emoji sets and stored next to this file, gives every image two unit vectors: one says
how it is drawn (3d, flat, ink), the other what it shows. Stored with it are the vectors of a few hundred reference
images. The network never saw the demo's own 32 drawings; they are references for what is shown, not for how.

    style     (d_other - d_ink) / (d_other + d_ink), where d is the distance to the nearest reference of the ink
              drawings or of the other two styles: -1 like a 3d image, +1 like an ink drawing. A mean over images.
    subject   the share of images whose nearest reference shows the subject requested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

SIDE_PIXELS = 64
STYLE_SIZE, SUBJECT_SIZE = 8, 48
WIDTHS = (24, 48, 64, 96)
STYLES = ("3d", "flat", "ink", "taught")  # "taught": the demo's own images
NEW_STYLE = "ink"
FEATURES_FILE = Path(__file__).resolve().parent / "features.safetensors"


@dataclass(frozen=True)
class Score:
    """What `score` found; `styles` and `nearest_subjects` are image by image."""

    style: float
    subject: float
    styles: tuple[float, ...]
    nearest_subjects: tuple[str, ...]

    def __str__(self) -> str:
        return f"style {self.style:+.2f} (-1 as the base draws, +1 as the new images), subject {self.subject:.0%}"


class FeatureNet(nn.Module):
    """Four strided convolutions on 64 px images, then one unit vector for style and one for subject."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in WIDTHS:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.body = nn.Sequential(*layers)
        self.style = nn.Linear(WIDTHS[-1] * 16, STYLE_SIZE)
        self.subject = nn.Linear(WIDTHS[-1] * 16, SUBJECT_SIZE)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors (B, STYLE_SIZE) and (B, SUBJECT_SIZE) of images (B, 3, 64, 64) in -1..1."""
        flat = self.body(pixels).flatten(1)
        return functional.normalize(self.style(flat), dim=1), functional.normalize(self.subject(flat), dim=1)


@dataclass(frozen=True)
class References:
    """The vectors of the reference images, with each one's style and subject."""

    style_vectors: torch.Tensor
    subject_vectors: torch.Tensor
    styles: torch.Tensor  # index into STYLES
    subjects: torch.Tensor  # index into subject_names
    subject_names: tuple[str, ...]


@lru_cache(maxsize=1)
def load_features() -> tuple[FeatureNet, References]:
    """The stored network and its references."""
    from safetensors import safe_open

    with safe_open(FEATURES_FILE, framework="pt") as file:
        names = tuple(file.metadata()["subjects"].split("|"))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping, it only has keys())
    net = FeatureNet()
    weights = {key.removeprefix("net."): value.float() for key, value in tensors.items() if key.startswith("net.")}
    net.load_state_dict(weights)
    net.eval().requires_grad_(False)
    return net, References(
        tensors["style_vectors"].float(),
        tensors["subject_vectors"].float(),
        tensors["styles"].long(),
        tensors["subjects"].long(),
        names,
    )


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An image of any shape as (3, 64, 64) in -1..1: its middle square, made small."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").resize(
        (SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


def score(images: Sequence[Image.Image], subjects: Sequence[str]) -> Score:
    """Score samples of the prompts "<subject>, ink drawing".

    Args:
        images: the samples.
        subjects: what each one should show, as in the base's captions ("red apple").

    Raises:
        ValueError: no images, not as many subjects as images, or a subject that has no reference.
    """
    net, references = load_features()
    if not images or len(images) != len(subjects):
        raise ValueError(f"score: {len(images)} images and {len(subjects)} subjects; give one subject an image")
    if unknown := sorted(set(subjects) - set(references.subject_names)):
        raise ValueError(f"score: no reference for {', '.join(unknown)}; take subjects of the base's captions")
    with torch.no_grad():
        style_vectors, subject_vectors = net(torch.stack([to_pixels(image) for image in images]))
    distances = torch.cdist(style_vectors, references.style_vectors)
    is_new = references.styles == STYLES.index(NEW_STYLE)
    is_other = references.styles < STYLES.index(NEW_STYLE)
    to_new, to_other = distances[:, is_new].amin(dim=1), distances[:, is_other].amin(dim=1)
    styles = ((to_other - to_new) / (to_other + to_new)).tolist()
    nearest = references.subjects[torch.cdist(subject_vectors, references.subject_vectors).argmin(dim=1)]
    names = tuple(references.subject_names[index] for index in nearest.tolist())
    hits = sum(name == subject for name, subject in zip(names, subjects, strict=True))
    return Score(sum(styles) / len(styles), hits / len(names), tuple(styles), names)
