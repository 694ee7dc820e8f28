"""Models without weights: the same names and shapes as the real ones, from wherever they are read."""

import json
import shutil

import pytest
from tiny_models import tiny_folder

from everydream_kit.errors import ModelError
from everydream_kit.models.loading import load_model
from everydream_kit.models.model_files import open_folder
from everydream_kit.preflight.skeleton import build_skeleton, read_architecture, shipped_architecture


def shapes(model):
    return {
        f"{name}.{key}": tuple(value.shape)
        for name, module in model.modules().items()
        for key, value in module.state_dict().items()
    }


def real_shapes(folder):
    parts = open_folder(folder).tensors
    found = {f"{name}.{key}": tensor.shape for name, part in parts.items() for key, tensor in part.items()}
    return {key.replace(".text_model.", "."): shape for key, shape in found.items()}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_folder_without_weights_gives_the_shapes_of_the_whole_one(family, tmp_path):
    import torch

    whole = tiny_folder(family)
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    model = build_skeleton(read_architecture(bare), torch.bfloat16)
    found = {key.replace(".text_model.", "."): shape for key, shape in shapes(model).items()}
    assert found == real_shapes(whole)
    assert all(parameter.is_meta for module in model.modules().values() for parameter in module.parameters())
    assert {p.dtype for p in model.unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.vae.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "key", "named", "held"),
    [
        ("z_image", "torch_dtype", "bfloat16", "bfloat16"),
        ("flux1", "dtype", "bfloat16", "bfloat16"),
        ("z_image", "dtype", "float32", "float32"),
        ("sdxl", "torch_dtype", "float16", "float32"),  # SDXL's own configs say so, and its files are float32
    ],
)
def test_without_weights_a_language_model_has_the_format_that_its_config_names(family, key, named, held, tmp_path):
    import torch

    from everydream_kit.models.number_formats import Formats

    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder(family), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for config in bare.glob("text_encoder*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), key: named}))
    full = Formats(frozen=torch.bfloat16, trained_roles=frozenset({"denoiser"}), keeps_precision=True)
    for text_encoder in build_skeleton(read_architecture(bare), full).text_encoders:
        linear = [part for part in text_encoder.modules() if isinstance(part, torch.nn.Linear)]
        assert {part.weight.dtype for part in linear} == {getattr(torch, held)}


def test_a_single_file_gives_the_architecture_that_it_carries(tmp_path):
    from everydream_kit.export.single_file_export import export_checkpoint

    file = export_checkpoint(tiny_folder("sd1"), tmp_path / "tiny.safetensors")
    found = read_architecture(file).identity()["configs"]["unet"]
    wanted = read_architecture(tiny_folder("sd1")).identity()["configs"]["unet"]
    assert found["block_out_channels"] == wanted["block_out_channels"]
    assert found["cross_attention_dim"] == wanted["cross_attention_dim"]


def test_the_embedded_base_is_read_by_its_name():
    from everydream_kit.config import TrainConfig
    from everydream_kit.preflight.memory_estimate import architecture_of

    assert architecture_of(TrainConfig(resume_ckpt="embedded")).files.family.name == "sd1"


@pytest.mark.parametrize(("family", "millions"), [("sd1", 1066), ("sd2", 1289), ("sdxl", 3469)])
def test_the_shipped_configs_have_the_published_sizes(family, millions):
    """SD 1.5: UNet 859.5, text 123.1, VAE 83.7; SD 2.1: 865.9, 340.4, 83.7; SDXL: 2567.5, 123.1 + 694.7, 83.7."""
    import torch

    model = build_skeleton(shipped_architecture(family), torch.float32)
    numbers = sum(p.numel() for module in model.modules().values() for p in module.parameters())
    assert round(numbers / 1e6) == pytest.approx(millions, abs=1)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ModelError, match="there is no such file or folder"):
        read_architecture("no/such/place")
    with pytest.raises(ModelError, match="the folder is empty"):
        read_architecture(tmp_path)
    (tmp_path / "note.txt").touch()
    with pytest.raises(ModelError, match=r"unet/config\.json is missing"):
        read_architecture(tmp_path)
    with pytest.raises(ModelError, match=r"unet/config\.json is missing"):
        read_architecture(tmp_path, subfolder="absent")
    shutil.copytree(tiny_folder("sdxl"), tmp_path / "part", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.rmtree(tmp_path / "part" / "vae")
    with pytest.raises(ModelError, match=r"vae/config\.json is missing"):
        read_architecture(tmp_path / "part")


@pytest.mark.parametrize(
    ("spoil", "family", "words"),
    [
        (lambda folder: shutil.rmtree(folder / "scheduler"), "z_image", r"scheduler_config\.json is missing"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "z_image", r"tokenizer: no tokenizer here"),
        (lambda folder: (folder / "t5_tokenizer" / "tokenizer.json").write_text("{"), "anima", r"t5_tokenizer"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "sd1", r"tokenizer: no tokenizer here"),
    ],
)
def test_a_plan_refuses_a_folder_that_training_refuses(spoil, family, words, tmp_path):
    folder = shutil.copytree(tiny_folder(family), tmp_path / "base")
    spoil(folder)
    with pytest.raises(ModelError, match=words) as planned:
        read_architecture(folder)
    with pytest.raises(ModelError) as trained:
        load_model(folder)
    assert str(planned.value) == str(trained.value)
