"""Families of flow transformers: what the kit makes of them against diffusers' own pipelines and conversions."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from stop_after import StopAfter
from tiny_models import tiny_folder

from everydream_kit.config import TrainConfig
from everydream_kit.config.objective_settings import ObjectiveGroup
from everydream_kit.errors import ConfigError, ModelError
from everydream_kit.export.lora_files import export_lora
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models import sampling
from everydream_kit.models.encoding import Sizes, encode_captions
from everydream_kit.models.families import FAMILIES
from everydream_kit.models.families.flux2_klein import NINE
from everydream_kit.models.loading import assemble, load_model, open_model
from everydream_kit.models.lora import add_lora, lora_parameters
from everydream_kit.models.lora_formats import apply_lora, read_lora_file
from everydream_kit.models.model_saving import live_tensors, save_model
from everydream_kit.models.number_formats import EXACT, Formats
from everydream_kit.models.random_models import build_model, build_tiny_model, write_model
from everydream_kit.models.sampling import SamplePrompt, sample_images
from everydream_kit.runs import RunFolder
from everydream_kit.runs.layout import CHECKPOINT_FILE
from everydream_kit.sessions import resume, train
from everydream_kit.training import offload, run_builder
from everydream_kit.training.objectives import build_flow_objective, denoising_losses
from everydream_kit.training.reports import Listener, StepReport
from everydream_kit.training.run import Run

FLOW = [name for name, family in FAMILIES.items() if family.objective == "flow"]
LONG = "ugly, blurred, and much longer than the other prompt"


@dataclass(frozen=True)
class Case:
    """What the tests must know of a family.

    Attributes:
        wide: config of a transformer that is wider than a token of an image, so that it can hold what the noise is.
        options: (pipeline, guidance scale, negative prompt) -> diffusers' arguments for them.
        distilled: name of a checkpoint that should not be trained on.
        num_tokens: most that are kept of a short caption.
        published: tensors and weights of the published single file of the transformer.
        fused: a layer of the file for apps that is three of diffusers'.
        loras: layouts of LoRA files that diffusers reads.
        conditioner: what stands before the names of the text conditioner in the single file, where there is one.
    """

    wide: dict[str, Any]
    options: Callable[[Any, float, str], dict[str, Any]]
    distilled: str
    num_tokens: int
    published: tuple[int, int]
    fused: str = ""
    loras: tuple[Literal["kohya", "diffusers", "comfy"], ...] = ("kohya", "diffusers")
    conditioner: str = ""


CASES = {
    "z_image": Case(
        {"dim": 128, "n_layers": 1, "axes_dims": [16, 24, 24]},
        lambda pipeline, cfg, negative: {"guidance_scale": cfg - 1, "negative_prompt": negative},  # counts from 0
        "Z-Image-Turbo",
        80,
        (453, 6_154_908_736),  # 12,309,817,472 bytes in z_image_turbo_bf16.safetensors
    ),
    "flux2_klein": Case(
        {"attention_head_dim": 48, "num_attention_heads": 4, "num_single_layers": 1, "axes_dims_rope": [12] * 4},
        lambda pipeline, cfg, negative: {
            "guidance_scale": cfg,
            "negative_prompt_embeds": pipeline.encode_prompt(negative)[0],
        },
        "FLUX.2-klein-4B",
        512,
        (149, 3_875_544_576),  # flux-2-klein-base-4b.safetensors has 16,560 bytes more, its header
        "double_blocks.0.img_attn.qkv",
    ),
    "qwen_image": Case(
        {"attention_head_dim": 48, "num_attention_heads": 4, "num_layers": 1, "axes_dims_rope": [8, 20, 20]},
        lambda pipeline, cfg, negative: {"true_cfg_scale": cfg, "negative_prompt": negative},
        "Qwen-Image-2512-Lightning",
        300,
        (1933, 20_430_401_088),  # qwen_image_bf16.safetensors has twice as many bytes, and its header
    ),
    "flux1": Case(
        {"attention_head_dim": 48, "num_attention_heads": 4, "num_single_layers": 1, "axes_dims_rope": [8, 20, 20]},
        lambda pipeline, cfg, negative: {"guidance_scale": cfg},  # embedded: there is no second prediction
        "FLUX.1-schnell",
        512,
        (780, 11_901_408_320),  # flux1-dev.safetensors has 23,802,932,552 bytes, twice this and its header
    ),
    "anima": Case(
        {"num_attention_heads": 8, "num_layers": 1},
        lambda pipeline, cfg, negative: {"negative_prompt": negative, **guided(pipeline, cfg)},
        "anima-turbo-v1.1",
        80,
        (567 + 118, 1_956_405_248 + 134_663_680),  # as diffusers' scripts/convert_anima_to_diffusers.py takes it apart
        loras=("comfy", "diffusers"),
        conditioner="net.llm_adapter.",
    ),
    "krea2": Case(
        {"num_attention_heads": 8, "num_key_value_heads": 4, "num_layers": 1},
        lambda pipeline, cfg, negative: {"guidance_scale": cfg - 1, "negative_prompt": negative},  # counts from 0
        "Krea-2-Turbo",
        300,
        (430, 12_820_073_036),  # as diffusers' own conversion takes raw.safetensors
    ),
}


SHORT_TEXTS = {
    **{"qwen_text.MAX_TOKENS": 48, "flux1.MAX_TOKENS": 48, "krea2.INSTRUCTION": "", "krea2.NUM_INSTRUCTION": 0},
    **{"qwen_image.TEMPLATE": "{}", "qwen_image.DROPPED": 0},
}
"""Less padding and less template to attend to, where only the objective matters."""


def guided(pipeline: Any, cfg: float) -> dict[str, Any]:
    """A modular pipeline's guidance is a part of it."""
    from diffusers.guiders import ClassifierFreeGuidance

    pipeline.update_components(guider=ClassifierFreeGuidance(guidance_scale=cfg))
    return {}


@pytest.fixture(params=FLOW)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pipeline_of(folder: Path) -> Any:
    import diffusers

    cls = getattr(diffusers, FAMILIES[open_model(folder).family.name].pipeline_class)
    if issubclass(cls, diffusers.ModularPipeline):  # as model cards say
        pipeline = diffusers.ModularPipeline.from_pretrained(folder)
        pipeline.load_components(pretrained_model_name_or_path=str(folder))
    else:
        pipeline = cls.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(family: str, pipeline: Any, cfg: float = 4.0, negative: str = "") -> np.ndarray:
    """A 64 x 96 image of diffusers' own pipeline."""
    made = pipeline(
        prompt="a red square",
        width=64,
        height=96,
        num_inference_steps=4,
        generator=torch.Generator("cpu").manual_seed(4),
        **CASES[family].options(pipeline, cfg, negative),
    )
    images = made.images if hasattr(made, "images") else made.get("images")
    return np.asarray(images[0]).astype(int)


def ours(model: Any, cfg: float = 4.0, negative: str = "") -> np.ndarray:
    wanted = SamplePrompt("a red square", negative, seed=4, width=64, height=96, cfgs=(cfg,))
    return np.asarray(sample_images(model, [wanted], num_inference_steps=4)[0]).astype(int)


def test_a_sample_is_the_image_of_diffusers_pipeline(family: str) -> None:
    """Template, layers, padding, packing, positions, sign, shift, scales and guidance together."""
    model, pipeline = load_model(tiny_folder(family)), pipeline_of(tiny_folder(family))
    image = ours(model)
    assert image.std() > 20
    assert np.abs(image - theirs(family, pipeline)).max() <= 1
    assert np.abs(ours(model, negative=LONG) - theirs(family, pipeline, negative=LONG)).max() <= 1
    assert np.abs(ours(model, cfg=1.0) - theirs(family, pipeline, cfg=1.0)).max() <= 1


def test_the_distilled_krea_2_is_sampled_with_its_own_shift_and_stays_what_it_is(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("krea2"), tmp_path / "distilled"))
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}), encoding="utf-8")
    model = load_model(folder)
    image = ours(model, cfg=1.0)
    assert np.abs(image - ours(load_model(tiny_folder("krea2")), cfg=1.0)).max() > 1
    assert np.abs(image - theirs("krea2", pipeline_of(folder), cfg=1.0)).max() <= 1
    save_model(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text(encoding="utf-8"))["is_distilled"] is True
    assert np.abs(image - ours(load_model(tmp_path / "again"), cfg=1.0)).max() <= 1


def test_a_text_next_to_a_longer_one_is_what_it_is_alone(family: str) -> None:
    """To 1e-5, where an image of 255 levels hides a token that should be masked."""
    model = load_model(tiny_folder(family))
    noisy = torch.randn(1, *model.family.latent_space.shape(model, 64, 64), generator=torch.Generator().manual_seed(0))

    def predicted(prompts: list[str]) -> torch.Tensor:
        texts, sizes = encode_captions(model, prompts), Sizes.uncropped(64, 64, len(prompts))
        count = len(prompts)
        return model.family.predict(model, noisy.expand(count, -1, -1, -1), torch.full((count,), 500.0), texts, sizes)

    with torch.no_grad():
        torch.testing.assert_close(predicted(["a cat", LONG])[:1], predicted(["a cat"]), rtol=1e-4, atol=1e-5)


def test_krea_2_sees_of_each_token_what_diffusers_pipeline_gives_it() -> None:
    theirs, mask = pipeline_of(tiny_folder("krea2")).encode_prompt("a cat", device=torch.device("cpu"))
    with torch.no_grad():
        own = encode_captions(load_model(tiny_folder("krea2")), ["a cat"]).encoder_hidden_states
    torch.testing.assert_close(own[0], theirs.detach()[mask].flatten(1), rtol=1e-4, atol=1e-5)


def test_an_overfitted_model_samples_the_image_it_has_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong sign or scale of the target cannot pass."""
    for name, value in SHORT_TEXTS.items():
        monkeypatch.setattr(f"everydream_kit.models.{name}", value)
    model = build_tiny_model(family, denoiser=CASES[family].wide)
    generator = torch.Generator().manual_seed(1)
    shape = model.family.latent_space.shape(model, 32, 32)
    latents = torch.randn(1, shape[0], 1, 1, generator=generator).expand(8, *shape)  # one color
    with torch.no_grad():
        conditioning = encode_captions(model, ["a cat"]).rows([0] * 8)
    objective = build_flow_objective(model.noise_scheduler, model.prediction_type, ObjectiveGroup())
    optimizer = torch.optim.Adam(model.denoiser.parameters(), lr=5e-3, betas=(0.9, 0.99))
    sizes = Sizes.uncropped(32, 32, 8)
    for step in range(220):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 220)
        noise = torch.randn(8, *shape, generator=generator)
        fractions = (torch.arange(8) + torch.rand(8, generator=generator)) / 8
        timesteps = objective.timesteps(fractions, 0, 1000, 1.0)

        def predict(noisy: torch.Tensor, at: torch.Tensor = timesteps) -> torch.Tensor:
            return model.family.predict(model, noisy, at, conditioning, sizes)

        optimizer.zero_grad()
        denoising_losses(objective, predict, latents, noise, timesteps).mean().backward()
        optimizer.step()
    sampled: list[torch.Tensor] = []
    decode = sampling.decode_latents
    monkeypatch.setattr(sampling, "decode_latents", lambda model, drawn: sampled.append(drawn) or decode(model, drawn))
    for num_steps in (8, 1):  # one step goes the whole way at once: many would come to the image at any scale
        sample_images(
            model, [SamplePrompt("a cat", seed=3, width=32, height=32, cfgs=(1.0,))], num_inference_steps=num_steps
        )
    errors = [(one - latents[:1]).square().mean() / latents.square().mean() for one in sampled]
    assert max(errors) < 0.15, errors


def with_lora(family: str, folder: Path) -> Any:
    model = load_model(tiny_folder(family))
    add_lora(model, 4, alpha=8.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    save_model(model, folder)
    return model


def test_a_lora_applied_merged_and_loaded_by_diffusers_gives_one_image(family: str, tmp_path: Path) -> None:
    image = ours(with_lora(family, tmp_path / "lora"))
    assert np.abs(image - ours(load_model(tiny_folder(family)))).max() > 5
    merged = export_checkpoint(
        tmp_path / "lora", copy_of_base(family, tmp_path) / "merged.safetensors", precision="fp32"
    )
    assert np.abs(image - ours(load_model(merged))).max() <= 1
    base = open_model(tiny_folder(family))
    layouts = ("kohya", *CASES[family].loras)
    for layout in dict.fromkeys(layouts):
        file = export_lora(tmp_path / "lora", tmp_path / f"{layout}.safetensors", layout=layout, precision="fp32")
        if layout in CASES[family].loras:
            pipeline = pipeline_of(tiny_folder(family))
            pipeline.load_lora_weights(file)
            assert np.abs(image - theirs(family, pipeline)).max() <= 1
        assert np.abs(image - ours(assemble(apply_lora(base, read_lora_file(file, base))))).max() <= 1
        assert not any("refiner" in name for name in load_file(file))
    for_apps = load_file(tmp_path / "kohya.safetensors")
    if CASES[family].fused:
        assert for_apps[f"diffusion_model.{CASES[family].fused}.lora_A.weight"].shape[0] == 3 * 4  # three of rank 4


def copy_of_base(family: str, folder: Path) -> Path:
    """A copy of the base's folder: a single file holds the transformer alone and is read next to the rest."""
    return Path(shutil.copytree(tiny_folder(family), folder / "base"))


def test_a_single_file_comes_back_bit_for_bit_and_only_next_to_its_model(family: str, tmp_path: Path) -> None:
    base = copy_of_base(family, tmp_path)
    file = export_checkpoint(base, base / "out.safetensors", precision="fp32")
    first, again = open_model(tiny_folder(family)), open_model(file)
    assert again.family is first.family
    folder = first.family.denoiser.folder
    assert first.tensors[folder].keys() == again.tensors[folder].keys()
    assert all(
        torch.equal(first.tensors[folder][k].read(), again.tensors[folder][k].read()) for k in first.tensors[folder]
    )
    alone = shutil.copy(file, tmp_path / "alone.safetensors")
    with pytest.raises(ModelError, match=r"alone\.safetensors: holds the transformer .* put the file there"):
        open_model(alone)


def converted(model: Any, checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What diffusers' own reader of single files makes of one; and its script for Anima of the conditioner in it."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    prefix = CASES[model.family.name].conditioner or "no name"
    conditioner = {name: checkpoint.pop(name) for name in list(checkpoint) if name.startswith(prefix)}
    convert = SINGLE_FILE_LOADABLE_CLASSES[type(model.denoiser).__name__]["checkpoint_mapping_fn"]
    if "guidance_embeds" in model.denoiser.config and "inner_dim" in convert.__code__.co_varnames:  # FLUX.1's width
        width = model.denoiser.inner_dim  # is written in the function
        consts = tuple(width if value == 3072 else value for value in convert.__code__.co_consts)
        convert = FunctionType(convert.__code__.replace(co_consts=consts), convert.__globals__)
    found: dict[str, torch.Tensor] = convert(checkpoint=checkpoint, config=model.denoiser.config)
    return found | {f"text_conditioner.{name.removeprefix(prefix)}": value for name, value in conditioner.items()}


def in_the_file(model: Any) -> dict[str, torch.Tensor]:
    """The weights that are in a family's single file, by diffusers' names."""
    own = dict(model.denoiser.state_dict())
    if CASES[model.family.name].conditioner:
        states = model.modules()["text_conditioner"].state_dict()
        own |= {f"text_conditioner.{name}": value for name, value in states.items()}
    return own


def test_diffusers_reads_the_weights_from_a_single_file_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = load_model(tiny_folder(family))
    file = export_checkpoint(tiny_folder(family), tmp_path / "out.safetensors", precision="fp32")
    theirs, own = converted(model, load_file(file)), in_the_file(model)
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], own[name]) for name in own)


SIZES = [(name, {}, CASES[name].published) for name in FLOW]
SIZES.append(("flux2_klein", NINE, (201, 9_078_581_248)))


@pytest.mark.parametrize(("family", "changes", "published"), SIZES, ids=[*FLOW, "flux2_klein 9B"])
def test_the_single_file_of_the_true_size_is_what_diffusers_converts(
    family: str, changes: dict[str, Any], published: tuple[int, int]
) -> None:
    model = build_model(family, device="meta", **changes)
    files = open_model(tiny_folder(family))
    for name in files.tensors:
        files.tensors[name] = live_tensors(name, model.modules()[name].state_dict())
    written = model.family.layout.to_single_file(files)
    meta = {name: torch.empty(value.shape, device="meta") for name, value in written.items()}
    back = {name: tuple(value.shape) for name, value in converted(model, meta).items()}
    assert back == {name: tuple(value.shape) for name, value in in_the_file(model).items()}
    assert (len(written), sum(math.prod(value.shape) for value in written.values())) == published


def test_every_file_of_a_checkpoint_is_one_that_a_fetched_checkpoint_may_hold(family: str) -> None:
    files = [path for path in tiny_folder(family).rglob("*") if path.is_file()]
    assert not [str(path) for path in files if not is_known(path.relative_to(tiny_folder(family)))]


def is_known(path: Path) -> bool:
    return CHECKPOINT_FILE.fullmatch(path.as_posix()) is not None


@pytest.fixture
def settings(family: str, tmp_path: Path) -> dict[str, Any]:
    return settings_for(family, tmp_path)


def settings_for(family: str, tmp_path: Path) -> dict[str, Any]:
    """Of a short run on four images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red square, number {10**number}", encoding="utf-8")
    return {
        **{"resume_ckpt": str(tiny_folder(family)), "data_root": str(folder), "logdir": str(tmp_path / "logs")},
        **{"resolution": 64, "batch_size": 2, "max_steps": 4, "max_epochs": 9, "lr": 1e-3, "seed": 7, "log_step": 1},
        **{"num_workers": 0, "cache_variants": 1, "cond_dropout": 0.2, "sample_steps": None, "no_save_ckpt": True},
        **{"optimizer": "adamw", "save_full_precision": True},
    }


def weights_of(run: RunFolder, suffix: str = "") -> dict[str, torch.Tensor]:
    folder = run.last_checkpoint
    paths = sorted(folder.with_name(folder.name + suffix).rglob("*.safetensors"))
    found = {
        path.parent.name: load_file(path) for path in paths if "resume" not in path.parts and "text" not in str(path)
    }
    return {f"{name}/{key}": value for name, tensors in found.items() for key, value in tensors.items()}


@pytest.mark.parametrize(
    "extra",
    [
        {"ema_decay_rate": 0.9, "ema_update_interval": 1, "timestep_sampling": "logit_normal"},
        {"training_kind": "lora", "lora_rank": 4, "timestep_sampling": "stratified", "gradient_checkpointing": True},
    ],
    ids=["full with EMA", "lora"],
)
def test_a_resumed_run_equals_one_that_never_stopped(
    settings: dict[str, Any], extra: dict[str, Any], tmp_path: Path
) -> None:
    validation = {"validation_config": {"auto_split_proportion": 0.25, "every_n_epochs": 0.5}}
    config = TrainConfig(**{**settings, **extra, **validation})
    whole = train(config)
    parted = train(config.replace(logdir=str(tmp_path / "parted")), listeners=[StopAfter(1)])
    resume(parted.folder)
    first, second = weights_of(whole), weights_of(parted)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    measured = [event["loss"] for event in whole.events("validation")]
    assert measured == [event["loss"] for event in parted.events("validation")]
    assert measured[-1] < measured[0]
    if "ema_decay_rate" in extra:
        averaged = weights_of(whole, "_ema")
        assert any(not torch.equal(averaged[name], first[name]) for name in averaged)


def test_settings_of_diffusion_are_refused_with_their_reasons(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        train(TrainConfig(**{**settings, "clip_skip": 2, "min_snr_gamma": 5.0, "enable_zero_terminal_snr": True}))
    for words in ("clip_skip: the text encoder is", "min_snr_gamma: it is defined", "ends in pure noise already"):
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match=r"training_kind textual_inversion: .* is trained with full or lora"):
        train(TrainConfig(**{**settings, "training_kind": "textual_inversion", "new_tokens": {"<a>": "b"}}))


def test_settings_of_flow_matching_are_refused_for_diffusion_and_change_a_flow_run(settings: dict[str, Any]) -> None:
    plain = train(TrainConfig(**{**settings, "max_steps": 1}))
    losses = [next(plain.events("loss"))["loss"]]
    for number, changes in enumerate([{"timestep_shift": 0.2}, {"weighting_scheme": "cosmap"}]):
        config = TrainConfig(**{**settings, **changes, "max_steps": 1, "project_name": f"changed{number}"})
        losses.append(next(train(config).events("loss"))["loss"])
    assert len(set(losses)) == 3
    sd1 = {**settings, "resume_ckpt": str(tiny_folder("sd1"))}
    with pytest.raises(ConfigError, match=r"timestep_shift: it is for flow matching.*\n.*weighting_scheme: it is for"):
        train(TrainConfig(**{**sd1, "timestep_shift": 3.0, "weighting_scheme": "cosmap"}))


FUSED = [name for name in FLOW if "img_in" in FAMILIES[name].layout.app_layers(["x_embedder"])]
"""Families that have Black Forest Labs' names of layers, several in one."""


@pytest.mark.parametrize("family", FUSED)
def test_a_lora_of_the_single_files_layers_changes_those(family: str, tmp_path: Path) -> None:
    """Layers in one, of unequal shares too, and those whose halves stand the other way round."""
    base = open_model(tiny_folder(family))
    before = base.family.layout.to_single_file(base)
    layers = [name for name, value in before.items() if len(value.shape) == 2]
    generator = torch.Generator().manual_seed(0)
    down = {name: torch.randn(2, before[name].shape[1], generator=generator) for name in layers}
    up = {name: torch.randn(before[name].shape[0], 2, generator=generator) for name in layers}
    for prefix, separator in (("diffusion_model.", "."), ("lora_unet_", "_")):
        stems = {name: prefix + name.removesuffix(".weight").replace(".", separator) for name in layers}
        parts = {f"{stems[name]}.lora_down.weight": down[name] for name in layers}
        save_file(parts | {f"{stems[name]}.lora_up.weight": up[name] for name in layers}, tmp_path / "lora.safetensors")
        changed = apply_lora(base, read_lora_file(tmp_path / "lora.safetensors", base))
        after = base.family.layout.to_single_file(changed)
        for name in layers:
            assert torch.allclose(after[name].read(), before[name].read() + up[name] @ down[name], atol=1e-5), name


@pytest.mark.parametrize("family", FUSED)
def test_the_last_modulation_in_a_lora_for_apps_is_the_single_files(family: str, tmp_path: Path) -> None:
    model = load_model(tiny_folder(family))
    add_lora(model, 2, targets=["norm_out.linear"])
    for parameter in lora_parameters(model):
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "lora")
    base = open_model(tiny_folder(family))
    file = export_lora(tmp_path / "lora", tmp_path / "out.safetensors", layout="kohya", precision="fp32")
    own = apply_lora(base, read_lora_file(tmp_path / "lora", base)).tensors["transformer"]["norm_out.linear.weight"]
    again = apply_lora(base, read_lora_file(file, base)).tensors["transformer"]["norm_out.linear.weight"]
    assert torch.allclose(own.read(), again.read(), atol=1e-6)
    written = load_file(file)
    stem = "diffusion_model.final_layer.adaLN_modulation.1"
    if f"{stem}.lora_B.weight" in written:  # else diffusers' names, as diffusers has them
        change = written[f"{stem}.lora_B.weight"] @ written[f"{stem}.lora_A.weight"]
        ours = own.read() - base.tensors["transformer"]["norm_out.linear.weight"].read()
        assert torch.allclose(change, ours.roll(len(ours) // 2, 0), atol=1e-5)


def test_flux1_is_given_a_guidance_of_1_in_training_and_schnell_none(tmp_path: Path) -> None:
    model = load_model(tiny_folder("flux1"))
    with torch.no_grad():
        conditioning = encode_captions(model, ["a cat"])
        noisy, times, sizes = torch.randn(1, 16, 4, 4), torch.tensor([300.0]), Sizes.uncropped(32, 32, 1)
        predicted = [model.family.predict(model, noisy, times, conditioning, sizes)]
        for scale in (1.0, 3.5):
            guided = replace(conditioning, guidance=torch.tensor([scale]))
            predicted.append(model.family.predict(model, noisy, times, guided, sizes))
    assert torch.equal(predicted[0], predicted[1])
    assert not torch.allclose(predicted[1], predicted[2], atol=1e-3)
    schnell = write_model(build_tiny_model("flux1", denoiser={"guidance_embeds": False}), tmp_path / "renamed")
    path = schnell / "scheduler" / "scheduler_config.json"
    path.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}', encoding="utf-8")
    assert "distilled to few steps" in (FAMILIES["flux1"].distilled(str(schnell)) or "")
    assert FAMILIES["flux1"].distilled(str(tiny_folder("flux1"))) is None
    assert np.abs(ours(load_model(schnell)) - theirs("flux1", pipeline_of(schnell))).max() <= 1


def test_models_for_editing_are_refused_by_name(tmp_path: Path) -> None:
    """Their transformers have the same class; what they need besides the caption is an image."""
    folder = copy_of_base("qwen_image", tmp_path)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("QwenImagePipeline", "QwenImageEditPipeline"), encoding="utf-8")
    with pytest.raises(ModelError, match=r"editing images \(QwenImageEditPipeline\)"):
        open_model(folder)


def test_a_scheduler_of_diffusion_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match="a flow model is sampled with euler"):
        sample_images(load_model(tiny_folder(family)), [SamplePrompt("x", width=64, height=64)], scheduler="dpm++_2m")


def test_a_distilled_base_is_warned_of(settings: dict[str, Any], family: str, tmp_path: Path) -> None:
    name = CASES[family].distilled
    distilled = Path(shutil.copytree(tiny_folder(family), tmp_path / name))
    run = train(TrainConfig(**{**settings, "resume_ckpt": str(distilled), "max_steps": 1}))
    assert any(name in event["message"] and "Train on" in event["message"] for event in run.events("warning"))


def test_klein_of_each_size_names_its_own_base() -> None:
    distilled = FAMILIES["flux2_klein"].distilled
    assert "klein-base-9B" in (distilled("black-forest-labs/FLUX.2-klein-9B") or "")
    assert "klein-base-4B" in (distilled("black-forest-labs/FLUX.2-klein-4B") or "")
    assert distilled("black-forest-labs/FLUX.2-klein-base-9B") is None


def test_captions_are_encoded_once_before_the_run_and_found_again(
    settings: dict[str, Any], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from everydream_kit.models import encoding

    asked: list[str] = []
    encode = encoding.encode_captions
    monkeypatch.setattr(
        "everydream_kit.training.caching.encode_captions",
        lambda model, captions, *args: asked.extend(captions) or encode(model, captions, *args),
    )
    first = train(TrainConfig(**{**settings, "max_steps": 2}))
    assert sorted(asked) == sorted(["", *(f"a red square, number {10**number}" for number in range(4))])
    reports = [event["kind"] for event in first.events()]
    assert reports.index("text cache") < reports.index("loss")
    files = list((Path(settings["logdir"]) / ".edk_cache" / "texts").rglob("*.safetensors"))
    assert len(files) == 5
    kept = load_file(files[0])["encoder_hidden_states"]
    assert kept.dtype == torch.bfloat16
    assert kept.shape[1] <= CASES[family].num_tokens  # valid tokens alone, unless padding counts
    asked.clear()
    second = train(TrainConfig(**{**settings, "max_steps": 2, "project_name": "again"}))
    assert asked == []
    assert [e["loss"] for e in second.events("loss")] == [e["loss"] for e in first.events("loss")]


def test_samples_and_validation_do_without_the_text_encoder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known before the run is encoded then; at a prompt that is not, the text encoder comes for the text alone."""
    model_of: list[Any] = []
    calls: list[str] = []

    class Watched(offload.IdleModels):
        @contextmanager
        def at_work(self, modules: Any) -> Iterator[None]:
            names = {id(module): name for name, module in model_of[-1].modules().items()}
            here = {names[id(module)] for module in modules}
            calls.append("texts" if "text_encoder" in here else "others")
            with super().at_work(modules):
                yield
            calls.append("end")

    build = run_builder.build_caches
    monkeypatch.setattr(run_builder, "IdleModels", Watched)
    monkeypatch.setattr(
        run_builder,
        "build_caches",
        lambda config, model, *args, **rest: model_of.append(model) or build(config, model, *args, **rest),
    )
    monkeypatch.setattr(sampling, "encode_captions", None)  # by the cache alone
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue circle\n", encoding="utf-8")
    sampled = {"sample_steps": 1, "sample_prompts": str(prompts), "sample_num_inference_steps": 2, "max_steps": 2}
    measured = {"validation_config": {"auto_split_proportion": 0.25, "every_n_epochs": 0.5}}

    class Edit(Listener):
        def __call__(self, run: Run, report: StepReport) -> None:
            calls.append(f"step {report.step}")
            if report.step == 1:
                prompts.write_text("a green one\n", encoding="utf-8")

    run = train(TrainConfig(**{**settings, **sampled, **measured}), listeners=[Edit()])
    assert not list(run.events("warning"))
    assert len(list(run.samples_folder.glob("*.jpg"))) == 2
    assert any(run.events("validation"))
    first = calls.index("step 1")
    assert "texts" in calls[:first]
    after = calls[first:]
    assert after.count("texts") == 1  # for "a green one"
    assert after[after.index("texts") + 1] == "end"  # nothing else happens meanwhile


def test_a_plan_estimates_the_phase_of_the_texts_apart_from_the_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    from everydream_kit.preflight.memory_estimate import estimate_memory

    config = TrainConfig(**{**settings, "training_kind": "lora", "lora_rank": 4, "sample_steps": 2})
    estimate = estimate_memory(config, device="cuda", cache_folder=tmp_path / "kept")
    phases = {phase.name: phase.by_category for phase in estimate.phases}
    model = load_model(settings["resume_ckpt"])

    def allocated(name: str, num_bytes: int) -> int:  # of each number; the allocator gives multiples of 512
        own = model.modules()[name].named_parameters()
        sizes = [
            (4 if "embedding" in key else num_bytes) * p.numel() for key, p in own
        ]  # CLIP's, which is mostly words
        return sum(-(-size // 512) * 512 for size in sizes)

    texts, vae = (
        sum(allocated(slot.folder, 4 if slot.folder in EXACT else 2) for slot in model.family.text_encoders),
        allocated("vae", 4),
    )  # what is frozen is in half precision, the VAE excepted
    assert 0 <= phases["text caching"]["weights"] - (texts + vae) < texts / 4
    kept = allocated("transformer", 2) + vae + 4 * estimate.num_trained_parameters
    for name in ("training step", "sampling", "saving"):
        assert 0 <= phases[name]["weights"] - kept < texts / 4, name
    assert estimate.host_bytes >= texts


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's norms are slower then
def test_a_base_in_half_precision_predicts_what_it_does_in_float32(family: str) -> None:
    """Under autocast, norms and embeddings are float32, and matrices are not."""
    found = []
    for formats in (Formats(), Formats(frozen=torch.bfloat16)):
        model = load_model(tiny_folder(family), dtype=formats)
        shape = model.family.latent_space.shape(model, 64, 64)
        noisy = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=formats.frozen is not None):
            texts = encode_captions(model, ["a cat", ""])
            timesteps, sizes = torch.tensor([300.0, 700.0]), Sizes.uncropped(64, 64, 2)
            found.append(model.family.predict(model, noisy, timesteps, texts, sizes))
    assert (found[0] - found[1]).abs().mean() < 0.05 * found[0].abs().mean()


def test_a_gpu_without_bfloat16_is_refused_in_words(settings: dict[str, Any], tmp_path: Path) -> None:
    from everydream_kit.preflight.memory_estimate import estimate_memory

    config = TrainConfig(**{**settings, "training_kind": "lora"})
    with pytest.raises(ConfigError, match=r"exceed float16.*T4"):
        estimate_memory(config, device="cuda", has_bf16=False, cache_folder=tmp_path / "kept")
