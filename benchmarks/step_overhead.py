"""The trainer's step next to the bare forward + backward + optimizer on the same tensors.

Both sides train copies of one model on the same latents, captions, noise and timesteps, in turns within one process, so
that what else the machine does falls on both alike. The trainer's side is everything between two steps of its loop: the
loader, drawing noise by address, encoding captions, the losses read back, the listeners that write logs. Latents are
cached on both sides, and the rounds of the first epoch, which also encode, do not count. Printed are the medians and
the ratio of each round; the claim is the median ratio.

    python benchmarks/step_overhead.py [--rounds 17] [--steps 4] [--resolution 128]
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from everydream_kit.config import TrainConfig
from everydream_kit.data.records import StepBatches
from everydream_kit.demo import base_model_path, images_path
from everydream_kit.models.encoding import encode_captions, latents_from_moments
from everydream_kit.runs import RunFolder
from everydream_kit.training.control import StopSignal
from everydream_kit.training.journal import Journal
from everydream_kit.training.listeners import build_listeners
from everydream_kit.training.loop import train_loop
from everydream_kit.training.ranks import Ranks
from everydream_kit.training.reports import Listener, ProgressBar
from everydream_kit.training.run import Run
from everydream_kit.training.run_builder import build_run


def square_images(folder: Path, resolution: int) -> Path:
    """The demo's 32 images as squares: one bucket, only full batches, so that both sides do the same steps."""
    folder.mkdir()
    for source in sorted(images_path().glob("*.webp")):
        with Image.open(source) as image:
            image.convert("RGB").resize((resolution, resolution)).save(folder / f"{source.stem}.png")
        (folder / f"{source.stem}.txt").write_text(source.with_suffix(".txt").read_text("utf-8"), "utf-8")
    return folder


def make_run(folder: Path, resolution: int, batch_size: int, base: Path | None = None) -> Run:
    images = folder / "pictures"
    if not images.is_dir():
        square_images(images, resolution)
    config = TrainConfig(
        resume_ckpt=str(base or base_model_path()),
        data_root=str(images),
        resolution=resolution,
        batch_size=batch_size,
        max_epochs=10_000,
        logdir=str(folder),
        cache_latents="memory",
        cache_variants=1,
        sample_steps=None,
        no_save_ckpt=True,
        ckpt_every_n_minutes=10_000.0,
        optimizer="adamw",
    )
    run_folder = RunFolder.create(folder, "bench")
    return build_run(config, run_folder, Journal(run_folder), Ranks.find())


def bare_steps(run: Run) -> Callable[[StepBatches], None]:
    """The floor: forward, backward and fused AdamW on ready latents, noise and token ids; nothing is read back."""
    parameters = run.learner.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    unet = run.learner.model.unet

    def step(work: StepBatches) -> None:
        (batch,) = work.batches
        moments = batch.moments.float()
        latents = latents_from_moments(run.learner.model, moments, torch.zeros_like(moments[:, :4]))
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),))
        noisy = run.learner.model.noise_scheduler.add_noise(latents, noise, timesteps)
        text = encode_captions(run.learner.model, batch.captions).encoder_hidden_states
        loss = torch.nn.functional.mse_loss(unet(noisy, timesteps, encoder_hidden_states=text).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Turns(Listener):
    """Lets the trainer run `num_steps` at a time: the clock of its side."""

    def __init__(self, num_steps: int, seconds: list[float], between: Callable[[], None]) -> None:
        self.num_steps, self.seconds, self.between = num_steps, seconds, between
        self._started, self._count = time.perf_counter(), 0

    def __call__(self, run: Run, report: object) -> None:
        self._count += 1
        if self._count == self.num_steps:
            self.seconds.append(time.perf_counter() - self._started)
            self.between()
            self._started, self._count = time.perf_counter(), 0


def measure(folder: Path, rounds: int, steps: int, resolution: int, batch_size: int) -> None:
    trained, bare = make_run(folder, resolution, batch_size), make_run(folder, resolution, batch_size)
    bare_step = bare_steps(bare)
    work: Iterator[StepBatches] = bare.batches()
    stop = StopSignal()
    ours: list[float] = []
    theirs: list[float] = []

    def bare_turn() -> None:
        items = list(itertools.islice(work, steps))  # loading is not the bare loop's cost
        started = time.perf_counter()
        for item in items:
            bare_step(item)
        theirs.append(time.perf_counter() - started)
        if len(theirs) == rounds:
            stop.ask("done")

    listeners = [entry for entry in build_listeners(trained, stop) if not isinstance(entry, ProgressBar)]
    for listener in listeners:
        listener.on_start(trained)
    train_loop(trained, [*listeners, Turns(steps, ours, bare_turn)], stop)
    warming_up = -(-len(trained.dataset) // (batch_size * steps))  # rounds of the first epoch, which also encode
    report(ours[warming_up:], theirs[warming_up:], steps)


def report(ours: list[float], theirs: list[float], steps: int) -> None:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"{'':24}{'median':>10}{'lowest':>10}")
    for name, values in (("bare step, s", theirs), ("trainer's step, s", ours)):
        print(f"{name:24}{statistics.median(values) / steps:10.4f}{min(values) / steps:10.4f}")
    print(f"{'ratio of each round':24}{statistics.median(ratios):10.3f}{min(ratios):10.3f}")
    print(f"{'ratio of the lowest':24}{min(ours) / min(theirs):10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=17)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=4)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.rounds, options.steps, options.resolution, options.batch_size)


if __name__ == "__main__":
    main()
