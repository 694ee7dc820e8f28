"""A run, built and ready: the model, the plan, the optimizer, and where it stands.

`Run` gives the loop and the listeners the few verbs that they need; how its parts are made is in `runs.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from everydream_kit.data.loader import make_loader
from everydream_kit.data.pixels import LATENT_CELL_PIXELS
from everydream_kit.draws import derive_seed, torch_generator
from everydream_kit.models.encoding import encode_captions, encode_moments, latents_from_moments
from everydream_kit.models.family import Sizes
from everydream_kit.training.combined import measure_gradient_norm, take_gradient_norm
from everydream_kit.training.noise import make_noise
from everydream_kit.training.offload import IdleModels
from everydream_kit.training.position import Position
from everydream_kit.training.resuming import image_keys, resume_facts
from everydream_kit.training.run_snapshot import Snapshot, clone_to_host, count_bytes
from everydream_kit.training.sharding import Sharding, as_whole, gather
from everydream_kit.training.summary import library_versions

if TYPE_CHECKING:
    from PIL import Image

    from everydream_kit.config import TrainConfig
    from everydream_kit.config.objective_settings import ObjectiveGroup
    from everydream_kit.data.cache import LatentCache
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.epoch_plan import PlanSettings
    from everydream_kit.data.records import Batch, StepBatches
    from everydream_kit.data.text_cache import TextCache
    from everydream_kit.models.family import Conditioning, Model
    from everydream_kit.training.ema import Ema
    from everydream_kit.training.file_hashes import OpenFile
    from everydream_kit.training.held_out_images import ValidationSet
    from everydream_kit.training.journal import Journal
    from everydream_kit.training.losses import ImageLosses
    from everydream_kit.training.objectives import Objective
    from everydream_kit.training.parameters import TrainedPart
    from everydream_kit.training.precision import Precision
    from everydream_kit.training.ranks import Ranks
    from everydream_kit.training.reports import Listener
    from everydream_kit.workspace import RunFolder

NOTHING, WEIGHTS, EVERYTHING = range(3)
"""What the main process asks of the others: nothing more, the trained weights, or the optimizer's state as well."""


@dataclass
class Run:
    """Everything that one training run consists of. `position` is the only thing that the loop changes."""

    config: TrainConfig
    folder: RunFolder
    journal: Journal
    ranks: Ranks
    seed: int
    dataset: Dataset
    plan_settings: PlanSettings
    num_steps: int  # estimated: with ratings or fractional multipliers, epochs differ by a few steps
    model: Model
    parts: list[TrainedPart]
    optimizer: torch.optim.Optimizer
    make_schedules: Callable[[int], dict[str, Callable[[int], float]]]  # of the run's number of steps
    objective: Objective
    noise_settings: ObjectiveGroup
    precision: Precision
    write_model: Callable[[Path, dict[str, dict[str, torch.Tensor]], OpenFile], None]
    ema_update_interval: int
    ema: Ema | None = None
    latent_cache: LatentCache | None = None
    text_cache: TextCache | None = None
    loader_options: dict[str, Any] = field(default_factory=dict)
    listeners: list[Listener] = field(default_factory=list)
    position: Position = field(default_factory=Position)
    lr_factor: float = 1.0
    ended_early: bool = False
    updates_in_backward: bool = False
    wants_gradient_norm: Callable[[int], bool] = lambda step: False
    validation_sets: list[ValidationSet] = field(default_factory=list)
    plugins: list[Any] = field(default_factory=list)
    idle_models: IdleModels = field(default_factory=IdleModels)
    sharding: Sharding | None = None
    plan_digests: dict[int, str] = field(default_factory=dict)  # of the current epoch, once it was asked for
    schedules: dict[str, Callable[[int], float]] = field(init=False)  # learning rate of each part, by step

    has_dropout: bool = field(init=False)  # an adapter's, or the base model's own

    def __post_init__(self) -> None:
        self.resolve_steps(self.num_steps)
        self.has_dropout = any(_drops_out(m) for m in [self.model.denoiser, *self.model.text_encoders])

    def resolve_steps(self, num_steps: int) -> None:
        """Say how many steps the run has; schedules that end with it follow."""
        self.num_steps = num_steps
        self.schedules = self.make_schedules(num_steps)

    # --- what the loop asks for ---------------------------------------------------------------------------------

    def batches(self) -> Iterator[StepBatches]:
        """The work of each optimizer step from the run's position to its end. Epochs without an image are passed over."""
        loader = make_loader(
            self.dataset,
            self.plan_settings,
            seed=self.seed,
            start_epoch=self.position.epoch,
            start_step=self.position.step_in_epoch,
            num_epochs=self.config.max_epochs - self.position.epoch,
            rank=self.ranks.rank,
            latent_cache=self.latent_cache,
            pin_memory=self.ranks.device.type == "cuda",
            **self.loader_options,
        )
        num_reported = 0
        try:
            for work in loader:
                for problem in loader.problems[
                    num_reported:
                ]:  # the loader has logged them; here they reach the run's events
                    self.report("warning", message=str(problem))
                num_reported = len(loader.problems)
                yield work
                if self.position.step_in_epoch == 0 and work.num_empty_after:
                    self.journal.note(_passed_over(work))
                if self.is_complete():
                    return
        finally:
            loader.close()

    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        by_epochs = self.position.epoch >= self.config.max_epochs
        by_steps = self.config.max_steps is not None and self.position.step >= self.config.max_steps
        return by_epochs or by_steps or self.ended_early

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Set every parameter group's rate for this step (counted from 0); returns them by part."""
        rates = {name: schedule(step) * self.lr_factor for name, schedule in self.schedules.items()}
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        if self.updates_in_backward:
            measure_gradient_norm(self.optimizer, self.wants_gradient_norm(step + 1))
        if self.has_dropout:  # dropout layers read torch's own generator; an address makes them resumable
            torch.manual_seed(derive_seed(self.seed, "dropout", step, self.ranks.rank))
        return rates

    def generators(self, batch: Batch, purpose: str) -> list[torch.Generator]:
        """One generator for each image of the batch, by its address."""
        planned = batch.planned
        return [
            torch_generator(self.seed, purpose, planned.epoch, self.dataset.key(draw.image), draw.repeat)
            for draw in planned.draws
        ]

    def encode_images(self, batch: Batch, *, mean_only: bool = False) -> torch.Tensor:
        """(B, C, h, w) latents for the denoiser, drawn from the VAE's posterior at each image's address, or its mean."""
        device = self.ranks.device
        with torch.no_grad():
            if batch.moments is not None:
                moments = batch.moments.to(device, torch.float32, non_blocking=True)
            else:
                assert batch.pixels is not None
                with self.idle_models.at_work([self.model.vae]):
                    moments = encode_moments(self.model, batch.pixels.to(device, non_blocking=True)).float()
            height, width = (side * LATENT_CELL_PIXELS for side in moments.shape[2:])
            shape = self.model.family.latent_space.shape(self.model, width, height)
            if mean_only:
                noise = torch.zeros((len(moments), *shape), device=device)
            else:
                noise = make_noise(shape, self.generators(batch, "posterior")).to(moments)
            return latents_from_moments(self.model, moments, noise)

    def encode_captions(self, captions: list[str]) -> Conditioning:
        """What the denoiser is told, computed under autocast. Remembered by caption where the text encoder is frozen.

        Autocast belongs here and not to the caller: what is remembered must not depend on who asks first.
        """
        with self.precision.autocast():
            if self.trains_text:
                return encode_captions(self.model, captions, self.config.clip_skip)
            with torch.no_grad():
                if self.text_cache is None:
                    return encode_captions(self.model, captions, self.config.clip_skip)
                if self.text_cache.knows(captions):
                    return self.text_cache.encode(captions)
                with self.idle_models.at_work(self.model.text_encoders):
                    return self.text_cache.encode(captions)

    def predict(
        self, batch: Batch, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The denoiser's prediction, (B, C, h, w) float32, told what its family wants to know."""
        sizes = Sizes(batch.original_sizes, batch.crop_top_lefts, batch.planned.bucket)
        return self.model.family.predict(self.model, noisy_latents, timesteps, conditioning, sizes)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss, times the gradient scaler's factor in float16."""
        if self.sharding is not None:
            loss = loss * self.ranks.num_ranks  # FSDP takes the mean over the processes where we want the sum
        return self.precision.scale(loss)

    def gather(self, losses: ImageLosses) -> ImageLosses:
        return self.ranks.gather(losses)

    def update_weights(self, step: int) -> float | None:
        """Reduce, measure, clip, step, zero. Returns the gradients' norm before clipping where it is wanted."""
        if self.updates_in_backward:
            return take_gradient_norm(self.optimizer)
        parameters = self.parameters()
        if self.sharding is None:
            self.ranks.sum_gradients(parameters)
        self.precision.unscale(self.optimizer)
        norm = None
        bound = self.config.clip_grad_norm
        if bound is not None or self.wants_gradient_norm(step + 1):
            total = as_whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
            if bound is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, bound, total)
            norm = float(total)
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def update_ema(self, step: int) -> None:
        if self.ema is not None and step % self.ema_update_interval == 0:
            self.ema.update(step // self.ema_update_interval)

    def sync_ranks(self, stop_requested: bool = False) -> bool:
        """Bring the processes together again after the listeners, which only the main one has.

        The others give what it asks for meanwhile, and learn what its listeners decided: the rate's factor, an early end.

        Returns:
            Whether any process was asked to stop.
        """
        while True:
            factor = self.lr_factor if self.ranks.is_main else 0.0
            asked, stop, ended, factor = self.ranks.largest(NOTHING, stop_requested, self.ended_early, factor)
            if asked == NOTHING:
                self.lr_factor, self.ended_early = factor, bool(ended)
                return bool(stop)
            self._gather(asked)

    # --- what listeners ask for ---------------------------------------------------------------------------------

    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything that is trained, in the optimizer's order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def trains_text(self) -> bool:
        """Whether gradients flow into a text encoder."""
        return any(p.requires_grad for encoder in self.model.text_encoders for p in encoder.parameters())

    def report(self, kind: str, **facts: Any) -> None:
        self.journal.report(kind, **facts)

    def warn(self, message: str) -> None:
        self.journal.warn(message)

    def scalar(self, tag: str, value: float, step: int) -> None:
        self.journal.scalar(tag, value, step)

    def image(self, tag: str, image: Image.Image, step: int) -> None:
        self.journal.image(tag, image, step)

    def set_state(self, state: str, **facts: Any) -> None:
        self.journal.set_state(state, **facts)

    def memory_bytes(self) -> int:
        """Device memory in use at its peak on a GPU, the process's memory on a CPU."""
        if self.ranks.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.ranks.device))
        return int(psutil.Process().memory_info().rss)

    def whole_model(self) -> AbstractContextManager[None]:
        """While inside, all of the model is on the device: what waits in host memory, and what other processes have."""
        stack = ExitStack()
        stack.enter_context(self.idle_models.at_work(self.model.modules().values()))
        if self.sharding is not None:
            weights, _ = self._ask_for(WEIGHTS)
            stack.enter_context(self.sharding.whole(weights))
        return stack

    def sampling_weights(self, *, averaged: bool) -> AbstractContextManager[Any]:
        """While inside, the model holds the averaged weights (where there is an EMA) or the live ones."""
        if averaged and self.ema is not None:
            return self.ema.swapped()
        return nullcontext()

    def weight_bytes(self) -> int:
        """Bytes that a snapshot copies."""
        return count_bytes(self._components()) + count_bytes(self.optimizer.state_dict())

    def snapshot(self, *, copy: bool) -> Snapshot:
        """The run's state now; `copy` makes it independent of the steps that follow."""
        keep = clone_to_host if copy else lambda value: value
        if self.sharding is None:
            weights, optimizer_state = keep(self._components()), keep(self.optimizer.state_dict())
        else:
            weights, optimizer_state = self._ask_for(EVERYTHING)
        averaged = self._averaged_components() if self.ema is not None else None
        tensors = {
            "optimizer": optimizer_state,
            "precision": keep(self.precision.state_dict()),
            "dataset": image_keys(self),
        }
        if self.ema is not None:
            tensors["ema"] = keep(self.ema.state_dict())
            averaged = keep(averaged)
        whole = self.config.training_kind == "full"
        model_bytes = self._model_bytes() if whole else count_bytes(weights)
        return Snapshot(
            step=self.position.step,
            copied=copy or self.sharding is not None,
            write_model=lambda folder, open_file: self.write_model(folder, weights, open_file),
            write_ema=None
            if averaged is None
            else lambda folder, open_file: self.write_model(folder, averaged, open_file),
            resume_tensors=tensors,
            state=self._state(),
            model_bytes=model_bytes,
            num_bytes=model_bytes + count_bytes(tensors),
        )

    def _ask_for(self, what: int) -> tuple[Any, Any]:
        """Have the other processes take part in putting together what they have slices of."""
        self.ranks.largest(what, False, False, 0.0)
        return self._gather(what)

    def _gather(self, what: float) -> tuple[Any, Any]:
        keep = self.ranks.is_main
        optimizer_state = self.optimizer.state_dict() if what == EVERYTHING else {}
        return gather(self._components(), keep=keep), gather(optimizer_state, keep=keep)

    def _model_bytes(self) -> int:
        modules = self.model.modules().values()
        return sum(tensor.nbytes for m in modules for tensor in itertools.chain(m.parameters(), m.buffers()))

    def _components(self) -> dict[str, dict[str, torch.Tensor]]:
        """State dicts of the components that are trained, by their folder's name; of adapters and tokens, only these."""
        trained = {id(module) for part in self.parts for module in part.modules}
        whole = self.config.training_kind == "full"
        components = {}
        for name, module in self.model.modules().items():
            if id(module) in trained:
                wanted = None if whole else {key for key, p in module.named_parameters() if p.requires_grad}
                state = module.state_dict()
                components[name] = {key: value for key, value in state.items() if wanted is None or key in wanted}
        return components

    def _averaged_components(self) -> dict[str, dict[str, torch.Tensor]]:
        assert self.ema is not None
        with self.ema.swapped():
            return clone_to_host(self._components())

    def _state(self) -> dict[str, Any]:
        return {
            "position": vars(self.position),
            "seed": self.seed,
            "num_ranks": self.ranks.num_ranks,
            "num_pictures": len(self.dataset),
            "config": self.config.model_dump(mode="json"),
            "versions": library_versions(),
            "listeners": {listener.name: listener.state() for listener in self.listeners if listener.name},
            **resume_facts(self),
        }


def _passed_over(work: StepBatches) -> str:
    first, last = work.epoch + 2, work.epoch + 1 + work.num_empty_after
    which = f"Epoch {first} has" if first == last else f"Epochs {first} to {last} have"
    return f"{which} no image, since multiply is so small, and the run passes over them."


def _drops_out(module: torch.nn.Module) -> bool:
    """Whether some layer drops out by chance: a Dropout, or an attention that has the share as a number."""
    layers = list(module.modules())
    shares = [layer.p if isinstance(layer, torch.nn.Dropout) else vars(layer).get("dropout") for layer in layers]
    return any(isinstance(share, float) and share > 0 for share in shares)
