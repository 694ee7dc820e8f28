"""The arithmetic of one optimizer step: images in, one loss for each, gradients out.

Every random number here has the address (seed, purpose, epoch, image, repeat), so an image's noise does not depend
on which batch, process or worker it came through. One loss per image is kept to the end; weights, masks and per-image
logs need no second path. The loss of the step is the sum over all its images (accumulated micro-batches and all
processes), divided by the images of the epoch's fullest step: a full step is a mean, a shorter one weighs by its
images.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from everydream_kit.draws import torch_generator
from everydream_kit.models.family import Conditioning
from everydream_kit.training.losses import ImageLosses, refuse_non_finite
from everydream_kit.training.noise import make_noise, perturb_embeddings, perturb_input
from everydream_kit.training.objectives import denoising_losses
from everydream_kit.training.timesteps import draw_timesteps

if TYPE_CHECKING:
    from everydream_kit.data.records import Batch, StepBatches
    from everydream_kit.training.run import Run


def backward(run: Run, batch: Batch, work: StepBatches) -> torch.Tensor:
    """Compute a micro-batch's losses and add its share to the gradients.

    Returns:
        (B,) float32 losses, detached, before `loss_scale`.
    """
    losses = image_losses(run, batch, work)
    if run.updates_in_backward:  # weights change inside backward(), so it is now or never
        refuse_non_finite(_single(batch, losses), run.position.step)
    run.scale_loss(share_of_step(losses, batch.loss_scale, work.loss_divisor)).backward()
    return losses.detach()


def share_of_step(losses: torch.Tensor, loss_scale: torch.Tensor, loss_divisor: int) -> torch.Tensor:
    """What a micro-batch adds to the loss of its step.

    Args:
        losses: (B,), one for each image.
        loss_scale: (B,), weight of each image; 0 for fillers.
        loss_divisor: the same for all steps of an epoch (`EpochPlan.images_in_fullest_step`).
    """
    return (losses * loss_scale.to(losses.device)).sum() / loss_divisor


def image_losses(run: Run, batch: Batch, work: StepBatches) -> torch.Tensor:
    """(B,) float32: the objective's loss for each image of a micro-batch."""
    settings = run.noise_settings
    latents = run.encode_images(batch)  # (B, C, h, w), as the denoiser knows them
    noise = make_noise(
        tuple(latents.shape[1:]),
        run.generators(batch, "noise"),
        offset=settings.zero_frequency_noise_ratio,
        pyramid_discount=settings.pyramid_noise_discount,
    ).to(latents)
    timesteps = _timesteps(run, batch, work).to(latents.device)
    input_noise = noise
    if settings.input_perturbation:
        input_noise = perturb_input(noise, settings.input_perturbation, run.generators(batch, "input noise"))

    def predict(noisy_latents: torch.Tensor) -> torch.Tensor:
        with run.precision.autocast():
            conditioning = run.encode_captions(batch.captions)
            if settings.embedding_perturbation:
                generators = run.generators(batch, "embedding")
                conditioning = _perturbed(conditioning, settings.embedding_perturbation, generators)
            return run.predict(batch, noisy_latents, timesteps, conditioning)

    return denoising_losses(run.objective, predict, latents, noise, timesteps, mask=batch.mask, input_noise=input_noise)


def _single(batch: Batch, losses: torch.Tensor) -> ImageLosses:
    single = ImageLosses()
    single.add(batch, losses.detach())
    return single


def _timesteps(run: Run, batch: Batch, work: StepBatches) -> torch.Tensor:
    settings = run.noise_settings
    positions = [batch.planned.position + row for row in range(len(batch.planned.draws))]
    shift = run.model.family.shift(run.model.scheduler_config, *batch.planned.bucket)
    return draw_timesteps(
        run.generators(batch, "timestep"),
        settings.timestep_start,
        settings.timestep_end,
        how=settings.timestep_sampling,
        positions=positions,
        num_images=work.num_images,
        step_generator=torch_generator(run.seed, "timestep strata", work.epoch, work.step),
        to_timesteps=partial(run.objective.timesteps, shift=shift),
    )


def _perturbed(conditioning: Conditioning, gamma: float, generators: list[torch.Generator]) -> Conditioning:
    embeddings = perturb_embeddings(conditioning.encoder_hidden_states, gamma, generators)
    return replace(conditioning, encoder_hidden_states=embeddings)
