"""The host's share of a training step: operations and Python time, ours next to a bare loop, without any arithmetic.

Ours is measured three times: with separate weights, as docs/gpu.md's table was measured; as it is on a GPU; and with CUDA
graphs, where forward and backward are one replay and what is counted is all that surrounds it.

All make a step of SD 1.5's true size on fake tensors, which have shapes and no values, so that what remains is what the host
does: Python, dispatch, launching. Where the host limits a GPU, the ratio of the sides is that of their steps. Counted are
all dispatched operators, and those of them that start a kernel. bitsandbytes launches its kernels past torch's dispatch, so its
updates are counted as tensors updated, and their time is not in the seconds. Fake tensors cost the host more than real ones do:
take ratios from here, not seconds.

    python benchmarks/host_share.py [--batch_size 4] [--steps 3] [--tiny]
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from everydream_kit.config import TrainConfig
from everydream_kit.data.records import StepBatches
from everydream_kit.models.random_models import _TINY
from everydream_kit.preflight import rehearsal
from everydream_kit.preflight.imitation import imitate_autocast, replace_bitsandbytes
from everydream_kit.preflight.skeleton import build_skeleton, shipped_architecture
from everydream_kit.preflight.tracker import BACKWARD, FORWARD, OPTIMIZER, RECOMPUTED, LaunchCounter, StorageTracker
from everydream_kit.training.base_model import select_trained
from everydream_kit.training.cuda_graphs import NUM_EAGER, GraphedPasses

PHASES = (FORWARD, BACKWARD, RECOMPUTED, OPTIMIZER)
OPTIMIZERS = ("adamw8bit", "adamw")
Step = Callable[[LaunchCounter], None]


class HostCounter(LaunchCounter):
    """Also answers what needs values: a norm or a loss that is read back is 1, a check for infinity is passed.

    Only fake tensors are asked for their device by an operator, so that does not count.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: False}.get(args[0].dtype, 1)
        if func.namespace == "prim":
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def phase(counter: LaunchCounter, name: str) -> Any:
    """Operators inside belong to this phase, and so does their time."""
    before, counter.phase = counter.phase, name
    yield
    counter.phase = before


def build(config: TrainConfig, tracker: StorageTracker, changes: dict[str, Any]) -> Any:
    """A skeleton on fake tensors, and what may be trained of it is."""
    model = build_skeleton(shipped_architecture("sd1", **changes), torch.float32)
    select_trained(model, config, config.seed)
    return model


def our_step(config: TrainConfig, tracker: StorageTracker, model: Any) -> Step:
    """The trainer's own."""
    bucket = (max(config.resolutions),) * 2
    with tempfile.TemporaryDirectory() as folder:
        run = rehearsal._assemble(
            config,
            model,
            rehearsal.stand_in_dataset(config, bucket),
            Path(folder),
            "cuda",
            tracker,
        )
    rehearsal._keep_gradients(run, tracker, "cuda")
    learner = run.learner
    if learner.kept_gradients is not None:
        learner.graphs = GraphedPasses(
            NoReplay, learner.learn_from, learner.kept_gradients, lambda: [], lambda message: None
        )
    batch = rehearsal.make_batch(bucket, config.batch_size, with_moments=True)
    work = StepBatches(0, 0, 1, config.batch_size, config.batch_size, [batch])

    def step(counter: LaunchCounter) -> None:
        run.learner.set_learning_rates(0)
        run.learner.backward(batch, work, 0)
        with phase(counter, OPTIMIZER):
            run.learner.update_weights(0)

    return step


class NoReplay:
    """A captured pass whose replay costs the host nothing: one call of the driver on a GPU."""

    def __init__(self, call: Callable[[], torch.Tensor]) -> None:
        self.result = call()

    def replay(self) -> None:
        pass


def bare_step(config: TrainConfig, tracker: StorageTracker, model: Any) -> Step:
    """Forward, backward, optimizer on ready latents and token ids."""
    unet, text_encoder = model.unet, model.text_encoders[0]
    parameters = [p for module in (unet, text_encoder) for p in module.parameters()]
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: Any = AdamW8bit(parameters, lr=1e-6)
        replace_bitsandbytes(optimizer, tracker, "host", device_type="cuda")
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    side = max(config.resolutions) // 8
    latents, tokens = torch.zeros(config.batch_size, 4, side, side), torch.zeros(config.batch_size, 77).long()
    scheduler = model.noise_scheduler

    def step(counter: LaunchCounter) -> None:
        noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            text = text_encoder(tokens)[0]
            prediction = unet(noisy, timesteps, encoder_hidden_states=text).sample
        torch.nn.functional.mse_loss(prediction.float(), noise).backward()
        with phase(counter, OPTIMIZER):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def measure(make: Callable[..., Step], config: TrainConfig, steps: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Counts of one step, and the fastest of several."""
    tracker = StorageTracker()
    model = build(config, tracker, changes)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        with tracker:
            rehearsal._materialise(model, tracker)
        for module in model.modules().values():
            for parameter in module.parameters():
                parameter._post_accumulate_grad_hooks = None  # the memory model's; the run's own are not made yet
        imitate_autocast(model.modules().values())
        best = float("inf")
        with tracker:  # it answers what optimizers ask of values
            step = make(config, tracker, model)
        num_before = NUM_EAGER + 1 if config.cuda_graphs == "on" else 1  # the first makes the optimizer's states
        for number in range(num_before + steps):
            if number == num_before:
                best = float("inf")
            with HostCounter() as counter, tracker.stretch("step") as stretch:
                started = time.perf_counter()
                step(counter)
                best = min(best, time.perf_counter() - started)
    del model, step
    gc.collect()
    return {
        "seconds": best,
        "operations": counter.operations,
        "launches": counter.launches,
        "tensors": stretch.launches.total(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny SD 1.x: whether the script works")
    options = parser.parse_args()
    torch.set_num_threads(1)
    changes = _TINY["sd1"] if options.tiny else {}
    print(f"{'':26}{'seconds':>9}  {'operators (kernels) of':<8}" + "".join(f"{name:>16}" for name in PHASES))
    for optimizer in OPTIMIZERS:
        config = TrainConfig(
            resume_ckpt="none",
            batch_size=options.batch_size,
            resolution=512,
            optimizer=optimizer,
            amp_dtype="bf16",
            sample_steps=None,
        )
        found = {}
        sides: dict[str, tuple[Callable[..., Step], dict[str, Any]]] = {
            "kit, separate": (our_step, {"flat_weights": "off"}),
            "kit": (our_step, {}),
            "kit, graphs": (our_step, {"cuda_graphs": "on"}),
            "bare loop": (bare_step, {}),
        }
        for name, (make, settings) in sides.items():
            found[name] = one = measure(make, config.replace(**settings), options.steps, changes)
            counts = [f"{one['operations'][name]:,} ({one['launches'][name]:,})" for name in PHASES]
            past = f"  and {one['tensors']:,} tensors updated by bitsandbytes" if one["tensors"] else ""
            print(
                f"{name + ', ' + optimizer:26}{one['seconds']:9.3f}  {'':22}"
                + "".join(f"{c:>16}" for c in counts)
                + past,
                flush=True,
            )
        for name in ("kit, separate", "bare loop"):
            ratios = [
                f"{side}: time {found[side]['seconds'] / found[name]['seconds']:.2f}, "
                f"operators {found[side]['operations'].total() / found[name]['operations'].total():.2f}"
                for side in ("kit", "kit, graphs")
            ]
            print(f"next to {name}, {optimizer}: {'; '.join(ratios)}", flush=True)


if __name__ == "__main__":
    main()
