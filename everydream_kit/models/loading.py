"""`load_model`: from a Hub id, a diffusers folder or a single file to modules in memory.

The files are opened and understood first (`model_files.py`, `single_file.py`), so a wrong or damaged model costs no time; then
each module is built without values, and its weights go one by one from the file to the device, in their final format. Host
memory holds no more than one of them on the way. Recognition of family, prediction type and zero-terminal SNR is done
there; here is only the assembly.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from everydream_kit.errors import ModelError
from everydream_kit.models.adapters import (
    AdapterBase,
    base_to_open,
    explaining_base,
    is_adapter_folder,
    kind_of_adapter,
    read_adapter_file,
)
from everydream_kit.models.block_swap import waiting_prefixes
from everydream_kit.models.components import build_component, fill
from everydream_kit.models.download import fetch_model, is_hub_id
from everydream_kit.models.families import family_in_header
from everydream_kit.models.family import Family, Model, ModelFiles, TextEncoderSlot, configs_folder, has_large_texts
from everydream_kit.models.fingerprints import weights_fingerprint
from everydream_kit.models.flow import flow_scheduler
from everydream_kit.models.model_files import open_folder, read_json
from everydream_kit.models.number_formats import Formats
from everydream_kit.models.quantized import quantized_layers
from everydream_kit.models.single_file import open_single_file
from everydream_kit.models.tokenizer import (
    Vocabulary,
    build_plain_tokenizer,
    build_tokenizer,
    load_language_tokenizer,
    load_tokenizer,
)
from everydream_kit.models.vae_files import with_given_vae
from everydream_kit.models.weight_files import open_weights
from everydream_kit.runs.layout import LORA_FILE, TOKENS_FILE

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

logger = logging.getLogger(__name__)

TABLE_SHARE = 0.9
"""Of a text encoder's table, the least that its own tokenizer has words for."""


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
    vae: str | Path | None = None,
    adapter_base: AdapterBase | None = None,
    check: Callable[[Family], None] | None = None,
    large_texts_on: torch.device | str | None = None,
    blocks_in_host_memory: int | str = 0,
) -> Model:
    """Load a model for training or sampling.

    Args:
        source: a diffusers folder, a `.safetensors` or `.ckpt` file, or a Hub id.
        dtype: of the UNet and text encoders, or their formats by component. The VAE stays float32: it is small, and
            several overflow in float16.
        revision, subfolder, variant, token: for Hub ids (subfolder and variant for folders, too).
        family, prediction_type: overrides of what the files say.
        vae: a VAE to use in place of the model's own: its file, or a diffusers folder.
        adapter_base: for a small checkpoint, the base to use in place of the one that it names: path or Hub id, or these
            arguments by name.
        check: called with the family once it is known, before any weight is read; may raise.
        large_texts_on: where text encoders go that are never trained; by default to the device.
        blocks_in_host_memory: blocks of the denoiser that stay in host memory (`block_swap`).

    Raises:
        ModelError: it is not there, damaged, or of a kind that the kit does not train.
    """
    where: dict[str, Any] = {"revision": revision, "subfolder": subfolder, "variant": variant}
    placing = _Placing(dtype, device, large_texts_on, blocks_in_host_memory, check)
    folder = Path(source).expanduser()
    if folder.is_dir() and is_adapter_folder(folder):
        return _load_adapted(folder, adapter_base, placing, token=token, vae=vae)
    how: dict[str, Any] = {"family": family, "prediction_type": prediction_type, "vae": vae}
    files = open_model(source, token=token, adapter_base=adapter_base, **how, **where)
    wanted = {"source": str(source), **where, **how}
    return _load_opened(files, wanted, placing)


@dataclass(frozen=True)
class _Placing:
    """How and where a model is loaded: arguments of `load_model`."""

    dtype: torch.dtype | Formats
    device: torch.device | str
    large_texts_on: torch.device | str | None
    blocks_in_host_memory: int | str
    check: Callable[[Family], None] | None


def _load_opened(files: ModelFiles, wanted: Mapping[str, Any], placing: _Placing) -> Model:
    """Modules that know how to be loaded again, whatever the working folder is then."""
    if placing.check is not None:
        placing.check(files.family)
    model = assemble(
        files,
        dtype=placing.dtype,
        device=placing.device,
        large_texts_on=placing.large_texts_on,
        blocks_in_host_memory=placing.blocks_in_host_memory,
    )
    model.origin = {name: value for name, value in wanted.items() if value is not None}
    for name in model.origin.keys() & {"source", "vae"}:
        local = Path(model.origin[name]).expanduser()
        model.origin[name] = str(local.absolute() if local.exists() else model.origin[name])
    model.fingerprint = weights_fingerprint(files)
    return model


def _load_adapted(
    folder: Path,
    own_base: AdapterBase | None,
    placing: _Placing,
    *,
    token: str | None,
    vae: str | Path | None,
) -> Model:
    """A base with the live adapter of a small checkpoint."""
    from everydream_kit.models.lora.adapter_settings import LoraSettings
    from everydream_kit.models.lora.files import read_lora
    from everydream_kit.models.lora.injection import inject, set_lora
    from everydream_kit.models.tokens import load_tokens

    note = read_adapter_file(folder)
    files = open_base(folder, note, own_base, token=token, vae=vae)
    wanted = base_to_open(note, own_base)
    model = _load_opened(files, wanted if vae is None else {**wanted, "vae": vae}, placing)
    if (folder / TOKENS_FILE).is_file():
        load_tokens(model, folder / TOKENS_FILE)
    if "lora" in note:
        inject(model, LoraSettings.from_json(note["lora"]), dtype=as_formats(placing.dtype).trained)
        set_lora(model, read_lora(folder / LORA_FILE, files))
    stay = {id(text_encoder) for text_encoder in model.text_encoders if has_large_texts(model.family)}
    if placing.blocks_in_host_memory:
        stay.add(id(model.denoiser))  # whoever swaps the blocks brings what was added to them
    for module in model.modules().values():
        if id(module) not in stay:
            module.to(placing.device)  # what was added to the base
    model.source = str(folder)
    return model


def open_base(
    folder: Path,
    note: Mapping[str, Any],
    own_base: AdapterBase | None = None,
    *,
    token: str | None = None,
    vae: str | Path | None = None,
) -> ModelFiles:
    """Open the base of a small checkpoint. Warns of one whose weights are not those that the checkpoint was trained on.

    Args:
        note: what `read_adapter_file` read.
        own_base: the base to use in place of the one that the note names.

    Raises:
        ModelError: it cannot be used; the message says whose base it is, and how to name another.
    """
    wanted = base_to_open(note, own_base)
    wanted["vae"] = vae or wanted.get("vae")
    with explaining_base(folder, note, str(wanted["source"])):
        files = open_model(token=token, **wanted)
        _refuse_other_family(folder, files)
        trained_on = note.get("base_fingerprint")
        if trained_on is not None and weights_fingerprint(files) != trained_on:
            logger.warning(
                "%s: the weights of %s are not those of the base that this %s was trained on (%s), so results will differ. "
                "Name the right one with --base.",
                folder,
                wanted["source"],
                kind_of_adapter(note),
                note["base"]["source"],
            )
    return files


def _refuse_other_family(folder: Path, base: ModelFiles) -> None:
    """Raises: ModelError: the LoRA in a checkpoint's folder was trained on a model of another family."""
    if not (folder / LORA_FILE).is_file():
        return
    trained_on = family_in_header(open_weights(folder / LORA_FILE)[1])
    if trained_on not in (None, base.family):
        raise ModelError(f"it is {base.family.title}, and the LoRA was trained on {trained_on.title}")


def open_model(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    token: str | None = None,
    family: str | None = None,
    prediction_type: str | None = None,
    vae: str | Path | None = None,
    adapter_base: AdapterBase | None = None,
) -> ModelFiles:
    """Find and open a model without reading its weights. Arguments and errors as `load_model`."""
    path = Path(source).expanduser()
    if path.is_dir() and is_adapter_folder(path):
        return _open_adapted(path, adapter_base, token, vae)
    if adapter_base is not None and path.exists():
        raise ModelError(f"{source}: not a LoRA checkpoint, so no base is needed. Leave --base (adapter_base) out.")
    if path.is_file():
        return open_single_file(path, family=family, prediction_type=prediction_type, vae=vae)
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        files = open_folder(folder, family=family, prediction_type=prediction_type, variant=variant)
        return with_given_vae(files, vae)
    require_source(source)
    where = fetch_model(str(source), revision=revision, subfolder=subfolder, variant=variant, token=token)
    how: dict[str, Any] = {"family": family, "prediction_type": prediction_type, "vae": vae}
    how["adapter_base"] = adapter_base
    files = open_model(where, variant=variant, token=token, **how)
    return dataclasses.replace(files, source=str(source))


def require_source(source: str | Path) -> None:
    """Raises: ModelError: there is no such file or folder, and the name is no Hub id's."""
    if not Path(source).expanduser().exists() and not is_hub_id(str(source)):
        raise ModelError(
            f"{source}: there is no such file or folder, and it is not a Hub id (owner/repository) either."
        )


def open_with_base(sources: Sequence[str | Path], adapter_base: AdapterBase | None) -> list[ModelFiles]:
    """Open several models; those that are small checkpoints on the base that is named, if one is.

    Raises:
        ModelError: a base is named, and all of them are full models.
    """
    bases = adapter_bases(sources, adapter_base)
    return [open_model(source, adapter_base=base) for source, base in zip(sources, bases, strict=True)]


def adapter_bases(sources: Sequence[str | Path], adapter_base: AdapterBase | None) -> list[AdapterBase | None]:
    """The base for each of several models: what is named for small checkpoints, None for full models.

    Raises:
        ModelError: a base is named, and all of them are full models.
    """
    paths = [Path(source).expanduser() for source in sources]
    is_small = [is_adapter_folder(path) for path in paths]
    if not any(is_small):
        is_small = [not path.exists() for path in paths]  # on the Hub: `open_model` says what it is
    if adapter_base is not None and not any(is_small):
        named = ", ".join(map(str, sources))
        raise ModelError(f"{named}: not a LoRA checkpoint, so no base is needed. Leave --base (adapter_base) out.")
    return [adapter_base if small else None for small in is_small]


def _open_adapted(folder: Path, own_base: AdapterBase | None, token: str | None, vae: str | Path | None) -> ModelFiles:
    """A base with the LoRA of a small checkpoint merged into it."""
    from everydream_kit.models.lora.files import apply_lora, read_lora

    note = read_adapter_file(folder)
    base = open_base(folder, note, own_base, token=token, vae=vae)
    if "lora" not in note:
        return base
    return dataclasses.replace(apply_lora(base, read_lora(folder / LORA_FILE, base)), source=str(folder))


def assemble(
    files: ModelFiles,
    *,
    dtype: torch.dtype | Formats = torch.float32,
    device: torch.device | str = "cpu",
    large_texts_on: torch.device | str | None = None,
    blocks_in_host_memory: int | str = 0,
) -> Model:
    """Build the modules, and read their weights. Arguments as `load_model`."""
    formats = as_formats(dtype)
    modules = build_modules(files)
    tokenizers = fitting_tokenizers(files, modules)
    for name, module in modules.items():
        component = files.family.component(name)
        dtypes = formats.of(component, module, files.stored_dtype(name))
        waits = component.role == "text_encoder" and has_large_texts(files.family)
        where = large_texts_on if waits and large_texts_on is not None else device
        layers = quantized_layers(formats, component, module)
        stays = blocks_in_host_memory if component.role == "denoiser" else 0
        waiting = waiting_prefixes(module, component.blocks, stays)
        fill(module, files.tensors[name], dtypes, f"{files.source}/{name}", where, quantized=layers, waiting=waiting)
    return model_of(files, modules, tokenizers)


def build_modules(files: ModelFiles) -> dict[str, torch.nn.Module]:
    """The modules without weights, by their folders' names. Raises: ModelError: a config cannot be built."""
    try:
        return {name: build_component(files.family.component(name), one) for name, one in files.configs.items()}
    except ModelError as error:
        raise ModelError(f"{files.source}: {error}") from error


def fitting_tokenizers(files: ModelFiles, modules: Mapping[str, torch.nn.Module]) -> list[Any]:
    """The tokenizers, in the family's order, each of the size of its text encoder's table.

    Published tables are up to 400 rows larger than their tokenizers, of 32,000 to 152,000.

    Raises:
        ModelError: one is larger than the table, or so much smaller that it is another's.
    """
    tokenizers = []
    for slot in files.family.text_encoders:
        tokenizers.append(_tokenizer(files, slot))
        size, rows = len(tokenizers[-1]), _table_rows(modules[slot.folder])
        if files.tokenizers[slot.tokenizer_folder] is not None and not TABLE_SHARE * rows <= size <= rows:
            raise ModelError(
                f"{files.source}: {slot.tokenizer_folder} has {size:,} tokens, and {slot.folder} knows {rows:,}. The folder "
                "mixes parts of different models; fetch the model again, or give the tokenizer that belongs to it."
            )
    return tokenizers


def _table_rows(text_encoder: torch.nn.Module) -> int:
    """Tokens that a text encoder has embeddings of."""
    config: Any = text_encoder.config
    if "target_vocab_size" in config:  # of Anima's text conditioner
        return int(config["target_vocab_size"])
    return int(config.get_text_config().vocab_size)


def model_of(
    files: ModelFiles, modules: Mapping[str, torch.nn.Module], tokenizers: Sequence[Any] | None = None
) -> Model:
    """A model of modules by their folders' names; everything else is as the files say."""
    family = files.family
    if tokenizers is None:
        tokenizers = [_tokenizer(files, slot) for slot in family.text_encoders]
    return Model(
        family=family,
        denoiser=modules[family.denoiser.folder],
        vae=modules[family.vae.folder].requires_grad_(False),
        text_encoders=[modules[slot.folder] for slot in family.text_encoders],
        tokenizers=list(tokenizers),
        noise_scheduler=scheduler_of(files),
        scheduler_config=dict(files.scheduler_config),
        prediction_type=files.prediction_type,
        zero_terminal_snr=files.zero_terminal_snr,
        source=files.source,
    )


def scheduler_of(files: ModelFiles) -> Any:
    """The noise schedule for training."""
    if files.family.objective == "flow":
        return flow_scheduler(files.scheduler_config)
    return training_scheduler(files.scheduler_config, files.prediction_type, files.zero_terminal_snr)


def as_formats(dtype: torch.dtype | Formats) -> Formats:
    """One format for all components, as formats by component."""
    return dtype if isinstance(dtype, Formats) else Formats(dtype)


def _tokenizer(files: ModelFiles, slot: TextEncoderSlot) -> Any:
    name = slot.tokenizer_folder
    found = files.tokenizers[name]
    if slot.tokenizer_class != "CLIPTokenizer":
        if isinstance(found, Path):
            return load_language_tokenizer(found, slot.tokenizer_class)
        return build_plain_tokenizer(slot.tokenizer_class)
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
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler as Schedule

    betas = scheduler_config.get("trained_betas")
    scheduler = Schedule(
        num_train_timesteps=scheduler_config.get("num_train_timesteps", 1000),
        beta_start=scheduler_config.get("beta_start", 0.00085),
        beta_end=scheduler_config.get("beta_end", 0.012),
        beta_schedule=scheduler_config.get("beta_schedule", "scaled_linear"),
        trained_betas=betas,
        prediction_type=prediction_type,
        clip_sample=False,
        rescale_betas_zero_snr=zero_terminal_snr and betas is None,
    )
    return cast("DDPMScheduler", scheduler)
