"""Number formats, the gradient scaler, and out of memory."""

import pytest
import torch

from everydream_kit.config import TrainConfig
from everydream_kit.config.precision_settings import PrecisionGroup
from everydream_kit.errors import ConfigError
from everydream_kit.models.families import FAMILIES
from everydream_kit.training.base_model import refuse_float16
from everydream_kit.training.precision import choose_precision


def test_on_a_cpu_automatic_precision_is_float32():
    precision = choose_precision("cpu", PrecisionGroup())
    assert (precision.dtype, precision.scaler, precision.gradient_scale) == (torch.float32, None, None)
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(("amp_dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_named_format_is_used_on_any_device(amp_dtype, expected):
    precision = choose_precision("cpu", PrecisionGroup(amp_dtype=amp_dtype))
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_on_a_gpu_the_format_follows_what_it_has(monkeypatch, has_bfloat16, expected):
    def is_supported(including_emulation=True):
        return True if including_emulation else has_bfloat16  # a T4 imitates it

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **options: options)
    precision = choose_precision("cuda", PrecisionGroup())
    assert precision.dtype == expected
    assert (precision.scaler is None) == has_bfloat16


def test_amp_off_means_float32():
    assert choose_precision("cpu", PrecisionGroup(amp=False, amp_dtype="bf16")).dtype == torch.float32


def test_bfloat16_weights_compute_in_bfloat16_even_without_amp():
    precision = choose_precision("cpu", PrecisionGroup(amp=False, weight_dtype="bfloat16"))
    assert (precision.dtype, precision.weight_dtype) == (torch.bfloat16, torch.bfloat16)


def test_bfloat16_weights_and_float16_arithmetic_are_refused():
    with pytest.raises(ConfigError, match="weight_dtype, amp_dtype: bfloat16 weights compute in bfloat16"):
        choose_precision("cpu", PrecisionGroup(amp_dtype="fp16", weight_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("device", "settings", "arithmetic", "frozen"),
    [
        ("cuda", {"amp_dtype": "bf16"}, torch.bfloat16, torch.bfloat16),
        ("cuda", {"amp_dtype": "bf16", "frozen_dtype": "float16"}, torch.bfloat16, torch.float16),
        ("cuda", {"amp_dtype": "bf16", "frozen_dtype": "float32"}, torch.bfloat16, torch.float32),
        ("cuda", {"amp": False}, torch.float32, None),
        ("cuda", {"weight_dtype": "bfloat16"}, torch.bfloat16, None),
        ("cpu", {}, torch.float32, None),
        ("cpu", {"amp_dtype": "bf16"}, torch.bfloat16, None),
        ("cpu", {"frozen_dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        ("cpu", {"frozen_dtype": "float16"}, torch.float16, torch.float16),
    ],
)
def test_frozen_weights_have_the_format_of_the_arithmetic_on_a_gpu(device, settings, arithmetic, frozen):
    precision = choose_precision(device, PrecisionGroup(**settings))
    assert (precision.dtype, precision.frozen_dtype) == (arithmetic, frozen)
    assert (precision.scaler is not None) == (arithmetic == torch.float16)


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
@pytest.mark.parametrize(
    ("device", "settings", "words"),
    [
        ("cpu", {"amp_dtype": "fp16"}, r"amp_dtype fp16: activations of Z-Image .*; set amp_dtype to auto or bf16"),
        ("cpu", {"frozen_dtype": "float16"}, "frozen_dtype float16: .*; set frozen_dtype to auto or bfloat16"),
        ("cuda", {}, r"exceed float16, and GPUs from before 2020 \(T4, V100\) have no bfloat16"),
    ],
)
def test_float16_is_refused_for_a_flow_model_with_what_asked_for_it(device, settings, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    config = TrainConfig(resume_ckpt="base", **settings)
    precision = choose_precision(device, config)
    with pytest.raises(ConfigError, match=words):
        refuse_float16(config, FAMILIES["z_image"], precision)
    refuse_float16(config, FAMILIES["sdxl"], precision)


def test_float16_and_a_fused_backward_are_refused():
    with pytest.raises(ConfigError, match="fused_backward, amp_dtype: float16 needs its gradients unscaled"):
        choose_precision("cpu", PrecisionGroup(amp_dtype="fp16", fused_backward=True))
    assert choose_precision("cpu", PrecisionGroup(amp_dtype="bf16", fused_backward=True)).dtype == torch.bfloat16


def trained_parameter():
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    return parameter, torch.optim.SGD([parameter], lr=1.0)


def update(precision, optimizer):
    """As the step does it."""
    precision.unscale(optimizer)
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    precision.step(optimizer, skip=torch.nn.utils.get_total_norm(gradients).isfinite().logical_not())


def test_without_a_scaler_the_loss_is_the_loss():
    precision = choose_precision("cpu", PrecisionGroup())
    parameter, optimizer = trained_parameter()
    precision.scale(0.25 * parameter.sum()).backward()
    update(precision, optimizer)
    assert parameter.item() == 0.75


def test_float16_scales_the_loss_and_unscales_the_gradients():
    precision = choose_precision("cpu", PrecisionGroup(amp_dtype="fp16"))
    assert precision.gradient_scale == pytest.approx(2**17.5)
    parameter, optimizer = trained_parameter()
    precision.scale(0.25 * parameter.sum()).backward()
    assert parameter.grad.item() == pytest.approx(0.25 * 2**17.5)
    precision.unscale(optimizer)
    assert parameter.grad.item() == pytest.approx(0.25)
    precision.step(optimizer, skip=torch.tensor(False))
    assert parameter.item() == pytest.approx(0.75)


def test_an_overflow_skips_the_step_and_halves_the_scale():
    precision = choose_precision("cpu", PrecisionGroup(amp_dtype="fp16"))
    parameter, optimizer = trained_parameter()
    parameter.grad = torch.tensor([float("inf")])
    precision.scale(torch.zeros(()))  # makes the scaler's tensors
    update(precision, optimizer)
    assert parameter.item() == 1.0
    assert precision.gradient_scale == pytest.approx(2**16.5)


@pytest.mark.parametrize(
    ("num_steps", "factor", "interval"),
    [
        (0, 2.0, 25),
        (499, 2.0, 25),
        (500, 1.8, 100),
        (1000, 1.6, 200),
        (2000, 1.3, 500),
        (4000, 1.15, 2000),
        (9999, 1.15, 2000),
    ],
)
def test_the_scale_grows_more_slowly_as_the_run_goes_on(num_steps, factor, interval):
    precision = choose_precision("cpu", PrecisionGroup(amp_dtype="fp16"))
    precision.num_steps = num_steps
    parameter, optimizer = trained_parameter()
    precision.scale(parameter.sum()).backward()
    update(precision, optimizer)
    scaler = precision.scaler
    assert scaler.get_growth_factor() == factor
    assert scaler.get_backoff_factor() == pytest.approx(1 / factor)
    assert scaler.get_growth_interval() == interval


def test_the_tuning_can_be_left_out():
    precision = choose_precision("cpu", PrecisionGroup(amp_dtype="fp16", apply_grad_scaler_step_tweaks=False))
    precision.num_steps = 5000
    parameter, optimizer = trained_parameter()
    precision.scale(parameter.sum()).backward()
    update(precision, optimizer)
    assert precision.scaler.get_growth_interval() == 25


def test_the_scalers_state_survives_a_resume():
    first, second = (choose_precision("cpu", PrecisionGroup(amp_dtype="fp16")) for _ in range(2))
    parameter, optimizer = trained_parameter()
    first.scale(torch.zeros(()))
    parameter.grad = torch.tensor([float("inf")])
    update(first, optimizer)
    second.load_state_dict(first.state_dict())
    assert second.gradient_scale == first.gradient_scale
    assert second.num_steps == 1
    plain = choose_precision("cpu", PrecisionGroup())
    plain.load_state_dict(plain.state_dict())
    assert plain.gradient_scale is None


@pytest.mark.parametrize(("keep_casts", "casts"), [(True, 1), (False, 3)])
def test_casts_of_trained_weights_are_kept_for_the_backward_pass_only(keep_casts, casts):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.found += func is torch.ops.aten._to_copy.default and args[0].shape == (5, 7)
            return func(*args, **(kwargs or {}))

    layer, precision = torch.nn.Linear(7, 5), choose_precision("cpu", PrecisionGroup(amp_dtype="bf16"))
    with Counter() as counter, torch.no_grad(), precision.autocast(keep_casts=keep_casts):
        for _ in range(3):
            layer(torch.zeros(1, 7))
    assert counter.found == casts
