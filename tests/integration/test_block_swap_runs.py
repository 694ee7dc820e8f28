"""Runs with blocks in host memory: the same numbers as without, whatever else the run does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rehearsals import plain_settings, prepared, rehearse, square_images
from safetensors.torch import load_file
from stop_after import StopAfter
from tiny_models import tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.errors import ConfigError
from everydream_kit.models.block_swap import waiting_prefixes
from everydream_kit.models.loading import load_model
from everydream_kit.models.tensors import LazyTensor
from everydream_kit.runs import RunFolder
from everydream_kit.sessions import resume, train

LORA: dict[str, Any] = {"training_kind": "lora", "lora_rank": 2, "lr": 1e-2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "UNet": ("sd1", LORA),
    "UNet, recomputed": ("sd1", {**LORA, "gradient_checkpointing": True}),
    "words": ("sd1", {"training_kind": "textual_inversion", "new_tokens": {"<square>": "square"}}),
    "Z-Image, DoRA": ("z_image", {**LORA, "lora_dora": True}),
    "Z-Image, recomputed": ("z_image", {**LORA, "gradient_checkpointing": True, "fused_backward": True}),
    "klein, LoKr": ("flux2_klein", {**LORA, "lora_form": "lokr"}),
    "klein, LoHa, flat": ("flux2_klein", {**LORA, "lora_form": "loha", "flat_weights": "on"}),
    "Z-Image, int8": ("z_image", {**LORA, "quantization": "int8"}),
    "klein, nf4, recomputed": ("flux2_klein", {**LORA, "quantization": "nf4", "gradient_checkpointing": True}),
    "FLUX.1": ("flux1", LORA),
    "Anima, recomputed": ("anima", {**LORA, "gradient_checkpointing": True}),
    "Krea 2": ("krea2", LORA),
    "Qwen-Image, int8": ("qwen_image", {**LORA, "quantization": "int8"}),
    "SDXL, half precision": ("sdxl", {**LORA, "amp_dtype": "bf16", "channels_last": True}),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return square_images(tmp_path_factory.mktemp("blocks") / "images")


def weights_of(rehearsal: Any) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value
        for part, weights in rehearsal.run.learner.trained_weights().items()
        for name, value in weights.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_weights_are_those_without(tmp_path: Path, images: Path, kind: str) -> None:
    family, changes = KINDS[kind]
    settings = {**plain_settings(tmp_path, tiny_folder(family), images), **changes}
    plain = rehearse(**settings)
    swapped = rehearse(**settings, blocks_to_swap="auto" if "recomputed" in kind else 2)
    swap = swapped.run.learner.model.block_swap
    assert swap.copied_bytes > sum(buffer.numel() for buffer in swap.host_buffers)
    assert swapped.losses == plain.losses
    found, expected = weights_of(swapped), weights_of(plain)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "blocks_to_swap: saves nothing on a CPU" in swapped.warnings


def everything(folder: Path, model: Path, images: Path) -> dict[str, Any]:
    return {
        **plain_settings(folder, model, images),
        **LORA,
        "batch_size": 1,
        "max_steps": 4,
        "no_save_ckpt": False,
        "ema_decay_rate": 0.5,
        "ema_update_interval": 1,
        "ema_sample_ema_model": True,
        "validation_split_mode": "automatic",
        "validation_split_proportion": 0.25,
        "validation_every_n_epochs": 1,
        "sample_steps": 2,
        "sample_num_inference_steps": 2,
        "sample_cfgs": [3.0],
    }


def outcome(run: RunFolder) -> list[Any]:
    """Losses, validation, the images of samples, and every tensor of the last checkpoint with its resume state."""
    checkpoint = run.last_checkpoint
    assert checkpoint is not None
    tensors = {
        f"{file.relative_to(checkpoint)} {name}": value.tolist()
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }
    losses = [[(event["step"], event["loss"]) for event in run.events(kind)] for kind in ("loss", "validation")]
    samples = {str(file.relative_to(run.folder)): file.read_bytes() for file in sorted(run.folder.rglob("*.jpg"))}
    assert tensors and samples and all(losses)
    return [*losses, tensors, samples]


@pytest.mark.parametrize("family", ["sd1", "z_image"])
def test_a_run_with_everything_resumes_to_what_it_is_without(
    tmp_path: Path, tiny_model_folder: Path, images: Path, family: str
) -> None:
    """Validation, samples with averaged weights, EMA and checkpoints; stopped and resumed with blocks, or without either."""
    settings = everything(tmp_path, tiny_model_folder if family == "sd1" else tiny_folder(family), images)
    plain = train(TrainConfig(**settings))
    swaps = TrainConfig(**{**settings, "blocks_to_swap": 3, "logdir": str(tmp_path / "swapped")})
    parted = train(swaps, listeners=[StopAfter(2)])
    assert parted.status()["state"] == "stopped"
    resume(parted.folder)
    assert outcome(parted) == outcome(plain)


def test_what_waits_is_never_put_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight is read to where it belongs at once; a GPU that is too small for all never sees the others."""
    read: list[tuple[str, int]] = []
    load = LazyTensor.load

    def note(tensor: LazyTensor, dtype: Any, device: Any) -> torch.Tensor:
        read.append((str(device), math.prod(tensor.shape)))
        return load(tensor, dtype, "cpu")

    monkeypatch.setattr(LazyTensor, "load", note)
    model = load_model(tiny_folder("z_image"), device="cpu:0", large_texts_on="cpu:0", blocks_in_host_memory=2)
    waiting = waiting_prefixes(model.denoiser, model.family.denoiser.blocks, 2)
    sizes = [value.numel() for name, value in model.denoiser.named_parameters() if name.startswith(waiting)]
    assert len(sizes) > 20
    assert sorted(size for device, size in read if device == "cpu") == sorted(sizes)


def test_more_blocks_than_there_are_is_an_error_with_their_number(tmp_path: Path, images: Path) -> None:
    settings = {**plain_settings(tmp_path, tiny_folder("z_image"), images), **LORA, "blocks_to_swap": 5}
    with (
        pytest.raises(ConfigError, match="blocks_to_swap 5: the ZImageTransformer2DModel has 4 blocks"),
        prepared(**settings),
    ):
        pass
