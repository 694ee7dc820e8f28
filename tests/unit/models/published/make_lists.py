"""Write the published single-file layouts (names and shapes) from implementations that are not ours.

    python make_lists.py LDM OPENCLIP OUT

LDM is the unpacked PyPI wheel `stable-diffusion-sdkit` 2.1.5 (CompVis' and Stability AI's `ldm` package, with einops
importable), OPENCLIP the unpacked wheel `open-clip-torch` 3.3.0. Modules are built on the meta device from the
published yaml settings. SD 1.x's text encoder is the CLIP of transformers 4, whose names the single files keep.
SDXL's UNet is ldm's with two things that its successor (Stability AI's `sgm`) added: a depth for each level, and
`label_emb` as two linear layers in a double Sequential.
"""

import gzip
import importlib
import sys
import types
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
VAE |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2}
UNET |= {
    "attention_resolutions": [4, 2, 1],
    "channel_mult": [1, 2, 4, 4],
    "use_spatial_transformer": True,
    "legacy": False,
}


def shapes(module, prefix):
    return {prefix + name: tuple(value.shape) for name, value in module.state_dict().items()}


def vae_shapes():
    model = importlib.import_module("ldm.modules.diffusionmodules.model")
    parts = {
        "encoder.": model.Encoder(**VAE),
        "decoder.": model.Decoder(**VAE),
        "quant_conv.": torch.nn.Conv2d(8, 8, 1),  # ldm/models/autoencoder.py
        "post_quant_conv.": torch.nn.Conv2d(4, 4, 1),
    }
    return {k: v for name, part in parts.items() for k, v in shapes(part, f"first_stage_model.{name}").items()}


def unet_shapes(**settings):
    openaimodel = importlib.import_module("ldm.modules.diffusionmodules.openaimodel")
    return shapes(openaimodel.UNetModel(**{**UNET, **settings}), "model.diffusion_model.")


def sdxl_unet_shapes():
    openaimodel = importlib.import_module("ldm.modules.diffusionmodules.openaimodel")
    plain = openaimodel.SpatialTransformer

    def with_depth(channels, *args, **kwargs):
        depth = {640: 2, 1280: 10}[channels]
        return plain(channels, *args, **{**kwargs, "depth": depth, "context_dim": [2048] * depth})

    openaimodel.SpatialTransformer = with_depth
    found = unet_shapes(
        channel_mult=[1, 2, 4],
        attention_resolutions=[4, 2],
        num_head_channels=64,
        context_dim=2048,
        use_linear_in_transformer=True,
    )
    openaimodel.SpatialTransformer = plain
    for name, rows, columns in (("0.0", 1280, 2816), ("0.2", 1280, 1280)):
        found[f"model.diffusion_model.label_emb.{name}.weight"] = (rows, columns)
        found[f"model.diffusion_model.label_emb.{name}.bias"] = (rows,)
    return found


def openclip_shapes(prefix, width, heads, layers, projection):
    clip = importlib.import_module("open_clip.transformer")
    tower = clip.TextTransformer(width=width, heads=heads, layers=layers, output_dim=projection)
    found = shapes(tower, prefix)
    found.pop(prefix + "attn_mask", None)
    found[prefix + "logit_scale"] = ()  # of open_clip.model.CLIP
    return found


def clip_shapes(prefix):
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
    names = {name.removeprefix("text_model."): tuple(v.shape) for name, v in CLIPTextModel(config).state_dict().items()}
    names["embeddings.position_ids"] = (1, 77)  # a saved buffer until transformers 4.31
    return {f"{prefix}text_model.{name}": shape for name, shape in names.items()}


def main(ldm, openclip, out):
    sys.path[:0] = [ldm, openclip]
    package = types.ModuleType("open_clip")  # its __init__ needs torchvision, its transformer.py does not
    package.__path__ = [str(Path(openclip) / "open_clip")]
    sys.modules["open_clip"] = package
    misc = types.ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = torch.nn.BatchNorm2d  # named by open_clip.utils, not used by the text tower
    sys.modules["torchvision.ops.misc"] = misc
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))
    sys.modules.setdefault("torchvision.ops", types.ModuleType("torchvision.ops"))
    with torch.device("meta"):
        lists = {
            "sd1": {
                **unet_shapes(num_heads=8, context_dim=768),
                **vae_shapes(),
                **clip_shapes("cond_stage_model.transformer."),
            },
            "sd2": {
                **unet_shapes(num_head_channels=64, context_dim=1024, use_linear_in_transformer=True),
                **vae_shapes(),
                **openclip_shapes("cond_stage_model.model.", 1024, 16, 24, 1024),
            },
            "sdxl": {
                **sdxl_unet_shapes(),
                **vae_shapes(),
                **clip_shapes("conditioner.embedders.0.transformer."),
                **openclip_shapes("conditioner.embedders.1.model.", 1280, 20, 32, 1280),
            },
        }
    for family, found in lists.items():
        text = "".join(f"{name} {','.join(map(str, shape))}\n" for name, shape in sorted(found.items()))
        (Path(out) / f"{family}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        print(family, len(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
