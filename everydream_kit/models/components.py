"""Building diffusers' and transformers' own modules from a config and lazy tensors.

A module to be loaded is built with its parameters on the meta device (no memory, no random numbers) and then given its
weights, each read, cast and placed once. Buffers and plain tensors are real from the start: files hold few of them, so
their values are the constructors' business. Every name and shape must match: a missing weight would otherwise silently
train from noise, as transformers 4 does with the text encoders that transformers 5 writes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from everydream_kit.errors import ModelError
from everydream_kit.models.convert import OLD_VAE_ATTENTION
from everydream_kit.models.family import Component, Config
from everydream_kit.models.imports import make_lazy
from everydream_kit.models.number_formats import HALF, NameToDtype
from everydream_kit.models.part_configs import diffusers_values, language_model_values, text_encoder_values
from everydream_kit.models.quantized import put_quantized
from everydream_kit.models.tensors import LazyTensor, Tensors

BOOKKEEPING = frozenset({"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values"})
"""Keys of a config that describe the file, not the module."""

ATTENTION = "sdpa"
BUILD_ERRORS = (
    *(TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, ArithmeticError, AssertionError),
    StrictDataclassError,
)
"""What the libraries raise for values that their modules cannot be built from."""

_INITIALIZER = re.compile(r"[a-z]\w*[a-z]_")
"""Names of torch's functions that fill a tensor in place."""
_OLD_VAE_ATTENTION = re.compile(rf"(?<=attentions\.0\.)({'|'.join(OLD_VAE_ATTENTION)})(?=\.)")


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While inside, modules are built with their parameters on the meta device, and with everything else as it should be.

    `torch.device("meta")` would take the buffers and plain tensors along, whose values no file holds: rotary
    frequencies, position ids, scales of embeddings.
    """
    register = torch.nn.Module.register_parameter
    initializers = {name: found for name, found in vars(torch.nn.init).items() if _INITIALIZER.fullmatch(name)}

    def register_on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that already exists is shared by two modules
            on_meta: Any = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            on_meta._is_hf_initialized = True  # transformers' own initializers skip such a parameter
            parameter = on_meta
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    for name, initializer in initializers.items():
        setattr(torch.nn.init, name, _unless_on_meta(initializer))
    try:
        with torch.random.fork_rng(devices=[]):  # a constructor may draw what it then registers
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        for name, initializer in initializers.items():
            setattr(torch.nn.init, name, initializer)


def _unless_on_meta(initializer: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An initializer that skips tensors without values: torch goes through its reference code for them, slowly."""

    def initialize(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return tensor if tensor.is_meta else initializer(tensor, *args, **options)

    return initialize


@contextmanager
def _building(what: str, device: str) -> Iterator[None]:
    """While inside, modules are built on this device.

    Raises:
        ModelError: the library cannot build them from the config.
    """
    try:
        with parameters_on_meta() if device == "meta" else torch.device(device):
            yield
    except BUILD_ERRORS as error:
        raise ModelError(f"{what}: its config.json cannot be built ({error}).") from error


def build_component(component: Component, config: Config, device: str = "meta") -> torch.nn.Module:
    """A component's module, without memory unless another device is named.

    Raises:
        ModelError: the config cannot be built, or the installed library does not have the class.
    """
    cls = _class_of(component)
    if component.library == "transformers":
        return _build_text_encoder(cls, config, device, component.folder)
    named = config.get("_class_name", cls.__name__)
    if named != cls.__name__:
        raise _other_class(component.folder, named, cls.__name__)
    with _building(cls.__name__, device):
        built: torch.nn.Module = cls.from_config(diffusers_values(cls, config))
    return built


def _other_class(folder: str, named: Any, wanted: str) -> ModelError:
    """Of a config that is another family's."""
    return ModelError(
        f"{folder}/config.json: names the class {named!r}, and this family's {folder} is {wanted}. The folder mixes parts of "
        "different model families; fetch the model again, or give the family's own part."
    )


def _build_text_encoder(cls: Any, config: Config, device: str, folder: str) -> torch.nn.Module:
    architectures = config.get("architectures") or [config.get("model_type", cls.__name__)]
    named = architectures[0] if isinstance(architectures, list) else architectures
    if cls.__name__.startswith("CLIP"):
        if config.get("architectures") and named not in ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"):
            raise _other_class(folder, named, cls.__name__)
        values = text_encoder_values(config)
    elif config.get("model_type") not in (None, cls.config_class.model_type):  # its architecture may be a head
        raise _other_class(folder, named, cls.__name__)
    else:
        values = language_model_values(config)
    with _building("text encoder", device):
        known = cls.config_class(**values)
        known._attn_implementation = ATTENTION  # never the file's: it may name a kernel on the Hub
        built: torch.nn.Module = cls(known)
    return built


def _class_of(component: Component) -> Any:
    make_lazy()
    try:
        return getattr(importlib.import_module(component.module), component.class_name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{component.class_name} is not in the installed {component.library}; it came with {component.since}. "
            f"Install a newer one: pip install --upgrade {component.library}"
        ) from error


def fill(
    module: torch.nn.Module,
    tensors: Tensors,
    dtypes: NameToDtype,
    where: str,
    device: torch.device | str = "cpu",
    *,
    quantized: Mapping[str, str] | None = None,
    waiting: tuple[str, ...] = (),
) -> torch.nn.Module:
    """Give a module that was built without values its weights, one by one.

    Args:
        tensors: by the module's own names, or with a text encoder's `text_model.` prefix put on or left off.
        dtypes: the floating-point format of each weight, by the module's name for it.
        where: file or folder, for messages.
        device: where the module is to be. A weight is in host memory only on its way there.
        quantized: linear layers whose weights are quantized there, each before the next is read -> the form of each.
        waiting: what the names of weights and buffers begin with that stay in host memory.

    Returns:
        The module, in evaluation mode, with its weights in memory.

    Raises:
        ModelError: names or shapes do not match.
    """
    found = renamed_for(module, tensors)
    shared = shared_names(module)
    for name, first in shared.items():
        if name in found:
            found.setdefault(first, found.pop(name))
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items() if name not in shared}
    missing = sorted(wanted.keys() - found.keys())
    unknown = sorted(found.keys() - wanted.keys())
    if missing or unknown:
        raise ModelError(
            f"{where}: weights do not fit the {type(module).__name__} that its config describes: "
            + "; ".join(
                f"{len(names)} {what}, such as {names[0]}"
                for names, what in ((missing, "missing"), (unknown, "unknown"))
                if names
            )
        )
    wrong = [name for name in wanted if found[name].shape != wanted[name]]
    if wrong:
        name = wrong[0]
        raise ModelError(
            f"{where}: {name} has the shape {found[name].shape}, but the config expects {wanted[name]}"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        )
    for name in sorted(wanted, key=lambda name: _position(found[name])):
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and layer in (quantized or {}):
            exact = found[name].dtype if found[name].dtype in HALF else torch.float32
            put_quantized(module, layer, (quantized or {})[layer], found[name].load(exact, device), dtypes(name))
            if name.startswith(waiting):
                module.get_submodule(layer).to("cpu")  # quantized where the others are, so that it is the same
        else:
            _place_weight(module, name, found[name], dtypes, "cpu" if name.startswith(waiting) else device)
    for name, first in shared.items():
        owner_name, _, leaf = name.rpartition(".")
        module.get_submodule(owner_name)._parameters[leaf] = module.get_parameter(first)
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if left:
        raise ModelError(f"{where}: {left[0]} of the {type(module).__name__} has no value in the file.")
    _move_all_but(module, waiting, device)
    return module.requires_grad_(True).eval()


def _move_all_but(module: torch.nn.Module, waiting: tuple[str, ...], device: torch.device | str) -> None:
    """Move a module, but for the weights and buffers whose names begin so."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if not name.startswith(waiting):
            value.data = value.data.to(device)


def shared_names(module: torch.nn.Module) -> dict[str, str]:
    """Names of weights that another module has, too -> the first name of each: files hold such a weight under one of them."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[id(value)] for name, value in named if first.setdefault(id(value), name) != name}


def _place_weight(
    module: torch.nn.Module, name: str, tensor: LazyTensor, dtypes: NameToDtype, device: torch.device | str
) -> None:
    """Read one weight or saved buffer, and put it where the module has one without a value."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor.load(dtypes(name), device))
    else:
        buffer = owner._buffers[leaf]
        assert buffer is not None  # it is in the state dict
        owner._buffers[leaf] = tensor.load(buffer.dtype, device)


def _position(tensor: LazyTensor) -> tuple[str, int]:
    """Where in which file: in this order a disk is read from front to back."""
    return (str(tensor.spans[0].file.path), tensor.spans[0].offset) if tensor.spans else ("", 0)


def renamed_for(module: torch.nn.Module, tensors: Tensors) -> Tensors:
    """Older and newer spellings of the same weights, as this module spells them."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    renamed: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids") or (name == "lm_head.weight" and name not in wanted):
            continue  # counted, not learned, so transformers stopped saving them; a head that is not used
        spelled = _OLD_VAE_ATTENTION.sub(lambda match: OLD_VAE_ATTENTION[match[0]], name)
        bare = spelled.removeprefix("model.")  # a language model is saved with the head that it is used without
        # Qwen2.5-VL was published before its language model had a name; CLIP's tower has one, or none
        forms = (spelled, bare, f"language_model.{bare}", spelled.removeprefix("text_model."), f"text_model.{spelled}")
        current = next((form for form in forms if form in wanted), spelled)
        shape = wanted.get(current, tensor.shape)
        if len(shape) == 2 and tensor.shape[2:] == (1, 1):
            renamed[current] = tensor.reshaped(*tensor.shape[:2])  # a 1 x 1 convolution is a linear layer
        elif (*tensor.shape, 1, 1) == shape:
            renamed[current] = tensor.reshaped(*shape)
        else:
            renamed[current] = tensor
    return renamed
