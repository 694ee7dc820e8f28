"""A model of real architecture without its weights: what a source's config files say.

A diffusers folder or a Hub repository gives its `config.json` files, a single file its header and the family's shipped configs.
Modules are built on torch's meta device: every name and shape is there, and no byte of a weight is read or downloaded.

Not here: tensors that can be computed with (`rehearsal`).
"""

from __future__ import annotations

import dataclasses
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream_kit.errors import ModelError

if TYPE_CHECKING:
    import torch

    from everydream_kit.models.family import Family, Model, ModelFiles, TextEncoderSlot
    from everydream_kit.models.lora.adapter_settings import LoraSettings
    from everydream_kit.models.number_formats import Formats

LARGEST_HEADER = 100 * 2**20
"""safetensors' own bound."""


@dataclass(frozen=True)
class Architecture:
    """What is known of a model without its weights.

    Attributes:
        files: its configs; `tensors` is empty, or lazy and unread.
        lora: the adapter that a small checkpoint carries.
        stored: formats of the components' files, where weights are on this machine next to their configs.
    """

    files: ModelFiles
    lora: LoraSettings | None = None
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)

    def stored_dtype(self, component: str) -> torch.dtype | None:
        """The format that a component's file has its weights in; None where that is not known.

        Without the file, a language model's config says it. Of CLIP's, many name a format that their files do not have.
        """
        return self.stored.get(component) or self.files.stored_dtype(component) or named_dtype(self.files, component)

    def identity(self) -> dict[str, Any]:
        """Everything that memory depends on, as JSON values."""
        files = self.files
        return {
            "family": files.family.name,
            "configs": {name: dict(config) for name, config in sorted(files.configs.items())},
            "prediction_type": files.prediction_type,
            "stored": {name: str(self.stored_dtype(name)) for name in sorted(files.configs)},
            "lora": None if self.lora is None else self.lora.to_json(),
        }


def read_architecture(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    variant: str | None = None,
    family: str | None = None,
    prediction_type: str | None = None,
    vae: str | Path | None = None,
    endpoint: str | None = None,
) -> Architecture:
    """Read a model's configs, wherever it is. Arguments as `load_model` has them; `endpoint` is another Hub's address.

    Raises:
        ModelError: it is not there, or of a kind that the kit does not train.
    """
    from everydream_kit.models.adapters import is_adapter_folder
    from everydream_kit.models.loading import require_source
    from everydream_kit.models.single_file import open_single_file
    from everydream_kit.models.vae_files import with_given_vae

    how: dict[str, Any] = {"family": family, "prediction_type": prediction_type}
    path = Path(source).expanduser()
    if path.is_file():
        return Architecture(open_single_file(path, vae=vae, **how))
    if path.is_dir() and is_adapter_folder(path):
        return _read_adapted(path, endpoint, vae)
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        files = with_given_vae(open_configs(folder, **how), vae)
        stored = stored_dtypes(folder, files, variant)
        if files.family.denoiser.folder in stored:  # a model to train on, not its configs alone
            require_side_files(folder, files.family)
        return Architecture(files, stored=stored)
    require_source(source)
    where = {"revision": revision, "endpoint": endpoint}
    files = _fetch_configs(str(source), subfolder, variant, where, how)
    return Architecture(dataclasses.replace(with_given_vae(files, vae), source=str(source)))


def require_side_files(folder: Path, family: Family) -> None:
    """Refuse a folder without what training reads next to weights, in training's words.

    Raises:
        ModelError: the scheduler's config or a tokenizer is missing or damaged.
    """
    from everydream_kit.models.model_files import read_scheduler
    from everydream_kit.models.tokenizer import require_tokenizer

    read_scheduler(folder)
    for slot in family.text_encoders:
        require_tokenizer(folder / slot.tokenizer_folder, slot.tokenizer_class)


def stored_dtypes(folder: Path, files: ModelFiles, variant: str | None) -> dict[str, torch.dtype]:
    """The formats of the safetensors files in a diffusers folder, by component, where they are there."""
    from everydream_kit.models.model_files import open_component

    found = {}
    for name in files.configs:
        if any((folder / name).glob("*.safetensors")):
            opened = dataclasses.replace(files, tensors={name: open_component(folder / name, variant)})
            dtype = opened.stored_dtype(name)
            if dtype is not None:
                found[name] = dtype
    return found


def named_dtype(files: ModelFiles, component: str) -> torch.dtype | None:
    """The half precision that a text encoder's config names, in families that never train it; else None."""
    from everydream_kit.models.number_formats import HALF

    texts = [slot.folder for slot in files.family.text_encoders if not slot.trains]
    config = files.configs.get(component, {}) if component in texts else {}
    name = config.get("dtype") or config.get("torch_dtype")  # transformers 5's word, and 4's
    return next((dtype for dtype in HALF if str(dtype) == f"torch.{name}"), None)


def shipped_architecture(
    family: str,
    *,
    denoiser: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
    text_encoders: Sequence[Mapping[str, Any]] | None = None,
    prediction_type: str | None = None,
) -> Architecture:
    """The architecture that a family was published with, with changes as `scratch.build_model` takes them.

    Raises:
        ModelError: unknown family.
    """
    from everydream_kit.models.families import family_by_name
    from everydream_kit.models.family import configs_folder

    files = open_configs(configs_folder(family_by_name(family)), family=family, prediction_type=prediction_type)
    names = [slot.folder for slot in files.family.text_encoders]
    changes = {
        files.family.denoiser.folder: denoiser or {},
        files.family.vae.folder: vae or {},
        **dict(zip(names, text_encoders or [{}] * len(names), strict=True)),
    }
    files.configs = {name: {**config, **changes[name]} for name, config in files.configs.items()}
    return Architecture(files)


def _read_adapted(folder: Path, endpoint: str | None, vae: str | Path | None) -> Architecture:
    """A base, and the adapter that a small checkpoint puts on it."""
    from everydream_kit.models.adapters import explaining_base, read_adapter_file
    from everydream_kit.models.lora.adapter_settings import LoraSettings

    note = read_adapter_file(folder)
    wanted = {**note["base"], **({} if vae is None else {"vae": vae})}
    with explaining_base(folder, note, wanted["source"]):
        base = read_architecture(wanted.pop("source"), endpoint=endpoint, **wanted)
    lora = LoraSettings.from_json(note["lora"]) if "lora" in note else None
    return Architecture(dataclasses.replace(base.files, source=str(folder)), lora)


def open_configs(folder: Path, *, family: str | None = None, prediction_type: str | None = None) -> ModelFiles:
    """A diffusers folder that need not hold weights.

    Raises:
        ModelError: a config is missing, or of a kind that the kit does not train.
    """
    from everydream_kit.models.model_files import open_folder

    files = open_folder(folder, family=family, prediction_type=prediction_type, needs_weights=False)
    files.tokenizers = {slot.tokenizer_folder: _own_vocabulary(folder, slot) for slot in files.family.text_encoders}
    return files


def _own_vocabulary(folder: Path, slot: TextEncoderSlot) -> Path | None:
    """A tokenizer's folder where it is complete: a small model's words are numbered in its own way. None: the shipped one."""
    own = folder / slot.tokenizer_folder
    held = {name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (own / name).is_file()}
    if slot.tokenizer_class == "CLIPTokenizer" and "vocab.json" in held:
        held.discard("tokenizer.json")  # which is not read then
    return own if "tokenizer.json" in held or {"vocab.json", "merges.txt"} <= held else None


def _fetch_configs(
    repo_id: str, subfolder: str | None, variant: str | None, where: dict[str, Any], how: dict[str, Any]
) -> ModelFiles:
    """The configs of a Hub repository, or a single file's header; kilobytes, and nothing where they are cached."""
    from huggingface_hub import HfApi, snapshot_download

    from everydream_kit.models.download import choose_files, network_errors

    repo_id = repo_id.removeprefix("hf://")
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    try:
        hub = HfApi(endpoint=where["endpoint"])
        info = hub.model_info(repo_id, revision=where["revision"], files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
        names = choose_files(repo_id, sizes, subfolder=subfolder, variant=variant)
        if len(names) == 1 and names[0].endswith(".safetensors"):
            return _read_remote_header(repo_id, names[0], where, how)
        wanted = [name for name in names if name.endswith(".json")]
        folder = Path(snapshot_download(repo_id, allow_patterns=wanted, **where))
    except network_errors() as error:
        folder = _cached_snapshot(repo_id, prefix, where["revision"], error)
    return open_configs(folder / prefix if prefix else folder, **how)


def _cached_snapshot(repo_id: str, prefix: str, revision: str | None, cause: Exception) -> Path:
    """What an earlier download left, where the Hub cannot be asked.

    Raises:
        ModelError: nothing.
    """
    from huggingface_hub import try_to_load_from_cache

    from everydream_kit.models.model_files import denoiser_folders

    for marker in (f"{prefix}{folder}/config.json" for folder in denoiser_folders()):
        found = try_to_load_from_cache(repo_id, marker, revision=revision)
        if isinstance(found, str):
            return Path(found.removesuffix(marker))
    raise ModelError(
        f"{repo_id}: its config files cannot be read from the Hub ({type(cause).__name__}), and it is not in the cache. Check "
        "the name and the connection, or give the path of a local model."
    ) from cause


def _read_remote_header(repo_id: str, name: str, where: dict[str, Any], how: dict[str, Any]) -> ModelFiles:
    """A single file on the Hub, by its header alone: a local file of the same length with a hole for the weights."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, and not in its __all__

    from everydream_kit.models.single_file import open_single_file

    url = hf_hub_url(repo_id, name, revision=where["revision"], endpoint=where["endpoint"])

    def read(start: int, stop: int) -> tuple[bytes, int]:
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        answer = get_session().get(url, headers=headers, follow_redirects=True)
        answer.raise_for_status()
        return answer.content[: stop - start], int(answer.headers["Content-Range"].rpartition("/")[2])

    head, total = read(0, 8)
    (length,) = struct.unpack("<Q", head)
    if length > min(LARGEST_HEADER, total):
        raise ModelError(f"{repo_id}/{name}: not a safetensors file; its header says {length:,} bytes.")
    header, _ = read(8, 8 + length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.safetensors"
        with path.open("wb") as file:
            file.write(head + header)
            file.truncate(total)
        return open_single_file(path, **how)


def build_skeleton(architecture: Architecture, dtype: torch.dtype | Formats) -> Model:
    """Build the modules on the meta device, each weight in the format that it would be loaded in.

    Args:
        dtype: of UNet and text encoders, or their formats by component; the VAE is float32.
    """
    from everydream_kit.models.loading import as_formats, build_modules, fitting_tokenizers, model_of
    from everydream_kit.models.lora.injection import inject
    from everydream_kit.models.quantized import put_quantized, quantized_layers

    files, formats = architecture.files, as_formats(dtype)
    modules = build_modules(files)
    tokenizers = fitting_tokenizers(files, modules)
    for name, module in modules.items():
        component = files.family.component(name)
        dtypes = formats.of(component, module, architecture.stored_dtype(name))
        for key, parameter in module.named_parameters():
            parameter.data = parameter.data.to(dtypes(key))  # not `module.to`: diffusers would comment on it
        for layer, form in quantized_layers(formats, component, module).items():
            weight: Any = module.get_submodule(layer).weight
            put_quantized(module, layer, form, weight, weight.dtype)
    model = model_of(files, modules, tokenizers)
    if architecture.lora is not None:
        inject(model, architecture.lora, dtype=formats.trained)
    return model
