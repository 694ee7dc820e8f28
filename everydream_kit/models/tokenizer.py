"""The CLIP tokenizer: the shipped vocabulary, and tokenizer folders that every version of transformers reads.

All families use one byte-pair vocabulary of 49,408 tokens, shipped as its merge list (`configs/clip/`); SD 2.x and
SDXL's second tokenizer pad with "!" instead of the end-of-text token. transformers 5 saves `tokenizer.json` alone,
transformers 4 needs `vocab.json` and `merges.txt`: we write all three.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from everydream_kit.errors import ModelError
from everydream_kit.strict_json import parse_json, read_json

if TYPE_CHECKING:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WINDOW = 77
"""Tokens that a CLIP text encoder sees at once, start and end included."""
MAX_TOKENS = 1_000_000
MAX_FILE_BYTES = 64 << 20
"""CLIP's tokenizer.json has 2 MB; one for all languages has 20."""
TOKENIZER_FILES = (
    "vocab.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
NO_LENGTH = b"1000000000000000019884624838656"
"""What transformers writes for a model without a longest text: 1e30 as an integer, which no other file may hold."""
CODE_KEYS = ("auto_map", "vocab_file", "merges_file", "tokenizer_file")
"""Keys of a tokenizer's config that name code, or a file somewhere else."""


def _byte_characters() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in vocabulary order: printable bytes first, then the others shifted
    up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


@cache
def clip_merges() -> tuple[tuple[str, str], ...]:
    """The 48,894 merges of CLIP's vocabulary, most frequent first."""
    text = (files("everydream_kit") / "models/configs/clip/merges.txt").read_text(encoding="utf-8")
    return tuple((left, right) for left, _, right in (line.partition(" ") for line in text.splitlines()[1:]))


@cache
def clip_vocabulary() -> dict[str, int]:
    """Token -> id: bytes, bytes at a word's end, merges, start, end."""
    characters = _byte_characters()
    tokens = [*characters, *(character + "</w>" for character in characters), *map("".join, clip_merges()), START, END]
    return {token: index for index, token in enumerate(tokens)}


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary that is not CLIP's own, such as the embedded base's cut-down one.

    Attributes:
        tokens: token -> id, learned tokens not included.
        merges: most frequent first, the two parts of each with a space between.
        pad_token: what fills the window.
    """

    tokens: dict[str, int]
    merges: list[str]
    pad_token: str = END


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary of a tokenizer folder, or None where it has CLIP's size: then it is the shipped one."""
    tokens, merges = _tokens_and_merges(folder, {})
    if isinstance(tokens, dict) and len(tokens) == len(clip_vocabulary()):
        return None
    special = _read(folder / "special_tokens_map.json", missing={})
    pad = special.get("pad_token", END)
    return checked_vocabulary(tokens, merges, pad.get("content") if isinstance(pad, dict) else pad, str(folder))


def _read_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The JSON files of a tokenizer folder by their names: bounded and well-formed, before a library reads them."""
    held = {name: _read(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    named = [key for key in CODE_KEYS if held.get("tokenizer_config.json", {}).get(key) is not None]
    if named:
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: {named[0]} is not allowed in a tokenizer. Take it out of the file."
        )
    return held


def _tokens_and_merges(folder: Path, held: Mapping[str, dict[str, Any]]) -> tuple[Any, Any]:
    """Of the old form, or of `tokenizer.json`; not checked yet. Files that are `held` are not read again."""
    if (folder / "vocab.json").is_file():
        return held.get("vocab.json") or _read(folder / "vocab.json"), _read_merges(folder / "merges.txt")
    bpe = (held.get("tokenizer.json") or _read(folder / "tokenizer.json")).get("model")
    if not isinstance(bpe, dict) or not isinstance(bpe.get("merges"), list):
        raise ModelError(f"{folder / 'tokenizer.json'}: holds no byte-pair vocabulary.")
    return bpe.get("vocab"), [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in bpe["merges"]]


def checked_vocabulary(tokens: Any, merges: Any, pad_token: Any, where: str) -> Vocabulary:
    """A vocabulary from a file.

    Raises:
        ModelError: its tokens are not numbered from 0, or a merge or the padding is not text.
    """
    if not isinstance(tokens, dict) or not all(type(index) is int for index in tokens.values()):
        raise ModelError(f"{where}: the vocabulary must give each token a number.")
    if len(set(tokens.values())) != len(tokens) or not all(0 <= index < MAX_TOKENS for index in tokens.values()):
        raise ModelError(f"{where}: the vocabulary's numbers must differ, from 0 to {MAX_TOKENS:,}.")
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise ModelError(f"{where}: the vocabulary's merges must be texts.")
    if not isinstance(pad_token, str):
        raise ModelError(f"{where}: the padding must be a text.")
    return Vocabulary(tokens, merges, pad_token)


def _read(path: Path, **options: Any) -> dict[str, Any]:
    if path.name == "tokenizer_config.json" and path.stat().st_size <= MAX_FILE_BYTES:
        text = path.read_bytes().replace(NO_LENGTH, b"77")
        return dict(parse_json(text, str(path), error=ModelError))
    try:
        return dict(read_json(path, error=ModelError, max_bytes=MAX_FILE_BYTES, **options))
    except FileNotFoundError:
        raise ModelError(f"{path}: is missing.") from None


def _read_merges(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()[1:]
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: the tokenizer cannot be read ({error}).") from error


def build_tokenizer(pad_token: str = END, vocabulary: Vocabulary | None = None) -> CLIPTokenizer:
    """A CLIP tokenizer from the shipped vocabulary, or another one."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    if vocabulary is not None:
        tokens, pad_token = vocabulary.tokens, vocabulary.pad_token
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in vocabulary.merges)]
    else:
        tokens, merges = clip_vocabulary(), list(clip_merges())
    made = CLIPTokenizer(
        vocab=tokens,
        merges=cast(Any, merges),  # pairs, as the library takes them, though it says texts
        pad_token=pad_token,
        model_max_length=WINDOW,
        do_lower_case=True,
    )
    _silence_length_warning(made)
    return made


def require_tokenizer(folder: Path, class_name: str) -> None:
    """Check the files of a tokenizer before a library reads them: there, bounded, well-formed and without code.

    Raises:
        ModelError: the folder has no vocabulary, a damaged one, or names code.
    """
    if (folder / "tokenizer.json").is_file():
        needed: tuple[str, ...] = ()
    elif class_name.startswith("T5"):
        needed = ("tokenizer.json",)
    else:
        needed = ("vocab.json", "merges.txt")
    if not all((folder / name).is_file() for name in needed):
        old_form = "" if class_name.startswith("T5") else ", or vocab.json and merges.txt"
        raise ModelError(f"{folder}: no tokenizer here (tokenizer.json{old_form}). The model is incomplete.")
    held = _read_files(folder)
    if class_name.startswith("CLIP"):
        checked_vocabulary(*_tokens_and_merges(folder, held), END, str(folder))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Read a tokenizer folder of any age.

    Raises:
        ModelError: the folder has no vocabulary.
    """
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    require_tokenizer(folder, "CLIPTokenizer")
    tokenizer: CLIPTokenizer = _from_folder(CLIPTokenizer, folder, model_max_length=WINDOW)
    return tokenizer


def _from_folder(cls: Any, folder: Path, **options: Any) -> Any:
    """A tokenizer of transformers' class. Its files were checked before."""
    try:
        loaded = cls.from_pretrained(folder, local_files_only=True, **options)
    except (ValueError, KeyError, OSError, TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{folder}: the tokenizer cannot be read ({error}).") from error
    _silence_length_warning(loaded)
    return loaded


def _silence_length_warning(tokenizer: Any) -> None:
    """transformers warns once of texts beyond the window ("will result in indexing errors"). Ours are read in windows or
    cut, and what does not fit is reported with the image, so the tokenizer counts as warned already."""
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True


def build_plain_tokenizer(class_name: str) -> Any:
    """A tokenizer of another class than CLIP's whose tokens are letters: for random models, and for estimates without a
    download."""
    return _build_t5_tokenizer() if class_name.startswith("T5") else _build_byte_tokenizer()


def _build_t5_tokenizer() -> Any:
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    letters = [(chr(code), -3.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=512)


def _build_byte_tokenizer() -> Any:
    """Of Qwen's class."""
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {token: index for index, token in enumerate([*_byte_characters(), *words])}
    made = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=words[1:3], chat_template=_CHAT, model_max_length=512
    )
    _silence_length_warning(made)
    return made


_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""Qwen3's chat template for plain messages, for others who read the folder."""


def load_language_tokenizer(folder: Path, class_name: str) -> Any:
    """Read a tokenizer folder of a language model: Qwen's or T5's. Its chat template is kept and never run here.

    Raises:
        ModelError: the folder has no vocabulary, or names code.
    """
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
    from transformers.models.t5.tokenization_t5 import T5Tokenizer

    require_tokenizer(folder, class_name)
    return _from_folder(T5Tokenizer if class_name.startswith("T5") else Qwen2Tokenizer, folder)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer as Stable Diffusion's own repositories hold it, which transformers 4 and 5 read.

    `tokenizer.json`, which transformers 5 would write alone, is added only where tokens were: it is four times the size
    and slower to load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not type(tokenizer).__name__.startswith("CLIP"):
        tokenizer.save_pretrained(str(folder))
        return
    own = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    special = {key: str(getattr(tokenizer, key)) for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    if len(tokenizer) > len(own):
        tokenizer.save_pretrained(str(folder))
        added = {token: index for token, index in tokenizer.get_added_vocab().items() if index >= len(own)}
        _write_json(folder / "added_tokens.json", added)
    else:
        _write_json(folder / "tokenizer_config.json", {**_TOKENIZER_CONFIG, **special})
    _write_json(folder / "special_tokens_map.json", special)
    vocabulary_text, merges_text = _own_texts(tokenizer, own)
    (folder / "vocab.json").write_text(vocabulary_text, encoding="utf-8")
    (folder / "merges.txt").write_text(merges_text, encoding="utf-8")


def tokenizer_identity(tokenizer: Any) -> str:
    """All that decides which numbers a text becomes, in one string."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    own = {key: value for key, value in backend.items() if key not in ("truncation", "padding")}  # of the last call
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json.dumps([type(tokenizer).__name__, own, special], sort_keys=True)


def saved_bytes(tokenizer: CLIPTokenizer) -> int:
    """About how large a saved tokenizer is: its vocabulary and merges, which are nearly all of it."""
    if not type(tokenizer).__name__.startswith("CLIP"):
        return len(tokenizer.backend_tokenizer.to_str().encode())
    texts = _own_texts(tokenizer, tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
    return sum(len(text.encode()) for text in texts)


def _own_texts(tokenizer: CLIPTokenizer, own: dict[str, int]) -> tuple[str, str]:
    """Contents of vocab.json and merges.txt of a tokenizer with these words, added ones not counted."""
    if own == clip_vocabulary():
        return _clip_texts()
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return _texts(bpe["vocab"], bpe["merges"])


def _texts(vocabulary: dict[str, int], merges: Iterable[Sequence[str]]) -> tuple[str, str]:
    """Contents of vocab.json and merges.txt."""
    lines = "\n".join(" ".join(pair) for pair in merges)
    return json.dumps(vocabulary, ensure_ascii=False), f"#version: 0.2\n{lines}\n"


@cache
def _clip_texts() -> tuple[str, str]:
    """Those of the shipped vocabulary, made once: they were most of the time that saving a small model took."""
    return _texts(clip_vocabulary(), clip_merges())


_TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": WINDOW,
    "tokenizer_class": "CLIPTokenizer",
}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
