"""Measuring on the GPU that is there, instead of estimating: two real steps, a validation and a sample.

The probe builds the run as training does, with the base's weights, and goes through the phases with batches of gray
images of the largest bucket: the first step creates the optimizer's states, the second shows the steady state. What the
allocator reserved at most in each phase is the answer, which replaces the estimate's. Nothing is written but the run's
own temporary folder.

Where it cannot run (no GPU, no memory, no base on the disk) it says why and measures nothing; running out of memory is
an answer, too. It takes the time of loading the model and a few steps, so it is done when asked for, or for
`batch_size: auto`.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.data.buckets import largest_bucket
from everydream_kit.errors import KitError
from everydream_kit.preflight.memory_estimate import estimate_latent_mode, sampled_together, validated_together
from everydream_kit.preflight.memory_records import Phase

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.data.records import Size
    from everydream_kit.training.run import Run

NUM_STEPS = 2
NO_GPU = "there is no CUDA GPU here, so memory is estimated and not measured"


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        phases: measured, each with everything under "measured"; empty where nothing could be measured.
        seconds_per_step: of the second step, or None.
        fits: False: the GPU ran out of memory in the phase `stopped_in`; None: nothing was measured.
        reason: in words: what was measured, or why nothing was.
    """

    phases: tuple[Phase, ...] = ()
    seconds_per_step: float | None = None
    fits: bool | None = None
    stopped_in: str | None = None
    reason: str = ""


class Meter:
    """Reads a device's memory; another one may be given in its place."""

    def begin(self) -> None:
        """From here on a new highest mark counts."""
        import torch

        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """The most that the allocator took from the device since `begin`: tensors, and the gaps between them."""
        import torch

        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_reserved())

    def seconds(self) -> float:
        """A clock that waits for the device."""
        import time

        import torch

        torch.cuda.synchronize()
        return time.perf_counter()


def probe(
    config: TrainConfig, *, build: Callable[[TrainConfig, Path], Run] | None = None, meter: Meter | None = None
) -> Probe:
    """Measure a run's memory on the GPU.

    Args:
        config: of the run; `batch_size` is a number.
        build: makes the run, given the config and a temporary folder; by default around the real base on the GPU.
        meter: reads the device; by default torch's CUDA allocator.

    Returns:
        What was found. Running out of memory is a finding and no error.

    Raises:
        ConfigError, ModelError: the settings or the base cannot be used, as in training.
    """
    if build is None or meter is None:
        import torch

        if not torch.cuda.is_available():
            return Probe(reason=NO_GPU)
    with tempfile.TemporaryDirectory() as folder:
        session = _Session(config, Path(folder), build or build_on_gpu, meter or Meter())
        try:
            return session.measure()
        finally:
            session.close()


def build_on_gpu(config: TrainConfig, folder: Path) -> Run:
    """The run that training would build, around gray images."""
    from everydream_kit.preflight.rehearsal import stand_in_dataset
    from everydream_kit.runs import RunFolder
    from everydream_kit.settings import with_side_files
    from everydream_kit.training.base_model import load_base
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.ranks import Ranks
    from everydream_kit.training.run_builder import assemble_run

    config, _ = with_side_files(config)
    ranks = Ranks.find(config.gpuid)
    return assemble_run(
        config.replace(cache_latents="off", ema_resume_model=None),
        RunFolder(folder),
        Journal(RunFolder(folder), writes=False),
        ranks,
        model=load_base(config, None, ranks),
        dataset=stand_in_dataset(config, largest_bucket(config.resolutions)),
        seed=max(0, config.seed),
    )


class _Session:
    """One probe: what has been measured so far, so that running out of memory loses nothing."""

    def __init__(
        self, config: TrainConfig, folder: Path, build: Callable[[TrainConfig, Path], Run], meter: Meter
    ) -> None:
        self._config, self._folder, self._build, self._meter = config, folder, build, meter
        self._phases: list[Phase] = []
        self._seconds: float | None = None
        self._now = "loading"
        self._run: Run | None = None

    def measure(self) -> Probe:
        """Go through the phases."""
        from everydream_kit.training.memory_measures import is_out_of_memory

        try:
            self._go_through()
        except KitError:
            raise
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Chained frames would hold the tensors that must go.
            error.__traceback__ = None
            reason = f"measured: this GPU runs out of memory in the phase {self._now}"
            return Probe(tuple(self._phases), self._seconds, False, self._now, reason)
        names = ", ".join(phase.name for phase in self._phases)
        reason = f"measured on this GPU: {names}; {NUM_STEPS} steps of {self._config.batch_size} images of the largest bucket"
        return Probe(tuple(self._phases), self._seconds, True, None, reason)

    def close(self) -> None:
        """Let go of the run, and of the device's memory."""
        self._run = None
        free_device_memory()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._now = name
        self._meter.begin()
        yield
        num_bytes = self._meter.peak_bytes()
        self._phases.append(Phase(name, num_bytes, {"measured": num_bytes}))

    def _go_through(self) -> None:
        import torch

        from everydream_kit.models.family import has_large_texts
        from everydream_kit.models.sampling import SamplePrompt, sample_images
        from everydream_kit.preflight.rehearsal import CACHED_TOGETHER, make_batch

        config, bucket = self._config, largest_bucket(self._config.resolutions)
        run = self._run = self._build(config, self._folder)
        latents = estimate_latent_mode(config)
        if latents == "disk":  # before the optimizer has any state
            self._cache_latents(run, bucket, CACHED_TOGETHER[latents])
        assert isinstance(config.batch_size, int)
        channels = run.learner.model.family.latent_space.stored_channels
        batch = make_batch(bucket, config.batch_size, with_moments=latents != "off", channels=channels)
        with self._phase("training step"):
            for _ in range(NUM_STEPS):
                started = self._meter.seconds()
                make_step(run, batch)
                self._seconds = self._meter.seconds() - started
        if latents == "memory":
            self._cache_latents(run, bucket, CACHED_TOGETHER[latents])
        together = validated_together(config)
        if together is not None:
            with self._phase("validation"), torch.no_grad(), run.sync.full_model():
                measured = make_batch(bucket, together, with_moments=False)
                run.learner.image_losses(measured, _work(measured, 1))
        samples = sampled_together(config, run.learner.model.family.sampler)
        if samples is not None:
            learner = run.learner
            encode = learner.encode_captions if has_large_texts(learner.model.family) else None
            if encode is not None:
                encode([""])
            with self._phase("sampling"), run.sync.full_model(averaged=config.ema_sample_ema_model):
                width, height = samples.size
                cfgs = tuple(7.0 + number for number in range(samples.num_images))
                prompts = [SamplePrompt("", width=width, height=height, cfgs=cfgs)]
                sample_images(learner.model, prompts, num_inference_steps=1, encode=encode)

    def _cache_latents(self, run: Run, bucket: Size, num_together: int) -> None:
        import torch

        from everydream_kit.models.encoding import encode_moments

        with self._phase("latent caching"), run.learner.idle_models.at_work([run.learner.model.vae]):
            encode_moments(run.learner.model, torch.zeros(num_together, 3, bucket[1], bucket[0], dtype=torch.uint8))


def free_device_memory() -> None:
    """Give back what nothing holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_step(run: Run, batch: Any) -> None:
    """An optimizer step as the loop makes it, with at most two of its micro-batches."""
    learner, num = run.learner, min(2, run.config.grad_accum)
    learner.set_learning_rates(0)
    for _ in range(num):
        learner.backward(batch, _work(batch, num), 0)
    learner.update_weights(0)
    if learner.ema is not None:
        learner.ema.update(1)


def _work(batch: Any, num: int) -> Any:
    from everydream_kit.data.records import StepBatches

    return StepBatches(0, 0, 1, num * len(batch.paths), num * len(batch.paths), [batch] * num)
