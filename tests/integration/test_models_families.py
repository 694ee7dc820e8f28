"""Loading, encoding, predicting, saving and exporting, for every family, with tiny real models."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from tiny_models import FAMILY_NAMES, draw, tiny_folder

from everydream_kit.errors import ConfigError, DiskSpaceError, ExportError, ModelError
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models import families
from everydream_kit.models.encoding import Sizes, encode_captions, encode_moments, latents_from_moments
from everydream_kit.models.families.sdxl import time_ids
from everydream_kit.models.family import text_tower
from everydream_kit.models.loading import load_model, open_model
from everydream_kit.models.model_saving import save_model, write_folder
from everydream_kit.models.random_models import build_tiny_model
from everydream_kit.models.sampling import SamplePrompt, guide, sample_images
from everydream_kit.models.tensors import open_safetensors

WIDTHS = {"sd1": 32, "sd2": 32, "sdxl": 80}


@pytest.fixture(params=FAMILY_NAMES)
def family(request):
    return request.param


@pytest.fixture
def copied(tmp_path):
    """A copy of the tiny SD 1.x folder that a test may spoil."""
    return shutil.copytree(tiny_folder("sd1"), tmp_path / "copied")


def all_tensors(files):
    return {f"{part}/{name}": lazy.read() for part, tensors in files.tensors.items() for name, lazy in tensors.items()}


def assert_same_files(one, other):
    ours, theirs = all_tensors(one), all_tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.configs == other.configs
    assert one.scheduler_config == other.scheduler_config


def test_a_saved_model_comes_back_bit_for_bit(family, tmp_path):
    model = load_model(tiny_folder(family))
    assert model.family.name == family
    save_model(model, tmp_path / "again")
    assert_same_files(open_model(tiny_folder(family)), open_model(tmp_path / "again"))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_diffusers_to_single_file_to_diffusers_is_bit_equal(family, tmp_path, suffix):
    single = export_checkpoint(tiny_folder(family), tmp_path / f"model{suffix}", precision="fp32")
    opened = open_model(single)
    assert opened.family.name == family
    write_folder(opened, tmp_path / "folder")
    assert_same_files(open_model(tiny_folder(family)), open_model(tmp_path / "folder"))


def test_diffusers_reads_our_folder_and_single_file_and_draws_our_image(family, tmp_path):
    import diffusers

    single = export_checkpoint(tiny_folder(family), tmp_path / "model.safetensors", precision="fp32")
    ours = draw(load_model(single))
    cls = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipelines = [
        cls.from_pretrained(tiny_folder(family), dtype=torch.float32),
        cls.from_single_file(str(single), config=str(tiny_folder(family)), dtype=torch.float32, local_files_only=True),
    ]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
        settings = {"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 3.0}
        generator = torch.Generator("cpu").manual_seed(4)
        theirs = pipeline("a red square", generator=generator, **settings).images[0]
        assert np.abs(ours - np.asarray(theirs).astype(int)).max() <= 1
    assert ours.std() > 5  # not a blank image


def test_text_encoders_are_saved_with_the_prefix_that_transformers_4_needs(family):
    folder = tiny_folder(family)
    names = open_safetensors(folder / "text_encoder" / "model.safetensors")[0]
    assert names
    assert all(name.startswith("text_model.") for name in names)
    assert (folder / "tokenizer" / "vocab.json").is_file()
    assert (folder / "tokenizer" / "merges.txt").is_file()


def test_a_text_encoder_saved_without_the_prefix_loads_too(copied):
    path = copied / "text_encoder" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name.removeprefix("text_model."): value for name, value in load_file(path).items()}, path)
    captions = ["a red square"]
    one, other = load_model(copied), load_model(tiny_folder("sd1"))
    assert torch.equal(
        encode_captions(one, captions).encoder_hidden_states, encode_captions(other, captions).encoder_hidden_states
    )


def test_the_models_own_sampler_is_saved_back(family, tmp_path):
    save_model(load_model(tiny_folder(family)), tmp_path)
    for folder in (tiny_folder(family), tmp_path):
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        expected = {"sd1": "PNDMScheduler", "sd2": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}
        assert config["_class_name"] == expected[family]


def test_captions_moments_and_predictions_have_their_shapes(family):
    model = load_model(tiny_folder(family))
    pixels = torch.randint(0, 256, (2, 3, 64, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moments = encode_moments(model, pixels)
    assert moments.shape == (2, 8, 8, 16)
    latents = latents_from_moments(model, moments, torch.zeros(2, 4, 8, 16))
    assert torch.allclose(latents, moments[:, :4] * model.vae.config["scaling_factor"])
    conditioning = encode_captions(model, ["a", "b c"])
    assert conditioning.encoder_hidden_states.shape == (2, 77, WIDTHS[family])
    assert (conditioning.pooled is not None) == (family == "sdxl")
    prediction = model.family.predict(
        model, latents, torch.tensor([10, 500]), conditioning, Sizes.uncropped(128, 64, 2)
    )
    assert prediction.shape == (2, 4, 8, 16)
    assert prediction.dtype == torch.float32


def test_clip_skip_chooses_the_hidden_layer_and_norms_it():
    model = load_model(tiny_folder("sd1"))
    captions = ["a red square"]
    ids = model.tokenizers[0](captions, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    output = model.text_encoders[0](ids, output_hidden_states=True)
    norm = text_tower(model.text_encoders[0]).final_layer_norm
    for clip_skip, expected in {
        0: output.last_hidden_state,
        1: output.last_hidden_state,
        2: norm(output.hidden_states[-2]),
        3: norm(output.hidden_states[-3]),
    }.items():
        assert torch.equal(encode_captions(model, captions, clip_skip).encoder_hidden_states, expected)


def test_sdxl_takes_the_penultimate_layers_unnormed_and_pools_the_second():
    model = load_model(tiny_folder("sdxl"))
    encoded = encode_captions(model, ["a red square"])
    parts = []
    for tokenizer, text_encoder in zip(model.tokenizers, model.text_encoders, strict=True):
        ids = tokenizer(["a red square"], padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
        output = text_encoder(ids, output_hidden_states=True)
        parts.append(output.hidden_states[-2])
    assert torch.equal(encoded.encoder_hidden_states, torch.cat(parts, dim=-1))
    assert torch.equal(encoded.pooled, output.text_embeds)


def test_time_ids_say_height_before_width():
    sizes = Sizes([(640, 480)], [(3, 5)], (512, 384))
    assert time_ids(sizes, 1).tolist() == [[480, 640, 5, 3, 384, 512]]


def test_a_long_prompt_is_read_to_its_end():
    model = load_model(tiny_folder("sd1"))
    words = "red " * 80
    assert np.array_equal(draw(model, words + "cat")[..., 0].shape, (64, 64))
    assert not np.array_equal(draw(model, words + "cat"), draw(model, words + "dog"))


def test_an_image_does_not_depend_on_its_batch_and_all_scales_start_from_one_noise():
    model = load_model(tiny_folder("sd1"))
    prompts = [
        SamplePrompt("a", "b", 1, 64, 64, (1.0, 5.0)),
        SamplePrompt("c " * 90, "", 2, 64, 64, (3.0,)),
        SamplePrompt("d", "", 3, 128, 64, (3.0,)),
    ]
    together = sample_images(model, prompts, scheduler="euler_a", num_inference_steps=3, batch_size=8)
    alone = sample_images(model, prompts, scheduler="euler_a", num_inference_steps=3, batch_size=1)
    assert [image.size for image in together] == [(64, 64), (64, 64), (64, 64), (128, 64)]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    assert "CFG scale: 5, Seed: 1, Size: 64x64" in together[1].info["parameters"]


@pytest.mark.parametrize(
    "scheduler", ["ddpm", "pndm", "lms", "Euler a", "heun", "DPM++ 2M Karras", "dpm++_2m_sde", "unipc"]
)
def test_every_kind_of_scheduler_draws(scheduler):
    assert draw(load_model(tiny_folder("sd2")), scheduler=scheduler).std() > 1


def test_sampling_leaves_the_modes_and_the_global_generator_alone():
    model = load_model(tiny_folder("sd1"))
    model.unet.train()
    model.unet.mid_block.eval()
    before = torch.random.get_rng_state()
    reported = []
    draw(model, scheduler="euler_a", progress=lambda done, total: reported.append((done, total)))
    assert model.unet.training
    assert not model.unet.mid_block.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert reported == [(1, 3), (2, 3), (3, 3)]


def test_an_unknown_scheduler_and_a_crooked_size_are_refused():
    model = load_model(tiny_folder("sd1"))
    with pytest.raises(ConfigError, match=r"'eular' is unknown; did you mean euler\? Known are ddim"):
        draw(model, scheduler="eular")
    with pytest.raises(ConfigError, match="multiples of 8"):
        sample_images(model, [SamplePrompt("a", width=65, height=64)])


def test_guidance_rescale_gives_the_guided_prediction_the_spread_of_the_conditional_one():
    generator = torch.Generator().manual_seed(0)
    unconditional, conditional = torch.randn(2, 1, 4, 8, 8, generator=generator)
    cfg = torch.full((1, 1, 1, 1), 7.0)
    plain = guide(unconditional, conditional, cfg)
    assert torch.allclose(plain, unconditional + 7 * (conditional - unconditional))
    assert torch.allclose(guide(unconditional, conditional, cfg, 1.0).std(), conditional.std())


def test_zero_terminal_snr_is_recognized_kept_and_marked(tmp_path):
    model = load_model(tiny_folder("sd2"))
    assert not model.zero_terminal_snr
    model.zero_terminal_snr = True
    save_model(model, tmp_path / "folder")
    again = load_model(tmp_path / "folder")
    assert again.zero_terminal_snr
    assert again.noise_scheduler.alphas_cumprod[-1] < 1e-6
    single = export_checkpoint(tmp_path / "folder", tmp_path / "model.safetensors")
    assert {"v_pred", "ztsnr"} <= open_safetensors(single)[0].keys()
    assert open_model(single).zero_terminal_snr
    assert draw(again).std() > 1


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_precision_and_metadata_of_a_single_file(tmp_path, precision, dtype):
    single = export_checkpoint(tiny_folder("sd2"), tmp_path / "jets.safetensors", precision=precision)
    tensors, metadata = open_safetensors(single)
    kept = {tensor.dtype for name, tensor in tensors.items() if name not in ("v_pred", "ztsnr")}
    assert kept == {dtype}
    assert metadata["modelspec.architecture"] == "stable-diffusion-v2"
    assert metadata["modelspec.title"] == "jets"
    assert metadata["modelspec.resolution"] == "768x768"
    assert metadata["modelspec.prediction_type"] == "v"
    legacy = yaml.safe_load(single.with_suffix(".yaml").read_text())
    assert legacy["model"]["params"]["parameterization"] == "v"
    assert load_model(single).prediction_type == "v_prediction"


def test_sd1_single_files_need_no_yaml_and_carry_no_v_marker(tmp_path):
    single = export_checkpoint(tiny_folder("sd1"), tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert "v_pred" not in open_safetensors(single)[0]


def test_ema_weights_come_from_the_folder_next_to(tmp_path):
    shutil.copytree(tiny_folder("sd1"), tmp_path / "ck")
    with pytest.raises(ExportError, match="no EMA weights"):
        export_checkpoint(tmp_path / "ck", tmp_path / "out.safetensors", ema=True)
    save_model(build_tiny_model("sd1", seed=1), tmp_path / "ck_ema")
    averaged = open_model(export_checkpoint(tmp_path / "ck", tmp_path / "out.safetensors", "fp32", ema=True))
    assert_same_files(averaged, open_model(tmp_path / "ck_ema"))


def test_export_refuses_what_it_cannot_write(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="precision 'int8' is unknown"):
        export_checkpoint(tiny_folder("sd1"), tmp_path / "a.safetensors", precision="int8")
    with pytest.raises(ExportError, match=r"must end in \.safetensors or \.ckpt"):
        export_checkpoint(tiny_folder("sd1"), tmp_path / "a.bin")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(DiskSpaceError, match="Nothing was written"):
        export_checkpoint(tiny_folder("sd1"), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_half_precision_leaves_the_vae_in_float32(family):
    model = load_model(tiny_folder(family), dtype=torch.bfloat16)
    formats = {name: next(module.parameters()).dtype for name, module in model.modules().items()}
    assert formats.pop("vae") == torch.float32
    assert set(formats.values()) == {torch.bfloat16}
    assert draw(model).std() > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "an inpainting model .*9 channels"),
        ({"in_channels": 5}, "a depth-to-image model"),
        ({"_class_name": "EvilModel"}, "names the class 'EvilModel'"),
        ({"block_out_channels": [32, 32]}, "cannot be built"),
        ({"cross_attention_dim": 48}, "has the shape"),
        ({"addition_embed_type": "other"}, "fits none of the families"),
    ],
)
def test_a_unet_that_is_not_ours_is_refused(copied, change, message):
    path = copied / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        load_model(copied)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "vae" / "config.json").unlink(), r"vae/config\.json is missing"),
        (lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "no weights here"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "no tokenizer here"),
        (lambda folder: shutil.rmtree(folder / "scheduler"), r"scheduler_config\.json is missing"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), r"config\.json, line 1.*not valid JSON"),
        (
            lambda folder: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in folder.iterdir()],
            "the folder is empty",
        ),
        (lambda folder: shutil.rmtree(folder / "unet"), "not a diffusers model"),
        (
            lambda folder: (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLFlux2"}'),
            r"vae/config\.json: names the class 'AutoencoderKLFlux2', and this family's vae is AutoencoderKL\. The folder",
        ),
    ],
)
def test_an_incomplete_folder_says_what_is_missing(copied, spoil, message):
    spoil(copied)
    with pytest.raises(ModelError, match=message):
        load_model(copied)


def test_missing_weights_are_an_error_and_not_noise(copied):
    from safetensors.torch import load_file, save_file

    path = copied / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("text_model.final_layer_norm.weight")
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"1 missing, such as .*final_layer_norm\.weight"):
        load_model(copied)


def test_a_single_file_that_is_something_else_is_named(tmp_path):
    from safetensors.torch import save_file

    kinds = {
        "lora_unet_x.lora_down.weight": "a LoRA",
        "double_blocks.0.img_attn.qkv.weight": "Flux",
        "first_stage_model.encoder.conv_in.weight": "a VAE alone",
        "emb_params": "textual-inversion",
        "banana": "not a Stable Diffusion model",
    }
    for name, message in kinds.items():
        save_file({name: torch.zeros(1)}, tmp_path / "a.safetensors")
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / "a.safetensors")


def test_what_is_not_there_says_so(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ModelError, match="not a model file by its name"):
        load_model(tmp_path / "a.txt")


def test_a_new_family_is_one_table_and_the_rest_follows(monkeypatch, tmp_path):
    """A toy whose UNet sees no text at all, built, saved, loaded, trained a step and drawn through the same
    interface."""

    def predict(model, noisy_latents, timesteps, conditioning, sizes):
        blind = torch.zeros_like(conditioning.encoder_hidden_states)
        return model.unet(noisy_latents, timesteps, encoder_hidden_states=blind).sample

    toy = dataclasses.replace(
        families.FAMILIES["sd1"],
        name="toy",
        predict=predict,
        matches_configs=lambda configs: (
            configs["unet"].get("class_embed_type") is None and "toy" in str(configs["vae"])
        ),
    )
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES)
    monkeypatch.setitem(families.FAMILIES, "toy", toy)
    model = build_tiny_model("sd1")
    model.family = toy
    save_model(model, tmp_path)
    again = load_model(tmp_path, family="toy")
    assert again.family is toy
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(again.unet.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        conditioning = encode_captions(again, ["a"])
        prediction = again.family.predict(again, noise, torch.tensor([5]), conditioning, Sizes.uncropped(64, 64, 1))
        loss = (prediction - noise).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert np.array_equal(draw(again, "cat"), draw(again, "dog"))  # it is blind to text, as its table says
