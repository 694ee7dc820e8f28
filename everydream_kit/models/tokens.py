"""Textual inversion: new words whose embeddings are all that is trained.

A new token stands for one or several vectors, as many as the word that it starts from has tokens. The new rows are a
parameter of their own next to the frozen table, so that no optimizer can touch the old words, weight decay included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken

from everydream_kit.errors import ConfigError, ModelError
from everydream_kit.models.convert import CLIP_VOCABULARY
from everydream_kit.models.family import Model, text_tower
from everydream_kit.models.lora.injection import Weights
from everydream_kit.models.tensors import LazyTensor, Tensors, open_safetensors, write_safetensors

if TYPE_CHECKING:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer


class GrownEmbedding(torch.nn.Module):
    """A frozen token table, and rows for new tokens that train.

    Attributes:
        weight: (V, D), the old table.
        new: (N, D), rows of the ids V to V + N - 1.
    """

    def __init__(self, weight: torch.Tensor, new: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.new = torch.nn.Parameter(new)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        num_old = len(self.weight)
        old = torch.nn.functional.embedding(input_ids.clamp(max=num_old - 1), self.weight)
        new = torch.nn.functional.embedding((input_ids - num_old).clamp(min=0), self.new)
        return torch.where((input_ids >= num_old).unsqueeze(-1), new, old)


def add_tokens(model: Model, new_tokens: Mapping[str, str]) -> list[torch.nn.Parameter]:
    """Freeze a model and give it new words to learn.

    Args:
        new_tokens: each new token ("<my-cat>") with the words whose embeddings it starts from ("cat"); it gets one
            vector for each of their tokens. A token that the model knows already continues from where it is.

    Returns:
        The new rows, those of earlier calls included, one parameter for each text encoder.

    Raises:
        ConfigError: a token is an ordinary word, or its starting words are empty.
    """
    for module in model.modules().values():
        module.requires_grad_(False)
    for token, words in new_tokens.items():
        starting = expand_tokens(model, words)
        names = _names(model, token, starting)
        for tokenizer, text_encoder in zip(model.tokenizers, model.text_encoders, strict=True):
            table, rows = _split_table(text_encoder)
            if names[0] not in tokenizer.get_added_vocab():
                start = tokenizer(starting, add_special_tokens=False)["input_ids"]
                tokenizer.add_tokens([_added(name) for name in names])
                rows = torch.cat([rows, torch.cat([table, rows])[start]])
            _grow(text_encoder, table, rows)
            _find_end_by_its_id(text_encoder, tokenizer.eos_token_id)
        model.new_tokens[token] = names
    for rows in token_parameters(model):
        rows.requires_grad_(True)
    return token_parameters(model)


def _split_table(text_encoder: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The table of the model's own words (V, D), and the rows of added ones (N, D), which a plain table may end in."""
    embedding = text_tower(text_encoder).embeddings.token_embedding
    if isinstance(embedding, GrownEmbedding):
        return embedding.weight.detach(), embedding.new.detach()
    table = embedding.weight.detach()
    return table[:CLIP_VOCABULARY], table[CLIP_VOCABULARY:]


def _grow(text_encoder: torch.nn.Module, table: torch.Tensor, rows: torch.Tensor) -> None:
    text_tower(text_encoder).embeddings.token_embedding = GrownEmbedding(table.clone(), rows.clone())
    text_encoder.config.vocab_size = len(table) + len(rows)  # type: ignore[union-attr]


def _names(model: Model, token: str, words: str) -> list[str]:
    """A token's vectors by name: `<cat>`, `<cat>_1`, ...: what UIs and diffusers call them."""
    tokenizer = model.tokenizers[0]
    vocabulary, num_own = tokenizer.get_vocab(), len(_split_table(model.text_encoders[0])[0])
    if (token in vocabulary and vocabulary[token] < num_own) or f"{token.lower()}</w>" in vocabulary:
        raise ConfigError(f"new_tokens: {token!r} is an ordinary word of the model; choose one such as '<{token}>'.")
    if any(character.isspace() for character in token) or not token:
        raise ConfigError(f"new_tokens: {token!r} must be one word without spaces.")
    if token in model.new_tokens:
        return model.new_tokens[token]
    num_vectors = len(tokenizer(words, add_special_tokens=False)["input_ids"])
    if not num_vectors:
        raise ConfigError(f"new_tokens: {token!r} needs a word to start from (got {words!r}).")
    return [token, *(f"{token}_{index}" for index in range(1, num_vectors))]


def _find_end_by_its_id(text_encoder: torch.nn.Module, end: int) -> None:
    """Older configs find the end of the text as the largest id, which new tokens exceed."""
    tower = text_tower(text_encoder)
    tower.eos_token_id = end
    text_encoder.config.eos_token_id = end  # type: ignore[union-attr]
    tower.config.eos_token_id = end


def token_parameters(model: Model) -> list[torch.nn.Parameter]:
    """The rows that train."""
    tables = [text_tower(text_encoder).embeddings.token_embedding for text_encoder in model.text_encoders]
    return [table.new for table in tables if isinstance(table, GrownEmbedding)]


def learned_embeddings(model: Model, weights: Weights | None = None) -> dict[str, list[LazyTensor]]:
    """Each token's vectors (n, D), one tensor for each text encoder.

    Args:
        weights: state dicts by component that are read instead of the live ones.
    """
    learned: dict[str, list[LazyTensor]] = {token: [] for token in model.new_tokens}
    for slot, tokenizer, text_encoder in zip(
        model.family.text_encoders, model.tokenizers, model.text_encoders, strict=True
    ):
        state = (weights or {}).get(slot.folder) or text_encoder.state_dict()
        rows = next(value for key, value in state.items() if key.endswith("token_embedding.new"))
        first = len(_split_table(text_encoder)[0])
        for token, names in model.new_tokens.items():
            ids = [_id_of(tokenizer, name) - first for name in names]
            learned[token].append(LazyTensor.of(rows[ids]))
    return learned


def _id_of(tokenizer: CLIPTokenizer, token: str) -> int:
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)  # a list for a list
    return number


def save_tokens(model: Model, path: Path, weights: Weights | None = None) -> None:
    """Write all learned tokens into one file: `<token>` for the first text encoder, `<token>|1` for the second."""
    tensors: Tensors = {}
    for token, parts in learned_embeddings(model, weights).items():
        for index, part in enumerate(parts):
            tensors[token if index == 0 else f"{token}|{index}"] = part
    write_safetensors(path, tensors, {"format": "pt"})


def load_tokens(model: Model, path: Path) -> None:
    """Give a model the tokens of a file that `save_tokens` wrote.

    Raises:
        ModelError: the vectors are of another size.
    """
    tensors, _ = open_safetensors(path)
    words = [name for name in tensors if "|" not in name]
    parts = {word: [tensors[name] for name in (word, f"{word}|1") if name in tensors] for word in words}
    put_tokens(model, parts, str(path))


def put_tokens(model: Model, embeddings: Mapping[str, Sequence[LazyTensor]], where: str) -> None:
    """Give a model words that were learned elsewhere.

    Args:
        embeddings: word -> vectors (n, D), one tensor for each text encoder.
        where: the file, for messages.

    Raises:
        ModelError: the vectors are of another size.
    """
    for token, parts in embeddings.items():
        add_tokens(model, {token: " ".join(["a"] * parts[0].shape[0])})
        for index, (tokenizer, text_encoder) in enumerate(zip(model.tokenizers, model.text_encoders, strict=True)):
            part = parts[index] if index < len(parts) else None
            table = text_tower(text_encoder).embeddings.token_embedding
            if part is None or part.shape[1] != table.new.shape[1]:
                raise ModelError(f"{where}: {token} does not fit the text encoder {index} of {model.source}.")
            ids = [_id_of(tokenizer, name) - len(table.weight) for name in model.new_tokens[token]]
            with torch.no_grad():
                table.new[ids] = part.read().to(table.new)


def write_embedding(path: Path, token: str, parts: Sequence[LazyTensor]) -> None:
    """Write a token's vectors, one tensor for each text encoder, as UIs name them."""
    names = ["emb_params"] if len(parts) == 1 else ["clip_l", "clip_g"]
    write_safetensors(path, dict(zip(names, parts, strict=True)), {"format": "pt", "name": token}, finite=True)


def expand_tokens(model: Model, caption: str) -> str:
    """A caption with each learned token spelled as all of its vectors.

    The longest token is found first, and only as a whole word: of `zkx` and `zkx2`, "a zkx2" has the second alone, and
    "zkxs" has neither. Case does not matter, as it does not to the tokenizer.
    """
    spelled = {token.lower(): " ".join(names) for token, names in model.new_tokens.items()}
    if not spelled:
        return caption
    longest_first = sorted(spelled, key=len, reverse=True)
    pattern = "|".join(_whole_word(token) for token in longest_first)
    return re.sub(pattern, lambda found: spelled[found[0].lower()], caption, flags=re.IGNORECASE)


def _whole_word(token: str) -> str:
    """A pattern: where a token begins or ends with a letter or digit, no other may stand next to it; `<cat>` needs no gap."""
    before = r"(?<!\w)" if _is_word(token[0]) else ""
    after = r"(?!\w)" if _is_word(token[-1]) else ""
    return f"{before}{re.escape(token)}{after}"


def _is_word(character: str) -> bool:
    return re.match(r"\w", character) is not None


def _added(name: str) -> AddedToken:
    """The same rule for the tokenizer, which would else find `zkx` in every word that begins so."""
    return AddedToken(name, single_word=_is_word(name[0]) and _is_word(name[-1]), normalized=True)
