"""The arithmetic of one optimizer step: images in, one loss for each, gradients, and the update of the weights.

Every random number here has the address (seed, purpose, epoch, image, repeat), so an image's noise does not depend on which
batch, process or worker it came through. One loss per image is kept to the end; weights, masks and per-image logs need no second
path. The loss of the step is the sum over all its images (accumulated micro-batches and all processes), divided by the images of
the epoch's fullest step: a full step is a mean, a shorter one weighs by its images.

Not here: which images a step has (`data.epoch_plan`), what other processes do meanwhile (`sync`), what is written
(`run_snapshot`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from everydream_kit.data.pixels import LATENT_CELL_PIXELS
from everydream_kit.draws import derive_seed, torch_generator
from everydream_kit.models.clip_text import TokenizedPrompts
from everydream_kit.models.encoding import (
    encode_captions,
    encode_moments,
    latents_from_moments,
    row_factors,
    scale_rows,
)
from everydream_kit.models.family import Conditioning, PromptSettings, Sizes
from everydream_kit.models.tokens import expand_tokens
from everydream_kit.training.base_model import drops_out
from everydream_kit.training.combined_optimizer import measure_gradient_norm, take_gradient_norm
from everydream_kit.training.decisions import Decisions
from everydream_kit.training.losses import ImageLosses, refuse_non_finite
from everydream_kit.training.noise import make_noise, perturb_embeddings, perturb_input, standard_normal
from everydream_kit.training.objectives import denoising_losses
from everydream_kit.training.offload import IdleModels
from everydream_kit.training.optimizers import parameters_of
from everydream_kit.training.sharding import full_tensor
from everydream_kit.training.skipped_updates import Update, find_non_finite, finds_non_finite
from everydream_kit.training.step_inputs import StepInputs
from everydream_kit.training.timesteps import draw_timesteps
from everydream_kit.transfers import Fetched, send

if TYPE_CHECKING:
    from everydream_kit.config.objective_settings import ObjectiveGroup
    from everydream_kit.data.dataset import Dataset
    from everydream_kit.data.records import Batch, StepBatches
    from everydream_kit.data.text_cache import TextCache
    from everydream_kit.models.family import Model
    from everydream_kit.training.ema import Ema
    from everydream_kit.training.gradient_sums import GradientSums
    from everydream_kit.training.kept_gradients import KeptGradients
    from everydream_kit.training.objectives import Objective
    from everydream_kit.training.optimizers import AnyOptimizer
    from everydream_kit.training.parameters import TrainedPart
    from everydream_kit.training.precision import Precision
    from everydream_kit.training.ranks import Ranks

Weights = dict[str, dict[str, torch.Tensor]]
"""State dicts of components, by their folder's name."""
Schedules = Mapping[str, Callable[[int], float]]
"""Learning rate of each part, by its name, as a function of the optimizer step (from 0)."""


@dataclass
class Learner:
    """A model, and all that one optimizer step does to it.

    Attributes:
        schedules: replaced when the run's number of steps changes.
        dataset: of which the keys of images are read.
        text_cache: encoded captions, where the text encoders are frozen.
        idle_models: those that wait in host memory while steps are made.
        gradient_sums: adds gradients up over the processes, where each has the whole model.
        updates_in_backward: the weights change inside `backward`, so there is nothing left to clip or to refuse.
        wants_gradient_norm: whether the norm is wanted after so many steps.
        is_sharded: the trained modules are divided among the processes (`sharding`).
        saves_components: a checkpoint holds whole components, and not only what is trained of them (adapters, tokens).
        graphs: `learn_from`, eager or replayed, where there are CUDA graphs (`cuda_graphs`).
        kept_gradients: where gradients stay for them.
    """

    model: Model
    parts: list[TrainedPart]
    optimizer: AnyOptimizer
    schedules: Schedules
    objective: Objective
    noise_settings: ObjectiveGroup
    precision: Precision
    ranks: Ranks
    seed: int
    dataset: Dataset
    clip_skip: int
    clip_grad_norm: float | None = None
    ema: Ema | None = None
    text_cache: TextCache[Conditioning] | None = None
    idle_models: IdleModels = field(default_factory=IdleModels)
    gradient_sums: GradientSums | None = None
    updates_in_backward: bool = False
    wants_gradient_norm: Callable[[int], bool] = lambda step: False
    is_sharded: bool = False
    saves_components: bool = True
    decisions: Decisions = field(default_factory=Decisions)
    graphs: Callable[[StepInputs], torch.Tensor] | None = None
    kept_gradients: KeptGradients | None = None
    has_dropout: bool = field(init=False)  # an adapter's, or the base model's own

    def __post_init__(self) -> None:
        self.has_dropout = any(drops_out(m) for m in [self.model.denoiser, *self.model.text_encoders])

    # The step, in the order of the loop

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Set every parameter group's rate for this step (counted from 0); returns them by part."""
        rates = {name: schedule(step) * self.decisions.lr_factor for name, schedule in self.schedules.items()}
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        if self.updates_in_backward:
            measure_gradient_norm(self.optimizer, self.wants_gradient_norm(step + 1))
        if self.has_dropout:  # dropout layers read torch's own generator; an address makes them resumable
            torch.manual_seed(derive_seed(self.seed, "dropout", step, self.ranks.rank))
        return rates

    def backward(self, batch: Batch, work: StepBatches, step: int) -> torch.Tensor:
        """Compute a micro-batch's losses and add its share to the gradients.

        Args:
            batch: the micro-batch.
            work: the step that it belongs to.
            step: optimizer steps done, for messages.

        Returns:
            (B,) float32 losses, detached, before `loss_scale`.

        Raises:
            NonFiniteLossError: where weights change inside the backward pass; elsewhere the loop looks at the whole step.
        """
        inputs = self.draw_inputs(batch, work)
        if self.graphs is not None:
            return self.graphs(inputs)
        losses = self.losses_of(inputs)
        if self.updates_in_backward:  # the weights change in this backward pass: it cannot be refused later
            refuse_non_finite(_single(batch, losses), step, base=self.model.source)
        if self.gradient_sums is not None and batch is work.batches[-1]:
            self.gradient_sums.watch()
        self._add_gradients(losses, inputs)
        return losses.detach()

    def learn_from(self, inputs: StepInputs) -> torch.Tensor:
        """Forward and backward of a micro-batch, reading inputs and weights alone: what a GPU can capture and replay.

        Returns:
            (B,) float32 losses, detached.
        """
        losses = self.losses_of(inputs)
        self._add_gradients(losses, inputs)
        return losses.detach()

    def _add_gradients(self, losses: torch.Tensor, inputs: StepInputs) -> None:
        share = share_of_step(losses, inputs.loss_scale, inputs.loss_divisor)
        if self.is_sharded:
            share = share * self.ranks.num_ranks  # FSDP takes the mean over the processes where we want the sum
        (self.precision.scale(share) * _one_or_nan(losses)).backward()

    def update_weights(self, step: int) -> Update:
        """Reduce, measure, clip, step, zero. Where a loss or a gradient is not finite, nothing is stepped.

        That is decided on the device, and nobody waits for it here; the loop learns it from what is returned.
        """
        if self.updates_in_backward:
            norm = take_gradient_norm(self.optimizer)
            return Update(None if norm is None else Fetched(norm))
        parameters = self.parameters()
        if self.gradient_sums is not None:
            self.gradient_sums.finish()
        skip, norm = self.precision.unscale(self.optimizer), None
        is_known = skip is not None or finds_non_finite(parameters)
        if self.clip_grad_norm is not None or self.wants_gradient_norm(step + 1) or not is_known:
            norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if skip is None:
            skip = find_non_finite(parameters) if norm is None else norm.isfinite().logical_not()
        update = Update(None if norm is None else Fetched(norm), Fetched(skip))
        if norm is not None and self.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_grad_norm, norm)
        self.precision.step(self.optimizer, skip=skip)
        if self.kept_gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.kept_gradients.clear()
        return update

    def refuse_non_finite(self, losses: ImageLosses, update: Update, step: int) -> None:
        """Raises: NonFiniteLossError, if a loss or a gradient is not; float16 gradients may overflow."""
        refuse_non_finite(
            losses,
            step,
            base=self.model.source,
            gradients_are_finite=self.precision.scaler is not None or not update.was_skipped,
        )

    def update_ema(self, step: int) -> None:
        """Take the weights after so many steps into the average, where there is one and it is due."""
        if self.ema is not None:
            self.ema.after_step(step)

    # The forward pass, piece by piece

    def image_losses(self, batch: Batch, work: StepBatches) -> torch.Tensor:
        """(B,) float32: the objective's loss for each image of a micro-batch."""
        return self.losses_of(self.draw_inputs(batch, work))

    def draw_inputs(self, batch: Batch, work: StepBatches) -> StepInputs:
        """What belongs to a micro-batch: drawn by address, encoded where nothing is learned in that, and sent to the device."""
        settings = self.noise_settings
        latents = self.encode_images(batch)  # (B, C, h, w), as the denoiser knows them
        noise = make_noise(
            tuple(latents.shape[1:]),
            self.generators(batch, "noise"),
            offset=settings.zero_frequency_noise_ratio,
            pyramid_discount=settings.pyramid_noise_discount,
        )
        noise = send(noise, latents.device).to(latents.dtype)
        inputs = StepInputs(
            latents,
            noise,
            timesteps=send(self._draw_timesteps(batch, work), latents.device),
            loss_scale=send(batch.loss_scale, latents.device),
            loss_divisor=send(torch.tensor(float(work.loss_divisor)), latents.device),
            sizes=self._sizes_of(batch, latents.device),
            mask=None if batch.mask is None else send(batch.mask, latents.device),
        )
        if settings.input_perturbation:
            inputs.input_noise = perturb_input(
                noise, settings.input_perturbation, self.generators(batch, "input noise")
            )
        self._draw_text(inputs, batch)
        return inputs

    def losses_of(self, inputs: StepInputs) -> torch.Tensor:
        """(B,) float32: forward, from inputs and weights alone. The host decides nothing by a value here."""

        def predict(noisy_latents: torch.Tensor) -> torch.Tensor:
            # a capture must find no cast weights of an earlier pass, and a replay gives what the calls before it gave
            with self.precision.autocast(keep_casts=self.graphs is None):
                return self.predict(inputs.sizes, noisy_latents, inputs.timesteps, self._condition(inputs))

        return denoising_losses(
            self.objective,
            predict,
            inputs.latents,
            inputs.noise,
            inputs.timesteps,
            mask=inputs.mask,
            input_noise=inputs.input_noise,
        )

    def _draw_text(self, inputs: StepInputs, batch: Batch) -> None:
        """Token ids where a text encoder is trained, else what the denoiser is conditioned on, and the noise for that."""
        encoder = self.model.family.encode_prompt
        if self.trains_text and isinstance(encoder, TokenizedPrompts):
            captions = [expand_tokens(self.model, caption) for caption in batch.captions]
            inputs.token_ids = encoder.tokenize(self.model, captions, PromptSettings(self.clip_skip))
            rows = row_factors(self.model, captions, always=self.graphs is not None)
            inputs.text_rows = None if rows is None else send(torch.tensor(rows), inputs.latents.device)
            shape: tuple[int, ...] = encoder.shape(self.model)
        else:
            inputs.conditioning = self.encode_captions(batch.captions)
            shape = tuple(inputs.conditioning.encoder_hidden_states.shape[1:])
        if self.noise_settings.embedding_perturbation:
            noise = standard_normal(shape, self.generators(batch, "embedding"))
            inputs.text_noise = send(noise, inputs.latents.device)

    def _condition(self, inputs: StepInputs) -> Conditioning:
        """What the denoiser is conditioned on."""
        conditioning = inputs.conditioning
        if conditioning is None:
            encoder = self.model.family.encode_prompt
            assert isinstance(encoder, TokenizedPrompts)
            conditioning = encoder.encode(self.model, inputs.token_ids, PromptSettings(self.clip_skip))
            if inputs.text_rows is not None:
                conditioning = scale_rows(conditioning, inputs.text_rows)
        if inputs.text_noise is not None:
            states, gamma = conditioning.encoder_hidden_states, self.noise_settings.embedding_perturbation
            conditioning = replace(
                conditioning, encoder_hidden_states=perturb_embeddings(states, gamma, inputs.text_noise)
            )
        return conditioning

    def _sizes_of(self, batch: Batch, device: torch.device) -> Sizes:
        """For the pass: numbers on the device, and nothing of single images that it could read on the host."""
        numbers = self.model.family.size_numbers
        if numbers is None:
            return Sizes((), (), batch.planned.bucket)
        made = numbers(sizes_of(batch), len(batch.captions))
        return Sizes((), (), batch.planned.bucket, send(made, device))

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
                moments = send(batch.moments, device).float()  # converted there: half the bytes to send
            else:
                assert batch.pixels is not None
                with self.idle_models.at_work([self.model.vae]):
                    moments = encode_moments(self.model, send(batch.pixels, device)).float()
            height, width = (side * LATENT_CELL_PIXELS for side in moments.shape[2:])  # moments: (B, stored, H/8, W/8)
            shape = self.model.family.latent_space.shape(self.model, width, height)
            if mean_only:
                noise = torch.zeros((len(moments), *shape), device=device)
            else:
                noise = send(make_noise(shape, self.generators(batch, "posterior")), device)
            return latents_from_moments(self.model, moments, noise)

    def encode_captions(self, captions: list[str]) -> Conditioning:
        """What the denoiser is conditioned on, computed under autocast. Remembered by caption where the text encoder is frozen.

        Autocast belongs here and not to the caller: what is remembered must not depend on who asks first.
        """
        with self.precision.autocast():
            if self.trains_text:
                return encode_captions(self.model, captions, self.clip_skip)
            with torch.no_grad():
                if self.text_cache is None:
                    return encode_captions(self.model, captions, self.clip_skip)
                if self.text_cache.knows(captions):
                    return self.text_cache.encode(captions)
                with self.idle_models.at_work(self.model.text_encoders):
                    return self.text_cache.encode(captions)

    def predict(
        self, sizes: Sizes, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """The denoiser's prediction, (B, C, h, w) float32."""
        swap = self.model.block_swap
        with nullcontext() if swap is None else swap.saving_places():
            return self.model.family.predict(self.model, noisy_latents, timesteps, conditioning, sizes)

    def _draw_timesteps(self, batch: Batch, work: StepBatches) -> torch.Tensor:
        settings = self.noise_settings
        family = self.model.family
        shift = settings.timestep_shift or family.shift(self.model.scheduler_config, *batch.planned.bucket)
        positions = [batch.planned.position + row for row in range(len(batch.planned.draws))]
        return draw_timesteps(
            self.generators(batch, "timestep"),
            settings.timestep_start,
            settings.timestep_end,
            how=settings.timestep_sampling,
            positions=positions,
            num_images=work.num_images,
            step_generator=torch_generator(self.seed, "timestep strata", work.epoch, work.step),
            to_timesteps=partial(self.objective.timesteps, shift=shift),
        )

    # What is trained

    def parameters(self) -> list[torch.nn.Parameter]:
        """Everything that is trained, in the optimizer's order."""
        return parameters_of(self.optimizer)

    @property
    def trains_text(self) -> bool:
        """Whether gradients flow into a text encoder."""
        return any(p.requires_grad for encoder in self.model.text_encoders for p in encoder.parameters())

    def trained_weights(self) -> Weights:
        """State dicts of the components that are trained; of adapters and tokens only these. Slices where they are divided."""
        trained = {id(module) for part in self.parts for module in part.modules}
        components = {}
        for name, module in self.model.modules().items():
            if id(module) in trained:
                wanted = {key for key, p in module.named_parameters() if p.requires_grad}
                state = module.state_dict()
                components[name] = {
                    key: value for key, value in state.items() if self.saves_components or key in wanted
                }
        return components

    def averaged_weights(self) -> AbstractContextManager[None]:
        """While inside, the model holds the averaged weights, where there is an EMA."""
        return self.ema.swapped() if self.ema is not None else nullcontext()


def sizes_of(batch: Batch) -> Sizes:
    """Original sizes and crops of a batch's images."""
    return Sizes(batch.original_sizes, batch.crop_top_lefts, batch.planned.bucket)


def share_of_step(losses: torch.Tensor, loss_scale: torch.Tensor, loss_divisor: torch.Tensor | int) -> torch.Tensor:
    """What a micro-batch adds to the loss of its step.

    Args:
        losses: (B,), one for each image.
        loss_scale: (B,), weight of each image; 0 for fillers.
        loss_divisor: the same for all steps of an epoch (`EpochPlan.images_in_fullest_step`).
    """
    return (losses * loss_scale).sum() / loss_divisor


def _one_or_nan(losses: torch.Tensor) -> torch.Tensor:
    """() NaN if a loss is not finite, else 1. As a factor it reaches every gradient, of other processes too.

    By itself an infinite loss need not: the derivative of a square that overflows is finite. A quotient and no choice between
    two numbers of the host: those would be sent first, which waits for the device.
    """
    one_or_zero = losses.detach().isfinite().all().float()
    return one_or_zero / one_or_zero


def _single(batch: Batch, losses: torch.Tensor) -> ImageLosses:
    single = ImageLosses()
    single.add(batch, losses.detach())
    return single
