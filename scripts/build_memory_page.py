"""Write docs/memory.md, the README's table and those of the families' pages: estimates for full-size models by size of GPU, and
what others published.

    python scripts/build_memory_page.py            writes all
    python scripts/build_memory_page.py --check    reports whether they are what the script would write
    python scripts/build_memory_page.py --family z_image    writes that family's page alone

No weights and no GPU are needed. Estimates are kept in `.edk_cache`, so a second run is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "memory.md"
README = REPOSITORY / "README.md"
CACHE = REPOSITORY / ".edk_cache" / "preflight"
GIB, GB = 2**30, 1e9
GPUS = {8: "RTX 3070", 12: "RTX 3060 12GB", 16: "T4", 24: "L4", 48: "A40", 80: "A100 80GB"}
"""The GPU that stands for each size: the one with the least memory of those in `gpus.json`."""
SHARE_OF_16 = 0.97
"""Of a 16 GB GPU with bfloat16, usable: as of the 12 GB and 24 GB ones. The T4, which stands for the size elsewhere, has
none."""
UNET_ONLY = "UNet only, bf16 weights, fused backward"
README_ROWS = ("full", "LoRA", "textual inversion", UNET_ONLY)
FAMILY_PAGES = {
    "z_image": "z-image.md",
    "flux2_klein": "flux2-klein.md",
    "flux1": "flux1.md",
    "anima": "anima.md",
    "krea2": "krea2.md",
    "qwen_image": "qwen-image.md",
}
"""Families that have a page of their own."""
SIZES = {"flux2_klein": "9B"}
"""Families with a second size, whose rows follow in their table."""
MARKS = ("<!-- memory table: scripts/build_memory_page.py writes it -->", "<!-- /memory table -->")
FAMILY_MARKS = ("<!-- family table: scripts/build_memory_page.py writes it -->", "<!-- /family table -->")
README_METHODS = ("LoRA", "LoRA, base in int8 or fp8", "full, bf16 weights, fused backward")
"""Of the families' pages, in the README."""
LEAN: dict[str, Any] = {
    "optimizer": "adamw8bit",
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


COMMON: dict[str, Any] = {"optimizer": "adamw8bit", "gradient_checkpointing": True}
LORA: dict[str, Any] = {**COMMON, "training_kind": "lora"}
WORDS: dict[str, Any] = {**COMMON, "training_kind": "textual_inversion", "new_tokens": {"<new>": "cat"}}
ROWS = (
    *(
        row
        for model, family, resolution in (("SD 1.5", "sd1", 512), ("SD 2.1", "sd2", 768), ("SDXL", "sdxl", 1024))
        for row in (
            Row(model, family, resolution, "full", COMMON),
            Row(model, family, resolution, "LoRA", LORA),
            Row(model, family, resolution, "textual inversion", WORDS),
        )
    ),
    Row("SDXL", "sdxl", 1024, UNET_ONLY, {**LEAN, "weight_dtype": "bfloat16", "fused_backward": True}),
    Row("SD 1.5", "sd1", 512, "full, AdamW", {**COMMON, "optimizer": "adamw"}),
    Row("SD 1.5", "sd1", 512, "full, batch 4", {**COMMON, "batch_size": 4}),
    Row(
        "SD 1.5",
        "sd1",
        512,
        "full, batch 4, without checkpointing",
        {**COMMON, "batch_size": 4, "gradient_checkpointing": False},
    ),
    Row("SD 1.5", "sd1", 512, "LoRA, batch 4", {**LORA, "batch_size": 4}),
    Row("SDXL", "sdxl", 1024, "LoRA, batch 4", {**LORA, "batch_size": 4}),
)
FULL: dict[str, Any] = {**COMMON, "weight_dtype": "bfloat16"}
FLOW_METHODS = (
    ("LoRA", 1024, LORA),
    ("LoRA", 512, LORA),
    ("LoRA, batch 4", 1024, {**LORA, "batch_size": 4}),
    ("LoRA, base in int8 or fp8", 1024, {**LORA, "quantization": "int8"}),
    ("LoRA, base in int8 or fp8, batch 4", 1024, {**LORA, "quantization": "int8", "batch_size": 4}),
    ("LoRA, base in nf4", 1024, {**LORA, "quantization": "nf4"}),
    ("full, bf16 weights, fused backward", 1024, {**FULL, "fused_backward": True}),
    ("full, bf16 weights", 1024, FULL),
    ("full, float32 weights", 1024, COMMON),
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
    """Write the page and the README's table, or say whether they stand as they would be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--family", choices=FAMILY_PAGES, help="this family's page alone")
    arguments = parser.parse_args()
    written = {}
    docs = REPOSITORY / "docs"
    for family in [arguments.family] if arguments.family else FAMILY_PAGES:
        file = docs / FAMILY_PAGES[family]
        written[file] = between_marks(file.read_text(encoding="utf-8"), family_table(family))
    readme = README.read_text(encoding="utf-8")
    if not arguments.family:
        page = write_page()
        written[PAGE] = page
        readme = with_table(readme, page)
    pages = {
        name: written.get(docs / name) or (docs / name).read_text(encoding="utf-8") for name in FAMILY_PAGES.values()
    }
    written[README] = between_marks(readme, family_lines(pages), FAMILY_MARKS)
    for file, text in written.items():
        if not arguments.check:
            file.write_text(text, encoding="utf-8")
        elif file.read_text(encoding="utf-8") != text:
            sys.exit(f"{file.name} is not what scripts/build_memory_page.py writes; run it.")


def write_page() -> str:
    """The whole page."""
    text = (Path(__file__).parent / "memory_page.md").read_text(encoding="utf-8")
    parts = {"gpus": gpus_table(), "t4": t4_sentence(), "published": published_table()}
    for name, part in parts.items():
        text = text.replace(f"{{{{{name}}}}}", part)
    return text


def with_table(readme: str, page: str) -> str:
    """The README with its table as the page has it: without the figures, for the settings most people choose."""
    table = next(block for block in page.split("\n\n") if block.startswith("| model | method |"))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    chosen = [cells for cells in lines if cells[1] in {"method", "---", *README_ROWS}]
    shown = ["| " + " | ".join([*cells[:3], *cells[6:]]) + " |" for cells in chosen]
    return between_marks(readme, "\n".join(shown))


def family_lines(pages: Mapping[str, str]) -> str:
    """The README's table of the families that have a page, from the pages' tables.

    Args:
        pages: texts by file name.
    """
    lines = ["| model, 1024 px | " + " | ".join(README_METHODS) + " |", "|---|" + "---|" * len(README_METHODS)]
    for name, text in pages.items():
        title = text.partition("\n")[0].lstrip("# ")
        table = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if " px | " in line
        ]
        figures = {cells[0]: cells[1] for cells in table}
        sizes = [key.removesuffix("LoRA, 1024 px") for key in figures if key.endswith("LoRA, 1024 px")]
        for size in sizes:
            cells = [figures.get(f"{size}{method}, 1024 px", "") for method in README_METHODS]
            named = f"[{title}](docs/{name}) {size.removesuffix(', ')}".rstrip()
            lines.append(f"| {named} | {' | '.join(cells)} |")
    return "\n".join(lines)


def between_marks(text: str, table: str, marks: tuple[str, str] = MARKS) -> str:
    """A text with another table in the place of the one it has."""
    before, rest = text.split(marks[0])
    return "\n".join([before + marks[0], table, marks[1] + rest.split(marks[1])[1]])


def family_table(family: str) -> str:
    """Ways to train a family of flow matching against sizes of GPUs that have bfloat16."""
    from everydream_kit.preflight.gpus import find_gpu

    gpus = {size: find_gpu(name) for size, name in GPUS.items() if size >= 12}
    gpus[16] = replace(gpus[12], name="16 GB", memory_bytes=int(SHARE_OF_16 * 16 * GIB))
    heads = " | ".join(f"{size} GB" for size in gpus)
    lines = [
        f"| method | memory (GiB) | texts | latents | step | samples | {heads} |",
        "|---|---|---|---|---|---|" + "---|" * len(gpus),
    ]
    methods = [("", *method) for method in FLOW_METHODS]
    methods += [(SIZES[family], *method) for method in FLOW_METHODS if family in SIZES]
    for size, words, resolution, settings in methods:
        row = Row(size, family, resolution, words, settings)
        plain = estimate(family, resolution, settings, size=size)
        sizes = {phase.name: phase.peak_bytes / GIB for phase in plain.phases}
        figures = [sizes[name] for name in ("text caching", "latent caching", "training step", "sampling")]
        shown = " | ".join(f"{figure:.1f}" for figure in [needs(plain, gpus[12]) / GIB, *figures])
        cells = " | ".join(verdict(row, gpu_spec) for gpu_spec in gpus.values())
        lines.append(f"| {f'{size}, ' if size else ''}{words}, {resolution} px | {shown} | {cells} |")
    return "\n".join(lines)


def estimate(family: str, resolution: int, settings: dict[str, Any], *, has_bf16: bool = True, size: str = "") -> Any:
    """An estimate without allowance. What is asked is printed: full-size models take up to a minute each.

    Args:
        size: a second size of the family, in place of the one whose configs ship with the kit.
    """
    from everydream_kit.config import TrainConfig
    from everydream_kit.models.families.flux2_klein import NINE
    from everydream_kit.preflight.memory_estimate import estimate_memory
    from everydream_kit.preflight.skeleton import shipped_architecture

    config = TrainConfig(resume_ckpt="shipped", resolution=resolution, **{"batch_size": 1, **settings})
    print(family, size, resolution, settings, "bfloat16" if has_bf16 else "float16", flush=True, file=sys.stderr)
    return estimate_memory(
        config,
        context_bytes=0,
        fragmentation=0,
        has_bf16=has_bf16,
        architecture=shipped_architecture(family, **(NINE if size == "9B" else {})),
        cache_folder=CACHE,
    )


def gpus_table() -> str:
    """Settings against sizes of GPUs."""
    from everydream_kit.preflight.gpus import find_gpu

    gpus = {size: find_gpu(name) for size, name in GPUS.items()}
    heads = [f"{size} GB" for size in gpus]
    lines = [
        "| model | method | memory (GiB) | step | latents | samples | " + " | ".join(heads) + " |",
        "|---|---|---|---|---|---|" + "---|" * len(gpus),
    ]
    for row in ROWS:
        plain = estimate(row.family, row.resolution, row.settings)
        sizes = {phase.name: phase.peak_bytes / GIB for phase in plain.phases}
        figures = [sizes[name] for name in ("training step", "latent caching", "sampling")]
        shown = " | ".join(f"{figure:.1f}" for figure in [needs(plain, find_gpu("RTX 3060 12GB")) / GIB, *figures])
        cells = [verdict(row, gpu_spec) for gpu_spec in gpus.values()]
        lines.append(f"| {row.model}, {row.resolution} px | {row.words} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def t4_sentence() -> str:
    """What most people train on the free Colab, phase by phase."""
    from everydream_kit.preflight.gpus import find_gpu

    gpu_spec = find_gpu("T4")
    sizes = []
    for settings in (LORA, {**LORA, "sample_batch_size": 4}):
        found = estimate("sdxl", 1024, settings, has_bf16=gpu_spec.has_bf16)
        phases = ("training step", "latent caching", "sampling")
        sizes.append([needs(found, gpu_spec, name) / GIB for name in phases])
    (step, latents, samples), (_, _, four) = sizes
    return (
        f"On a T4, an SDXL LoRA at batch 1 needs {step:.1f} GiB for its step, {latents:.1f} for encoding and\n"
        f"{samples:.1f} for the default samples, one at a time; four together would need {four:.1f}."
    )


def needs(found: Any, gpu_spec: Any, phase: str | None = None) -> int:
    """Bytes of the worst phase, or of the one named, with the GPU's allowance."""
    from everydream_kit.preflight.memory_estimate import allowance

    worst = found.worst.peak_bytes
    added = allowance(found, "cuda", gpu_spec.context_bytes, gpu_spec.fragmentation)
    peaks = {one.name: one.peak_bytes for one in found.phases}
    return added + (worst if phase is None else peaks[phase])


def verdict(row: Row, gpu_spec: Any) -> str:
    """Whether a run fits: as it is, with idle models in host memory, or its training alone."""
    size = row.model if row.model in SIZES.values() else ""
    as_it_is = estimate(row.family, row.resolution, row.settings, has_bf16=gpu_spec.has_bf16, size=size)
    if needs(as_it_is, gpu_spec) <= gpu_spec.memory_bytes:
        return "yes"
    settings = {**row.settings, "offload_idle_models": True}
    offloaded = estimate(row.family, row.resolution, settings, has_bf16=gpu_spec.has_bf16, size=size)
    if needs(offloaded, gpu_spec) <= gpu_spec.memory_bytes:
        return "offload"
    least = min(needs(found, gpu_spec, "training step") for found in (as_it_is, offloaded))
    return "step only" if least <= gpu_spec.memory_bytes else "no"


def published_table() -> str:
    """Others' figures compared with ours."""
    from everydream_kit.preflight.memory_estimate import allowance

    lines = ["| what | published | tensors | with allowance | source |", "|---|---|---|---|---|"]
    for one in PUBLISHED:
        resolution = {"sd1": 512, "sd2": 768, "sdxl": 1024}[one.family]
        found = estimate(one.family, resolution, {**one.settings, "sample_steps": None})
        step = next(phase for phase in found.phases if phase.name == "training step").peak_bytes
        whole = step + allowance(found, "cuda", 450_000_000, 0.05)
        lines.append(f"| {one.what} | {one.figure} | {step / GB:.2f} GB | {whole / GB:.2f} GB | {one.source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
