"""Quantized linear layers of a frozen base: 8 or 4 bits a weight, and what is computed with them.

A layer keeps its weight as whole numbers with scales, and makes it in the format of its input for the moment of a product.
Nothing else than storage is needed of a GPU: no product is computed in 8 or 4 bits. The gradient of the input is computed from
the weight made once more, so that no copy of it waits for the backward pass; the weight itself has no gradient.

Which layers are quantized is said by the component's `blocks`: linear layers in its repeated blocks, which hold most of a
transformer. Convolutions, norms, embedders and modulation keep their format: they are small, or every token passes through
them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from everydream_kit.errors import ConfigError
from everydream_kit.models.family import Component
from everydream_kit.models.number_formats import Formats
from everydream_kit.optional_packages import drop_irrelevant_records

FP8_MAX = 448.0
"""The largest number of e4m3 (arXiv 2209.05433)."""
INT8_MAX = 127.0
NF4_BLOCK = 64
"""Weights that share a scale, as in QLoRA (arXiv 2305.14314)."""

_KEPT = re.compile(r"norm|emb|(?:^|[._])mod(?:ulation)?(?:[._]|$)")
"""In names of layers within a block: what scales and shifts everything else, and what embeds timesteps."""


@dataclass(frozen=True)
class QuantizedForm:
    """One way to keep a matrix.

    Attributes:
        quantize: (out, in) of any floating-point format -> what is stored, and its scales.
        dequantize: (what is stored, scales, shape, format) -> (out, in) in that format.
        check: raises ConfigError where this machine lacks something.
    """

    quantize: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    dequantize: Callable[[torch.Tensor, torch.Tensor, tuple[int, int], torch.dtype], torch.Tensor]
    check: Callable[[], Any] = lambda: None


def _row_scales(weight: torch.Tensor, largest: float) -> torch.Tensor:
    """(out, 1) float32: what the largest weight of each row is divided by to become the largest number of a format."""
    scales = weight.abs().amax(dim=1, keepdim=True).float() / largest
    return torch.where(scales > 0, scales, 1.0)


def _to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = _row_scales(weight, FP8_MAX)
    scaled = (weight / scales).clamp_(-FP8_MAX, FP8_MAX)  # the cast gives NaN above it
    return scaled.to(torch.float8_e4m3fn).view(
        torch.uint8
    ), scales  # as bytes: no `module.to(dtype)` takes them for floats


def _from_fp8(stored: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return stored.view(torch.float8_e4m3fn).to(dtype).mul_(scales)  # multiplied in float32 and rounded once


def _to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = _row_scales(weight, INT8_MAX)
    return (weight / scales).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scales


def _from_int8(stored: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return stored.to(dtype).mul_(scales)


def _to_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # one block in a row: bitsandbytes 0.50 on a CPU mixes up the scales of rows that are no multiple of a block
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    stored, state = _bitsandbytes().quantize_4bit(blocks, blocksize=NF4_BLOCK, quant_type="nf4")
    return stored, state.absmax


def _from_nf4(stored: torch.Tensor, scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    functional = _bitsandbytes()
    blocks = torch.Size((len(scales), NF4_BLOCK))
    state = functional.QuantState(absmax=scales, shape=blocks, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
    flat: torch.Tensor = functional.dequantize_4bit(stored, state).view(-1)
    return flat[: math.prod(shape)].view(shape)


def _bitsandbytes() -> Any:
    drop_irrelevant_records()
    try:
        import bitsandbytes.functional
    except (ImportError, OSError, RuntimeError) as error:  # what broken native packages raise
        raise ConfigError(
            f"quantization nf4: needs bitsandbytes, which cannot be imported here ({type(error).__name__}: {error}). "
            "Install it with pip install bitsandbytes, or set quantization to int8 or fp8."
        ) from error
    return bitsandbytes.functional


FORMS: dict[str, QuantizedForm] = {
    "fp8": QuantizedForm(_to_fp8, _from_fp8),
    "int8": QuantizedForm(_to_int8, _from_int8),
    "nf4": QuantizedForm(_to_nf4, _from_nf4, _bitsandbytes),
}
"""By the setting `quantization`."""


class QuantizedLinear(torch.nn.Linear):
    """A frozen linear layer whose weight is quantized.

    Args:
        form: by name (`FORMS`).
        weight: (out, in), as exact as there is one.
        bias: as it is kept.
        dtype: what readers of `weight` take the layer for: the format of an adapter on it, unless one is given.
    """

    quantized: torch.Tensor
    scales: torch.Tensor
    absent: torch.Tensor

    def __init__(self, form: str, weight: torch.Tensor, bias: torch.nn.Parameter | None, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.form = form
        quantized, scales = FORMS[form].quantize(weight.detach())
        # buffers: they move with the module, and nobody asks them for gradients
        self.register_buffer("quantized", quantized)
        self.register_buffer("scales", scales)
        absent = torch.full((), math.nan, dtype=dtype, device=weight.device)
        self.register_buffer("absent", absent, persistent=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """For readers of shape, format and device: peft, at every use. It holds NaN, and cannot be written to.

        So a change that somebody merges into it is an error, and not lost.
        """
        return self.absent.expand(self.out_features, self.in_features)

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802 - by this name peft knows that `dequantize` gives the weight: DoRA asks
        """What is stored."""
        return self.quantized

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight (out, in), made anew at every call."""
        shape = (self.out_features, self.in_features)
        return FORMS[self.form].dequantize(self.quantized, self.scales, shape, dtype or self.absent.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), in autocast's format or the input's."""
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        product: torch.Tensor = _Product.apply(inputs.to(dtype), self)  # type: ignore[no-untyped-call]
        return product

    @contextmanager
    def seen_as(self, dtype: torch.dtype) -> Iterator[None]:
        """While inside, readers of `weight` take the layer for one of this format."""
        before, self.absent = self.absent, self.absent.to(dtype)
        try:
            yield
        finally:
            self.absent = before


class _Product(torch.autograd.Function):
    """A product whose backward pass needs neither the input nor a copy of the weight."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.save_for_backward(layer.quantized, layer.scales)  # itself, and no copy: see `block_swap`
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(inputs.dtype)
        return torch.nn.functional.linear(inputs, layer.dequantize(inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        _ = ctx.saved_tensors  # reading them brings a block back that has left the device
        return gradient @ ctx.layer.dequantize(gradient.dtype), None


def quantized_layers(formats: Formats, component: Component, module: torch.nn.Module) -> dict[str, str]:
    """The layers of a component that are quantized, each with its form.

    They are the linear layers in the repeated blocks of a frozen denoiser, or of a text encoder that nothing trains, but
    for those that scale, shift and embed.
    """
    texts = None if component.trains else formats.text_quantization
    form = {"denoiser": formats.quantization, "text_encoder": texts}.get(component.role)
    if form is None or formats.trains(component):
        return {}
    found: dict[str, str] = {}
    for block_name, block in module.named_modules():
        if type(block).__name__ in component.blocks:
            for name, part in block.named_modules():
                if isinstance(part, torch.nn.Linear) and not _KEPT.search(name):
                    found[f"{block_name}.{name}"] = form
    return found


def put_quantized(module: torch.nn.Module, name: str, form: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
    """Put a quantized layer into the place of a linear one.

    Args:
        weight: its values, or a tensor without values, on the device where the layer is to be.
        dtype: the format that the layer would have.
    """
    parent, _, leaf = name.rpartition(".")
    plain = module.get_submodule(name)
    layer = QuantizedLinear(form, weight, plain._parameters["bias"], dtype)
    module.get_submodule(parent)._modules[leaf] = layer.train(plain.training)


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a layer of it is quantized."""
    return any(isinstance(part, QuantizedLinear) for part in module.modules())


def num_weights(module: torch.nn.Module) -> int:
    """Numbers that a module's parameters hold, those of quantized layers included."""
    layers = [part for part in module.modules() if isinstance(part, QuantizedLinear)]
    return sum(p.numel() for p in module.parameters()) + sum(one.in_features * one.out_features for one in layers)
