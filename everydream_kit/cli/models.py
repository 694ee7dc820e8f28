"""Commands that read models: sample, export."""

from __future__ import annotations

import argparse
from pathlib import Path

from everydream_kit.cli.command import Command


def _add_sample_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="diffusers folder, single file, Hub id, run folder, or `embedded`")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--cfg", type=float, nargs="+", default=[7.0], help="guidance scales, side by side")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=555)
    parser.add_argument("--num_images", type=int, default=1, help="pictures of each prompt, with seeds counting up")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--clip_skip", type=int, default=0)
    parser.add_argument("--lora", help="LoRA weights to draw with")
    parser.add_argument("--out", default="samples", help="folder for the pictures (default samples)")


def _run_sample(options: argparse.Namespace) -> None:
    from everydream_kit.drawing import sample

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
        out=options.out,
    )
    for path in paths:
        print(path)


def _add_export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder, or a run folder for its last one")
    parser.add_argument("out", help="file to write: .safetensors or .ckpt")
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"], default="fp16")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")


def _run_export(options: argparse.Namespace) -> None:
    from everydream_kit.export.single_file import export_checkpoint
    from everydream_kit.workspace import RunFolder

    source = Path(options.checkpoint)
    if (source / "ckpts").is_dir():
        source = RunFolder(source).last_checkpoint
    print(export_checkpoint(source, options.out, precision=options.precision, ema=options.ema))


COMMANDS = {
    "sample": Command("draw pictures with a checkpoint", _add_sample_flags, _run_sample),
    "export": Command("write a checkpoint as one file that every image app loads", _add_export_flags, _run_export),
}
