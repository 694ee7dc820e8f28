"""A VAE that is given for itself (`vae`): in place of a model's own, or for a file that holds none.

Read are a file of any tool (LDM's or diffusers' names, with or without `first_stage_model.`), a full checkpoint, of which
only the VAE counts, and a diffusers folder of a VAE or of a model. A file says nothing of its scale, so the config is then
that of the model that it joins.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

from everydream_kit.errors import ModelError
from everydream_kit.models.convert import VAE_PREFIX, vae_from_single_file
from everydream_kit.models.family import Config, ModelFiles
from everydream_kit.models.model_files import open_component, read_json
from everydream_kit.models.tensors import Tensors
from everydream_kit.models.weight_files import open_weights

logger = logging.getLogger(__name__)

OLD_SCALE = 0.18215
"""`scaling_factor` of Stable Diffusion 1's VAE, whose old configs do not say it; diffusers' default."""


def with_given_vae(files: ModelFiles, vae: str | Path | None) -> ModelFiles:
    """A model with the VAE at this path in place of its own; None keeps its own.

    Raises:
        ModelError: there is no VAE at this path, it is one of another family's class or number of latent channels, or the
            family is used with its own.
    """
    if vae is None:
        return files
    if "vae" in files.family.refuses:
        raise ModelError(f"vae: {files.family.refuses['vae']} ({files.family.title}). Leave it out.")
    config, tensors = read_vae(Path(vae).expanduser())
    _require_fit(files, str(vae), config, tensors)
    if config is None:
        config = files.configs["vae"]
        scale = "its statistics" if config.get("latents_mean") else f"scaling_factor {_scale_of(config)}"
        logger.info(
            "vae: %s is a file, which does not say its scale; that of %s is taken: %s.", vae, files.source, scale
        )
    return dataclasses.replace(
        files,
        configs={**files.configs, "vae": config},
        tensors={**files.tensors, "vae": vae_from_single_file(tensors, config)},
    )


def _require_fit(files: ModelFiles, vae: str, config: Config | None, tensors: Tensors) -> None:
    """Refuse a VAE whose latents the denoiser cannot take, and warn of one that scales them otherwise."""
    own, title = files.configs["vae"], files.family.title
    wanted = files.family.vae.class_name
    given = wanted if config is None else str(config.get("_class_name", wanted))
    if given != wanted:
        raise ModelError(f"vae: {vae} is an {given}, {title} needs an {wanted}. Give a VAE made for {title}.")
    channels, needed = _latent_channels(tensors), own.get("latent_channels", own.get("z_dim"))
    if channels is not None and channels != needed:
        raise ModelError(
            f"vae: {vae} has {channels} latent channels, {title} needs {needed}. Give a VAE made for {title}."
        )
    scales = [_scale_of(one) for one in (config or own, own)]
    if scales[0] != scales[1]:
        logger.warning(
            "vae: %s scales latents by %s, and %s by %s. It seems made for another family, so samples will be "
            "wrong until training has learned that scale. Give a VAE made for %s.",
            vae,
            scales[0],
            files.source,
            scales[1],
            title,
        )


def _scale_of(config: Config) -> float:
    return float(config.get("scaling_factor", OLD_SCALE))


def _latent_channels(tensors: Tensors) -> int | None:
    found = next((value for name, value in tensors.items() if name.endswith("decoder.conv_in.weight")), None)
    return None if found is None else found.shape[1]


def read_vae(path: Path) -> tuple[Config | None, Tensors]:
    """A VAE's config, where a folder says it, and its weights by any layout's names.

    Raises:
        ModelError: there is none at this path.
    """
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        if not (folder / "config.json").is_file():
            raise ModelError(f"vae: {path} holds no VAE (config.json or vae/config.json is missing).")
        return read_json(folder / "config.json"), open_component(folder)
    if not path.is_file():
        raise ModelError(f"vae: {path} is not a file or folder here. Give a VAE's file, or a diffusers folder of one.")
    tensors = open_weights(path)[0]
    found = [name for name in tensors if re.search(r"(^|\.)decoder\.conv_in\.weight$", name)]
    if not found:
        raise ModelError(f"vae: {path} holds no VAE.")
    # a trainer's wrapper may stand before it; of several, the checkpoint's own
    prefix = max(found, key=lambda name: VAE_PREFIX in name).removesuffix("decoder.conv_in.weight")
    return None, {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix) and (prefix or not name.startswith("model."))
    }
