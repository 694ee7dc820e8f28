"""A LoRA on a quantized base next to one on a base in bfloat16: how exact the weights are, and how the losses run.

The base is the kit's embedded model, whose weights were trained; images are the demo's. Every run draws the same noise and
timesteps, so that losses differ by the base alone. All arithmetic is in bfloat16.

    python benchmarks/quantized_bases.py [--steps 50] [--resolution 128] [--batch_size 4]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from everydream_kit.config import TrainConfig
from everydream_kit.demo import base_model_path, images_path
from everydream_kit.models.loading import load_model
from everydream_kit.models.lora.files import delta
from everydream_kit.models.lora.injection import lora_of
from everydream_kit.models.number_formats import Formats
from everydream_kit.models.quantized import FORMS, QuantizedLinear
from everydream_kit.runs import RunFolder
from everydream_kit.training.control import StopSignal
from everydream_kit.training.journal import Journal
from everydream_kit.training.loop import train_loop
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.run_builder import build_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    arguments = parser.parse_args()
    weights = {form: weight_error(form) for form in FORMS}
    with tempfile.TemporaryDirectory() as folder:
        runs = {form: train(Path(folder), form, arguments) for form in ("none", *FORMS)}
    losses, learned, seconds, sizes = (
        dict(zip(runs, column, strict=True)) for column in zip(*runs.values(), strict=True)
    )
    print("| base | UNet, MB | error of a weight | first 10 | last 10 | difference: mean, largest | adapter | s/step |")
    print("|---|---|---|---|---|---|---|---|")
    for form in runs:
        differences = [abs(one - other) for one, other in zip(losses[form], losses["none"], strict=True)]
        apart = (learned[form] - learned["none"]).norm() / learned["none"].norm()
        cells = [
            form,
            f"{sizes[form] / 1e6:.2f}",
            "" if form == "none" else f"{100 * weights[form]:.2f} %",
            f"{sum(losses[form][:10]) / 10:.5f}",
            f"{sum(losses[form][-10:]) / 10:.5f}",
            f"{sum(differences) / len(differences):.5f}, {max(differences):.5f}",
            f"{100 * apart:.1f} %",
            f"{seconds[form] / arguments.steps:.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


def weight_error(form: str) -> float:
    """Root of the mean squared error of all quantized weights, relative to their own."""
    exact = load_model(base_model_path()).denoiser
    found = load_model(base_model_path(), dtype=Formats(quantization=form)).denoiser
    layers = [(name, part) for name, part in found.named_modules() if isinstance(part, QuantizedLinear)]
    weights = {name: exact.get_parameter(f"{name}.weight").detach() for name, _ in layers}
    error = sum(float((part.dequantize(torch.float32) - weights[name]).square().sum()) for name, part in layers)
    return (error / sum(float(weight.square().sum()) for weight in weights.values())) ** 0.5


def train(folder: Path, form: str, arguments: Any) -> tuple[list[float], torch.Tensor, float, int]:
    """The losses of each step, what the adapter adds to all weights, seconds, and bytes of the UNet."""
    config = TrainConfig(
        resume_ckpt=str(base_model_path()),
        data_root=str(images_path()),
        training_kind="lora",
        lora_rank=16,
        quantization=form,
        resolution=arguments.resolution,
        batch_size=arguments.batch_size,
        max_steps=arguments.steps,
        max_epochs=arguments.steps,
        lr=1e-3,
        optimizer="adamw",
        amp_dtype="bf16",
        frozen_dtype="bfloat16",
        cond_dropout=0.0,
        num_workers=0,
        seed=7,
        sample_steps=None,
        no_save_ckpt=True,
        logdir=str(folder / form),
    )
    run_folder = RunFolder.create(config.logdir, config.project_name)
    journal = Journal(run_folder)
    run = build_run(config, run_folder, journal, Ranks.find(0))
    losses: list[float] = []
    started = time.perf_counter()
    train_loop(run, [lambda run, report: losses.append(report.losses.mean)], StopSignal())
    seconds = time.perf_counter() - started
    journal.close()
    unet = run.learner.model.unet
    frozen = [p for p in unet.parameters() if not p.requires_grad]
    layers = lora_of(run.learner.model)["unet"].values()
    learned = torch.cat([delta(layer).flatten() for layer in layers])  # type: ignore[arg-type]
    return losses, learned, seconds, sum(tensor.nbytes for tensor in (*frozen, *unet.buffers()))


if __name__ == "__main__":
    main()
