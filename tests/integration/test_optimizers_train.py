"""Every optimizer trains a real (tiny) UNet, and its saved state continues as if nothing had happened."""

import copy
import io

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from everydream_kit.config.objective_settings import ObjectiveGroup
from everydream_kit.draws import derive_seed
from everydream_kit.training.noise import make_noise
from everydream_kit.training.objectives import build_objective
from everydream_kit.training.optimizers import OPTIMIZERS, build_optimizer_for_parts
from everydream_kit.training.parameters import TrainedPart
from everydream_kit.training.parts import PartSettings
from everydream_kit.training.timesteps import draw_timesteps

RATES = {
    "sgd": 0.1,
    "lion": 1e-4,
    "lion8bit": 1e-4,
    "pagedlion8bit": 1e-4,
    "adafactor": 0.02,
    "adan": 5e-3,
    "came": 2e-4,
}


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),  # the middle block has the attention
    )


class Trainee:
    """Four fixed images, and what is needed to learn them."""

    def __init__(self, base, names, dtype=torch.float32, **options):
        self.unet = copy.deepcopy(base).to(dtype)
        named = list(self.unet.named_parameters())
        middle = len(named) // 2  # two parts, as UNet and text encoder are
        parts = [TrainedPart("unet", [self.unet], named[:middle]), TrainedPart("text encoder", [], named[middle:])]
        settings = [
            PartSettings(part.name, name, rate_of(name), "constant", weight_decay=0.01)
            for part, name in zip(parts, names, strict=True)
        ]
        self.optimizer = build_optimizer_for_parts(parts, settings, **options)
        self.objective = build_objective(
            DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            "epsilon",
            ObjectiveGroup(),
        )
        self.latents = make_noise((4, 8, 8), [1, 2, 3, 4])
        self.states = make_noise((1, 5, 16), [5, 6, 7, 8])[:, 0]
        self.dtype = dtype

    def losses(self, rows, epoch=0):
        seeds = [derive_seed(0, "noise", epoch, row) for row in rows]
        noise, timesteps = make_noise((4, 8, 8), seeds), draw_timesteps(seeds, 0, 1000)
        noisy = self.objective.add_noise(self.latents[rows], noise, timesteps).to(self.dtype)
        predicted = self.unet(noisy, timesteps, self.states[rows].to(self.dtype)).sample
        return self.objective.loss(predicted, self.objective.target(self.latents[rows], noise, timesteps), timesteps)

    def step(self, windows=((0, 1, 2, 3),), epoch=0):
        total = 0.0
        for rows in windows:
            loss = self.losses(list(rows), epoch).sum() / 4
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def copy_with_saved_state(self, base, names, **options):
        """What a resume does: a fresh trainee, the saved weights, the state through a file."""
        file = io.BytesIO()
        torch.save({"weights": self.unet.state_dict(), "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other = Trainee(base, names, self.dtype, **options)
        other.unet.load_state_dict(saved["weights"])
        other.optimizer.load_state_dict(saved["optimizer"])
        return other


def rate_of(name):
    return 1.0 if OPTIMIZERS[name].finds_own_rate else RATES.get(name, 1e-3)


def assert_same_weights(first, second):
    for (name, one), other in zip(first.unet.named_parameters(), second.unet.parameters(), strict=True):
        assert torch.equal(one, other), name


def check(base, names, dtype=torch.float32, **options):
    trainee = Trainee(base, names, dtype, **options)
    losses = [trainee.step() for _ in range(6)]
    assert losses[-1] < losses[0]
    resumed = trainee.copy_with_saved_state(base, names, **options)
    for epoch in (1, 2):
        assert trainee.step(epoch=epoch) == resumed.step(epoch=epoch)
    assert_same_weights(trainee, resumed)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_resumes_to_the_bit(base, name):
    check(base, [name, name])


@pytest.mark.parametrize("names", [["adamw", "lion"], ["adamw8bit", "prodigy"]])
def test_two_optimizers_learn_together_and_resume_to_the_bit(base, names):
    check(base, names)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion8bit", "adafactor", "prodigy", "dowg"])
def test_bfloat16_weights_learn_and_resume_to_the_bit(base, name):
    check(base, [name, name], torch.bfloat16, rounding_seed=555)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion8bit"])
def test_a_fused_backward_learns_and_resumes_to_the_bit(base, name):
    check(base, [name, name], fused_backward=True)


def test_a_fused_backward_with_bfloat16_weights_learns_and_resumes_to_the_bit(base):
    check(base, ["adamw", "adamw"], torch.bfloat16, fused_backward=True, rounding_seed=555)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "adafactor", "adamw8bit"])
def test_a_fused_backward_gives_the_weights_of_an_ordinary_one(base, name):
    ordinary, fused = Trainee(base, [name, name]), Trainee(base, [name, name], fused_backward=True)
    for epoch in range(3):
        assert ordinary.step(epoch=epoch) == pytest.approx(fused.step(epoch=epoch), rel=1e-6)
    for one, other in zip(ordinary.unet.parameters(), fused.unet.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_a_fused_backward_holds_no_gradients_and_knows_their_norm(base):
    ordinary, fused = Trainee(base, ["sgd", "sgd"]), Trainee(base, ["sgd", "sgd"], fused_backward=True)
    (ordinary.losses([0, 1, 2, 3]).sum() / 4).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in ordinary.unet.parameters()]).item()
    fused.optimizer.measures_norm = True
    (fused.losses([0, 1, 2, 3]).sum() / 4).backward()
    assert all(p.grad is None for p in fused.unet.parameters())
    assert fused.optimizer.take_gradient_norm() == pytest.approx(expected, rel=1e-5)
    assert fused.optimizer.take_gradient_norm() == 0.0


@pytest.mark.parametrize("windows", [((0, 1), (2, 3)), ((0,), (1,), (2,), (3,)), ((0, 1, 2), (3,))])
def test_accumulated_steps_are_the_steps_of_the_whole_batch(base, windows):
    # SGD: Adam's first steps are signs, which turn rounding errors of tiny gradients into whole updates
    whole, pieces = Trainee(base, ["sgd", "sgd"]), Trainee(base, ["sgd", "sgd"])
    for epoch in range(3):
        assert whole.step(epoch=epoch) == pytest.approx(pieces.step(windows, epoch=epoch), abs=1e-6)
    for one, other in zip(whole.unet.parameters(), pieces.unet.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_frozen_parameters_keep_their_bytes_and_get_no_gradients(base):
    trainee = Trainee(base, ["adamw", "adamw"])
    frozen = {name: p for name, p in trainee.unet.named_parameters() if "attn2" in name}
    assert frozen
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    for _ in range(2):
        (trainee.losses([0, 1]).sum() / 2).backward()
        assert all(parameter.grad is None for parameter in frozen.values())
        trainee.optimizer.step()
        trainee.optimizer.zero_grad()
    before = dict(base.named_parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())
    assert not torch.equal(trainee.unet.conv_in.weight, before["conv_in.weight"])


def test_a_learning_rate_of_zero_changes_nothing(base):
    trainee = Trainee(base, ["adamw", "adamw"])
    for group in trainee.optimizer.param_groups:
        group["lr"] = 0.0
    trainee.step()
    for one, other in zip(trainee.unet.parameters(), base.parameters(), strict=True):
        assert torch.equal(one, other)
