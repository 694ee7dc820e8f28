"""What the parameters of length, optimizer, objective and precision do, seen in steps of a tiny real model."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rehearsals import Rehearsal, plain_settings, prepared, rehearse, square_images

from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.runs import RunFolder
from everydream_kit.sessions import resume, train
from everydream_kit.training.control import StopSignal
from everydream_kit.training.loop import train_loop


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("training")
    return plain_settings(folder, tiny_model_folder, square_images(folder / "pictures"))


@pytest.fixture(scope="module")
def plain(settings: dict[str, Any]) -> Rehearsal:
    """Two steps with nothing switched on."""
    return rehearse(**settings)


# Length and learning rate ---------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_epochs_or_its_steps_whichever_come_first(
    settings: dict[str, Any], plain: Rehearsal
) -> None:
    assert (len(plain.losses), plain.run.num_steps) == (2, 2)
    by_epochs = rehearse(**{**settings, "max_steps": 9, "max_epochs": 1})
    assert (len(by_epochs.losses), by_epochs.run.num_steps) == (1, 1)


def test_images_of_one_step_are_batch_size_times_grad_accum(settings: dict[str, Any], plain: Rehearsal) -> None:
    accumulated = rehearse(**{**settings, "batch_size": 1, "grad_accum": 2, "max_steps": 1})
    assert (plain.reports[0].num_images, accumulated.reports[0].num_images) == (4, 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"lr": 3e-4}, [3, 3, 3, 3]),
        ({"lr_warmup_steps": 2}, [0.5, 1, 1, 1]),
        ({"lr_scheduler": "linear", "lr_warmup_steps": 0, "lr_decay_steps": 4}, [1, 0.75, 0.5, 0.25]),
        (
            {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "lr_decay_steps": 3},
            [1, 1, 0.5, 0],  # the half cosine over two steps
        ),
        ({"scale_lr": True}, [4**0.55] * 4),
    ],
    ids=["constant", "lr", "warm-up", "linear", "cosine", "scaled"],
)
def test_the_rate_of_each_step(settings: dict[str, Any], changes: dict[str, Any], expected: list[float]) -> None:
    with prepared(**{**settings, "max_steps": 4, **changes}) as rehearsal:
        rates = [rehearsal.run.learner.set_learning_rates(step)["unet"] for step in range(4)]
        groups = {group["lr"] for group in rehearsal.run.learner.optimizer.param_groups}
    assert rates == pytest.approx([1e-4 * factor for factor in expected])
    assert groups == {rates[-1]}


def test_the_seed_decides_all_draws_and_minus_one_is_a_new_one_that_is_reported(
    settings: dict[str, Any], plain: Rehearsal
) -> None:
    assert rehearse(**settings).losses == plain.losses
    first, second = (rehearse(**{**settings, "seed": -1, "max_steps": 1}) for _ in range(2))
    assert first.losses != second.losses != plain.losses[:1]
    reported = [next(iter(r.folder.events("dataset")))["seed"] for r in (plain, first, second)]
    assert reported == [7, first.run.seed, second.run.seed]
    assert rehearse(**{**settings, "seed": reported[1], "max_steps": 1}).losses == first.losses


# Optimizer and what is trained ----------------------------------------------------------------------------------------


def test_the_optimizer_is_the_one_that_is_named(settings: dict[str, Any]) -> None:
    for name, kind in ((None, "AdamW"), ("lion", "Lion"), ("torch.optim.RMSprop", "RMSprop")):
        with prepared(**{**settings, "optimizer": name}) as rehearsal:
            assert type(rehearsal.run.learner.optimizer).__name__ == kind


def test_the_optimizer_config_sets_the_text_encoders_rate_and_freezes_layers(settings: dict[str, Any]) -> None:
    file = {
        "base": {"weight_decay": 0.25},
        "text_encoder_overrides": {"lr": 5e-7},
        "text_encoder_freezing": {"unfreeze_last_n_layers": 1},
    }
    with prepared(**{**settings, "optimizer_config": file}) as rehearsal:
        assert rehearsal.run.learner.set_learning_rates(0) == {"unet": 1e-4, "text encoder": 5e-7}
        assert {group["weight_decay"] for group in rehearsal.run.learner.optimizer.param_groups} == {0.25}
        trained = [
            name for name, p in rehearsal.run.learner.model.text_encoders[0].named_parameters() if p.requires_grad
        ]
    assert any("layers.2." in name for name in trained)  # of three
    assert not any(f"layers.{number}." in name for name in trained for number in (0, 1))


def test_a_text_encoder_rate_of_zero_stays_zero(settings: dict[str, Any]) -> None:
    file = {"text_encoder_overrides": {"lr": 0}}
    rehearsal = rehearse(**{**settings, "optimizer_config": file, "max_steps": 1})
    assert rehearsal.reports[0].learning_rates == {"unet": 1e-4, "text encoder": 0}


def test_clipping_bounds_the_gradient_that_is_applied(settings: dict[str, Any]) -> None:
    sgd = {**settings, "optimizer": "sgd", "lr": 1.0, "clip_grad_norm": 1e-3, "disable_textenc_training": True}
    sgd["optimizer_config"] = {"base": {"weight_decay": 0, "momentum": 0}}
    with prepared(**sgd) as before:
        start = [p.detach().clone() for p in before.run.learner.parameters()]
    after = rehearse(**{**sgd, "max_steps": 1})
    moved = torch.cat([(a - b).flatten() for a, b in zip(after.run.learner.parameters(), start, strict=True)])
    assert after.reports[0].gradient_norm > 1e-2
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("switch", "left"), [("disable_unet_training", "text encoder"), ("disable_textenc_training", "unet")]
)
def test_a_part_that_is_switched_off_has_no_rate(settings: dict[str, Any], switch: str, left: str) -> None:
    with prepared(**{**settings, switch: True}) as rehearsal:
        assert [part.name for part in rehearsal.run.learner.parts] == [left]


# LoRA and new tokens --------------------------------------------------------------------------------------------------


def adapter_shapes(rehearsal: Rehearsal) -> dict[str, torch.Size]:
    return {name: p.shape for part in rehearsal.run.learner.parts for name, p in part.parameters}


def test_lora_trains_matrices_of_its_rank_in_the_layers_that_are_meant(settings: dict[str, Any]) -> None:
    lora = {**settings, "training_kind": "lora"}
    with prepared(**{**lora, "lora_rank": 3}) as small:
        assert {min(shape) for shape in adapter_shapes(small).values()} == {3}
        assert [part.name for part in small.run.learner.parts] == ["unet"]
    with prepared(**{**lora, "lora_targets": ["to_q"], "lora_text_encoder": True}) as chosen:
        unet = chosen.run.learner.parts[0]
        assert all("to_q" in name for name, _ in unet.parameters)
        assert {min(p.shape) for _, p in unet.parameters} == {16}
        assert [part.name for part in chosen.run.learner.parts] == ["unet", "text encoder"]
    with prepared(**{**lora, "lora_dora": True}) as dora:
        assert adapter_shapes(dora).keys() > adapter_shapes(small).keys()  # a magnitude for each layer


def test_alpha_is_the_adapters_strength_and_dropout_makes_its_steps_differ(settings: dict[str, Any]) -> None:
    lora = {**settings, "training_kind": "lora", "lr": 1e-2}
    plain, strong, dropped = (
        rehearse(**lora, **changes) for changes in ({}, {"lora_alpha": 64.0}, {"lora_dropout": 0.5})
    )
    # A fresh adapter adds nothing, so the first loss is the base's whatever its strength.
    assert plain.losses[0] == strong.losses[0] == dropped.losses[0]
    assert len({plain.losses[1], strong.losses[1], dropped.losses[1]}) == 3


def test_new_tokens_are_all_that_textual_inversion_trains(settings: dict[str, Any]) -> None:
    changes = {"training_kind": "textual_inversion", "new_tokens": {"<my-cat>": "cat"}}
    with prepared(**{**settings, **changes}) as rehearsal:
        run = rehearsal.run
        assert list(run.learner.model.new_tokens) == ["<my-cat>"]
        assert [part.name for part in run.learner.parts] == ["text encoder"]
        width = run.learner.model.text_encoders[0].config.hidden_size
        assert run.learner.parts[0].num_parameters == width


# Objective ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "huber"},
        {"loss_type": "mse_huber"},
        {"min_snr_gamma": 0.01},
        {"debiased_estimation": True},
        {"zero_frequency_noise_ratio": 0.2},
        {"pyramid_noise_discount": 0.3},
        {"input_perturbation": 0.2},
        {"embedding_perturbation": 50.0},
        {"timestep_sampling": "logit_normal"},
        {"timestep_sampling": "mode"},
        {"timestep_sampling": "stratified"},
        {"prediction_type": "v_prediction"},
        {"clip_skip": 2},
    ],
    ids=lambda changes: " ".join(f"{name} {value}" for name, value in changes.items()),
)
def test_what_the_loss_asks_for_changes_the_loss(
    settings: dict[str, Any], plain: Rehearsal, changes: dict[str, Any]
) -> None:
    changed = rehearse(**{**settings, **changes, "max_steps": 1})
    assert math.isfinite(changed.losses[0])
    assert abs(changed.losses[0] - plain.losses[0]) > 1e-4
    assert (changed.timesteps == plain.timesteps[:4]) is ("timestep_sampling" not in changes)


def test_only_timesteps_from_start_to_before_end_are_drawn(settings: dict[str, Any], plain: Rehearsal) -> None:
    assert not all(300 <= t < 304 for t in plain.timesteps)
    bounded = rehearse(**{**settings, "timestep_start": 300, "timestep_end": 304})
    assert len(bounded.timesteps) == 8
    assert all(300 <= t < 304 for t in bounded.timesteps)


def test_zero_terminal_snr_leaves_no_signal_in_the_last_timestep_and_needs_v_prediction(
    settings: dict[str, Any],
) -> None:
    with prepared(**{**settings, "prediction_type": "v_prediction", "enable_zero_terminal_snr": True}) as rehearsal:
        assert rehearsal.run.learner.objective.snr(torch.tensor([999])) == 0.0
        assert rehearsal.run.learner.model.noise_scheduler.alphas_cumprod[-1] == 0.0
    with (
        pytest.raises(ConfigError, match="enable_zero_terminal_snr"),
        prepared(**{**settings, "enable_zero_terminal_snr": True}),
    ):
        pass


def test_another_train_sampler_changes_nothing_and_says_so(settings: dict[str, Any], plain: Rehearsal) -> None:
    pndm = rehearse(**{**settings, "train_sampler": "pndm", "max_steps": 1})
    assert pndm.losses == plain.losses[:1]
    assert "train_sampler pndm" in pndm.warnings


# Precision and memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [{"amp": False}, {"disable_amp": True}], ids=["amp", "disable_amp"])
def test_mixed_precision_can_be_forced_and_switched_off(
    settings: dict[str, Any], plain: Rehearsal, off: dict[str, bool]
) -> None:
    with prepared(**{**settings, "amp_dtype": "bf16", **off}) as rehearsal:
        assert rehearsal.run.learner.precision.dtype == torch.float32
    with prepared(**{**settings, "amp_dtype": "bf16"}) as rehearsal:
        assert rehearsal.run.learner.precision.dtype == torch.bfloat16


def test_bfloat16_arithmetic_gives_nearly_the_same_losses(settings: dict[str, Any], plain: Rehearsal) -> None:
    mixed = rehearse(**{**settings, "amp_dtype": "bf16"})
    assert mixed.losses != plain.losses
    assert mixed.losses == pytest.approx(plain.losses, rel=0.02)
    assert {p.dtype for p in mixed.run.learner.parameters()} == {torch.float32}


def test_weights_are_kept_in_the_named_format(settings: dict[str, Any]) -> None:
    with prepared(**{**settings, "weight_dtype": "bfloat16"}) as rehearsal:
        assert {p.dtype for p in rehearsal.run.learner.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in rehearsal.run.learner.model.vae.parameters()} == {torch.float32}


def test_measures_that_save_memory_leave_the_losses_as_they_are(settings: dict[str, Any], plain: Rehearsal) -> None:
    saving = rehearse(**{**settings, "gradient_checkpointing": True, "attn_type": "slice", "channels_last": True})
    assert saving.losses == pytest.approx(plain.losses, rel=1e-4)
    unet, text_encoder = saving.run.learner.model.unet, saving.run.learner.model.text_encoders[0]
    assert unet.is_gradient_checkpointing and text_encoder.is_gradient_checkpointing
    assert {"Sliced" in type(p).__name__ for p in unet.attn_processors.values()} == {True}
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    plain_unet = plain.run.learner.model.unet
    assert not plain_unet.is_gradient_checkpointing
    assert not any("Sliced" in type(p).__name__ for p in plain_unet.attn_processors.values())
    assert not plain_unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_share_of_the_blocks_is_recomputed_and_the_losses_stay(settings: dict[str, Any], plain: Rehearsal) -> None:
    calls: Counter[int] = Counter()
    losses: list[float] = []
    with prepared(**settings, gradient_checkpointing=True, checkpointing_share=0.25) as rehearsal:
        learner = rehearsal.run.learner
        names = learner.model.family.denoiser.blocks
        blocks = [m for m in learner.model.unet.modules() if type(m).__name__ in names]
        for block in blocks:
            block.register_forward_pre_hook(lambda module, inputs: calls.update([id(module)]))
        train_loop(rehearsal.run, [lambda run, report: losses.append(report.losses.mean)], StopSignal())
    assert losses == plain.losses  # to the bit
    num_steps = len(losses)
    twice = [block for block in blocks if calls[id(block)] == 2 * num_steps]
    assert len(twice) == math.ceil(0.25 * len(blocks))
    weights = [sum(p.numel() for p in block.parameters()) for block in blocks]
    assert max(sum(p.numel() for p in block.parameters()) for block in twice) == sorted(weights)[len(twice) - 1]
    assert not learner.model.text_encoders[0].is_gradient_checkpointing


def test_a_fused_backward_keeps_no_gradient_and_gives_the_same_losses(
    settings: dict[str, Any], plain: Rehearsal
) -> None:
    fused = rehearse(**{**settings, "fused_backward": True})
    assert fused.losses == pytest.approx(plain.losses, rel=1e-4)
    assert fused.run.learner.updates_in_backward
    assert all(p.grad is None for p in fused.run.learner.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_flat_weights_are_stepped_together_and_give_the_same_losses(settings: dict[str, Any], optimizer: str) -> None:
    apart = rehearse(**{**settings, "optimizer": optimizer})
    flat = rehearse(**{**settings, "optimizer": optimizer, "flat_weights": "on"})
    assert flat.losses == pytest.approx(apart.losses, rel=1e-6)
    storages = [len({p.untyped_storage().data_ptr() for p in one.run.learner.parameters()}) for one in (apart, flat)]
    assert storages[1] * 10 < storages[0]


def test_what_has_no_effect_here_is_said(settings: dict[str, Any]) -> None:
    with prepared(**{**settings, "offload_idle_models": True, "attn_type": "xformers"}) as rehearsal:
        assert "offload_idle_models: has no effect on a CPU" in rehearsal.warnings
        assert "attn_type xformers" in rehearsal.warnings


def test_the_unets_transformer_blocks_are_compiled(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiled.append((type(module).__name__, how)))
    with prepared(**{**settings, "torch_compile": True}):
        assert compiled
        assert {name for name, _ in compiled} == {"BasicTransformerBlock"}
        assert all(how == {"dynamic": True} for _, how in compiled)


def test_the_gpu_with_the_number_is_used(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Reached(Exception):
        pass

    def set_device(device: torch.device) -> None:
        raise Reached(str(device))

    machine = SimpleNamespace(device=torch.device("cuda"), num_processes=1, process_index=0)
    monkeypatch.setattr("accelerate.PartialState", lambda **_: machine)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(Reached, match="cuda:3"):
        train({**settings, "gpuid": 3})
    begun = RunFolder.create(settings["logdir"], "begun")
    begun.config_path.write_text(TrainConfig(**settings, gpuid=2).to_json(), "utf-8")
    with pytest.raises(Reached, match="cuda:2"):
        resume(begun.folder)
    with pytest.raises(Reached, match="cuda:1"):
        resume(begun.folder, changes={"gpuid": 1})
