"""`load_model`: from a Hub id, a diffusers folder or a single file to modules in memory.

The files are opened and understood first (`files.py`, `single_file.py`), so a wrong or damaged model costs no time; then
each module is built without values, and its weights go one by one from the file to the device, in their final format. Host
memory holds no more than one of them on the way. Recognition of family, prediction type and zero-terminal SNR is done
there; here is only the assembly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from everydream_kit.errors import ModelError
from everydream_kit.models.adapters import LORA_FILE, TOKENS_FILE, is_adapter_folder, read_adapter_file
from everydream_kit.models.components import build_component, fill
from everydream_kit.models.download import fetch_model, is_hub_id
from everydream_kit.models.family import Model, configs_folder
from everydream_kit.models.model_files import ModelFiles, open_folder, read_json
from everydream_kit.models.number_formats import Formats
from everydream_kit.models.single_file import open_single_file
from everydream_kit.models.tokenizer import Vocabulary, build_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from diffusers import DDPMScheduler
    from transformers import CLIPTokenizer


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | Formats = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    token: str | None = None,
    family: str | None = None,
    prediction_type: str | None = None,
    adapter_base: Mapping[str, Any] | None = None,
) -> Model:
    """Load a model for training or drawing.

    Args:
        source: a diffusers folder, a `.safetensors` or `.ckpt` file, or a Hub id.
        dtype: of the UNet and text encoders, or their formats by component. The VAE stays float32: it is small, and
            several overflow in float16.
        revision, subfolder, variant, token: for Hub ids (subfolder and variant for folders, too).
        family, prediction_type: overrides of what the files say.
        adapter_base: for a small checkpoint, the base to use in place of the one that it names: `source`, perhaps
            `revision`, `subfolder`, `variant`, `family` and `prediction_type`.

    Raises:
        ModelError: it is not there, damaged, or of a kind that the kit does not train.
    """
    where: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "variant": variant}
    folder = Path(source).expanduser()
    if folder.is_dir() and is_adapter_folder(folder):
        return _load_adapted(folder, adapter_base, dtype=dtype, device=device, token=token)
    files = open_model(source, token=token, family=family, prediction_type=prediction_type, **where)
    model = assemble(files, dtype=dtype, device=device)
    wanted = {"source": str(source), **where, "family": family, "prediction_type": prediction_type}
    model.origin = {name: value for name, value in wanted.items() if value is not None}
    return model


def _load_adapted(
    folder: Path,
    own_base: Mapping[str, Any] | None,
    *,
    dtype: torch.dtype | Formats,
    device: torch.device | str,
    token: str | None,
) -> Model:
    """A base with the live adapter of a small checkpoint."""
    from everydream_kit.models.lora import inject, set_lora
    from everydream_kit.models.lora_formats import read_lora
    from everydream_kit.models.lora_settings import LoraSettings
    from everydream_kit.models.tokens import load_tokens

    note = read_adapter_file(folder)
    origin = note["base"] if own_base is None else own_base
    base = {name: value for name, value in origin.items() if name != "source"}
    model = load_model(origin["source"], dtype=dtype, device=device, token=token, **base)
    if (folder / TOKENS_FILE).is_file():
        load_tokens(model, folder / TOKENS_FILE)
    if "lora" in note:
        inject(model, LoraSettings.from_json(note["lora"]), dtype=as_formats(dtype).trained)
        set_lora(model, read_lora(folder / LORA_FILE, open_model(origin["source"], token=token, **base)))
    for module in model.modules().values():
        module.to(device)  # what was added to the base
    model.source = str(folder)
    return model


def open_model(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    token: str | None = None,
    family: str | None = None,
    prediction_type: str | None = None,
) -> ModelFiles:
    """Find and open a model without reading its weights. Arguments and errors as `load_model`."""
    path = Path(source).expanduser()
    if path.is_file():
        return open_single_file(path, family=family, prediction_type=prediction_type)
    if path.is_dir() and is_adapter_folder(path):
        return _open_adapted(path, token)
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        return open_folder(folder, family=family, prediction_type=prediction_type, variant=variant)
    if not is_hub_id(str(source)):
        raise ModelError(
            f"{source}: there is no such file or folder, and it is not a Hub id (owner/repository) either."
        )
    where = fetch_model(str(source), revision=revision, subfolder=subfolder, variant=variant, token=token)
    files = open_model(where, family=family, prediction_type=prediction_type, variant=variant, token=token)
    return dataclasses.replace(files, source=str(source))


def _open_adapted(folder: Path, token: str | None) -> ModelFiles:
    """A base with the LoRA of a small checkpoint merged into it."""
    from everydream_kit.models.lora_formats import apply_lora, read_lora

    note = read_adapter_file(folder)
    base = open_model(token=token, **note["base"])
    if "lora" not in note:
        return base
    return dataclasses.replace(apply_lora(base, read_lora(folder / LORA_FILE, base)), source=str(folder))


def assemble(
    files: ModelFiles, *, dtype: torch.dtype | Formats = torch.float32, device: torch.device | str = "cpu"
) -> Model:
    """Build the modules, and read their weights. Arguments as `load_model`."""
    formats = as_formats(dtype)
    modules = {name: build_component(files.family.component(name), config) for name, config in files.configs.items()}
    for name, module in modules.items():
        dtypes = formats.of(name, module, files.stored_dtype(name))
        fill(module, files.tensors[name], dtypes, f"{files.source}/{name}", device)
    return model_of(files, modules)


def model_of(files: ModelFiles, modules: Mapping[str, torch.nn.Module]) -> Model:
    """A model of modules by their folders' names; everything else is as the files say."""
    family = files.family
    return Model(
        family=family,
        denoiser=modules[family.denoiser.folder],
        vae=modules[family.vae.folder].requires_grad_(False),
        text_encoders=[modules[slot.folder] for slot in family.text_encoders],
        tokenizers=[_tokenizer(files, slot.tokenizer_folder) for slot in family.text_encoders],
        noise_scheduler=training_scheduler(files.scheduler_config, files.prediction_type, files.zero_terminal_snr),
        scheduler_config=dict(files.scheduler_config),
        prediction_type=files.prediction_type,
        zero_terminal_snr=files.zero_terminal_snr,
        source=files.source,
    )


def as_formats(dtype: torch.dtype | Formats) -> Formats:
    """One format for all components, as formats by component."""
    return dtype if isinstance(dtype, Formats) else Formats(dtype)


def _tokenizer(files: ModelFiles, name: str) -> CLIPTokenizer:
    found = files.tokenizers[name]
    if isinstance(found, Vocabulary):
        return build_tokenizer(vocabulary=found)
    if found is not None:
        return load_tokenizer(found)
    shipped = read_json(configs_folder(files.family) / name / "tokenizer_config.json")
    return build_tokenizer(str(shipped["pad_token"]))


def training_scheduler(
    scheduler_config: dict[str, Any], prediction_type: str, zero_terminal_snr: bool
) -> DDPMScheduler:
    """The noise schedule for training, from the model's own sampler's betas.

    Args:
        zero_terminal_snr: rescale to zero terminal SNR unless the betas are so already.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    betas = scheduler_config.get("trained_betas")
    return DDPMScheduler(
        num_train_timesteps=scheduler_config.get("num_train_timesteps", 1000),
        beta_start=scheduler_config.get("beta_start", 0.00085),
        beta_end=scheduler_config.get("beta_end", 0.012),
        beta_schedule=scheduler_config.get("beta_schedule", "scaled_linear"),
        trained_betas=betas,
        prediction_type=prediction_type,
        clip_sample=False,
        rescale_betas_zero_snr=zero_terminal_snr and betas is None,
    )
