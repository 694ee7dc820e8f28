"""The arithmetic of one optimizer step: pictures in, one loss for each, gradients out.

Every random number here has the address (seed, purpose, epoch, picture, repeat), so a picture's noise does not depend
on which batch, process or worker it came through. One loss per picture is kept to the end; weights, masks and per-picture
logs need no second path. The loss of the step is the mean over all its pictures (accumulated micro-batches and all
processes), so a short batch weighs by its pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from everydream_kit.data.records import Batch, StepBatches
from everydream_kit.draws import torch_generator
from everydream_kit.errors import NonFiniteLossError
from everydream_kit.models.family import Conditioning
from everydream_kit.training.noise import make_noise, perturb_embeddings, perturb_input
from everydream_kit.training.timesteps import draw_timesteps

if TYPE_CHECKING:
    from everydream_kit.training.run import Run


@dataclass(frozen=True)
class NoiseSettings:
    """How noise and timesteps are drawn; the fields are the parameters of the same names."""

    zero_frequency_noise_ratio: float = 0.0
    pyramid_noise_discount: float | None = None
    input_perturbation: float = 0.0
    embedding_perturbation: float = 0.0
    timestep_start: int = 0
    timestep_end: int = 1000
    timestep_sampling: str = "uniform"


@dataclass
class PictureLosses:
    """The losses of one step, a number for each picture (fillers left out)."""

    pictures: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    loss_scales: list[float] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    _waiting: list[tuple[Batch, torch.Tensor]] = field(default_factory=list, repr=False)

    def add(self, batch: Batch, losses: torch.Tensor) -> None:
        """Note a micro-batch's losses, (B,). They stay on the device until `read`, so that it is not waited for."""
        self._waiting.append((batch, losses))

    def read(self) -> PictureLosses:
        """Fetch what is still on the device."""
        for batch, losses in self._waiting:
            for row, (draw, loss) in enumerate(zip(batch.planned.draws, losses.tolist(), strict=True)):
                if not draw.filler:
                    self.pictures.append(draw.picture)
                    self.losses.append(loss)
                    self.loss_scales.append(float(batch.loss_scale[row]))
                    self.paths.append(batch.paths[row])
        self._waiting.clear()
        return self

    @property
    def mean(self) -> float:
        """Mean loss of the pictures, each weighed by its loss_scale, as the gradient saw it."""
        if not self.losses:
            return 0.0
        return sum(loss * scale for loss, scale in zip(self.losses, self.loss_scales, strict=True)) / len(self.losses)


def backward(run: Run, batch: Batch, work: StepBatches) -> torch.Tensor:
    """Compute a micro-batch's losses and add its share to the gradients.

    Returns:
        (B,) float32 losses, detached, before `loss_scale`.
    """
    losses = picture_losses(run, batch, work)
    if run.updates_in_backward:  # weights change inside backward(), so it is now or never
        refuse_non_finite(_single(batch, losses), run.position.step)
    share = (losses * batch.loss_scale.to(losses.device)).sum() / work.num_images
    run.scale_loss(share).backward()
    return losses.detach()


def picture_losses(run: Run, batch: Batch, work: StepBatches) -> torch.Tensor:
    """(B,) float32: the objective's loss for each picture of a micro-batch."""
    settings = run.noise_settings
    latents = run.encode_pictures(batch)  # (B, 4, H/8, W/8), scaled
    noise = make_noise(
        tuple(latents.shape[1:]),
        picture_generators(run, batch, "noise"),
        offset=settings.zero_frequency_noise_ratio,
        pyramid_discount=settings.pyramid_noise_discount,
    ).to(latents)
    timesteps = _timesteps(run, batch, work).to(latents.device)
    input_noise = noise
    if settings.input_perturbation:
        input_noise = perturb_input(noise, settings.input_perturbation, picture_generators(run, batch, "input noise"))
    noisy_latents = run.objective.add_noise(latents, input_noise, timesteps)

    with run.precision.autocast():
        conditioning = run.encode_captions(batch.captions)
        if settings.embedding_perturbation:
            conditioning = _perturbed(
                conditioning, settings.embedding_perturbation, picture_generators(run, batch, "embedding")
            )
        model_pred = run.predict(batch, noisy_latents, timesteps, conditioning)
    target = run.objective.target(latents, noise, timesteps)
    mask = None if batch.mask is None else batch.mask.to(latents.device)
    return run.objective.loss(model_pred, target, timesteps, mask)


def refuse_non_finite(losses: PictureLosses, step: int) -> None:
    """Raises: NonFiniteLossError, naming the step and the pictures, if any loss is NaN or infinite."""
    losses.read()
    bad = [path for path, loss in zip(losses.paths, losses.losses, strict=True) if not math.isfinite(loss)]
    if bad:
        raise NonFiniteLossError(
            f"step {step}: the loss is not a number any more (NaN or infinite) for {', '.join(bad[:4])}"
            + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
            + ". Nothing was updated in this step. Lower lr, set clip_grad_norm 1.0, or choose amp_dtype bf16; "
            "then resume from the last checkpoint."
        )


def _single(batch: Batch, losses: torch.Tensor) -> PictureLosses:
    single = PictureLosses()
    single.add(batch, losses.detach())
    return single


def picture_generators(run: Run, batch: Batch, purpose: str) -> list[torch.Generator]:
    """One generator for each picture of the batch, by its address."""
    planned = batch.planned
    return [
        torch_generator(run.seed, purpose, planned.epoch, run.dataset.key(draw.picture), draw.repeat)
        for draw in planned.draws
    ]


def _timesteps(run: Run, batch: Batch, work: StepBatches) -> torch.Tensor:
    settings = run.noise_settings
    positions = [batch.planned.position + row for row in range(len(batch.planned.draws))]
    return draw_timesteps(
        picture_generators(run, batch, "timestep"),
        settings.timestep_start,
        settings.timestep_end,
        how=settings.timestep_sampling,
        positions=positions,
        num_images=work.num_images,
        step_generator=torch_generator(run.seed, "timestep strata", work.epoch, work.step),
    )


def _perturbed(conditioning: Conditioning, gamma: float, generators: list[torch.Generator]) -> Conditioning:
    embeddings = perturb_embeddings(conditioning.encoder_hidden_states, gamma, generators)
    return Conditioning(embeddings, conditioning.pooled)
