"""Prompts of the families whose text encoders are CLIP's: windows of 77 tokens, long prompts in several of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from everydream_kit.models.family import Conditioning, Model, PromptSettings
from everydream_kit.transfers import send

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

EncodeTokens = Callable[[Model, Sequence[torch.Tensor], int], Conditioning]
"""(model, token ids (B, 77) for each tokenizer, clip_skip) -> Conditioning."""


def clip_prompt_encoder(encode_tokens: EncodeTokens) -> Callable[[Model, Sequence[str], PromptSettings], Conditioning]:
    """A family's `encode_prompt` from what its text encoders make of one window."""

    def encode_prompt(model: Model, prompts: Sequence[str], settings: PromptSettings) -> Conditioning:
        """Windows follow one another; the pooled embedding is the first one's."""
        num_windows = settings.num_windows
        token_ids = [
            send(tokenize(tokenizer, prompts, num_windows), next(text_encoder.parameters()).device)
            for tokenizer, text_encoder in zip(model.tokenizers, model.text_encoders, strict=True)
        ]
        encoded = encode_tokens(model, [ids.flatten(0, 1) for ids in token_ids], settings.clip_skip)
        if num_windows == 1:
            return encoded
        hidden_states = encoded.encoder_hidden_states.unflatten(0, (len(prompts), num_windows)).flatten(1, 2)
        pooled = encoded.pooled
        pooled = None if pooled is None else pooled.unflatten(0, (len(prompts), num_windows))[:, 0]
        return Conditioning(hidden_states, pooled)

    return encode_prompt


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
