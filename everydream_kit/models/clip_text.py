"""Prompts of the families whose text encoders are CLIP's: windows of 77 tokens, long prompts in several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from everydream_kit.models.family import Conditioning, Model, PromptSettings, text_tower
from everydream_kit.transfers import send

if TYPE_CHECKING:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

EncodeTokens = Callable[[Model, Sequence[torch.Tensor], int], Conditioning]
"""(model, token ids (B, 77) for each tokenizer, clip_skip) -> Conditioning."""


@dataclass(frozen=True)
class TokenizedPrompts:
    """A family's `encode_prompt` from what its text encoders make of one window.

    Its halves can be called apart: the host's, which sends token ids to the device, and the device's, which reads nothing else.
    """

    encode_tokens: EncodeTokens

    def __call__(self, model: Model, prompts: Sequence[str], settings: PromptSettings) -> Conditioning:
        return self.encode(model, self.tokenize(model, prompts, settings), settings)

    def tokenize(self, model: Model, prompts: Sequence[str], settings: PromptSettings) -> tuple[torch.Tensor, ...]:
        """Token ids (B, windows, 77) for each text encoder, on its device."""
        return tuple(
            send(tokenize(tokenizer, prompts, settings.num_windows), next(text_encoder.parameters()).device)
            for tokenizer, text_encoder in zip(model.tokenizers, model.text_encoders, strict=True)
        )

    def shape(self, model: Model) -> tuple[int, int]:
        """(77, D): of one window's hidden states."""
        return model.tokenizers[0].model_max_length, sum(_width(encoder) for encoder in model.text_encoders)

    def encode(self, model: Model, token_ids: Sequence[torch.Tensor], settings: PromptSettings) -> Conditioning:
        """Windows follow one another; the pooled embedding is the first one's."""
        num_windows = settings.num_windows
        encoded = self.encode_tokens(model, [ids.flatten(0, 1) for ids in token_ids], settings.clip_skip)
        if num_windows == 1:
            return encoded
        shape = (len(token_ids[0]), num_windows)
        hidden_states = encoded.encoder_hidden_states.unflatten(0, shape).flatten(1, 2)
        pooled = encoded.pooled
        pooled = None if pooled is None else pooled.unflatten(0, shape)[:, 0]
        return Conditioning(hidden_states, pooled)


def _width(text_encoder: torch.nn.Module) -> int:
    width: int = text_tower(text_encoder).config.hidden_size
    return width


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str], num_chunks: int = 1) -> torch.Tensor:
    """(B, num_chunks, 77) token ids; each chunk has its own start, end and padding."""
    window = tokenizer.model_max_length
    start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = []
    for ids in tokenizer(list(captions), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
        chunks = []
        for index in range(num_chunks):
            piece = ids[index * (window - 2) : (index + 1) * (window - 2)]
            chunks.append([start, *piece, end, *([pad] * (window - 2 - len(piece)))])
        rows.append(chunks)
    return torch.tensor(rows, dtype=torch.int64)


def count_windows(model: Model, captions: Sequence[str]) -> int:
    """Windows of 75 tokens that the longest of these texts fills; at least 1."""
    longest = 1
    for tokenizer in model.tokenizers:
        for ids in tokenizer(list(captions), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
            longest = max(longest, -(-len(ids) // (tokenizer.model_max_length - 2)))
    return longest
