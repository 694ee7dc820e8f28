"""The feature network behind the demo's score: trained on all emoji in three styles, without the demo's images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from everydream_kit.demo import images_path
from everydream_kit.demo.score import FEATURES_FILE, SIDE_PIXELS, STYLES, FeatureNet, to_pixels

BATCH, STEPS, SHARPNESS = 64, 700, 16.0


def disturb(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move, scale, blur, tint and add noise, as samples of a small model do."""
    size = len(pixels)
    scale = 0.85 + 0.4 * torch.rand(size, generator=generator)
    shift = 0.2 * (torch.rand(size, 2, generator=generator) - 0.5)
    matrix = torch.zeros(size, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = scale
    matrix[:, :, 2] = shift
    grid = functional.affine_grid(matrix, list(pixels.shape), align_corners=False)
    # outside lies white paper: 1 is subtracted and added, since padding can only be zeros
    pixels = functional.grid_sample(pixels - 1, grid, align_corners=False) + 1
    blurred = functional.avg_pool2d(pixels, 3, stride=1, padding=1, count_include_pad=False)
    mix = torch.rand(size, 1, 1, 1, generator=generator)
    pixels = mix * blurred + (1 - mix) * pixels
    tint = 1 + 0.15 * torch.randn(size, 3, 1, 1, generator=generator)
    strength = 0.15 * torch.rand(size, 1, 1, 1, generator=generator)
    return (pixels - 1) * tint + 1 + strength * torch.randn(pixels.shape, generator=generator)


def train(data: Path, steps: int = STEPS) -> None:
    """Train, measure on fresh disturbances, and write the network with its references."""
    archive = np.load(data / "vae.npz")
    labels = {entry["code"]: entry["label"] for entry in json.loads((data / "subjects.json").read_text("utf-8"))}
    keys = [str(name).split() for name in archive["names"]]
    codes = sorted(labels)
    images = torch.from_numpy(archive["pictures"]).permute(0, 3, 1, 2)
    small = functional.interpolate(images.float(), (SIDE_PIXELS, SIDE_PIXELS), mode="area").round().byte()
    # The other emoji teach styles only: -100 is what cross_entropy skips.
    subjects = torch.tensor([codes.index(code) if code in labels else -100 for code, _ in keys])
    styles = torch.tensor([STYLES.index(style) for _, style in keys])
    known = (subjects >= 0).nonzero()[:, 0]

    torch.manual_seed(4)
    net = FeatureNet()
    style_heads = torch.nn.Parameter(torch.randn(len(STYLES) - 1, net.style.out_features))
    subject_heads = torch.nn.Parameter(torch.randn(len(codes), net.subject.out_features))
    optimizer = torch.optim.AdamW([*net.parameters(), style_heads, subject_heads], lr=3e-3, fused=True)
    generator = torch.Generator().manual_seed(5)

    def losses(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        style, subject = net(disturb(small[indices].float() / 127.5 - 1, generator))
        style_logits = SHARPNESS / 2 * style @ functional.normalize(style_heads, dim=1).T
        subject_logits = SHARPNESS * subject @ functional.normalize(subject_heads, dim=1).T
        hits = (subject_logits.argmax(dim=1) == subjects[indices])[subjects[indices] >= 0].float().mean()
        return (
            functional.cross_entropy(style_logits, styles[indices]),
            functional.cross_entropy(subject_logits, subjects[indices]),
            hits,
        )

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * (1 - step / steps)
        named = known[torch.randint(len(known), (BATCH * 3 // 4,), generator=generator)]
        indices = torch.cat([named, torch.randint(len(small), (BATCH // 4,), generator=generator)])
        style_loss, subject_loss, hits = losses(indices)
        (style_loss + subject_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: style {style_loss:.3f}, subject {subject_loss:.3f}, hits {hits:.0%}", flush=True)

    kept = [index for index, (code, _) in enumerate(keys) if code in labels]
    write(
        net.eval(),
        small[kept].float() / 127.5 - 1,
        [labels[keys[index][0]] for index in kept],
        styles[kept].tolist(),
    )


@torch.no_grad()
def write(net: FeatureNet, pixels: torch.Tensor, subjects: list[str], styles: list[int]) -> None:
    """Store the network and the vectors of its references: `pixels` and the demo's own images."""
    taught = sorted(images_path().glob("*.webp"))
    pixels = torch.cat([pixels, torch.stack([to_pixels(Image.open(path)) for path in taught])])
    subjects = subjects + [path.with_suffix(".txt").read_text("utf-8").split(",")[0] for path in taught]
    styles = styles + [STYLES.index("taught")] * len(taught)
    names = sorted(set(subjects))
    style_vectors, subject_vectors = net(pixels)
    tensors = {f"net.{key}": value.half().contiguous() for key, value in net.state_dict().items()}
    tensors["style_vectors"], tensors["subject_vectors"] = style_vectors.half(), subject_vectors.half()
    tensors["styles"] = torch.tensor(styles, dtype=torch.uint8)
    tensors["subjects"] = torch.tensor([names.index(subject) for subject in subjects], dtype=torch.int16)
    save_file(tensors, FEATURES_FILE, metadata={"subjects": "|".join(names)})
    print("references:", len(subjects), "bytes:", FEATURES_FILE.stat().st_size)
