"""What test_ranks.py starts on two processes, once for all its tests: starting costs more than training.

torchrun --nproc_per_node 2 two_ranks.py FOLDER     (FOLDER/config.json holds the settings of the run on one process)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from everydream_kit.runs import RunFolder
from everydream_kit.sessions import RUN_FOLDER_VARIABLE, resume, train
from everydream_kit.training.reports import Listener

RANK = int(os.environ["RANK"])


class EndsEarly(Listener):
    """What early stopping does, on the main process only, as all of the run's own listeners."""

    def __call__(self, run, report) -> None:
        run.decisions.ended_early = report.step == 2


def divided_batch(folder: Path, settings: dict) -> None:
    """The whole model on both; half the rate from live.json, which the main process alone reads, and twice the rate."""
    run = RunFolder(folder / "ddp")
    run.folder.mkdir(exist_ok=True)
    (run.folder / "live.json").write_text(json.dumps({"lr_factor": 0.5}), "utf-8")
    os.environ[RUN_FOLDER_VARIABLE] = str(run.folder)
    train({**settings, "batch_size": 2, "lr": 2 * settings["lr"], "load_settings_every_epoch": True})


def divided_model(folder: Path, settings: dict) -> None:
    """Slices of the model; ended after two steps, resumed for one more."""
    os.environ[RUN_FOLDER_VARIABLE] = str(folder / "fsdp2")
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps({"cfgs": [3], "num_inference_steps": 2, "samples": [{"prompt": "red"}]}), "utf-8")
    extra = {
        "batch_size": 2,
        "parallel": "fsdp2",
        "gradient_checkpointing": True,
        "save_every_n_steps": 1,
        "sample_steps": 100,
        "sample_prompts": str(prompts),
        "validation_config": {"val_split_mode": "manual", "manual_data_root": settings["data_root"]},
    }
    run = train({**settings, **extra}, listeners=[EndsEarly()] if RANK == 0 else [])
    resume(run.folder, changes={"max_steps": 3})


def text_encoders(folder: Path) -> None:
    """Of each family and each clip_skip: how far the gradients of divided text encoders are from those of whole ones."""
    import torch

    from everydream_kit.models.encoding import encode_captions
    from everydream_kit.models.random_models import build_tiny_model
    from everydream_kit.training.parameters import TrainedPart
    from everydream_kit.training.ranks import Ranks
    from everydream_kit.training.sharding import Sharding, full_tensor

    ranks, results = Ranks.find(), {}
    for family in ("sd1", "sd2", "sdxl"):
        whole, divided = build_tiny_model(family, seed=0), build_tiny_model(family, seed=0)
        encoders = divided.text_encoders
        named = [(name, p) for encoder in encoders for name, p in encoder.named_parameters()]
        Sharding(divided, [TrainedPart("text encoder", list(encoders), named)], ranks, torch.float32)
        for clip_skip in range(5):
            gradients = []
            for model in (whole, divided):
                encoded = encode_captions(model, ["a red square", "blue"], clip_skip)
                texts = [encoded.encoder_hidden_states, *([] if encoded.pooled is None else [encoded.pooled])]
                torch.cat([text.flatten() for text in texts]).square().mean().backward()
                parameters = [p for encoder in model.text_encoders for p in encoder.parameters()]
                gradients.append([torch.zeros(p.shape) if p.grad is None else full_tensor(p.grad) for p in parameters])
                for parameter in parameters:
                    parameter.grad = None
            far = max(float((one - two).abs().max()) for one, two in zip(*gradients, strict=True))
            results[f"{family} {clip_skip}"] = [far, max(float(one.abs().max()) for one in gradients[0])]
    if RANK == 0:
        (folder / "text_encoders.json").write_text(json.dumps(results), "utf-8")


def divided_sdxl(folder: Path, settings: dict) -> None:
    """A step of SDXL in slices, text encoders included."""
    from tiny_models import tiny_folder

    os.environ[RUN_FOLDER_VARIABLE] = str(folder / "sdxl")
    model = {"resume_ckpt": str(tiny_folder("sdxl")), "clip_skip": 3, "max_steps": 1}
    train({**settings, **model, "batch_size": 1, "parallel": "fsdp2", "gradient_checkpointing": True})


def sums_of_gradients(folder: Path) -> None:
    """Sent piece by piece in three steps of two micro-batches, next to the plain sum of each gradient."""
    import torch
    import torch.distributed as dist

    from everydream_kit.training import gradient_sums
    from everydream_kit.training.ranks import Ranks

    gradient_sums.PIECE_BYTES = 1000
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(torch.nn.Linear(17, 17) for _ in range(6)))
    used = [p for layer in layers for p in layer.parameters()]
    unused = torch.nn.Parameter(torch.ones(3))
    sums, equal = gradient_sums.GradientSums([unused, *used], Ranks.find()), []
    generator = torch.Generator().manual_seed(RANK)
    for step in range(3):
        batches = [torch.randn(4, 17, generator=generator) for _ in range(2)]
        chosen = layers[:4] if step % 2 == RANK else layers  # one process has no gradient of the last layers
        for batch in batches:
            chosen(batch).square().sum().backward()
        plain = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in used]
        layers.zero_grad()
        for gradient in plain:
            dist.all_reduce(gradient)
        for batch in batches:
            if batch is batches[-1]:
                sums.watch()
            chosen(batch).square().sum().backward()
        sums.finish()
        equal.append(unused.grad is None and all(torch.equal(p.grad, g) for p, g in zip(used, plain, strict=True)))
        layers.zero_grad()
    if RANK == 0:
        (folder / "sums.json").write_text(json.dumps(equal), "utf-8")


if __name__ == "__main__":
    place = Path(sys.argv[1])
    wanted = json.loads((place / "config.json").read_text("utf-8"))
    divided_batch(place, wanted)
    sums_of_gradients(place)
    divided_model(place, wanted)
    text_encoders(place)
    divided_sdxl(place, wanted)
