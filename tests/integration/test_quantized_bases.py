"""Adapters on a base of 8 or 4 bits: loading, gradients, resume, checkpoints, merging and the plan."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_cases import settings_for, weights_of
from rehearsals import prepared
from safetensors.torch import load_file
from stop_after import StopAfter
from tiny_models import tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.errors import ModelError
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.encoding import Sizes, encode_captions
from everydream_kit.models.family import Model
from everydream_kit.models.loading import load_model, open_model
from everydream_kit.models.lora.injection import ADAPTER, add_lora, lora_of, lora_parameters
from everydream_kit.models.lora.weight_changes import change_of
from everydream_kit.models.model_saving import save_model
from everydream_kit.models.number_formats import Formats
from everydream_kit.models.quantized import QuantizedLinear, num_weights
from everydream_kit.models.tensors import LazyTensor
from everydream_kit.preflight.disk import single_file_bytes
from everydream_kit.preflight.memory_estimate import estimate_memory
from everydream_kit.preflight.skeleton import build_skeleton, read_architecture
from everydream_kit.sessions import resume, train

KEPT = {
    "sd1": ("conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"),
    "sdxl": ("conv_in", "add_embedding.linear_1", "down_blocks.1.attentions.0.proj_in"),
    "z_image": ("all_x_embedder.2-1", "layers.0.adaLN_modulation.0", "cap_embedder.1"),
    "flux2_klein": ("x_embedder", "double_stream_modulation_img.linear", "proj_out"),
    "flux1": ("x_embedder", "transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.norm.linear"),
    "anima": ("patch_embed.proj", "time_embed.t_embedder.linear_1", "transformer_blocks.0.norm1.linear_1"),
    "krea2": ("img_in", "time_mod_proj", "text_fusion.projector", "final_layer.linear"),
    "qwen_image": ("img_in", "txt_in", "transformer_blocks.0.img_mod.1", "norm_out.linear"),
}
"""Layers that stay as they are, of each family."""
QUANTIZED = {
    "sd1": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "sdxl": "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "z_image": "layers.0.feed_forward.w2",
    "flux2_klein": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "flux1": "single_transformer_blocks.0.proj_mlp",
    "anima": "transformer_blocks.0.attn1.to_q",
    "krea2": "transformer_blocks.0.ff.gate",
    "qwen_image": "transformer_blocks.0.attn.add_q_proj",
}

TOLERANCES = {"int8": 0.04, "fp8": 0.12, "nf4": 0.4}
"""Of a gradient's direction and length together: about four times a form's own error, over the depth of the model."""
MEASURED = {
    **{"validation_config": {"auto_split_proportion": 0.25, "every_n_epochs": 0.5}, "sample_steps": 3},
    **{"sample_num_inference_steps": 2, "sample_before_training": False, "sample_cfgs": [1.0]},
}


def quantized(family: str, form: str) -> Model:
    return load_model(tiny_folder(family), dtype=Formats(frozen=torch.bfloat16, quantization=form))


def held(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("family", KEPT)
def test_linear_layers_of_the_blocks_are_quantized_one_by_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is gone before the next is read: no copy of the whole is ever in memory."""
    read: list[weakref.ref[torch.Tensor]] = []
    most = []
    load = LazyTensor.load

    def noted(self: LazyTensor, *args: Any) -> torch.Tensor:
        most.append(sum(one() is not None for one in read))
        values = load(self, *args)
        if values.dim() == 2:  # not the statistics of a VAE, which stay as they come
            read.append(weakref.ref(values))
        return values

    monkeypatch.setattr(LazyTensor, "load", noted)
    model = quantized(family, "int8")
    denoiser = model.denoiser
    assert isinstance(denoiser.get_submodule(QUANTIZED[family]), QuantizedLinear)
    for name in KEPT[family]:
        assert type(denoiser.get_submodule(name)) in (torch.nn.Linear, torch.nn.Conv2d), name
    inside = sum(isinstance(part, QuantizedLinear) for part in denoiser.modules())
    assert inside > 4
    assert max(most) <= 1, "at most the one that was read before"
    plain = load_model(tiny_folder(family), dtype=Formats(frozen=torch.bfloat16)).denoiser
    assert num_weights(denoiser) == num_weights(plain)
    layers = [part for part in denoiser.modules() if isinstance(part, QuantizedLinear)]
    saved = sum(one.in_features * one.out_features - 4 * one.out_features - one.absent.nbytes for one in layers)
    assert held(denoiser) == held(plain) - saved
    on_paper = build_skeleton(
        read_architecture(tiny_folder(family)), Formats(frozen=torch.bfloat16, quantization="int8")
    ).denoiser
    assert {n: (t.shape, t.dtype) for n, t in on_paper.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in denoiser.state_dict().items()
    }


def gradients(family: str, form: str | None, how: dict[str, Any]) -> torch.Tensor:
    """Of an adapter that has learned something, as one vector."""
    model = load_model(tiny_folder(family), dtype=Formats(quantization=form))
    generator = torch.Generator().manual_seed(0)
    for parameter in add_lora(model, 4, **how):
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    shape = model.family.latent_space.shape(model, 64, 64)
    latents = torch.randn(2, *shape, generator=generator)
    with torch.no_grad():
        conditioning = encode_captions(model, ["a cat", "a dog"])
    model.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    model.denoiser.train()
    sizes = Sizes.uncropped(64, 64, 2)
    prediction = model.family.predict(model, latents, torch.tensor([200, 700]), conditioning, sizes)
    prediction.square().mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in lora_parameters(model) if parameter.grad is not None])


@pytest.mark.parametrize(
    ("family", "how", "forms"),
    [
        ("sd1", {}, ("int8",)),
        ("z_image", {}, ("int8", "fp8", "nf4")),
        ("flux2_klein", {}, ("int8", "nf4")),
        ("flux1", {}, ("int8",)),
        ("anima", {}, ("int8", "nf4")),
        ("krea2", {}, ("fp8",)),
        ("qwen_image", {}, ("int8",)),
        ("z_image", {"dora": True}, ("fp8",)),
        ("z_image", {"form": "loha"}, ("int8",)),
        ("z_image", {"form": "lokr"}, ("fp8",)),
    ],
)
def test_gradients_of_the_adapter_are_nearly_those_on_the_whole_base(
    family: str, how: dict[str, Any], forms: tuple[str, ...]
) -> None:
    expected = gradients(family, None, how)
    for form in forms:
        error = ((gradients(family, form, how) - expected).norm() / expected.norm()).item()
        assert 0 < error < TOLERANCES[form], (form, error)


@pytest.mark.parametrize(
    ("family", "form", "extra"),
    [
        ("z_image", "nf4", {"ema_decay_rate": 0.9, "ema_update_interval": 1, **MEASURED}),
        ("flux2_klein", "fp8", {"lora_form": "loha", "gradient_checkpointing": True, "text_quantization": "nf4"}),
        ("sd1", "int8", {"lora_dora": True, "lora_text_encoder": True}),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped_and_keeps_the_adapter_alone(
    family: str, form: str, extra: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**settings_for(family, tmp_path), **extra, "max_steps": 3}
    config = TrainConfig(**{**settings, "training_kind": "lora", "lora_rank": 4, "quantization": form})
    whole = train(config)
    parted = train(config.replace(logdir=str(tmp_path / "parted")), listeners=[StopAfter(1)])
    resume(parted.folder)
    first, second = weights_of(whole), weights_of(parted)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any("quantized" in name or "base_layer" in name for name in first)
    for kind in ("loss", "validation"):
        losses = [event["loss"] for event in whole.events(kind)]
        assert losses == [event["loss"] for event in parted.events(kind)]
        assert bool(losses) == (kind == "loss" or "validation_config" in extra)
    assert any(whole.samples_folder.glob("*.jpg")) == ("sample_steps" in extra)
    assert sum(value.nbytes for value in first.values()) < 300_000

    # merging takes the base as its files have it
    checkpoint = whole.last_checkpoint
    live, base, merged = load_model(checkpoint), open_model(tiny_folder(family)), open_model(checkpoint)
    folder = base.family.denoiser.folder
    name, layer = next(iter(lora_of(live)[folder].items()))
    exact = base.tensors[folder][f"{name}.weight"].read()
    assert torch.equal(merged.tensors[folder][f"{name}.weight"].read(), change_of(layer).apply(exact, 1.0))


def test_a_quantized_base_is_neither_merged_into_nor_saved(tmp_path: Path) -> None:
    model = quantized("sd1", "fp8")
    with pytest.raises(ModelError, match=r"its weights are quantized .* Load it without quantization"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    add_lora(model, 2)
    adapted: list[Any] = [part for part in model.unet.modules() if hasattr(part, "base_layer")]
    assert adapted
    assert adapted[0].lora_A[ADAPTER].weight.dtype == torch.bfloat16
    before = adapted[0].base_layer.quantized.clone()
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        adapted[0].merge()
    with pytest.raises(ValueError, match="NaNs detected"):
        adapted[0].merge(safe_merge=True)
    assert torch.equal(adapted[0].base_layer.quantized, before)


def test_new_words_learn_over_a_quantized_unet(tmp_path: Path) -> None:
    words = {"training_kind": "textual_inversion", "new_tokens": {"<red>": "red"}, "max_steps": 2}
    losses, plain = {}, TrainConfig(**{**settings_for("sd1", tmp_path), **words})
    for form in ("none", "int8"):
        run = train(plain.replace(quantization=form, project_name=form))
        losses[form] = [event["loss"] for event in run.events("loss")]
    assert losses["int8"] == pytest.approx(losses["none"], rel=1e-2)
    assert losses["int8"] != losses["none"]


def test_weights_of_a_plan_are_those_of_the_run(tmp_path: Path) -> None:
    config = TrainConfig(**{**settings_for("z_image", tmp_path), "training_kind": "lora", "lora_rank": 4})
    sizes, numbers = {}, set()
    for form in ("fp8", "nf4"):
        changed = config.replace(quantization=form, frozen_dtype="bfloat16", amp_dtype="bf16")
        found = estimate_memory(changed, device="cpu", cache_folder=tmp_path / "kept")
        sizes[form] = next(p.by_category["weights"] for p in found.phases if p.name == "saving")
        numbers.add(found.num_parameters)
        with prepared(**changed.model_dump(exclude_unset=True)) as rehearsal:
            assert sizes[form] == sum(map(held, rehearsal.run.learner.model.modules().values()))
    assert len(numbers) == 1
    assert sizes["nf4"] < sizes["fp8"]


@pytest.mark.parametrize("family", ["sdxl", "z_image", "anima"])  # a whole model, a transformer, one with a conditioner
def test_single_files_take_the_disk_that_a_plan_says(family: str, tmp_path: Path) -> None:
    changes = {"training_kind": "lora", "quantization": "int8", "save_full_precision": False}
    config = TrainConfig(**{**settings_for(family, tmp_path), **changes})
    planned = single_file_bytes(config, estimate_memory(config, device="cpu", cache_folder=tmp_path / "kept"))
    written = export_checkpoint(tiny_folder(family), tmp_path / "model.safetensors")
    assert sum(tensor.nbytes for tensor in load_file(written).values()) == pytest.approx(planned, rel=1e-4)


def test_a_language_model_is_quantized_for_its_captions(tmp_path: Path) -> None:
    settings = {**settings_for("z_image", tmp_path), "training_kind": "lora", "lora_rank": 4, "max_steps": 1}
    plain = TrainConfig(**settings)
    changed = plain.replace(text_quantization="int8", project_name="changed")
    losses = []
    for config in (plain, changed):
        with prepared(**config.model_dump(exclude_unset=True)) as rehearsal:
            run = rehearsal.run
            work = next(iter(run.batches()))
            losses.append(run.learner.backward(work.batches[0], work, 0).mean().item())
            layers = dict(run.learner.model.text_encoders[0].named_modules())
            assert isinstance(layers["layers.0.mlp.gate_proj"], QuantizedLinear) == (config is changed)
            assert type(layers["embed_tokens"]) is torch.nn.Embedding
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    caches = list((Path(settings["logdir"]) / ".edk_cache" / "texts").iterdir())
    assert len(caches) == 2  # captions of one encoder are not those of the other
    texts = []
    for config in (plain, changed):
        found = estimate_memory(config.replace(amp_dtype="bf16"), device="cuda", cache_folder=tmp_path / "kept")
        phases = {phase.name: phase.by_category["weights"] for phase in found.phases}
        texts.append(phases["text caching"])
        assert phases["training step"] < phases["saving"] + texts[-1]
    assert texts[1] < texts[0]  # little: a tiny language model is mostly words
