"""Schedulers for sampling, by the names that people know, made from a model's own noise schedule.

Each gets the settings of the model's own sampler that it understands (betas, prediction type, offsets); all others
keep that class's defaults. A name is one line in `SAMPLERS`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from everydream_kit.errors import ConfigError
from everydream_kit.models.flow import flow_scheduler

if TYPE_CHECKING:
    import torch

    from everydream_kit.models.family import Model


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers.

    Attributes:
        title: what UIs call it, for an image's metadata.
        module: under `diffusers.schedulers`.
        extra: settings on top of the model's.
    """

    title: str
    module: str
    class_name: str
    extra: dict[str, Any] = field(default_factory=dict)


_DPM = ("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler")
_SINGLE = ("scheduling_dpmsolver_singlestep", "DPMSolverSinglestepScheduler")
_SINGLE_EXTRA = {"lower_order_final": True}  # without it an odd number of steps is refused
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_KARRAS = {"use_karras_sigmas": True}

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIM", "scheduling_ddim", "DDIMScheduler"),
    "ddpm": Sampler("DDPM", "scheduling_ddpm", "DDPMScheduler"),
    "pndm": Sampler("PLMS", "scheduling_pndm", "PNDMScheduler", {"skip_prk_steps": True}),
    "lms": Sampler("LMS", "scheduling_lms_discrete", "LMSDiscreteScheduler"),
    "euler": Sampler("Euler", "scheduling_euler_discrete", "EulerDiscreteScheduler"),
    "euler_a": Sampler("Euler a", "scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler"),
    "heun": Sampler("Heun", "scheduling_heun_discrete", "HeunDiscreteScheduler"),
    "dpm2": Sampler("DPM2", "scheduling_k_dpm_2_discrete", "KDPM2DiscreteScheduler"),
    "dpm2_a": Sampler("DPM2 a", "scheduling_k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler"),
    "dpm++_2s": Sampler("DPM++ 2S", *_SINGLE, _SINGLE_EXTRA),
    "dpm++_2s_karras": Sampler("DPM++ 2S Karras", *_SINGLE, {**_SINGLE_EXTRA, **_KARRAS}),
    "dpm++_sde": Sampler("DPM++ SDE", *_SINGLE, {**_SINGLE_EXTRA, **_SDE}),
    "dpm++_sde_karras": Sampler("DPM++ SDE Karras", *_SINGLE, {**_SINGLE_EXTRA, **_SDE, **_KARRAS}),
    "dpm++_2m": Sampler("DPM++ 2M", *_DPM),
    "dpm++_2m_karras": Sampler("DPM++ 2M Karras", *_DPM, _KARRAS),
    "dpm++_2m_sde": Sampler("DPM++ 2M SDE", *_DPM, _SDE),
    "dpm++_2m_sde_karras": Sampler("DPM++ 2M SDE Karras", *_DPM, {**_SDE, **_KARRAS}),
    "unipc": Sampler("UniPC", "scheduling_unipc_multistep", "UniPCMultistepScheduler"),
}

_ALIASES = {
    "kdpm2": "dpm2_a",  # EveryDream 2's name of the ancestral one
    "kdpm2_a": "dpm2_a",
    "k_dpm_2": "dpm2",
    "k_dpm_2_a": "dpm2_a",
    "plms": "pndm",
    "k_lms": "lms",
    "euler_ancestral": "euler_a",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_euler_ancestral": "euler_a",
    "dpm++": "dpm++_2m",
    "dpm": "dpm++_2m",
    "uni_pc": "unipc",
}

_KEPT = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "steps_offset",
    "set_alpha_to_one",
    "clip_sample",
    "rescale_betas_zero_snr",
    "timestep_spacing",
)


def sampler_by_name(name: str) -> Sampler:
    """Find a sampler; spaces, hyphens and capitals do not matter, `dpmpp` is `dpm++`, and a `_k` at the end is `_karras`.

    Raises:
        ConfigError: unknown; the message names the nearest, and lists all.
    """
    key = re.sub(r"[\s_-]+", "_", name.strip().lower()).replace("dpmpp", "dpm++")
    key = re.sub(r"_k$", "_karras", _ALIASES.get(key, key))
    if key not in SAMPLERS:
        near = difflib.get_close_matches(key, [*SAMPLERS, *_ALIASES], n=1)
        hint = f"did you mean {near[0]}? Known" if near else "known"
        raise ConfigError(f"scheduler: {name!r} is unknown; {hint} are {', '.join(SAMPLERS)}.")
    return SAMPLERS[key]


def build_scheduler(model: Model, name: str) -> Any:
    """A fresh diffusers scheduler for sampling with this model.

    Raises:
        ConfigError: unknown name, or one that cannot start from the pure noise of a zero-terminal-SNR schedule.
    """
    sampler = sampler_by_name(name)
    if model.family.sampler.kind == "flow":
        flow_sampler_name(name)
        return flow_scheduler(model.scheduler_config)
    cls = _class_of(sampler)
    accepted = inspect.signature(cls.__init__).parameters
    settings = {key: model.scheduler_config[key] for key in _KEPT if key in model.scheduler_config}
    settings |= {"clip_sample": False, "prediction_type": model.prediction_type}
    if model.zero_terminal_snr:
        _refuse_finite_start(accepted, name)
        # A schedule that is rescaled already, in a list of betas, stays what it is; with this flag, a scheduler starts from a
        # finite noise level. The steps begin at the very last one (arXiv 2305.08891, sections 3.1 and 3.3).
        settings |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    settings |= sampler.extra
    return cls(**{key: value for key, value in settings.items() if key in accepted})


def flow_sampler_name(name: str) -> str:
    """What a flow model is sampled with by this name.

    Its straight paths make DDIM's step and Euler's the same one, so the name that is the default elsewhere works here, too.

    Raises:
        ConfigError: the scheduler is for diffusion.
    """
    if sampler_by_name(name) not in (SAMPLERS["ddim"], SAMPLERS["euler"]):
        raise ConfigError(f"scheduler: {name!r} is for diffusion models; a flow model is sampled with euler.")
    return "euler"


def begin(scheduler: Any, model: Model, num_inference_steps: int, size: tuple[int, int], device: torch.device) -> Any:
    """Set a scheduler's timesteps for images of a size (width, height). Returns the spread of the noise to start from."""
    if model.family.sampler.kind != "flow":
        scheduler.set_timesteps(num_inference_steps, device=device)
        return scheduler.init_noise_sigma
    sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
    dynamic = model.scheduler_config.get("use_dynamic_shifting", False)
    extra = {"mu": model.family.sampler.mu(model.scheduler_config, *size, num_inference_steps)} if dynamic else {}
    if num_inference_steps == 1 and scheduler.config.get("shift_terminal"):
        scheduler.register_to_config(
            shift_terminal=None
        )  # a single level cannot be stretched: diffusers makes it 0 / 0
    scheduler.set_timesteps(sigmas=sigmas, device=device, **extra)
    return 1.0


def _refuse_finite_start(accepted: Any, name: str) -> None:
    if "rescale_betas_zero_snr" in accepted:
        return
    usable = [
        key
        for key, sampler in SAMPLERS.items()
        if "rescale_betas_zero_snr" in inspect.signature(_class_of(sampler).__init__).parameters
    ]
    raise ConfigError(
        f"scheduler: {name!r} does not work with a zero-terminal-SNR model; take one of {', '.join(usable)}."
    )


def _class_of(sampler: Sampler) -> Any:
    return getattr(importlib.import_module(f"diffusers.schedulers.{sampler.module}"), sampler.class_name)
