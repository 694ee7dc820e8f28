"""The embedded base's tokenizer: CLIP's own byte-pair merges, cut down to what emoji captions and common words need.

Any text can still be written with it, byte by byte where need be; a word in the list is cut exactly as CLIP cuts it,
because every merge that CLIP uses for that word is kept, in CLIP's order. The merges come from
`bpe_simple_vocab_16e6.txt.gz` (OpenAI CLIP, MIT), which the wheels clip-anytorch and open-clip-torch carry.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

COMMON_MERGES = 500  # the first merges are the most frequent ones of English
CLIP_MERGES = 49152 - 256 - 2
MORE_WORDS = """
a an the of in on with and to for photo picture image drawing painting sketch illustration ink line art style icon emoji
flat shaded render 3d black white red green blue yellow orange purple pink brown grey gray gold silver dark light bright
background plain simple cute small big large happy sad old new man woman boy girl person child dog cat bird fish horse
flower tree house car boat plane city mountain sea sky sun moon star night day winter summer portrait landscape closeup
high contrast outline monochrome colour color cartoon watercolor pencil photograph quality best detailed beautiful sks
ohwx zwx everydream
"""


def read_merges(archive: Path) -> list[tuple[str, str]]:
    """CLIP's merges in order, from the .txt.gz itself or from a wheel that holds it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith("bpe_simple_vocab_16e6.txt.gz"))
            packed = wheel.read(name)
    else:
        packed = archive.read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : CLIP_MERGES + 1]
    return [tuple(line.split()) for line in lines]


def merges_of(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges by which CLIP's byte-pair encoding puts an ASCII word together."""
    parts = [*word[:-1], word[-1] + "</w>"]
    used = set()
    while len(parts) > 1:
        best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        used.add(best)
        merged, index = [], 0
        while index < len(parts):
            if tuple(parts[index : index + 2]) == best:
                merged.append("".join(best))
                index += 2
            else:
                merged.append(parts[index])
                index += 1
        parts = merged
    return used


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in CLIP's vocabulary, in the vocabulary's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def write_tokenizer(folder: Path, archive: Path, texts: Iterable[str], max_tokens: int) -> int:
    """Write vocab.json, merges.txt and the JSON files beside them; returns the vocabulary's size."""
    merges = read_merges(archive)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    words = {word for text in (*texts, MORE_WORDS) for word in re.findall(r"[a-z]+", text.lower())}
    kept = set(merges[:COMMON_MERGES])
    for word in words:
        kept |= merges_of(word, ranks)
    kept_in_order = [pair for pair in merges if pair in kept]

    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in kept_in_order)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in kept_in_order)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1], "pad_token": tokens[-1]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", "utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_tokens,
        "do_lower_case": True,
        "add_prefix_space": False,
        "errors": "replace",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return len(tokens)
