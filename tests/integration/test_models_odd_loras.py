"""LoRA files of other tools: every tensor is applied, by arithmetic that is checked by other means, or the file is named."""

import pytest
import torch
from odd_loras import LAYOUTS, write_lora_layout
from tiny_models import tiny_folder

from everydream_kit.errors import ExportError, ModelError
from everydream_kit.export.lora_files import export_lora
from everydream_kit.export.merge import merge_lora
from everydream_kit.generation import open_for_sampling
from everydream_kit.models.family import text_tower
from everydream_kit.models.loading import load_model, open_model
from everydream_kit.models.lora.files import apply_lora, is_lora, read_lora, read_lora_file
from everydream_kit.models.lora.injection import add_lora, lora_parameters
from everydream_kit.models.lora.weight_changes import Change
from everydream_kit.models.model_saving import save_model
from everydream_kit.models.tensors import LazyTensor, open_safetensors

READ = [name for name, (_, error) in LAYOUTS.items() if error is None]
REFUSED = [name for name in LAYOUTS if name not in READ]


def test_the_corpus_is_as_large_as_promised():
    assert len(LAYOUTS) >= 20


@pytest.mark.parametrize("name", READ)
def test_every_tensor_of_a_lora_is_applied(name, tmp_path):
    path, made = write_lora_layout(name, tmp_path)
    base = open_model(tiny_folder(made.family))
    read = read_lora_file(path, base)
    merged = apply_lora(base, read)
    changed = {(part, key) for part, own in read.changes.items() for key in own}
    assert changed == made.expected.keys()
    tolerance = 0.2 if name == "float8" else 1e-4
    for (component, key), wanted in made.expected.items():
        weight = merged.tensors[component][key].read()
        assert not torch.allclose(weight, base.tensors[component][key].read(), atol=1e-3), key
        assert torch.allclose(weight, wanted, rtol=0, atol=tolerance), key
    assert {word: parts[0].read().tolist() for word, parts in read.embeddings.items()} == {
        word: vectors.tolist() for word, vectors in made.embeddings.items()
    }
    assert is_lora(path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_lora_that_is_not_read_whole_is_refused_by_name(name, tmp_path):
    path, made = write_lora_layout(name, tmp_path)
    with pytest.raises(ModelError, match=LAYOUTS[name][1]):
        read_lora_file(path, open_model(tiny_folder(made.family)))


@pytest.mark.parametrize(
    "kind",
    [
        *("LoHa with a core", "LoKr with a core", "LoCon with lora_mid", "DoRA along the input", "bundled embedding"),
        "FLUX.1 with text encoders, kohya",
    ],
)
def test_what_cannot_be_trained_on_says_so(kind, tmp_path):
    path, made = write_lora_layout(kind, tmp_path)
    with pytest.raises(ModelError, match="can be merged and sampled with, not trained"):
        read_lora(path, open_model(tiny_folder(made.family)))


def test_a_bundled_word_is_learned_by_the_model_and_written_next_to_a_merge(tmp_path):
    path, made = write_lora_layout("bundled embedding", tmp_path)
    model = open_for_sampling(tiny_folder("sd1"), lora=path)
    assert model.new_tokens == {"mytoken": ["mytoken", "mytoken_1"]}
    table = text_tower(model.text_encoders[0]).embeddings.token_embedding
    assert torch.equal(table.new, made.embeddings["mytoken"])
    merge_lora(tiny_folder("sd1"), path, tmp_path / "merged.safetensors", precision="fp32")
    assert torch.equal(open_safetensors(tmp_path / "mytoken.safetensors")[0]["emb_params"].read(), table.new)


def test_a_merge_into_a_transformers_file_says_what_is_not_in_it(tmp_path, caplog):
    path, _ = write_lora_layout("FLUX.1 with text encoders, kohya", tmp_path)
    merge_lora(tiny_folder("flux1"), path, tmp_path / "folder")
    assert not caplog.messages
    merge_lora(tiny_folder("flux1"), path, tmp_path / "merged.safetensors")
    assert "holds the transformer alone, so what the LoRA changes in text_encoder and text_encoder_2" in caplog.text


@pytest.mark.parametrize("family", ["flux2_klein", "flux1", "krea2", "anima"])
def test_a_lora_by_the_single_files_names_changes_what_it_changed(family, tmp_path):
    """q, k and v of a block are one layer there, and in FLUX.1 the four times as wide MLP is in it, too."""
    model = load_model(tiny_folder(family))
    add_lora(model, 2)
    for parameter in lora_parameters(model):
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "lora")
    file = export_lora(tmp_path / "lora", tmp_path / "out.safetensors", layout="comfy", precision="fp32")
    base = open_model(tiny_folder(family))
    own, again = (
        apply_lora(base, read_lora_file(path, base)).tensors["transformer"] for path in (tmp_path / "lora", file)
    )
    assert all(name.startswith("diffusion_model.") for name in open_safetensors(file)[0])
    for name, weight in own.items():
        assert torch.allclose(weight.read(), again[name].read(), atol=1e-5), name


def test_a_family_whose_single_file_has_diffusers_names_has_one_kind_of_lora(tmp_path):
    model = load_model(tiny_folder("z_image"))
    add_lora(model, 2)
    save_model(model, tmp_path / "lora")
    with pytest.raises(ExportError, match=r"comfy_lora: no app reads LoRAs of Z-Image in this form\. Take lora"):
        export_lora(tmp_path / "lora", tmp_path / "out.safetensors", layout="comfy")


@pytest.mark.parametrize("layer", ["linear", "convolution", "convolution with a core"])
@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_the_arithmetic_is_that_of_peft(kind, layer):
    """peft's layers hold the same tensors under the same names; its forward and merge are another implementation."""
    import peft

    module = torch.nn.Sequential(torch.nn.Linear(48, 96) if layer == "linear" else torch.nn.Conv2d(48, 96, 3))
    config = getattr(peft, f"{kind}Config")(
        r=2,
        alpha=6,
        target_modules=["0"],
        init_weights=False,
        use_effective_conv2d=layer.endswith("core"),
        **({"decompose_both": True} if kind == "LoKr" else {}),
    )
    wrapped = peft.get_peft_model(module, config).base_model.model[0]
    names = {name.rpartition(".")[0]: value for name, value in wrapped.named_parameters() if "base_layer" not in name}
    parts = {name: LazyTensor.of(value) for name, value in names.items()}
    ours = Change(kind, parts, 6 / 2).delta()
    assert len(parts) >= 3
    theirs = wrapped.get_delta_weight("default")
    assert torch.allclose(ours.reshape(theirs.shape), theirs, rtol=1e-5, atol=1e-4)


def test_dora_is_that_of_peft():
    import peft

    module = torch.nn.Sequential(torch.nn.Linear(24, 36, bias=False))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(module, config).base_model.model[0]
    with torch.no_grad():
        wrapped.lora_magnitude_vector["default"].weight.mul_(1.5)
    parts = {"down": wrapped.lora_A["default"].weight, "up": wrapped.lora_B["default"].weight}
    lengths = LazyTensor.of(wrapped.lora_magnitude_vector["default"].weight)
    change = Change("LoRA", {name: LazyTensor.of(value) for name, value in parts.items()}, 6 / 4, lengths)
    ours = change.apply(wrapped.base_layer.weight.detach().clone(), 1.0)
    wrapped.merge()
    assert torch.allclose(ours, wrapped.base_layer.weight, atol=1e-5)
