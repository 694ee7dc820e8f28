"""What a model's weights are known by, in whatever file they lie.

A LoRA belongs to one base. Its name says little: files are moved, replaced and converted. So a small checkpoint keeps a
hash of its base's weights. A hash of the file would take half a minute for SDXL, and would differ between a folder and
the single file that was made of it; this one takes the first numbers of every tensor, which any training changes.
"""

from __future__ import annotations

import hashlib

import torch

from everydream_kit.models.family import ModelFiles
from everydream_kit.models.spans import read_whole
from everydream_kit.models.tensors import LazyTensor

NUMBERS = 256
"""Read of each tensor. SDXL has 2,500 of them: 1 MB in all."""
BOOKKEEPING = ("position_ids", "logit_scale")


def weights_fingerprint(files: ModelFiles) -> str:
    """A hash of the UNet and the text encoders, the parts that a LoRA changes.

    Layout and file type do not count, and float32 counts as the float16 that it is rounded to; bfloat16 is another model.
    """
    digest = hashlib.sha256()
    for component in sorted(files.tensors.keys() - {"vae"}):
        tensors = files.tensors[component]
        for name, tensor in sorted((name.removeprefix("text_model."), tensor) for name, tensor in tensors.items()):
            if not name.endswith(BOOKKEEPING):
                digest.update(f"{component}.{name}".encode())
                digest.update(_first_numbers(tensor).to(torch.float16).numpy().tobytes())
    return digest.hexdigest()


def _first_numbers(tensor: LazyTensor) -> torch.Tensor:
    if not tensor.spans:
        return tensor.read().reshape(-1)[:NUMBERS]
    first = tensor.spans[0]
    return read_whole((first.part(0, min(NUMBERS, first.length)),), first.dtype, first.dtype)
