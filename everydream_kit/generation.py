"""`sample`: generate images with any model or checkpoint, and write them with their settings inside.

The sampling itself is in `models/sampling.py`; here is finding the model that a person means, and naming the files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.config import EMBEDDED_MODEL, default_of
from everydream_kit.disk_space import make_place, require_place
from everydream_kit.errors import ConfigError, ModelError
from everydream_kit.params import check_value
from everydream_kit.runs import RunFolder, list_runs
from everydream_kit.runs.run_folder import is_run

if TYPE_CHECKING:
    from PIL.Image import Image

    from everydream_kit.models.family import Model, SamplerSpec
    from everydream_kit.models.sampling import SamplePrompt

    Checkpoint = str | Path | RunFolder | Model
else:
    Checkpoint = str | Path | RunFolder
    """What the command line can name."""

logger = logging.getLogger(__name__)


def sample(
    checkpoint: Checkpoint | Sequence[Checkpoint],
    prompts: str | Sequence[str],
    *,
    negative_prompt: str = "",
    cfgs: Sequence[float] | None = None,
    scheduler: str = "ddim",
    num_inference_steps: int | None = None,
    seed: int = default_of("seed"),
    num_images: int = 1,
    width: int | None = None,
    height: int | None = None,
    clip_skip: int = 0,
    lora: str | Path | None = None,
    vae: str | Path | None = None,
    adapter_base: str | Path | None = None,
    out: str | Path = "samples",
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Generate images and write them as PNG files that carry their settings, with a labeled grid of all.

    Args:
        checkpoint: diffusers folder, single file, Hub id, run folder (its last checkpoint), or `embedded`; in Python also a
            loaded model. Several are loaded one after the other and are side by side on the grid.
        prompts: what to generate.
        cfgs: guidance scales; each prompt is generated at each, from the same noise. By default the one that is usual for
            the model's family: 7 for Stable Diffusion, 4 to 5.5 for Z-Image, Anima and their like, 3.5 for FLUX.1; 1, which is
            none, for models whose name says that they are distilled (Turbo, Lightning, schnell).
        negative_prompt: what the images should not show.
        scheduler: denoising scheduler, by its name in the sample settings.
        num_inference_steps: denoising steps of an image; by default as many as are usual for the family, 28 to 50, or 4 to 8
            for distilled models.
        seed: of the first image of each prompt.
        num_images: images of each prompt, with seeds counting up from `seed`.
        width, height: in pixels; by default the model's own size.
        clip_skip: layers of the text encoder that are skipped at its end.
        lora: a LoRA to generate with: its file, a checkpoint, or a run folder (its last checkpoint).
        vae: a VAE to use in place of the models' own: its file, or a diffusers folder.
        adapter_base: for LoRA checkpoints, their base, where the one that they name has moved.
        out: folder for the images; made if it is not there.
        progress: called with (denoising steps done, in all).

    Returns:
        The image files, by checkpoint, then in order of prompt, seed and cfg; last the grid, where there is more than
        one image.

    Raises:
        ModelError: a checkpoint cannot be used.
        ConfigError: no prompt, no checkpoint, or a value that its setting does not allow.
    """
    from everydream_kit.models.sampling import SamplePrompt, sample_images

    _check_settings(
        cfgs=None if cfgs is None else list(cfgs),
        num_inference_steps=num_inference_steps,
        seed=seed,
        width=width,
        height=height,
        clip_skip=clip_skip,
    )
    if num_images < 1:
        raise ConfigError(f"num_images: must be at least 1 (got {num_images})")
    _check_out(Path(out))
    texts: list[str] = _as_list("prompt", prompts)
    checkpoints: list[Checkpoint] = _as_list("checkpoint", checkpoint)
    wanted: list[SamplePrompt] = []
    drawn, scales = [], tuple(cfgs or ())
    bases = _adapter_bases(checkpoints, adapter_base)
    for number, (each, base) in enumerate(zip(checkpoints, bases, strict=True)):
        model = open_for_sampling(each, lora=lora, vae=vae, adapter_base=base)
        _check_clip_skip(model, clip_skip)
        side, usual = native_size(model), _usual_sampling(model, is_asked=not (cfgs and num_inference_steps))
        scales = scales or usual.cfgs[:1]  # the first one's for all: they stand side by side on the grid
        wanted = [
            SamplePrompt(text, negative_prompt, seed + index, width or side, height or side, scales)
            for text in texts
            for index in range(num_images)
        ]
        images = sample_images(
            model,
            wanted,
            scheduler=scheduler,
            num_inference_steps=num_inference_steps or usual.num_steps,
            clip_skip=clip_skip,
            progress=_part_of(progress, number, len(checkpoints)),
        )
        drawn.append((_label(each), images))
        del model  # before the next one is loaded
    return _write_images(Path(out), wanted, drawn)


def _usual_sampling(model: Model, *, is_asked: bool) -> SamplerSpec:
    """What is usual for the model. Where it is asked for, a distilled model is named, since its name may be chance."""
    usual = model.family.sampler_of(model.source)
    if is_asked and usual is not model.family.sampler:
        logger.warning(
            "%s: its name or index says that it is distilled. Unless given, --num_inference_steps is %d and --cfg %g.",
            model.source,
            usual.num_steps,
            usual.cfgs[0],
        )
    return usual


def _as_list(name: str, given: Any) -> list[Any]:
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    if not several:
        raise ConfigError(f"{name}: give at least one")
    return several


_SETTINGS = {
    "cfgs": "sample_cfgs",
    "num_inference_steps": "sample_num_inference_steps",
    "seed": "sample_seed",
    "width": "sample_resolution",
    "height": "sample_resolution",
    "clip_skip": "clip_skip",
}
"""Arguments of `sample` that mean what a setting means, and so allow what it allows."""


def _check_settings(**given: Any) -> None:
    for name, value in given.items():
        problem = None if value is None else check_value(_SETTINGS[name], value)
        if problem is not None:
            raise ConfigError(f"{name}: {problem}")


def _check_out(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out: {folder} is a file; give a folder for the images")
    require_place(folder, "out")


def _check_clip_skip(model: Model, clip_skip: int) -> None:
    why = model.family.refuses.get("clip_skip")
    if clip_skip and why is not None:
        raise ConfigError(f"clip_skip: {why} ({model.family.title}). Leave it out.")


def _adapter_bases(checkpoints: Sequence[Checkpoint], adapter_base: str | Path | None) -> Sequence[str | Path | None]:
    """The base for each checkpoint: what is named for LoRA checkpoints, None for whole models and loaded ones."""
    if adapter_base is None:
        return [None] * len(checkpoints)
    from everydream_kit.models.family import Model
    from everydream_kit.models.loading import adapter_bases

    sources = [each.source if isinstance(each, Model) else resolve_checkpoint(each) for each in checkpoints]
    found = adapter_bases(sources, adapter_base)
    return [
        None if isinstance(each, Model) or base is None else adapter_base
        for each, base in zip(checkpoints, found, strict=True)
    ]


def _part_of(progress: Callable[[int, int], None] | None, number: int, count: int) -> Callable[[int, int], None] | None:
    """Progress of one of several checkpoints, reported as that of all."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)


def _write_images(
    folder: Path, wanted: Sequence[SamplePrompt], drawn: Sequence[tuple[str, Sequence[Image]]]
) -> list[Path]:
    """A file for each image, and the grid: prompts and seeds downwards, checkpoints and guidance scales across."""
    from everydream_kit.models.sampling import label_grid, save_image

    make_place(folder, "out")
    several = len(drawn) > 1
    names = [(prompt, cfg) for prompt in wanted for cfg in prompt.cfgs]
    paths = []
    for label, images in drawn:
        start = f"{_as_file_name(label)}-" if several else ""
        for (prompt, cfg), image in zip(names, images, strict=True):
            stem = f"{start}{_as_file_name(prompt.prompt)}-seed{prompt.seed}-cfg{cfg:g}"
            paths.append(_free_name(folder, stem))
            save_image(image, paths[-1])
    if len(paths) > 1:
        cfgs = wanted[0].cfgs
        rows = [
            [image for _, images in drawn for image in images[row * len(cfgs) : (row + 1) * len(cfgs)]]
            for row in range(len(wanted))
        ]
        columns = [f"{label}, cfg {cfg:g}" if several else f"cfg {cfg:g}" for label, _ in drawn for cfg in cfgs]
        labels = [f"{prompt.prompt} (seed {prompt.seed})" for prompt in wanted]
        paths.append(_free_name(folder, "grid"))
        save_image(label_grid(rows, column_labels=columns, row_labels=labels), paths[-1])
    return paths


def _label(checkpoint: Checkpoint) -> str:
    """What a checkpoint is called on the grid: the last part of its name."""
    from everydream_kit.models.family import Model

    source = checkpoint.source if isinstance(checkpoint, Model) else str(checkpoint)
    if not isinstance(checkpoint, Model) and source != EMBEDDED_MODEL:
        source = str(resolve_checkpoint(checkpoint))
    return Path(source).name


def open_for_sampling(
    checkpoint: Checkpoint,
    *,
    lora: str | Path | None = None,
    vae: str | Path | None = None,
    adapter_base: str | Path | None = None,
) -> Model:
    """Load the model that is meant, on the device there is, with a LoRA merged into it if one is given.

    Args:
        vae, adapter_base: as in `sample`.

    Raises:
        ModelError: the checkpoint or the LoRA cannot be used, or do not belong together.
        ConfigError: a LoRA for a model that is loaded already.
    """
    import torch

    from everydream_kit.models.family import Model
    from everydream_kit.models.loading import assemble, load_model, open_model

    if isinstance(checkpoint, Model):
        for name, given in (("lora", lora), ("vae", vae)):
            if given is not None:
                raise ConfigError(f"{name}: give the checkpoint's path, so that it can be used while it is loaded")
        return checkpoint
    source = resolve_checkpoint(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = open_model(source, vae=vae, adapter_base=adapter_base)
    half = torch.bfloat16 if files.family.objective == "flow" else torch.float16  # their activations overflow float16
    dtype = half if device == "cuda" else torch.float32
    if lora is None:
        return load_model(source, dtype=dtype, device=device, vae=vae, adapter_base=adapter_base)
    from everydream_kit.models.lora.files import apply_lora, read_lora_file
    from everydream_kit.models.tokens import put_tokens

    read = read_lora_file(_resolve_lora(lora), files)
    model = assemble(apply_lora(files, read), dtype=dtype, device=device)
    if read.embeddings:
        put_tokens(model, read.embeddings, str(lora))
    return model


def _resolve_lora(lora: str | Path) -> Path:
    """The file or checkpoint that is meant by `lora`.

    Raises:
        ConfigError: there is none.
    """
    from everydream_kit.models.lora.files import is_lora

    path = Path(resolve_checkpoint(lora)).expanduser()
    if not path.exists():
        raise ConfigError(f"lora: {lora} is not there. Give a LoRA's file, a LoRA checkpoint or a run folder.")
    if path.is_dir() and not is_lora(path):
        what = (
            "a complete model; generate with it as the checkpoint"
            if (path / "model_index.json").is_file()
            else ("a folder without a LoRA. Give a LoRA's file, a LoRA checkpoint or a run folder")
        )
        raise ConfigError(f"lora: {path} is {what}.")
    return path


MOST_NAMED = 3
"""Runs in a message."""


def resolve_checkpoint(checkpoint: str | Path | RunFolder) -> str | Path:
    """What a person means: a run's last checkpoint, the embedded model's folder, or what was given."""
    if isinstance(checkpoint, RunFolder):
        return checkpoint.last_checkpoint
    if str(checkpoint) == EMBEDDED_MODEL:
        from everydream_kit.demo import base_model_path

        return base_model_path()
    if is_run(Path(checkpoint)):
        return RunFolder(Path(checkpoint)).last_checkpoint
    if runs := list_runs(checkpoint):
        some = ", ".join(str(run.folder) for run in reversed(runs[-MOST_NAMED:]))
        raise ConfigError(f"{checkpoint}: is a folder of runs. Name one of them, the latest first: {some}.")
    return checkpoint


def native_size(model: Model) -> int:
    """Side in pixels that a model samples best: its denoiser's sample size times the VAE's factor, else its family's."""
    config: Any = model.denoiser.config
    cells = config.get("sample_size")
    if cells is None:
        return model.family.resolution(model.prediction_type)
    return int(cells if isinstance(cells, int) else cells[0]) * model.vae_scale_factor


def caption_reading(model: str | Path) -> tuple[Callable[[str], int], int]:
    """How captions are read by a model of a diffusers folder: (text -> tokens without marks, and how many are read).

    A folder that names no pipeline is taken as Stable Diffusion's.
    """
    from everydream_kit.models.families import FAMILIES
    from everydream_kit.models.model_files import MODULAR_INDEX
    from everydream_kit.models.tokenizer import load_language_tokenizer, load_tokenizer
    from everydream_kit.strict_json import read_json

    whole = Path(resolve_checkpoint(model))
    index = next((whole / name for name in ("model_index.json", MODULAR_INDEX) if (whole / name).is_file()), None)
    pipeline = None if index is None else read_json(index, error=ModelError).get("_class_name")
    family = next((one for one in FAMILIES.values() if one.pipeline_class == pipeline), FAMILIES["sd1"])
    folder = whole / family.text_encoders[-1].tokenizer_folder
    class_name = read_json(folder / "tokenizer_config.json", error=ModelError, missing={}).get("tokenizer_class")
    is_clip = str(class_name or "CLIP").startswith("CLIP")
    tokenizer = load_tokenizer(folder) if is_clip else load_language_tokenizer(folder, str(class_name))
    return lambda caption: len(tokenizer(caption, add_special_tokens=False)["input_ids"]), family.caption_tokens


def _as_file_name(prompt: str) -> str:
    """At most 60 characters and 90 bytes: two of them and the settings stay below the 255 bytes of a name."""
    name = re.sub(r"[^\w\-]+", "-", prompt).strip("-")[:60]
    return name.encode(errors="ignore")[:90].decode(errors="ignore").strip("-") or "empty"


def _free_name(folder: Path, stem: str) -> Path:
    """A PNG name that is not taken: earlier images are never overwritten."""
    path, number = folder / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.png"
    return path
