"""The training objective: what the model predicts, and the loss of an error.

With a(t) = alphas_cumprod[t], x the latents and n the noise:

    noisy latents    z = sqrt(a)·x + sqrt(1 - a)·n                 DDPM, arXiv 2006.11239, eq. 4
    epsilon target   n
    v target         v = sqrt(a)·n - sqrt(1 - a)·x                 arXiv 2202.00512, appendix D
    sample target    x
    SNR(t)           a / (1 - a)

One and the same prediction has a squared error of epsilon that is SNR times its squared error of x, and one of v that
is SNR + 1 times it. Weightings are therefore written once, as a weight of the x error, and divided by that factor.

There is one loss for each image to the end, in float32 whatever the model runs in; averaging over images,
`loss_scale` and accumulation belong to the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from everydream_kit.config.objective_settings import ObjectiveGroup
from everydream_kit.errors import ConfigError
from everydream_kit.models.flow import shifted
from everydream_kit.training.timesteps import integer_timesteps
from everydream_kit.transfers import send

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
MAX_DEBIASED_SNR = 1000.0
"""Bound of the SNR in debiased estimation. It concerns the first timesteps only: SD 1.x begins at an SNR of 1176."""
MIN_DEBIASED_SNR = 1e-3
"""Keeps 1/sqrt(SNR) finite. SD 1.x ends at 0.0047, so this bounds no model that predicts epsilon."""


class Objective(Protocol):
    """What a model learns: how noise is mixed in, what is predicted, and what an error costs.

    Timesteps are as the denoiser's `predict` takes them: 0 is the image, `num_timesteps` nothing but noise.
    """

    loss_type: str

    @property
    def num_timesteps(self) -> int: ...

    def timesteps(self, fractions: torch.Tensor, start: int, end: int, shift: float) -> torch.Tensor:
        """Noise levels between start and end from fractions in 0..1 (B,) float64; `shift` is the family's."""

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy latents (B, C, h, w)."""

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model should predict, (B, C, h, w) float32."""

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) float32: the weight of each timestep."""

    def loss(
        self,
        model_pred: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss of each image, weighting included.

        Args:
            model_pred, target: (B, C, h, w), any float type; computed in float32.
            timesteps: (B,).
            mask: (B, 1, h, w) in 0..1, or None. The loss is the mean over the latent cells, weighed by the mask, so an
                image counts the same however small its masked area is; one that is masked altogether costs 0.

        Returns:
            (B,) float32.
        """
        share = timesteps.float() / self.num_timesteps
        cost = _COSTS[self.loss_type]((model_pred.float() - target.float()), share.view(-1, 1, 1, 1))
        return self.weight(timesteps) * _mean_over_cells(cost, mask)


def denoising_losses(
    objective: Objective,
    predict: Callable[[torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    input_noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """From noise to the loss of each image: what a step, validation and the estimate of memory share.

    Args:
        predict: noisy latents -> the model's prediction.
        latents, noise: (B, C, h, w).
        timesteps: (B,), on the latents' device.
        mask: (B, 1, h, w), on any device.
        input_noise: noise that is mixed in where it differs from the noise that the target is made of.

    Returns:
        (B,) float32.
    """
    noisy_latents = objective.add_noise(latents, noise if input_noise is None else input_noise, timesteps)
    model_pred = predict(noisy_latents)
    target = objective.target(latents, noise, timesteps)
    return objective.loss(model_pred, target, timesteps, None if mask is None else send(mask, latents.device))


@dataclass
class DiffusionObjective(Objective):
    """Target, noise mixing and loss of one noise schedule and prediction type. Made by `build_objective`.

    Attributes:
        alphas_cumprod: (T,) float32.
        prediction_type: epsilon, v_prediction or sample.
        loss_type: mse, huber, mse_huber or huber_mse.
        min_snr_gamma: bound of Min-SNR weighting, or None.
        debiased_estimation: weigh by debiased estimation.
    """

    alphas_cumprod: torch.Tensor
    prediction_type: str
    loss_type: str
    min_snr_gamma: float | None
    debiased_estimation: bool
    _by_device: dict[torch.device, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def num_timesteps(self) -> int:
        """T, the length of the noise schedule."""
        return len(self.alphas_cumprod)

    def timesteps(self, fractions: torch.Tensor, start: int, end: int, shift: float = 1.0) -> torch.Tensor:
        """Whole timesteps, start inclusive and end exclusive; a noise schedule of betas is not shifted."""
        return integer_timesteps(fractions, start, end)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Mix latents (B, 4, h, w) with noise at each image's timestep (B,). Returns the type of `latents`."""
        signal, spread = self._mixing_rates(timesteps)
        return (signal * latents.float() + spread * noise.float()).to(latents.dtype)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the model should predict: (B, 4, h, w) float32."""
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return latents.float()
        signal, spread = self._mixing_rates(timesteps)
        return signal * noise.float() - spread * latents.float()

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) float32: the weight of each timestep. 1 unless Min-SNR or debiased estimation is on.

        Min-SNR (arXiv 2303.09556, eq. 8): min(SNR, gamma), divided by SNR for epsilon and by SNR + 1 for v.
        Debiased estimation (arXiv 2310.08442, eq. 10): 1/sqrt(SNR) for epsilon; the same weighting for v is
        sqrt(SNR)/(SNR + 1).
        """
        snr = self.snr(timesteps)
        if self.min_snr_gamma is not None:
            return snr.clamp(max=self.min_snr_gamma) / self._weight_of_unit_error(snr)
        if self.debiased_estimation:
            bounded = snr.clamp(MIN_DEBIASED_SNR, MAX_DEBIASED_SNR)
            return bounded.sqrt() / self._weight_of_unit_error(bounded)
        return torch.ones_like(snr)

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio a / (1 - a) at each timestep: (B,) float32."""
        alphas_cumprod = self._alphas_cumprod(timesteps.device)[timesteps]
        return alphas_cumprod / (1.0 - alphas_cumprod)

    def _weight_of_unit_error(self, snr: torch.Tensor) -> torch.Tensor:
        if self.prediction_type == "epsilon":
            return snr
        return snr + 1.0 if self.prediction_type == "v_prediction" else torch.ones_like(snr)

    def _mixing_rates(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(a) and sqrt(1 - a), each (B, 1, 1, 1) float32."""
        alphas_cumprod = self._alphas_cumprod(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alphas_cumprod.sqrt(), (1.0 - alphas_cumprod).sqrt()

    def _alphas_cumprod(self, device: torch.device) -> torch.Tensor:
        if device not in self._by_device:
            self._by_device[device] = send(self.alphas_cumprod, device)
        return self._by_device[device]


def build_objective(
    noise_scheduler: Any,
    prediction_type: str,
    settings: ObjectiveGroup,
) -> DiffusionObjective:
    """Make the objective of a diffusion model.

    Args:
        noise_scheduler: a diffusers scheduler; only its `alphas_cumprod` is read.
        prediction_type: epsilon, v_prediction or sample.
        settings: kind and weighting of the loss.

    Raises:
        ConfigError: an unknown prediction type, epsilon on a zero-terminal schedule, or two weightings at once.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ConfigError(f"prediction_type: must be one of {', '.join(PREDICTION_TYPES)} (got {prediction_type!r})")
    if settings.weighting_scheme != "none":
        raise ConfigError("weighting_scheme: is for flow matching; diffusion models have min_snr_gamma")
    if settings.min_snr_gamma is not None and settings.debiased_estimation:
        raise ConfigError("min_snr_gamma, debiased_estimation: two weightings of the same thing; give one of them")
    alphas_cumprod = noise_scheduler.alphas_cumprod.detach().to("cpu", torch.float32)
    if prediction_type == "epsilon" and alphas_cumprod[-1] <= 0:
        raise ConfigError(_ZERO_TERMINAL_EPSILON)
    return DiffusionObjective(
        alphas_cumprod,
        prediction_type,
        loss_type=settings.loss_type,
        min_snr_gamma=settings.min_snr_gamma,
        debiased_estimation=settings.debiased_estimation,
    )


@dataclass
class FlowObjective(Objective):
    """Rectified flow (arXiv 2209.03003): straight paths from image to noise, and their velocity as target.

    With s = t / 1000, x the latents and n the noise:

        noisy latents    z = (1 - s)·x + s·n
        target           n - x
        sigma_sqrt       1 / s²                              as diffusers' trainers weigh
        cosmap           2 / (π·(1 - 2·s + 2·s²))            arXiv 2403.03206, section 3.1

    Attributes:
        loss_type: as `DiffusionObjective` has it.
        weighting_scheme: none, sigma_sqrt or cosmap.
    """

    loss_type: str
    weighting_scheme: str
    num_timesteps: int = 1000

    def timesteps(self, fractions: torch.Tensor, start: int, end: int, shift: float = 1.0) -> torch.Tensor:
        """(B,) float32 between start and end; a shift above 1 moves them toward the noise."""
        moved: torch.Tensor = shifted(fractions, shift)
        return (start + moved * (end - start)).float()

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Points on the paths (B, C, h, w), in the type of `latents`."""
        sigmas = self._sigmas(timesteps).view(-1, 1, 1, 1)
        return ((1.0 - sigmas) * latents.float() + sigmas * noise.float()).to(latents.dtype)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The velocity (B, C, h, w) float32."""
        return noise.float() - latents.float()

    def weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) float32: the weight of each noise level."""
        sigmas = self._sigmas(timesteps)
        if self.weighting_scheme == "sigma_sqrt":
            return sigmas.clamp(min=1.0 / self.num_timesteps) ** -2
        if self.weighting_scheme == "cosmap":
            return 2.0 / (math.pi * (1.0 - 2.0 * sigmas + 2.0 * sigmas.square()))
        return torch.ones_like(sigmas)

    def _sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps.float() / self.num_timesteps


def build_flow_objective(noise_scheduler: Any, prediction_type: str, settings: ObjectiveGroup) -> FlowObjective:
    """Make the objective of a flow model.

    Args:
        noise_scheduler: a diffusers scheduler; only its number of timesteps is read.
        prediction_type: always the velocity.
        settings: kind and weighting of the loss; diffusion's weightings must be off (`Family.refuses` says why).
    """
    if settings.min_snr_gamma is not None or settings.debiased_estimation:
        raise ConfigError(
            "min_snr_gamma, debiased_estimation: flow matching has no such weighting; see weighting_scheme"
        )
    return FlowObjective(settings.loss_type, settings.weighting_scheme, noise_scheduler.config.num_train_timesteps)


OBJECTIVES: dict[str, Callable[..., Objective]] = {"diffusion": build_objective, "flow": build_flow_objective}
"""By the name that a family has it under."""


def rescale_zero_terminal_snr(noise_scheduler: Any, prediction_type: str) -> Any:
    """The same scheduler with its noise schedule rescaled so that the last timestep holds no signal.

    sqrt(a) is shifted so that its last value is 0 and rescaled so that its first stays (arXiv 2305.08891, algorithm 1),
    by diffusers' own option, which is saved with the scheduler as `rescale_betas_zero_snr`.

    Raises:
        ConfigError: the model predicts epsilon, which says nothing where there is no signal.
    """
    if prediction_type == "epsilon":
        raise ConfigError(_ZERO_TERMINAL_EPSILON)
    return type(noise_scheduler).from_config(noise_scheduler.config, rescale_betas_zero_snr=True)


_ZERO_TERMINAL_EPSILON = (
    "enable_zero_terminal_snr: this model predicts epsilon, which is undefined at the last timestep, where nothing but "
    "noise is left. Switch it off, or start from a v-prediction model."
)


def _mse(error: torch.Tensor, _share: torch.Tensor) -> torch.Tensor:
    return error.square()


def _huber(error: torch.Tensor, _share: torch.Tensor) -> torch.Tensor:
    """Huber's loss with delta 1: e²/2 up to |e| = 1, then |e| - 1/2."""
    size = error.abs()
    return torch.where(size < 1.0, 0.5 * error.square(), size - 0.5)


def _mse_huber(error: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """MSE at high noise, Huber at low noise: t/T of the one and 1 - t/T of the other."""
    return share * _mse(error, share) + (1.0 - share) * _huber(error, share)


def _huber_mse(error: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return _mse_huber(error, 1.0 - share)


_COSTS = {"mse": _mse, "huber": _huber, "mse_huber": _mse_huber, "huber_mse": _huber_mse}


def _mean_over_cells(cost: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, C, h, w) -> (B,), weighed by the mask (B, 1, h, w) if there is one."""
    if mask is None:
        return cost.mean(dim=(1, 2, 3))
    mask = mask.float()
    if mask.shape[2:] != cost.shape[2:]:  # masks have one value for each 8 pixels, some latents for each 16
        mask = torch.nn.functional.adaptive_avg_pool2d(mask, (cost.shape[2], cost.shape[3]))
    area = mask.sum(dim=(1, 2, 3))  # (B,)
    return (cost.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / area.clamp(min=1e-6)
