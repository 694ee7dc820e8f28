"""Prompts of the families whose text encoder is a Qwen3 language model: chat template, hidden layers, texts of any length.

The template is written here and not read from the model's folder: it is part of what the denoiser was trained with, and a
file's own is a program. Each prompt is encoded alone. The model looks backward only, so that what stands behind a text, as
padding in diffusers' pipelines, changes nothing of it; it is there only for denoisers that were trained to see it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch

from everydream_kit.models.family import Conditioning, Model, PromptSettings, TextEncoderSlot, join_conditioning

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""Qwen3's template for one message, with thinking allowed."""
CHAT_WITHOUT_THINKING = CHAT + "<think>\n\n</think>\n\n"
MAX_TOKENS = 512
"""Template included; what does not fit is cut off."""


def language_model(class_name: str, block: str, module: str, *, index_class: str = "") -> TextEncoderSlot:
    """The only text encoder of a family, a language model of Qwen's that is never trained.

    Args:
        module: of transformers. Other arguments are as `TextEncoderSlot` has them.
    """
    return TextEncoderSlot(
        "text_encoder",
        "tokenizer",
        class_name,
        trains=frozenset(),
        blocks=(block,),
        module=f"transformers.models.{module}.modeling_{module}",
        tokenizer_class="Qwen2Tokenizer",
        index_class=index_class,
    )


QWEN3 = language_model("Qwen3Model", "Qwen3DecoderLayer", "qwen3")


def qwen_prompt_encoder(
    layers: Sequence[int], template: str, *, padded: bool = False
) -> Callable[[Model, Sequence[str], PromptSettings], Conditioning]:
    """A family's `encode_prompt`.

    Args:
        layers: hidden states that stand side by side; 0 are the embeddings, negative numbers count from the end.
        template: with `{}` in the prompt's place.
        padded: every text is `MAX_TOKENS` long, and what the encoder makes of the padding belongs to it.
    """

    def encode_prompt(model: Model, prompts: Sequence[str], settings: PromptSettings) -> Conditioning:
        tokenizer, text_encoder = model.tokenizers[0], model.text_encoders[0]
        device = next(text_encoder.parameters()).device
        rows = []
        for prompt in prompts:
            ids = tokenizer(template.format(prompt), truncation=True, max_length=MAX_TOKENS)["input_ids"]
            length = len(ids)
            if padded:
                ids = ids + [tokenizer.pad_token_id] * (MAX_TOKENS - length)
            states = hidden_states(text_encoder, torch.tensor([ids], device=device), layers, length)
            rows.append(Conditioning(torch.cat(states, dim=-1)))
        return join_conditioning(rows)

    return encode_prompt


def hidden_states(
    text_encoder: torch.nn.Module, token_ids: torch.Tensor, layers: Sequence[int], length: int
) -> list[torch.Tensor]:
    """Outputs (B, L, D) of a language model's layers, before its final norm.

    Args:
        token_ids: (B, L) int64.
        length: tokens that are text; what follows is padding, which sees the text and is not seen.
        layers: as transformers counts `hidden_states`, the last one excepted, which would be normed.
    """
    blocks = cast(torch.nn.ModuleList, text_encoder.layers)
    caught: dict[int, torch.Tensor] = {}
    hooks = []
    for layer in layers:
        index = layer if layer >= 0 else len(blocks) + 1 + layer
        hooks.append(blocks[index].register_forward_pre_hook(_catching(caught, layer), with_kwargs=True))
    try:
        text_encoder(input_ids=token_ids, attention_mask=_seen(token_ids, length), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [caught[layer] for layer in layers]


def _seen(token_ids: torch.Tensor, length: int) -> torch.Tensor | None:
    """(1, 1, L, L) of what each token sees; None without padding. Made here: transformers would look at a mask's values."""
    longest = token_ids.shape[1]
    if length == longest:
        return None
    places = torch.arange(longest, device=token_ids.device)
    return ((places <= places.unsqueeze(1)) & (places < length)).view(1, 1, longest, longest)


def _catching(caught: dict[int, torch.Tensor], layer: int) -> Callable[..., None]:
    """A hook that keeps what goes into a block: the output of the one before it."""

    def catch(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        caught[layer] = args[0] if args else kwargs["hidden_states"]

    return catch
