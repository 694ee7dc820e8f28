"""LoRA files as tools in the field write them, for the tiny models. `write_lora_layout(name, folder)` makes one.

`LAYOUTS` says what must come of each: None where every tensor is applied (`Made.expected` holds the weights that result,
computed by other means than the kit's), or the start of an error.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import tiny_folder

from everydream_kit.models.loading import open_model

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
NORM = "down_blocks.0.resnets.0.norm1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
SDXL_LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
RANK, ALPHA = 4, 2.0


@dataclass
class Made:
    """A file to be, and the weights that must result: (component, key) -> weight."""

    tensors: dict[str, torch.Tensor]
    expected: dict[tuple[str, str], torch.Tensor]
    family: str = "sd1"
    name: str = "lora.safetensors"
    metadata: dict[str, str] = field(default_factory=dict)
    next_to_it: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, torch.Tensor] = field(default_factory=dict)


def base_weight(component, key, family="sd1"):
    return open_model(tiny_folder(family)).tensors[component][key].read()


def kohya(name):
    return "lora_unet_" + name.replace(".", "_")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * 0.3


def pair(
    stem, name=LINEAR, *, component="unet", family="sd1", ends=("lora_down.weight", "lora_up.weight"), alpha=ALPHA
):
    """An ordinary layer. alpha None: no such tensor, and a scale of 1."""
    weight = base_weight(component, name + ".weight", family)
    out, inputs, *kernel = weight.shape
    down, up = noise(RANK, inputs, *kernel), noise(out, RANK, *[1] * len(kernel), seed=1)
    tensors = {f"{stem}.{ends[0]}": down, f"{stem}.{ends[1]}": up}
    scale = 1.0
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        scale = alpha / RANK
    # Each output is a sum over the ranks, written out.
    change = sum(up.flatten(1)[:, r, None] * down.flatten(1)[None, r] for r in range(RANK)) * scale
    return Made(tensors, {(component, name + ".weight"): weight + change.reshape(weight.shape)}, family)


def both(one, other, **changes):
    merged = Made(one.tensors | other.tensors, one.expected | other.expected, one.family)
    for name, value in changes.items():
        setattr(merged, name, value)
    return merged


def tucker():
    """LoCon with `lora_mid`: three convolutions one after the other, found by what they do to unit images."""
    weight = base_weight("unet", CONV + ".weight")
    out, inputs, height, width = weight.shape
    down, mid, up = noise(RANK, inputs, 1, 1), noise(RANK, RANK, 3, 3), noise(out, RANK, 1, 1)
    impulse = torch.zeros(inputs, inputs, 5, 5)
    impulse[range(inputs), range(inputs), 2, 2] = 1
    conv = torch.nn.functional.conv2d
    seen = conv(conv(conv(impulse, down), mid), up)  # (in, out, 3, 3), the kernel mirrored
    change = seen.flip(2, 3).transpose(0, 1) * (ALPHA / RANK)
    stem = kohya(CONV)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}
    assert (height, width) == (3, 3)
    return Made({f"{stem}.{k}": v for k, v in parts.items()}, {("unet", CONV + ".weight"): weight + change})


def loha(name=LINEAR, *, core=False, is_flat=False):
    """Two LoRAs multiplied number by number."""
    weight = base_weight("unet", name + ".weight")
    out, inputs, *kernel = weight.shape
    parts, halves = {}, []
    for half in "12":
        seed = 10 * int(half)
        if core:
            a, b, t = (
                noise(RANK, out, seed=seed),
                noise(RANK, inputs, seed=seed + 1),
                noise(RANK, RANK, 3, 3, seed=seed),
            )
            parts |= {f"hada_w{half}_a": a, f"hada_w{half}_b": b, f"hada_t{half}": t}
            halves.append(
                sum(
                    t[i, j] * (a[i, :, None, None, None] * b[None, j, :, None, None])
                    for i in range(RANK)
                    for j in range(RANK)
                )
            )
        else:
            width = inputs * (kernel[0] * kernel[1] if kernel else 1)
            a, b = noise(out, RANK, seed=seed), noise(RANK, width, seed=seed + 1)
            b = b if is_flat else b.reshape(RANK, inputs, *kernel)
            parts |= {f"hada_w{half}_a": a, f"hada_w{half}_b": b}
            halves.append(sum(a[:, r, None] * b.flatten(1)[None, r] for r in range(RANK)))
    parts["alpha"] = torch.tensor(ALPHA)
    change = (halves[0] * halves[1]).reshape(weight.shape) * (ALPHA / RANK)
    stem = kohya(name)
    return Made({f"{stem}.{k}": v for k, v in parts.items()}, {("unet", name + ".weight"): weight + change})


def lokr(name=LINEAR, *, split=(), core=False, stem=None, alpha=ALPHA):
    """A Kronecker product: block (i, j) of the change is w1[i, j] * w2."""
    weight = base_weight("unet", name + ".weight")
    out, inputs, *kernel = weight.shape
    parts, factors = {}, []
    for half, shape in (("1", (4, 4)), ("2", (out // 4, inputs // 4, *kernel))):
        seed = 20 * int(half)
        if half == "2" and core:
            a, b, t = noise(RANK, shape[0]), noise(RANK, shape[1]), noise(RANK, RANK, *kernel)
            parts |= {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
            factors.append(torch.einsum("ip,ijhw,jr->prhw", a, t, b))
        elif half in split:
            a, b = noise(shape[0], RANK, seed=seed), noise(RANK, *shape[1:], seed=seed + 1)
            parts |= {f"lokr_w{half}_a": a, f"lokr_w{half}_b": b}
            factors.append(torch.tensordot(a, b, dims=1))
        else:
            parts[f"lokr_w{half}"] = noise(*shape, seed=seed)
            factors.append(parts[f"lokr_w{half}"])
    rows = [torch.cat([number * factors[1] for number in row], dim=1) for row in factors[0]]
    change = torch.cat(rows) * (alpha / RANK if split or core else 1.0)
    parts["alpha"] = torch.tensor(alpha)
    stem = stem or kohya(name)
    return Made({f"{stem}.{k}": v for k, v in parts.items()}, {("unet", name + ".weight"): weight + change})


def dora(axis, *, made=None, name=LINEAR, end="dora_scale", shaped=True):
    """DoRA: each row (axis 0) or column (axis 1) of the changed weight gets a learned length."""
    made = made or pair(kohya(name), name)
    changed = made.expected["unet", name + ".weight"]
    scale = 0.5 + torch.rand(changed.shape[axis], generator=torch.Generator().manual_seed(3))
    rows = changed.transpose(0, axis).flatten(1)
    lengths = rows.square().sum(1).sqrt()
    scaled = (rows * (scale / lengths)[:, None]).reshape(changed.transpose(0, axis).shape).transpose(0, axis)
    shape = [1] * changed.dim()
    shape[axis] = -1
    stem = next(iter(made.tensors)).removesuffix(".weight").rpartition(".lora_")[0] or kohya(name)
    made.tensors[f"{stem}.{end}"] = scale.reshape(shape) if shaped else scale
    made.expected["unet", name + ".weight"] = scaled
    return made


def full():
    """Whole differences of weight and bias, and of a norm, next to an ordinary layer."""
    changes = {
        (LINEAR, "diff", "weight"): noise(*base_weight("unet", LINEAR + ".weight").shape),
        (OUT, "diff_b", "bias"): noise(*base_weight("unet", OUT + ".bias").shape),
        (NORM, "w_norm", "weight"): noise(*base_weight("unet", NORM + ".weight").shape),
        (NORM, "b_norm", "bias"): noise(*base_weight("unet", NORM + ".bias").shape),
    }
    made = pair(kohya(OUT), OUT)
    for (name, end, leaf), change in changes.items():
        made.tensors[f"{kohya(name)}.{end}"] = change
        made.expected["unet", f"{name}.{leaf}"] = base_weight("unet", f"{name}.{leaf}") + change
    return made


def with_embedding():
    made, vectors = pair(kohya(LINEAR)), noise(2, 32)
    made.tensors["bundle_emb.mytoken.string_to_param.*"] = vectors
    made.embeddings = {"mytoken": vectors}
    return made


def text(stem, *, ends=("lora_down.weight", "lora_up.weight"), alpha=ALPHA):
    return pair(stem, TEXT, component="text_encoder", ends=ends, alpha=alpha)


def peft(**config):
    """peft's own file with its settings next to it."""
    made = pair(f"base_model.model.{LINEAR}", ends=("lora_A.weight", "lora_B.weight"), alpha=None)
    weight = base_weight("unet", LINEAR + ".weight")
    changed = made.expected["unet", LINEAR + ".weight"]
    scale = config["lora_alpha"] / (RANK**0.5 if config.get("use_rslora") else RANK)
    made.expected["unet", LINEAR + ".weight"] = weight + (changed - weight) * scale
    made.name = "adapter_model.safetensors"
    made.next_to_it["adapter_config.json"] = json.dumps({"r": RANK, **config})
    return made


def plus(made, **changes):
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def more(made, tensors):
    made.tensors |= tensors
    return made


def cast(made, dtype):
    made.tensors = {name: value.to(dtype) for name, value in made.tensors.items()}
    return made


def sdxl_single_file_name():
    stem = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
    second = pair("lora_te2_" + TEXT.replace(".", "_"), TEXT, component="text_encoder_2", family="sdxl")
    return both(pair(stem, SDXL_LINEAR, family="sdxl"), second)


def flux1(denoiser, clip, t5, **how):
    """A layer of FLUX.1's transformer, and one of each text encoder."""
    made = pair(denoiser, "transformer_blocks.0.ff.net.0.proj", component="transformer", family="flux1", **how)
    made = both(made, pair(clip, TEXT, component="text_encoder", family="flux1", **how)) if clip else made
    return both(made, pair(t5, T5, component="text_encoder_2", family="flux1", **how)) if t5 else made


DOTS = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
OF_2024 = ("lora.down.weight", "lora.up.weight")
OF_2023 = ("down.weight", "up.weight")

LAYOUTS = {
    # made by, error (None: every tensor is applied)
    "kohya": (lambda: pair(kohya(LINEAR)), None),
    "kohya with text encoder": (lambda: both(pair(kohya(LINEAR)), text("lora_te_" + TEXT.replace(".", "_"))), None),
    "kohya lora_te1 on one encoder": (lambda: text("lora_te1_" + TEXT.replace(".", "_")), None),
    "kohya convolution (LoCon)": (lambda: pair(kohya(CONV), CONV), None),
    "LoCon with lora_mid": (tucker, None),
    "kohya sdxl": (sdxl_single_file_name, None),
    "sdxl by diffusers' names": (lambda: pair(kohya(SDXL_LINEAR), SDXL_LINEAR, family="sdxl"), None),
    "sdxl of ComfyUI": (
        lambda: pair(
            "diffusion_model.input_blocks.3.1.transformer_blocks.0.attn1.to_q", SDXL_LINEAR, family="sdxl", ends=PEFT
        ),
        None,
    ),
    "FLUX.1 with text encoders, kohya": (
        lambda: flux1(
            "lora_unet_double_blocks_0_img_mlp_0",
            "lora_te1_" + TEXT.replace(".", "_"),
            "lora_te3_" + T5.replace(".", "_"),
        ),
        None,
    ),
    "FLUX.1 with text encoders, OneTrainer": (
        lambda: flux1(
            "lora_transformer_transformer_blocks_0_ff_net_0_proj",
            "lora_te1_" + TEXT.replace(".", "_"),
            "lora_te2_" + T5.replace(".", "_"),
        ),
        None,
    ),
    "FLUX.1 with CLIP, diffusers": (
        lambda: flux1(
            "transformer.transformer_blocks.0.ff.net.0.proj", f"text_encoder.{TEXT}", "", ends=PEFT, alpha=None
        ),
        None,
    ),
    "LoHa": (loha, None),
    "LoHa of a convolution": (lambda: loha(CONV), None),
    "LoHa of a convolution, LyCORIS": (lambda: loha(CONV, is_flat=True), None),
    "LoHa with a core": (lambda: loha(CONV, core=True), None),
    "LoKr": (lokr, None),
    "LoKr with two matrices": (lambda: lokr(split="2"), None),
    "LoKr with four matrices": (lambda: lokr(split="12"), None),
    "LoKr of a convolution": (lambda: lokr(CONV, split="2"), None),
    "LoKr with a core": (lambda: lokr(CONV, core=True), None),
    "LoKr of SimpleTuner": (lambda: lokr(stem="lycoris_" + LINEAR.replace(".", "_")), None),
    "LoRA next to LoKr": (lambda: both(pair(kohya(OUT), OUT), lokr()), None),
    "differences, biases and norms": (full, None),
    "bundled embedding": (with_embedding, None),
    "DoRA along the output": (lambda: dora(0), None),
    "DoRA along the input": (lambda: dora(1), None),
    "DoRA of a convolution along the input": (lambda: dora(1, name=CONV), None),
    "DoRA of diffusers": (
        lambda: dora(0, made=pair(f"unet.{LINEAR}", ends=PEFT, alpha=None), end="lora_magnitude_vector", shaped=False),
        None,
    ),
    "OneTrainer's dots": (lambda: pair(f"lora_unet.{LINEAR}"), None),
    "OneTrainer's dots, unet": (lambda: both(pair(f"unet.{OUT}", OUT), text(f"lora_te.{TEXT}")), None),
    "OneTrainer's DoRA": (lambda: dora(0, made=pair(f"unet.{LINEAR}")), None),
    "diffusers": (
        lambda: both(
            pair(f"unet.{LINEAR}", ends=PEFT, alpha=None), text(f"text_encoder.{TEXT}", ends=PEFT, alpha=None)
        ),
        None,
    ),
    "diffusers with an alpha in its header": (
        lambda: plus(
            pair(f"unet.{LINEAR}", ends=PEFT, alpha=None),
            metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": RANK, "unet.r": RANK})},
        ),
        None,
    ),
    "diffusers of 2024": (lambda: pair(f"unet.{LINEAR}", ends=OF_2024, alpha=None), None),
    "diffusers of 2023": (
        lambda: both(
            pair(f"unet.{LINEAR.removesuffix('.to_q')}.processor.to_q_lora", ends=OF_2023, alpha=None),
            pair(f"unet.{OUT.removesuffix('.to_out.0')}.processor.to_out_lora", OUT, ends=OF_2023, alpha=None),
        ),
        None,
    ),
    "diffusers of 2023 without unet": (
        lambda: pair(f"{LINEAR.removesuffix('.to_q')}.processor.to_q_lora", ends=OF_2023, alpha=None),
        None,
    ),
    "diffusers of 2023, text": (
        lambda: text(
            f"text_encoder.{TEXT}", ends=("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), alpha=None
        ),
        None,
    ),
    "peft": (lambda: peft(lora_alpha=8), None),
    "peft with rank-stabilized scale": (lambda: peft(lora_alpha=8, use_rslora=True), None),
    "float8": (lambda: plus(cast(pair(kohya(LINEAR), alpha=None), torch.float8_e4m3fn)), None),
    "alpha 0 is the rank": (
        lambda: more(pair(kohya(LINEAR), alpha=None), {f"{kohya(LINEAR)}.alpha": torch.zeros(())}),
        None,
    ),
    "upper case name": (lambda: plus(pair(kohya(LINEAR)), name="UPPER.SAFETENSORS"), None),
    "pickle": (lambda: plus(pair(kohya(LINEAR)), name="lora.pt"), None),
    "OFT": (lambda: more(pair(kohya(LINEAR)), {f"{kohya(OUT)}.oft_blocks": noise(2, 4, 4)}), "kind OFT"),
    "GLoRA": (lambda: more(pair(kohya(LINEAR)), {f"{kohya(OUT)}.a1.weight": noise(2, 4)}), "kind GLoRA"),
    "(IA)3": (lambda: more(pair(kohya(LINEAR)), {f"{kohya(OUT)}.on_input": noise(1)}), r"kind \(IA\)³"),
    "Flux": (
        lambda: Made(
            {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": noise(4, 8)},
            {},
            metadata={"modelspec.architecture": "flux-2-klein/lora"},
        ),
        "made for another model family: its header says flux-2-klein/lora",
    ),
    "sdxl on sd1": (lambda: plus(sdxl_single_file_name(), family="sd1"), "made for another model family"),
    "another text encoder": (
        lambda: more(pair(kohya(LINEAR)), {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.diff": noise(2)}),
        "1 of its 2 layers are not in it, .* or changes text encoders that",
    ),
    "one unknown tensor": (
        lambda: more(pair(kohya(LINEAR)), {f"{kohya(OUT)}.banana": noise(2)}),
        "1 of its tensors are of no kind of LoRA",
    ),
    "one unknown layer": (
        lambda: more(pair(kohya(LINEAR)), {"lora_unet_banana.diff": noise(2)}),
        "1 of its 2 layers are not in it",
    ),
    "half a layer": (lambda: Made({f"{kohya(LINEAR)}.lora_down.weight": noise(4, 32)}, {}), "is incomplete"),
    "half a LoHa": (lambda: Made({f"{kohya(LINEAR)}.hada_w1_a": noise(4, 4)}, {}), "is incomplete"),
    "two kinds in one layer": (
        lambda: more(pair(kohya(LINEAR)), {f"{kohya(LINEAR)}.diff": noise(32, 32)}),
        "is incomplete",
    ),
    "a layer in two spellings": (
        lambda: more(pair(kohya(LINEAR)), pair(f"unet.{LINEAR}").tensors),
        "names the layer unet.* twice",
    ),
    "embedding of another width": (
        lambda: more(pair(kohya(LINEAR)), {"bundle_emb.cat.string_to_param.*": noise(2, 48)}),
        "bundled embedding 'cat' does not fit",
    ),
    "wrong width": (
        lambda: Made(
            {f"{kohya(LINEAR)}.lora_{k}.weight": noise(*s) for k, s in (("down", (4, 8)), ("up", (8, 4)))}, {}
        ),
        "expects a weight of 8 x 8",
    ),
    "no LoRA": (lambda: Made({"banana": noise(2)}, {}), "not a LoRA"),
}


def write_lora_layout(name, folder):
    """Write a layout's file, with what lies next to it. Returns its path and what it holds."""
    made = LAYOUTS[name][0]()
    path = Path(folder) / made.name
    tensors = {key: value.clone().contiguous() for key, value in made.tensors.items()}
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path, made.metadata or None)
    for near, content in made.next_to_it.items():
        (Path(folder) / near).write_text(content, encoding="utf-8")
    return path, made
