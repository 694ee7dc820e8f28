"""Write docs/memory.md: what the pre-flight estimates for full-size models, GPU by GPU, compared with what others published.

    python scripts/build_memory_page.py            writes docs/memory.md
    python scripts/build_memory_page.py --check    reports whether the page is what the script would write

No weights and no GPU are needed. Estimates are kept in `.edk_cache`, so a second run is quick.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "memory.md"
CACHE = REPOSITORY / ".edk_cache" / "preflight"
GIB, GB = 2**30, 1e9
GPUS = ("RTX 3060 12GB", "T4", "L4", "RTX 4090", "A40", "A100 80GB")
FULL_8BIT: dict[str, Any] = {"optimizer": "adamw8bit"}
LEAN: dict[str, Any] = {
    **FULL_8BIT,
    "disable_textenc_training": True,
    "offload_idle_models": True,
    "gradient_checkpointing": True,
}


@dataclass(frozen=True)
class Row:
    """One line of the first table."""

    model: str
    family: str
    resolution: int
    words: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class Published:
    """One figure of somebody else's, and our settings that come nearest to theirs."""

    what: str
    figure: str
    family: str
    settings: dict[str, Any]
    source: str


ROWS = (
    Row(
        "SD 1.5", "sd1", 512, "full, 8-bit AdamW, checkpointing, batch 1", {**FULL_8BIT, "gradient_checkpointing": True}
    ),
    Row(
        "SD 1.5",
        "sd1",
        512,
        "full, 8-bit AdamW, checkpointing, batch 4",
        {**FULL_8BIT, "gradient_checkpointing": True, "batch_size": 4},
    ),
    Row("SD 1.5", "sd1", 512, "full, 8-bit AdamW, batch 4", {**FULL_8BIT, "batch_size": 4}),
    Row(
        "SD 1.5",
        "sd1",
        512,
        "full, AdamW, checkpointing, batch 1",
        {"optimizer": "adamw", "gradient_checkpointing": True},
    ),
    Row(
        "SD 1.5",
        "sd1",
        512,
        "LoRA 16, checkpointing, batch 4",
        {**FULL_8BIT, "training_kind": "lora", "gradient_checkpointing": True, "batch_size": 4},
    ),
    Row(
        "SD 2.1", "sd2", 768, "full, 8-bit AdamW, checkpointing, batch 1", {**FULL_8BIT, "gradient_checkpointing": True}
    ),
    Row(
        "SD 2.1",
        "sd2",
        768,
        "LoRA 16, checkpointing, batch 4",
        {**FULL_8BIT, "training_kind": "lora", "gradient_checkpointing": True, "batch_size": 4},
    ),
    Row(
        "SDXL", "sdxl", 1024, "full, 8-bit AdamW, checkpointing, batch 1", {**FULL_8BIT, "gradient_checkpointing": True}
    ),
    Row(
        "SDXL",
        "sdxl",
        1024,
        "UNet only, bf16 weights, 8-bit AdamW, fused backward, idle models in host memory, checkpointing, batch 1",
        {**LEAN, "weight_dtype": "bfloat16", "fused_backward": True},
    ),
    Row(
        "SDXL",
        "sdxl",
        1024,
        "LoRA 16, checkpointing, batch 1",
        {**FULL_8BIT, "training_kind": "lora", "gradient_checkpointing": True},
    ),
    Row(
        "SDXL",
        "sdxl",
        1024,
        "LoRA 16, bf16 weights, idle models in host memory, checkpointing, batch 1",
        {**LEAN, "training_kind": "lora", "weight_dtype": "bfloat16"},
    ),
)
GITHUB = "https://github.com"
SHIVAM = f"[ShivamShrirao/diffusers, examples/dreambooth]({GITHUB}/ShivamShrirao/diffusers/blob/main/examples/dreambooth), T4"
KOHYA = (
    f"sd-scripts [#1879]({GITHUB}/kohya-ss/sd-scripts/pull/1879) and [#1259]({GITHUB}/kohya-ss/sd-scripts/pull/1259)"
)
PUBLISHED = (
    Published("SD 1.x UNet, fp16, checkpointing, 8-bit, batch 1", "9.92 GB", "sd1", {**LEAN}, SHIVAM),
    Published("the same, batch 2", "10.4 GB", "sd1", {**LEAN, "batch_size": 2}, SHIVAM),
    Published("without checkpointing, batch 1", "11.17 GB", "sd1", {**LEAN, "gradient_checkpointing": False}, SHIVAM),
    Published(
        "without checkpointing, batch 2",
        "13.67 GB",
        "sd1",
        {**LEAN, "gradient_checkpointing": False, "batch_size": 2},
        SHIVAM,
    ),
    Published("AdamW, checkpointing, batch 1", "15.79 GB", "sd1", {**LEAN, "optimizer": "adamw"}, SHIVAM),
    Published(
        "SDXL UNet, float32, Adafactor, fused backward, checkpointing, batch 1",
        "16.4 to 17 GB",
        "sdxl",
        {**LEAN, "optimizer": "adafactor", "fused_backward": True, "amp": False},
        KOHYA,
    ),
)


def main() -> None:
    """Write the page, or say whether it stands as it would be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--kept", action="store_true", help="only lines whose estimate is kept from an earlier run")
    arguments = parser.parse_args()
    page = write_page(kept_only=arguments.kept)
    if not arguments.check:
        PAGE.write_text(page, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page:
        sys.exit("docs/memory.md is not what scripts/build_memory_page.py writes; run it.")


def write_page(*, kept_only: bool = False) -> str:
    """The whole page."""
    text = (Path(__file__).parent / "memory_page.md").read_text(encoding="utf-8")
    return text.replace("{{gpus}}", gpus_table(kept_only)).replace("{{published}}", published_table(kept_only))


def estimate(family: str, resolution: int, settings: dict[str, Any], kept_only: bool = False) -> Any:
    """An estimate without allowance, told on the way: full size takes its time. None where it would have to be made."""
    from everydream_kit.config import TrainConfig
    from everydream_kit.preflight.memory_estimate import estimate_memory, is_kept
    from everydream_kit.preflight.skeleton import shipped_architecture

    config = TrainConfig(resume_ckpt="shipped", resolution=resolution, **{"batch_size": 1, **settings})
    how = {"architecture": shipped_architecture(family), "cache_folder": CACHE}
    if kept_only and not is_kept(config, **how):
        return None
    print(family, resolution, settings, flush=True, file=sys.stderr)
    return estimate_memory(config, context_bytes=0, fragmentation=0, **how)


def gpus_table(kept_only: bool) -> str:
    """Settings against GPUs."""
    from everydream_kit.preflight.gpus import find_gpu
    from everydream_kit.preflight.memory_estimate import allowance

    gpus = [find_gpu(name) for name in GPUS]
    heads = [f"{gpu_spec.name} ({gpu_spec.memory_bytes / GIB:.1f})" for gpu_spec in gpus]
    lines = [
        "| model | settings | step | latents | samples | " + " | ".join(heads) + " |",
        "|---|---|---|---|---|" + "---|" * len(gpus),
    ]
    for row in ROWS:
        found = estimate(row.family, row.resolution, row.settings, kept_only)
        if found is None:
            continue
        sizes = {phase.name: phase.peak_bytes / GIB for phase in found.phases}
        cells = []
        for gpu_spec in gpus:
            need = found.worst.peak_bytes + allowance(found, "cuda", gpu_spec.context_bytes, gpu_spec.fragmentation)
            step = need - found.worst.peak_bytes + sizes["training step"] * GIB
            cells.append(
                "yes" if need <= gpu_spec.memory_bytes else "step only" if step <= gpu_spec.memory_bytes else "no"
            )
        figures = [sizes[name] for name in ("training step", "latent caching", "sampling")]
        shown = " | ".join(f"{figure:.1f}" for figure in figures)
        lines.append(f"| {row.model}, {row.resolution} px | {row.words} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def published_table(kept_only: bool) -> str:
    """Others' figures compared with ours."""
    from everydream_kit.preflight.memory_estimate import allowance

    lines = ["| what | published | tensors | with allowance | source |", "|---|---|---|---|---|"]
    for one in PUBLISHED:
        resolution = {"sd1": 512, "sd2": 768, "sdxl": 1024}[one.family]
        found = estimate(one.family, resolution, {**one.settings, "sample_steps": None}, kept_only)
        if found is None:
            continue
        step = next(phase for phase in found.phases if phase.name == "training step").peak_bytes
        whole = step + allowance(found, "cuda", 450_000_000, 0.05)
        lines.append(f"| {one.what} | {one.figure} | {step / GB:.2f} GB | {whole / GB:.2f} GB | {one.source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
