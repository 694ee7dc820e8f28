"""Commands that make images and files out of models: sample, export, merge, extract."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from everydream_kit.cli.command import BASE_HELP, VAE_HELP, Command
from everydream_kit.errors import ConfigError


def _add_sample_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="+",
        help="diffusers folder, single file, Hub id, run folder, or `embedded`; several are side by side on the grid",
    )
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--cfg", type=float, nargs="+", default=[7.0], help="guidance scales, side by side")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=555)
    parser.add_argument("--num_images", type=int, default=1, help="images of each prompt, with seeds counting up")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--clip_skip", type=int, default=0)
    parser.add_argument("--lora", help="LoRA file or checkpoint to generate with")
    parser.add_argument("--vae", help=VAE_HELP)
    parser.add_argument("--base", help=BASE_HELP)
    parser.add_argument("--out", default="samples", help="folder for the images (default samples)")


def _run_sample(options: argparse.Namespace) -> None:
    from everydream_kit.generation import sample
    from everydream_kit.share_bar import ShareBar

    with ShareBar("sampling") as bar:
        paths = sample(
            options.checkpoint,
            options.prompt,
            negative_prompt=options.negative_prompt,
            cfgs=options.cfg,
            scheduler=options.scheduler,
            num_inference_steps=options.num_inference_steps,
            seed=options.seed,
            num_images=options.num_images,
            width=options.width,
            height=options.height,
            clip_skip=options.clip_skip,
            lora=options.lora,
            vae=options.vae,
            adapter_base=options.base,
            out=options.out,
            progress=bar.show,
        )
    for path in paths:
        print(path)


PRECISIONS = ("fp16", "bf16", "fp32")


def _add_export_flags(parser: argparse.ArgumentParser) -> None:
    from everydream_kit.export.checkpoint_formats import FORMATS, SINGLE_FILE

    parser.add_argument("checkpoint", help="checkpoint, run folder (its last one goes), single file, or Hub id")
    parser.add_argument("out", help="what to write")
    formats = "; ".join(f"{name}: {form.help}" for name, form in FORMATS.items())
    parser.add_argument(
        "--format", choices=list(FORMATS), default=SINGLE_FILE.name, help=f"{formats} (default {SINGLE_FILE.name})"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="of the weights (default fp16)")
    parser.add_argument("--strength", type=float, help="of a LoRA that is merged: 1 is as it was trained (default 1)")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--token", help="which learned token, where there are several (with --format embedding)")
    parser.add_argument("--vae", help=VAE_HELP)
    parser.add_argument("--base", help=BASE_HELP)


def _run_export(options: argparse.Namespace) -> None:
    from everydream_kit.export.checkpoint_formats import write_as
    from everydream_kit.generation import resolve_checkpoint

    how = {name: getattr(options, name) for name in ("precision", "strength", "ema", "token", "vae", "base")}
    print(write_as(resolve_checkpoint(options.checkpoint), options.out, options.format, **how))


def _add_merge_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint, run folder, single file, or Hub id")
    parser.add_argument("other", help="a LoRA (file or checkpoint) to merge into it, or a second model to mix it with")
    parser.add_argument(
        "out", help="a name in .safetensors or .ckpt for a single file, any other for a diffusers folder"
    )
    parser.add_argument("--strength", type=float, help="of the LoRA: 1 is as it was trained (default 1)")
    parser.add_argument("--weight", type=float, help="of the second model: 0 is the first, 1 the second (default 0.5)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="of the result (default fp16)")
    parser.add_argument("--base", help=BASE_HELP)


def _run_merge(options: argparse.Namespace) -> None:
    from everydream_kit.export.merge import merge_checkpoints, merge_lora
    from everydream_kit.generation import resolve_checkpoint
    from everydream_kit.models.lora_formats import is_lora

    model, other = resolve_checkpoint(options.model), resolve_checkpoint(options.other)
    how: dict[str, Any] = {"precision": options.precision, "adapter_base": options.base}
    if is_lora(Path(other)):
        if options.weight is not None:
            raise ConfigError(f"--weight mixes two models, and {other} is a LoRA: it is merged with --strength.")
        strength = 1.0 if options.strength is None else options.strength
        print(merge_lora(model, other, options.out, strength=strength, **how))
        return
    if options.strength is not None:
        raise ConfigError(f"--strength is for a LoRA, and {other} is not one: two models are mixed with --weight.")
    weight = 0.5 if options.weight is None else options.weight
    print(merge_checkpoints(model, other, options.out, weight=weight, **how))


def _add_extract_flags(parser: argparse.ArgumentParser) -> None:
    from everydream_kit.export.checkpoint_formats import LAYOUTS

    parser.add_argument("tuned", help="the fine-tuned model: checkpoint, run folder, single file, or Hub id")
    parser.add_argument("base", help="the model that it was made from")
    parser.add_argument("out", help="file to write: .safetensors")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA: more keeps more and is larger (default 32)")
    parser.add_argument("--unet_only", action="store_true", help="ignore the text encoders' difference")
    parser.add_argument("--format", choices=list(LAYOUTS), default="lora", help="as for export (default lora)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="of the weights (default fp16)")
    parser.add_argument("--base", dest="adapter_base", help=BASE_HELP)


def _run_extract(options: argparse.Namespace) -> None:
    from everydream_kit.export.checkpoint_formats import LAYOUTS
    from everydream_kit.export.lora_files import extract_lora
    from everydream_kit.generation import resolve_checkpoint

    out = extract_lora(
        resolve_checkpoint(options.tuned),
        resolve_checkpoint(options.base),
        options.out,
        rank=options.rank,
        text_encoder=not options.unet_only,
        layout=LAYOUTS[options.format],
        precision=options.precision,
        adapter_base=options.adapter_base,
    )
    print(out)


COMMANDS = {
    "sample": Command("generate images with a checkpoint", _add_sample_flags, _run_sample),
    "export": Command(
        "write a checkpoint as one file that every image app loads, as a folder, or a LoRA alone",
        _add_export_flags,
        _run_export,
    ),
    "merge": Command("merge a LoRA into a model, or mix two models", _add_merge_flags, _run_merge),
    "extract": Command("write the difference of two models as a LoRA", _add_extract_flags, _run_extract),
}
