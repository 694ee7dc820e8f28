"""LoRA adapters on a live model: adding them for training, reading their weights out, and putting weights back in.

peft injects the layers; everything else is ours: which layers, seeded starting values, and the records that the file
formats (`files.py`) read and write. The base stays frozen and unchanged beneath.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from everydream_kit.draws import derive_seed
from everydream_kit.errors import ConfigError, ModelError
from everydream_kit.models.adapter_layers import import_peft, torch_layers_only
from everydream_kit.models.family import Model
from everydream_kit.models.lora.adapter_settings import LoraSettings
from everydream_kit.models.lora.forms import FORMS, is_adapter_weight
from everydream_kit.models.quantized import QuantizedLinear
from everydream_kit.models.tensors import LazyTensor

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
ADAPTER = "default"
"""peft's name of the adapter that is trained."""


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One adapted layer: W + alpha / rank * up @ down, or DoRA's renormalised form of it.

    Attributes:
        down: (rank, in) or (rank, in, k, k).
        up: (out, rank) or (out, rank, 1, 1).
        magnitude: (out,), DoRA's length of each row, or None.
    """

    down: LazyTensor
    up: LazyTensor
    alpha: float
    magnitude: LazyTensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class FactorLayer:
    """One layer of a form with other factors than two matrices: LoHa, LoKr.

    Attributes:
        kind: "LoHa" or "LoKr".
        parts: its tensors, by the names that files have for them.
        alpha: the change is scaled by alpha / rank, but for a LoKr of two full factors, which has no rank.
    """

    kind: str
    parts: Mapping[str, LazyTensor]
    alpha: float

    @property
    def rank(self) -> int | None:
        """Rank of the matrices; None where both factors are full matrices."""
        names = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((self.parts[name].shape[0] for name in names if name in self.parts), None)


Layer = LoraLayer | FactorLayer
Weights = Mapping[str, Mapping[str, torch.Tensor]]
"""State dicts by component ("unet", ...)."""
Lora = dict[str, dict[str, Layer]]
"""Component ("unet", "text_encoder", ...) -> layer by its diffusers name, text encoders' with `text_model.` ->
weights."""


def add_lora(
    model: Model,
    rank: int = 16,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    text_encoder: bool = False,
    dora: bool = False,
    form: str = "lora",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> list[torch.nn.Parameter]:
    """Freeze a model and give it a LoRA adapter to train. The model draws as before until the adapter has learned
    something.

    Args:
        rank: of the matrices.
        alpha: the adapter's output is scaled by alpha / rank; None: rank, so by 1.
        dropout: on the adapter's input.
        targets: names ("to_q") or regular expressions of UNet layers; None: the attention projections.
        text_encoder: adapt the text encoders' attention, too.
        dora: weight-decomposed (arXiv 2402.09353); of the form `lora`.
        form: by name (`forms.FORMS`).
        seed: of the starting values.
        dtype: of the adapter; None: the format of the layers beneath it.

    Returns:
        The adapter's parameters.

    Raises:
        ConfigError: no layer fits the targets.
    """
    settings = LoraSettings(
        rank,
        float(rank if alpha is None else alpha),
        dropout,
        None if targets is None else tuple(targets),
        text_encoder,
        dora,
        form,
    )
    inject(model, settings, seed=seed, dtype=dtype)
    return lora_parameters(model)


def inject(model: Model, settings: LoraSettings, *, seed: int = 0, dtype: torch.dtype | None = None) -> None:
    """`add_lora` from settings that were kept."""
    peft = import_peft()

    if model.lora is not None:
        raise ModelError(f"{model.source}: this model has an adapter already; merge it first.")
    if settings.form not in FORMS:
        raise ModelError(f"{model.source}: an adapter of the form {settings.form!r:.60}; known are {', '.join(FORMS)}.")
    for module in model.modules().values():
        module.requires_grad_(False)
    family = model.family
    patterns: dict[str, Sequence[str]] = {family.denoiser.folder: settings.targets or family.lora_targets}
    if settings.text_encoder:
        patterns |= {slot.folder: TEXT_TARGETS for slot in family.text_encoders}
    for name, wanted in patterns.items():
        module = model.modules()[name]
        layers = matching_layers(module, wanted)
        config = FORMS[settings.form].config(peft, settings, layers)
        stand_ins = _weights_in(dtype, module, layers)
        with torch.random.fork_rng(devices=[]), torch_layers_only(), stand_ins:
            torch.manual_seed(derive_seed(seed, "lora", name))
            peft.inject_adapter_in_model(config, module, adapter_name=ADAPTER)
        _scale_full_factors(module)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)
    model.lora = settings


def _scale_full_factors(module: torch.nn.Module) -> None:
    """A LoKr of two full factors has no rank, so it is not scaled: as LyCORIS trains it, and as apps apply its file."""
    parts: Iterable[Any] = module.modules()
    for part in parts:
        if ADAPTER in getattr(part, "lokr_w1", {}) and ADAPTER in part.lokr_w2:
            part.scaling[ADAPTER] = 1.0


def without_chance(module: torch.nn.Module) -> None:
    """Take the layers of LoHa and LoKr out of training mode, in which peft draws whether to skip each: with a chance of 0 here.

    For runs on tensors without values, which cannot be compared with a chance.
    """
    for part in module.modules():
        if hasattr(part, "module_dropout"):
            part.training = False


@contextmanager
def _weights_in(dtype: torch.dtype | None, module: torch.nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While inside, layers of another format have stand-ins for weights: peft makes an adapter in the format of its layer.

    The stand-ins take no memory. Afterwards DoRA's magnitudes are measured on the real weights, in the adapter's format.
    """
    layers: list[Any] = [module.get_submodule(name) for name in names]
    layers = [layer for layer in layers if dtype is not None and layer.weight.dtype != dtype]
    real = {layer: layer.weight for layer in layers if not isinstance(layer, QuantizedLinear)}
    for layer, weight in real.items():
        empty = torch.zeros((), dtype=dtype, device=weight.device).expand(weight.shape)
        layer.weight = torch.nn.Parameter(empty, requires_grad=False)
    with ExitStack() as quantized:
        for layer in layers:
            if isinstance(layer, QuantizedLinear) and dtype is not None:
                quantized.enter_context(layer.seen_as(dtype))
        try:
            yield
        finally:
            for layer, weight in real.items():
                layer.weight = weight
    parts: Iterable[Any] = module.modules() if real else ()
    for part in parts:
        magnitudes = getattr(part, "lora_magnitude_vector", {})
        if ADAPTER in magnitudes and part.base_layer in real:
            magnitude = magnitudes[ADAPTER].weight
            with torch.no_grad():
                magnitude.copy_(part.base_layer.weight.to(dtype).flatten(1).norm(dim=1).reshape(magnitude.shape))


def matching_layers(module: torch.nn.Module, patterns: Sequence[str]) -> list[str]:
    """Full names of the linear and convolution layers that fit a name or regular expression.

    Raises:
        ConfigError: a pattern fits nothing, or is not a regular expression.
    """
    layers = [name for name, part in module.named_modules() if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d))]
    found: dict[str, None] = {}
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"lora_targets: {pattern!r} is not a regular expression ({error}).") from error
        fitting = [
            name for name in layers if name == pattern or name.endswith(f".{pattern}") or expression.fullmatch(name)
        ]
        if not fitting:
            raise ConfigError(
                f"lora_targets: {pattern!r} fits no layer; layers are named like {layers[len(layers) // 2]}."
            )
        found |= dict.fromkeys(fitting)
    return list(found)


def lora_parameters(model: Model) -> list[torch.nn.Parameter]:
    """Parameters of the adapter, in a fixed order."""
    return [
        parameter
        for module in model.modules().values()
        for name, parameter in module.named_parameters()
        if is_adapter_weight(name)
    ]


def lora_of(model: Model, weights: Weights | None = None) -> Lora:
    """The adapter's weights, by component and layer.

    Args:
        weights: state dicts by component that are read instead of the live ones.

    Raises:
        ModelError: the model has none.
    """
    if model.lora is None:
        raise ModelError(f"{model.source}: this model has no LoRA adapter.")
    lora: Lora = {}
    for component, module in model.modules().items():
        state = (weights or {}).get(component) or module.state_dict()
        layers = _layers(state, model.lora)
        if layers:
            lora[component] = {_long_name(component, name): layer for name, layer in layers.items()}
    return lora


def _layers(state: Mapping[str, torch.Tensor], settings: LoraSettings) -> dict[str, Layer]:
    """A module's adapted layers by name."""
    form = FORMS[settings.form]
    ends = {f".{theirs}.{ADAPTER}{end}": ours for theirs, ours in form.parts.items() for end in ("", ".weight")}
    parts: dict[str, dict[str, LazyTensor]] = {}
    for key, value in state.items():
        end = next((end for end in ends if key.endswith(end)), None)
        if end is not None:
            parts.setdefault(key.removesuffix(end), {})[ends[end]] = LazyTensor.of(value)
    if settings.form == "lora":
        return {name: _plain_layer(own, settings.alpha) for name, own in parts.items()}
    return {name: FactorLayer(form.title, own, settings.alpha) for name, own in parts.items()}


def _plain_layer(parts: Mapping[str, LazyTensor], alpha: float) -> LoraLayer:
    magnitude = parts.get("magnitude")
    if magnitude is not None:
        magnitude = magnitude.reshaped(math.prod(magnitude.shape))
    return LoraLayer(parts["down"], parts["up"], alpha, magnitude)


def _long_name(component: str, name: str) -> str:
    bare = not component.startswith("text_encoder") or name.startswith("text_model.")
    return name if bare else f"text_model.{name}"


def set_lora(model: Model, lora: Lora) -> None:
    """Put weights into the adapter that a model has.

    Raises:
        ModelError: layers or shapes do not fit.
    """
    form = FORMS[model.lora.form if model.lora is not None else "lora"]
    for component, module in model.modules().items():
        layers = lora.get(component, {})
        for name, part in module.named_modules():
            own = {ours: getattr(part, theirs, {}) for theirs, ours in form.parts.items()}
            own = {ours: held[ADAPTER] for ours, held in own.items() if ADAPTER in held}
            if not own:
                continue
            layer = layers.get(_long_name(component, name))
            if layer is None:
                raise ModelError(f"{model.source}: the LoRA has no weights for {component}.{name}.")
            _fill(own, layer, name)


def _fill(own: Mapping[str, Any], layer: Layer, name: str) -> None:
    """Put a layer's tensors into an adapter's parameters, by the names of their parts."""
    plain = {} if isinstance(layer, FactorLayer) else {"down": layer.down, "up": layer.up, "magnitude": layer.magnitude}
    parts: Mapping[str, LazyTensor | None] = layer.parts if isinstance(layer, FactorLayer) else plain
    for part, held in own.items():
        values = parts.get(part)
        if values is not None:
            _copy(getattr(held, "weight", held), values, name)
        elif part != "magnitude":
            raise ModelError(f"{name}: the LoRA has no {part}, which the adapter has.")


def _copy(parameter: torch.nn.Parameter, lazy: LazyTensor, name: str) -> None:
    if parameter.numel() != lazy.read().numel():
        raise ModelError(
            f"{name}: the LoRA's weights have the shape {lazy.shape}, the adapter {tuple(parameter.shape)}."
        )
    with torch.no_grad():
        parameter.copy_(lazy.read().reshape(parameter.shape))


def base_name(name: str) -> str | None:
    """A weight's name in the base model beneath an adapter; None for the adapter's own."""
    if is_adapter_weight(name):
        return None
    return name.replace(".base_layer.", ".")
