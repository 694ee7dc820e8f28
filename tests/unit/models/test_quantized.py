"""Quantized linear layers: how exact they are, what they keep, and that nothing is lost in them."""

import builtins
import weakref

import pytest
import torch

from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.models.quantized import FORMS, QuantizedLinear
from everydream_kit.training.base_model import choose_formats, precision_of

BYTES = {"fp8": 1 + 4 / 256, "int8": 1 + 4 / 256, "nf4": 1 / 2 + 4 / 64}
"""Of a weight in a row of 256: what is stored, and its share of a scale."""


def matrix() -> torch.Tensor:
    """Rows of unlike size, one of them zero, one with an outlier, one of tiny numbers."""
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0
    weight[5, 7] = 3
    weight[6] *= 1e-6
    return weight


def bound(form: str, weight: torch.Tensor) -> torch.Tensor:
    """The largest error that a format allows, for each weight.

    e4m3 has three bits behind the leading one, so half a step is 2^-4 of a number, and 2^-10 below the smallest normal one;
    int8 has half a step of the row; the widest gap of nf4 is 1 - 0.6962 of a block's largest number.
    """
    largest = weight.abs().amax(1, keepdim=True)
    if form == "fp8":
        return torch.maximum(weight.abs() / 16, largest / 448 / 1024)
    if form == "int8":
        return (largest / 127 / 2).expand_as(weight)
    return weight.view(-1, 64).abs().amax(1, keepdim=True).mul(0.1520).expand(-1, 64).reshape(weight.shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_weight_comes_back_within_the_formats_bound(form: str, stored: torch.dtype) -> None:
    weight = matrix().to(stored)
    layer = QuantizedLinear(form, weight, None, torch.bfloat16)
    exact = weight.float()
    error = (layer.dequantize(torch.float32) - exact).abs()
    assert (error <= bound(form, exact) * 1.001).all()
    assert error.max() > 0
    rounded = (layer.dequantize(torch.bfloat16).float() - exact).abs()
    assert (rounded <= bound(form, exact) * 1.001 + exact.abs() / 128).all()  # and one rounding to bfloat16
    kept = sum(buffer.nbytes for buffer in layer.buffers())
    assert kept == BYTES[form] * weight.numel() + layer.absent.nbytes
    assert not list(layer.parameters())


@pytest.mark.parametrize("shape", [(8, 96), (3, 50), (1, 1)])
def test_rows_need_be_no_multiple_of_a_block(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = QuantizedLinear("nf4", weight, None, torch.float32).dequantize()
    assert (found - weight).abs().max() <= 0.1520 * weight.abs().max() * 1.001
    assert ((found - weight).norm() / weight.norm()).item() < 0.12
    meta = QuantizedLinear("nf4", weight.to("meta"), None, torch.float32)
    assert meta.dequantize().shape == shape


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_the_input_needs_no_copy_of_the_weight(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = torch.nn.Parameter(torch.ones(32), requires_grad=False)
    layer = QuantizedLinear(form, matrix(), bias, torch.bfloat16)
    made: list[weakref.ref[torch.Tensor]] = []
    dequantize = layer.dequantize

    def noted(dtype: torch.dtype | None = None) -> torch.Tensor:
        weight = dequantize(dtype)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(layer, "dequantize", noted)
    inputs = torch.randn(2, 3, 256, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        outputs = layer(inputs)
    assert [one() for one in made] == [None]
    assert [one.data_ptr() for one in saved] == [layer.quantized.data_ptr(), layer.scales.data_ptr()]
    weight = dequantize(torch.float32)
    assert torch.allclose(outputs, inputs @ weight.T + 1, atol=1e-5)
    outputs.backward(torch.ones_like(outputs))
    assert torch.allclose(inputs.grad, weight.sum(0).expand_as(inputs), atol=1e-4)
    assert [one() for one in made] == [None, None]


def test_under_autocast_it_computes_in_its_format() -> None:
    layer = QuantizedLinear("int8", matrix(), None, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 256)).dtype == torch.bfloat16
    assert layer(torch.ones(1, 256)).dtype == torch.float32


def test_its_weight_shows_shape_and_format_and_takes_no_change() -> None:
    layer = QuantizedLinear("fp8", matrix(), None, torch.bfloat16)
    assert (layer.weight.shape, layer.weight.dtype) == ((32, 256), torch.bfloat16)
    assert layer.weight.isnan().all()
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        layer.weight.data += 1


def test_a_machine_without_bitsandbytes_is_reported_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: object, **rest: object) -> object:
        if name.startswith("bitsandbytes"):
            raise ModuleNotFoundError("No module named 'bitsandbytes'")
        return real(name, *args, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    config = TrainConfig(resume_ckpt="x", training_kind="lora", quantization="nf4")
    precision = precision_of(config, "cpu")
    with pytest.raises(ConfigError, match=r"quantization nf4: needs bitsandbytes.*pip install.*int8 or fp8"):
        choose_formats(config, precision)
    assert choose_formats(config.replace(quantization="int8"), precision).quantization == "int8"
