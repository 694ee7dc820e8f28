"""Generating images with a model: our own loop over diffusers' schedulers.

Why not a pipeline: the model is in the middle of training and must come back as it was; each image has its own
generator, so its noise depends on its seed alone and not on the batch or on what was generated before; all guidance
scales of a prompt start from the same noise; and importing pipelines costs seconds.

An image's noise comes from `torch.Generator("cpu").manual_seed(seed)`, and not from the kit's addressed draws: the
seed that is written into an image then gives the same image in diffusers.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from everydream_kit.errors import ConfigError
from everydream_kit.models.captures import Capture
from everydream_kit.models.encoding import decode_latents, encode_captions, scale_rows
from everydream_kit.models.family import Conditioning, Family, Model, Sizes
from everydream_kit.models.predictions import Predictions
from everydream_kit.models.sample_grids import label_grid, save_image
from everydream_kit.models.sampling_schedulers import begin, build_scheduler, flow_sampler_name, sampler_by_name

__all__ = ["SamplePrompt", "label_grid", "sample_images", "save_image", "settings_text"]

logger = logging.getLogger(__name__)

ZERO_SNR_GUIDANCE_RESCALE = 0.7
"""arXiv 2305.08891, section 3.4: what zero-terminal-SNR models need against over-exposure."""

EncodeTexts = Callable[[list[str]], Conditioning]
Progress = Callable[[int, int], None]
"""Called with (denoising steps done, denoising steps in all), counted over all batches."""


@dataclass(frozen=True)
class SamplePrompt:
    """One wanted image, at one or several guidance scales.

    Attributes:
        seed: of the starting noise, the same for every scale.
        width, height: in pixels, multiples of 8.
        cfgs: guidance scales; one image each.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    width: int = 512
    height: int = 512
    cfgs: tuple[float, ...] = (7.0,)


@dataclass(frozen=True)
class _Row:
    """One image of a batch: a prompt at one guidance scale, and where its image goes."""

    position: int
    prompt: SamplePrompt
    cfg: float


def sample_images(
    model: Model,
    prompts: Sequence[SamplePrompt],
    *,
    scheduler: str = "ddim",
    num_inference_steps: int = 30,
    clip_skip: int = 0,
    batch_size: int = 4,
    guidance_rescale: float | None = None,
    progress: Progress | None = None,
    encode: EncodeTexts | None = None,
    capture: Capture | None = None,
) -> list[Image.Image]:
    """Generate images. The model comes back in the modes that it came in. Where guidance is an input of the denoiser, a scale
    takes no second prediction, and negative prompts have no effect.

    Args:
        prompts: what to generate. Prompts longer than the text encoder's window are read in chunks of it.
        scheduler: by name (`samplers.SAMPLERS`).
        num_inference_steps: denoising steps.
        batch_size: images that go through the UNet together; does not change them beyond rounding.
        guidance_rescale: arXiv 2305.08891, equation 16; None: 0.7 for zero-terminal-SNR models, else 0.
        encode: gives the conditioning of texts; None: the model's text encoders, which are on its device then.
        capture: of the device: predictions of one shape are captured once and replayed, where they stay the same.

    Returns:
        One image for each guidance scale of each prompt, in order. `image.info["parameters"]` holds its settings
        as the common UIs write them; `save_image` puts them into the file.

    Raises:
        ConfigError: unknown scheduler, or a size that is not a multiple of 8.
    """
    wanted = [(prompt, cfg) for prompt in prompts for cfg in prompt.cfgs]
    rows = [_Row(position, prompt, cfg) for position, (prompt, cfg) in enumerate(wanted)]
    for row in rows:
        _check_size(row.prompt, model.family.sampler.size_multiple)
    if model.family.sampler.kind == "flow":
        scheduler = flow_sampler_name(scheduler)
    if not is_doubled(model.family) and any(row.prompt.negative_prompt for row in rows):
        logger.warning("Negative prompts have no effect: %s makes one prediction a step.", model.family.title)
    rescale = guidance_rescale
    if rescale is None:
        rescale = ZERO_SNR_GUIDANCE_RESCALE if model.zero_terminal_snr else 0.0
    images: list[Image.Image | None] = [None] * len(rows)
    batches = list(_batches(model, rows, batch_size))
    predictions = Predictions(model, capture)
    with _sampling_mode(model), predictions:
        for number, (num_chunks, batch) in enumerate(batches):
            report = None if progress is None else _part_of(progress, number, len(batches))
            latents = _denoise(
                model,
                batch,
                predictions,
                build_scheduler(model, scheduler),
                num_inference_steps=num_inference_steps,
                clip_skip=clip_skip,
                num_chunks=num_chunks,
                guidance_rescale=rescale,
                progress=report,
                encode=encode,
            )
            for row, pixels in zip(batch, decode_latents(model, latents), strict=True):
                image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
                image.info["parameters"] = settings_text(
                    row.prompt,
                    row.cfg,
                    scheduler=scheduler,
                    num_inference_steps=num_inference_steps,
                    clip_skip=clip_skip,
                    model_name=model.source,
                    guidance_rescale=rescale,
                )
                images[row.position] = image
    return [image for image in images if image is not None]


def settings_text(
    prompt: SamplePrompt,
    cfg: float,
    *,
    scheduler: str,
    num_inference_steps: int,
    clip_skip: int = 0,
    model_name: str = "",
    guidance_rescale: float = 0.0,
) -> str:
    """An image's settings in the form that AUTOMATIC1111, Forge, ComfyUI and InvokeAI read back from a file."""
    lines = [prompt.prompt]
    if prompt.negative_prompt:
        lines.append(f"Negative prompt: {prompt.negative_prompt}")
    settings: dict[str, object] = {
        "Steps": num_inference_steps,
        "Sampler": sampler_by_name(scheduler).title,
        "CFG scale": f"{cfg:g}",
        "Seed": prompt.seed,
        "Size": f"{prompt.width}x{prompt.height}",
    }
    if model_name:
        settings["Model"] = model_name.rstrip("/").rpartition("/")[2].replace(",", " ")
    if clip_skip > 1:
        settings["Clip skip"] = clip_skip
    if guidance_rescale:
        settings["CFG Rescale φ"] = f"{guidance_rescale:g}"
    settings["Version"] = "EveryDream Kit"
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in settings.items())])


def _check_size(prompt: SamplePrompt, multiple: int) -> None:
    if prompt.width % multiple or prompt.height % multiple or min(prompt.width, prompt.height) < multiple:
        raise ConfigError(
            f"size {prompt.width} x {prompt.height} of the prompt {prompt.prompt!r}: width and height must be "
            f"multiples of {multiple}."
        )


def _batches(model: Model, rows: Sequence[_Row], batch_size: int) -> Iterator[tuple[int, list[_Row]]]:
    """Rows of one size and one text length together, in order; the text length is in chunks."""
    groups: dict[tuple[int, int, int], list[_Row]] = {}
    for row in rows:
        prompt = row.prompt
        num_chunks = model.family.count_windows(model, [prompt.prompt, prompt.negative_prompt])
        groups.setdefault((prompt.width, prompt.height, num_chunks), []).append(row)
    for (_, _, num_chunks), group in groups.items():
        for start in range(0, len(group), batch_size):
            yield num_chunks, group[start : start + batch_size]


@contextmanager
def _sampling_mode(model: Model) -> Iterator[None]:
    """No gradients, no dropout; every module's mode is put back, whatever happens."""
    parts = [part for module in model.modules().values() for part in module.modules()]
    modes = [part.training for part in parts]
    for module in model.modules().values():
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            part.training = mode


def _part_of(progress: Progress, number: int, num_batches: int) -> Progress:
    return lambda done, total: progress(number * total + done, num_batches * total)


def _denoise(
    model: Model,
    rows: Sequence[_Row],
    predict: Predictions,
    scheduler: Any,
    *,
    num_inference_steps: int,
    clip_skip: int,
    num_chunks: int,
    guidance_rescale: float,
    progress: Progress | None,
    encode: EncodeTexts | None,
) -> torch.Tensor:
    """From noise to latents (B, 4, h, w)."""
    device = model.device
    prompt = rows[0].prompt
    shape = (1, *model.family.latent_space.shape(model, prompt.width, prompt.height))
    generators = [torch.Generator("cpu").manual_seed(row.prompt.seed) for row in rows]
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    guided = is_doubled(model.family) and any(row.cfg != 1 for row in rows)
    cfg = torch.tensor([row.cfg for row in rows], device=device).view(-1, 1, 1, 1)
    conditioning = _conditioning(model, rows, clip_skip, num_chunks, guided, encode)
    conditioning.guidance = cfg.flatten()
    sizes = Sizes.uncropped(prompt.width, prompt.height, len(rows) * (2 if guided else 1))
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if takes_generator else {}

    latents: torch.Tensor = noise * begin(scheduler, model, num_inference_steps, (prompt.width, prompt.height), device)
    scale_input = getattr(scheduler, "scale_model_input", lambda latents, timestep: latents)  # flow matching has none
    for done, timestep in enumerate(scheduler.timesteps):
        doubled = torch.cat([latents, latents]) if guided else latents
        model_input = scale_input(doubled, timestep)
        prediction = predict(model_input, timestep.expand(len(doubled)), conditioning, sizes)
        if guided:
            negative, positive = prediction.chunk(2)
            prediction = guide(negative, positive, cfg, guidance_rescale)
            prediction = model.family.sampler.after_guidance(prediction, positive)
            del negative, positive
        latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
        if progress is not None:
            progress(done + 1, len(scheduler.timesteps))
    return latents


def _conditioning(  # noqa: PLR0917 - what `_denoise` was asked, in its order
    model: Model,
    rows: Sequence[_Row],
    clip_skip: int,
    num_chunks: int,
    guided: bool,
    encode: EncodeTexts | None,
) -> Conditioning:
    """The rows' texts; with guidance, their negative prompts before them.

    As in diffusers, SDXL has zeros where there is no negative prompt; an empty prompt is encoded like any text.
    """
    negative = [row.prompt.negative_prompt for row in rows] if guided else []
    texts = negative + [row.prompt.prompt for row in rows]
    unique = list(dict.fromkeys(texts))
    if encode is None:
        encoded = encode_captions(model, unique, clip_skip, num_chunks=num_chunks, zero_empty=False)
    else:
        encoded = encode(unique)
    conditioning = encoded.rows([unique.index(text) for text in texts]).to(model.device)
    if not model.family.zeros_for_empty or "" not in negative:
        return conditioning
    return scale_rows(conditioning, [float(text != "") for text in negative] + [1.0] * len(rows))


def is_doubled(family: Family) -> bool:
    """Whether guidance takes a second prediction, for the negative prompt."""
    return family.sampler.guidance == "cfg"


def guide(
    unconditional: torch.Tensor, conditional: torch.Tensor, cfg: torch.Tensor, guidance_rescale: float = 0.0
) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2207.12598, equation 6 with w = cfg - 1), rescaled by arXiv 2305.08891,
    equations 15, 16.

    Args:
        unconditional, conditional: (B, C, h, w) predictions.
        cfg: (B, 1, 1, 1).
    """
    guided = unconditional + cfg * (conditional - unconditional)
    if guidance_rescale == 0:
        return guided
    axes = (1, 2, 3)
    rescaled = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return guidance_rescale * rescaled + (1 - guidance_rescale) * guided
