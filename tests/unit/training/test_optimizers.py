"""Optimizers by name: what is built, what is refused, and what goes into the groups."""

import logging
import sys

import pytest
import torch
from optimizers_by_name import build_optimizer

from everydream_kit.errors import ConfigError
from everydream_kit.training.optimizers import (
    OPTIMIZERS,
    build_optimizer_for_parts,
    default_optimizer_name,
    may_step_by_parameter,
    restore_optimizer,
)
from everydream_kit.training.parameters import TrainedPart
from everydream_kit.training.parts import PartSettings


def parameter(*shape):
    return torch.nn.Parameter(torch.ones(*(shape or (3,))))


def part(name, *parameters):
    return TrainedPart(name, [], [(str(number), one) for number, one in enumerate(parameters)])


@pytest.mark.parametrize("spelling", ["adamw", "AdamW", "adam_w", "ADAM-W"])
def test_names_are_compared_without_case_and_dashes(spelling):
    assert type(build_optimizer(spelling, [parameter()], lr=0.1)) is torch.optim.AdamW


def test_everydream_2s_spellings_are_known():
    for name in ("dadapt_adam", "dadapt_lion", "dadapt_sgd", "adamw8bit", "lion", "dowg", "prodigy", "adafactor"):
        assert name.replace("_", "") in OPTIMIZERS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamw8bits", r"optimizer: unknown name 'adamw8bits'; did you mean adamw8bit\?"),
        ("zzz", r"optimizer: unknown name 'zzz'\. Known: adamw, adam, .*or module\.Class"),
        ("no_such_module.Thing", r"no_such_module\.Thing cannot be imported"),
        ("torch.optim.Nothing", r"torch\.optim\.Nothing is not a class of torch optimizers"),
        ("torch.nn.Linear", r"torch\.nn\.Linear is not a class of torch optimizers"),
    ],
)
def test_an_unknown_name_is_an_error_and_never_another_optimizer(name, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(name, [parameter()], lr=0.1)


def test_any_class_can_be_named_with_its_arguments():
    optimizer = build_optimizer("torch.optim.RMSprop", [parameter()], lr=0.1, alpha=0.5, weight_decay=0.25)
    assert type(optimizer) is torch.optim.RMSprop
    assert optimizer.param_groups[0]["alpha"] == 0.5
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


def test_a_class_that_knows_no_betas_gets_none():
    optimizer = build_optimizer("torch.optim.RMSprop", [parameter()], lr=0.1, betas=(0.9, 0.99))
    assert "betas" not in optimizer.param_groups[0]


@pytest.mark.parametrize("name", ["adamw", "lion", "pytorch_optimizer.Lion"])
def test_an_argument_that_the_class_does_not_take_is_refused(name):
    with pytest.raises(ConfigError, match=rf"optimizer {name}: takes no foreech; did you mean foreach\?"):
        build_optimizer(name, [parameter()], lr=0.1, foreech=True)


def test_betas_of_the_wrong_number_are_refused():
    with pytest.raises(ConfigError, match=r"optimizer adan: betas are 3 numbers \(got \[0\.9, 0\.999\]\)"):
        build_optimizer("adan", [parameter()], lr=0.1, betas=[0.9, 0.999])


@pytest.mark.parametrize(
    ("device_type", "fused", "foreach"), [("cpu", True, None), ("cuda", True, None), ("mps", None, True)]
)
def test_adamw_takes_torchs_fastest_path_for_the_device(device_type, fused, foreach):
    group = build_optimizer("adamw", [parameter()], lr=0.1, device_type=device_type).param_groups[0]
    assert (group["fused"], group["foreach"]) == (fused, foreach)


def test_the_default_is_8_bit_on_cuda_and_fused_adamw_elsewhere():
    assert [default_optimizer_name(device) for device in ("cuda", "cpu", "mps")] == ["adamw8bit", "adamw", "adamw"]


def moved_by(name, **settings):
    """How 20 steps of noisy gradients, small as a fine-tuning's are, move weights of a layer's usual size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(0.3 * torch.randn(64, 64, generator=generator))
    start, gradient = weight.detach().clone(), 1e-5 * torch.randn(64, 64, generator=generator)
    lr = 1.0 if OPTIMIZERS[name].finds_own_rate else 1e-6
    optimizer = build_optimizer(name, [weight], lr=lr, **settings)
    for _ in range(20):
        weight.grad = gradient + 1e-5 * torch.randn(64, 64, generator=generator)
        optimizer.step()
    return weight.detach() - start


@pytest.mark.filterwarnings("ignore:.*nothing to page.*")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_weight_decay_moves_weights_far_less_than_their_gradients_do(name):
    # with 0.01 coupled to the gradient: adam 1.90, adopt 1.72, sgd 279, dadaptsgd 841; dowg's weights became NaN
    without, by_default = moved_by(name, weight_decay=0.0), moved_by(name)
    assert float((by_default - without).norm() / without.norm()) < 0.05


def test_an_asked_for_weight_decay_is_used_and_a_foreign_class_keeps_its_own():
    assert build_optimizer("sgd", [parameter()], lr=0.1, weight_decay=0.25).param_groups[0]["weight_decay"] == 0.25
    assert build_optimizer("torch.optim.RMSprop", [parameter()], lr=0.1).param_groups[0]["weight_decay"] == 0
    assert build_optimizer("torch.optim.AdamW", [parameter()], lr=0.1).param_groups[0]["weight_decay"] == 0.01


def test_decouple_reaches_the_class_by_its_own_name():
    group = build_optimizer("radam", [parameter()], lr=0.1, decouple=False).param_groups[0]
    assert group["decoupled_weight_decay"] is False


def test_a_zero_weight_decay_stays_zero_and_betas_reach_the_group():
    optimizer = build_optimizer("adamw", [parameter()], lr=0.1, betas=[0.8, 0.9], eps=1e-5, weight_decay=0.0)
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.0, (0.8, 0.9), 1e-5)


def test_settings_that_are_not_given_are_the_classes_own():
    lion = build_optimizer("lion", [parameter()], lr=0.1).param_groups[0]
    assert (lion["betas"], lion["weight_decay"]) == ((0.9, 0.99), 0.01)
    assert build_optimizer("adafactor", [parameter()], lr=0.1, eps=1e-8).param_groups[0]["eps"] == (None, 0.001)


def test_without_bitsandbytes_adamw_is_used_with_a_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with caplog.at_level(logging.WARNING):
        optimizer = build_optimizer("adamw8bit", [parameter()], lr=0.1)
    assert type(optimizer) is torch.optim.AdamW
    assert "adamw8bit" in caplog.text
    assert "adamw is used instead" in caplog.text


def test_a_paged_optimizer_on_a_cpu_is_not_paged_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        optimizer = build_optimizer("pagedadamw", [parameter()], lr=0.1)
    assert type(optimizer) is torch.optim.AdamW
    assert "nothing to page on a CPU; adamw is used instead" in caplog.text


def test_a_small_lr_for_an_optimizer_that_finds_its_own_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        build_optimizer("prodigy", [parameter()], lr=1e-6)
        assert "prodigy finds its own learning rate" in caplog.text
        caplog.clear()
        build_optimizer("prodigy", [parameter()], lr=1.0)
    assert caplog.text == ""


def test_parts_with_one_optimizer_share_it_and_keep_their_own_settings():
    unet, text = part("unet", parameter(), parameter()), part("text encoder", parameter())
    settings = [
        PartSettings("unet", "adamw", 1e-3, "constant", weight_decay=0.1),
        PartSettings("text encoder", "adamw", 0.0, "constant", betas=(0.5, 0.6), weight_decay=0.0),
    ]
    optimizer = build_optimizer_for_parts([unet, text], settings)
    assert type(optimizer) is torch.optim.AdamW
    assert [
        (group["name"], group["lr"], group["peak_lr"], group["weight_decay"], group["betas"], len(group["params"]))
        for group in optimizer.param_groups
    ] == [
        ("unet", 1e-3, 1e-3, 0.1, (0.9, 0.999), 2),
        ("text encoder", 0.0, 0.0, 0.0, (0.5, 0.6), 1),
    ]


def test_parts_with_different_optimizers_step_as_one():
    first, second = parameter(), parameter()
    optimizer = build_optimizer_for_parts(
        [part("unet", first), part("text encoder", second)],
        [
            PartSettings("unet", "sgd", 0.5, "constant", weight_decay=0.0),
            PartSettings("text encoder", "lion", 0.25, "constant", weight_decay=0.0),
        ],
    )
    assert [group["name"] for group in optimizer.param_groups] == ["unet", "text encoder"]
    (2 * first.sum() + 3 * second.sum()).backward()
    optimizer.step()
    assert first.tolist() == [0.0, 0.0, 0.0]  # 1 - 0.5 · 2
    assert second.tolist() == [0.75, 0.75, 0.75]  # 1 - 0.25 · sign(3)
    optimizer.param_groups[1]["lr"] = 0.0  # what a schedule does
    optimizer.step()
    assert second.tolist() == [0.75, 0.75, 0.75]
    optimizer.zero_grad()
    assert first.grad is None
    assert second.grad is None


def test_a_fused_backward_with_an_optimizer_that_needs_all_gradients_is_refused():
    assert not may_step_by_parameter("prodigy")
    assert may_step_by_parameter("AdamW8bit")
    with pytest.raises(ConfigError, match="fused_backward, optimizer: prodigy needs all gradients together"):
        build_optimizer_for_parts(
            [part("unet", parameter())], [PartSettings("unet", "prodigy", 1.0, "constant")], fused_backward=True
        )


@pytest.mark.parametrize(
    "options", [{}, {"rounding_seed": 1}, {"fused_backward": True}, {"fused_backward": True, "rounding_seed": 1}]
)
@pytest.mark.parametrize("names", [["adamw", "adamw"], ["adamw", "lion"]])
def test_a_restored_optimizer_has_the_old_state_and_the_new_settings(options, names):
    def build(weight_decay, betas):
        weights = [
            torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16 if "rounding_seed" in options else None))
            for _ in "ab"
        ]
        settings = [
            PartSettings(part, name, 0.1, "constant", betas=betas, weight_decay=weight_decay)
            for part, name in zip(["unet", "text encoder"], names, strict=True)
        ]
        parts = [part("unet", weights[0]), part("text encoder", weights[1])]
        return weights, build_optimizer_for_parts(parts, settings, **options)

    def step(weights, optimizer):
        sum(weight.float().square().sum() for weight in weights).backward()
        optimizer.step()
        optimizer.zero_grad()

    weights, old = build(0.5, (0.9, 0.99))
    step(weights, old)
    _, new = build(0.0, (0.8, 0.9))
    restore_optimizer(new, old.state_dict())
    assert {(group["weight_decay"], tuple(group["betas"])) for group in new.param_groups} == {(0.0, (0.8, 0.9))}
    moments = [[state["exp_avg"].flatten() for state in one.state.values()] for one in (old, new)]
    assert len(moments[0]) == 2
    assert torch.equal(torch.cat(moments[0]), torch.cat(moments[1]))


def test_the_settings_of_a_rounded_optimizer_reach_its_inner_ones_after_a_restore():
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    built = [
        build_optimizer_for_parts(
            [part("unet", weight)],
            [PartSettings("unet", "adamw", 0.5, "constant", weight_decay=decay)],
            rounding_seed=1,
        )
        for decay in (0.0, 1.0)
    ]
    restore_optimizer(built[1], built[0].state_dict())
    weight.grad = torch.zeros_like(weight)
    built[1].step()
    assert weight.tolist() == [0.5, 0.5]  # decayed by lr · weight_decay, as requested now


def test_dowg_takes_the_papers_steps():
    """Two steps of algorithm 1 of arXiv 2305.16284 by hand, on f(x) = x²/2 in two parameters."""
    first, second = torch.nn.Parameter(torch.tensor([3.0])), torch.nn.Parameter(torch.tensor([4.0]))
    optimizer = build_optimizer("dowg", [first, second], lr=1.0, weight_decay=0.0, d0=0.5)
    # r = 0.5 · (1 + |(3, 4)|) = 3, v = 9 · 25 = 225, rate = 9 / 15 = 0.6
    (first**2 / 2 + second**2 / 2).sum().backward()
    optimizer.step()
    assert [first.item(), second.item()] == pytest.approx([1.2, 1.6])
    # moved by |(1.8, 2.4)| = 3, so r stays 3; v = 225 + 9 · 4 = 261, rate = 9 / sqrt(261)
    optimizer.zero_grad()
    (first**2 / 2 + second**2 / 2).sum().backward()
    optimizer.step()
    keep = 1 - 9 / 261**0.5
    assert [first.item(), second.item()] == pytest.approx([1.2 * keep, 1.6 * keep])


def test_dowg_stands_still_without_gradients():
    optimizer = build_optimizer("dowg", [parameter()], lr=1.0)
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].tolist() == [1.0, 1.0, 1.0]
