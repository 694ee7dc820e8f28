"""Reads model folders with whatever diffusers and transformers are on the path, and writes what their modules give.

A program of its own: the kit is not imported, since the libraries here may be older than it runs with.
usage: old_reader.py OUT NAME=FOLDER[,LORA] ...     (a LoRA is loaded over the folder's model)
"""

import sys

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

CAPTIONS = ["a cat, <sitting> on a wall", ""]


def give(module, text_encoders, tokenizers, vae):
    """Outputs of a model's parts for fixed inputs. The test calls it for the kit's own modules, too."""
    made = torch.Generator().manual_seed(0)
    outputs = {}
    for number, (text_encoder, tokenizer) in enumerate(zip(text_encoders, tokenizers)):  # noqa: B905 (old Pythons)
        ids = tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        given = text_encoder(ids, output_hidden_states=True)
        outputs[f"ids {number}"] = ids
        outputs |= {f"text {number} hidden {n}": hidden for n, hidden in enumerate(given.hidden_states)}
        outputs |= {
            f"text {number} {name}": given[name] for name in ("last_hidden_state", "text_embeds") if name in given
        }
    config = module.config
    latents = torch.randn(2, 4, 8, 8, generator=made)
    context = torch.randn(2, 77, config["cross_attention_dim"], generator=made)
    added = None
    if config["addition_embed_type"] == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        added = {"text_embeds": torch.randn(2, pooled, generator=made), "time_ids": torch.full((2, 6), 64.0)}
    outputs["unet"] = module(latents, torch.tensor([10, 900]), context, added_cond_kwargs=added).sample
    outputs["vae decoded"] = vae.decode(latents).sample
    outputs["vae encoded"] = vae.encode(outputs["vae decoded"]).latent_dist.parameters
    return outputs


def read(folder, lora=None):
    """Load a pipeline as its users would, and give its parts' outputs."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    parts = [(pipeline.text_encoder, pipeline.tokenizer)]
    if hasattr(pipeline, "text_encoder_2"):
        parts.append((pipeline.text_encoder_2, pipeline.tokenizer_2))
    with torch.no_grad():
        return give(pipeline.unet, [part[0] for part in parts], [part[1] for part in parts], pipeline.vae)


def main(out, *jobs):
    """Write the outputs of all models, and by which version."""
    found = {name: read(*where.split(",")) for name, _, where in (job.partition("=") for job in jobs)}
    torch.save({"transformers": transformers.__version__, "diffusers": diffusers.__version__, "outputs": found}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
