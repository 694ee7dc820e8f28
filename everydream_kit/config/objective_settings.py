"""The objective: noise, timesteps and loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from everydream_kit.config.declaration import DIFFUSION, FLOW, MEMORY_AND_RESULT, NOTHING, RESULT, Facts, Group, Knob


class ObjectiveGroup(Group):
    """Objective: noise, timesteps, and the loss."""

    loss_type: Annotated[
        Literal["mse", "huber", "mse_huber", "huber_mse"],
        Knob(when="outliers dominate the loss; docs/training-objective.md shows the curves"),
        Facts(MEMORY_AND_RESULT, "resume"),
    ] = "mse"
    """Plain squared error, Huber (delta 1), or a mix that changes with the timestep: `mse_huber` is MSE at high noise and Huber
    at low noise, `huber_mse` the reverse."""
    min_snr_gamma: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Knob(when="faster convergence on larger sets: 5"),
        Facts(
            MEMORY_AND_RESULT,
            "resume",
            families=DIFFUSION,
            refusal="diffusion's noise schedule defines it; flow matching has weighting_scheme",
        ),
    ] = None
    """Min-SNR weighting (arXiv 2303.09556): min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v-prediction."""
    debiased_estimation: Annotated[
        bool,
        Knob(when="instead of min_snr_gamma, for epsilon models"),
        Facts(
            MEMORY_AND_RESULT,
            "resume",
            families=DIFFUSION,
            refusal="diffusion's noise schedule defines it; flow matching has weighting_scheme",
        ),
    ] = False
    """Weigh by 1 / sqrt(SNR) (arXiv 2310.08442), bounded."""
    enable_zero_terminal_snr: Annotated[
        bool,
        Knob(when="a v-prediction model should reach true black and white"),
        Facts(RESULT, "resume", families=DIFFUSION, refusal="flow matching ends in pure noise already"),
    ] = False
    """Rescale the noise schedule to zero terminal SNR (arXiv 2305.08891). Needs a v-prediction model."""
    zero_frequency_noise_ratio: Annotated[
        Annotated[float, Field(ge=0, le=1)],
        Knob(when="dark and bright images: 0.02 to 0.1"),
        Facts(MEMORY_AND_RESULT, "resume"),
    ] = 0.0
    """Offset noise: this share of a constant per image and channel is added to the noise."""
    pyramid_noise_discount: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Knob(when="richer contrast: 0.03 as EveryDream 2 ships it"),
        Facts(MEMORY_AND_RESULT, "resume"),
    ] = None
    """Multi-resolution noise: each coarser level is added with this factor to the power of its level."""
    input_perturbation: Annotated[
        Annotated[float, Field(ge=0, le=1)],
        Knob(when="small sets that overfit: 0.1"),
        Facts(MEMORY_AND_RESULT, "resume"),
    ] = 0.0
    """Extra noise on the UNet's input only (arXiv 2301.11706)."""
    embedding_perturbation: Annotated[
        Annotated[float, Field(ge=0, le=100)],
        Knob(when="captions are memorized: 1.0"),
        Facts(MEMORY_AND_RESULT, "resume"),
    ] = 0.0
    """Noise on the text embeddings, gamma / sqrt(dim) (arXiv 2405.20494)."""
    timestep_start: Annotated[
        int,
        Field(ge=0, le=999),
        Knob(unit="timesteps", when="only coarse structure should be trained"),
        Facts(RESULT, "resume"),
    ] = 0
    """First noise level that is trained on."""
    timestep_end: Annotated[
        int,
        Field(ge=1, le=1000),
        Knob(unit="timesteps", when="only fine detail should be trained"),
        Facts(RESULT, "resume"),
    ] = 1000
    """End of the noise levels that are trained on, exclusive."""
    timestep_sampling: Annotated[
        Literal["uniform", "logit_normal", "mode", "stratified"],
        Knob(when="stratified for a calmer loss; logit_normal and mode favor the middle"),
        Facts(RESULT, "resume"),
    ] = "uniform"
    """How timesteps are drawn. Stratified spreads the images of one optimizer step evenly over the range."""
    timestep_shift: Annotated[
        Annotated[float, Field(gt=0, le=100)] | None,
        Knob(when="a flow model should learn more composition (higher) or more detail (lower)"),
        Facts(
            RESULT,
            "resume",
            families=FLOW,
            refusal="it is for flow matching; diffusion has timestep_start, timestep_end and timestep_sampling",
        ),
    ] = None
    """Flow matching: factor by which noise levels are moved upward, s·u / (1 + (s - 1)·u). By default what the model
    was trained with, fixed or by the number of tokens of each bucket; 1 leaves them where they are drawn."""
    weighting_scheme: Annotated[
        Literal["none", "sigma_sqrt", "cosmap"],
        Knob(when="a flow model should weigh fine detail more: sigma_sqrt, with timestep_start 50 or more"),
        Facts(
            RESULT,
            "resume",
            families=FLOW,
            refusal="it is for flow matching; diffusion has min_snr_gamma and debiased_estimation",
        ),
    ] = "none"
    """Flow matching: weight of each noise level. `sigma_sqrt` is 1 / sigma², `cosmap` 2 / (π (1 - 2 sigma + 2 sigma²))
    (arXiv 2403.03206)."""
    train_sampler: Annotated[
        Literal["ddpm", "pndm", "ddim"], Knob(when="never: all three add noise alike"), Facts(NOTHING, "resume")
    ] = "ddpm"
    """Kept for EveryDream 2's files: the noise schedule is the model's own in every case."""
