"""What the families of flow transformers share: facts of their records, and the names in their single files.

A file holds the transformer alone, by its makers' names: of blocks, of what is in them, and of the rest. Layers that read
the same input may be one there (q, k and v), and the halves of a modulation may stand the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from everydream_kit.models.convert import UNET_PREFIX, known_start
from everydream_kit.models.family import Component, Config, Family, Layout, ModelFiles, Shapes
from everydream_kit.models.flow import shift_of
from everydream_kit.models.tensors import Tensors, concatenated, halves_swapped, row_shares

FOLDER = "transformer"
PREFIXES = ("net.", UNET_PREFIX, "diffusion_model.")
"""Before the names, in NVIDIA's files and in those that were cut out of full checkpoints."""

Names = Mapping[str, str]
"""diffusers' names of layers and weights, or their starts -> the file's. Layers that are one in the file have the same
name there, and stand in order."""

flow_family = partial(Family, objective="flow", shift=shift_of)
"""A family's record, with what is so in nearly all of flow matching."""


def transformer(module: str, class_name: str, *blocks: str, since: str) -> Component:
    """A transformer that diffusers has in this module. Arguments as `Component` has them."""
    path = f"diffusers.models.transformers.{module}"
    return Component(FOLDER, path, class_name, "denoiser", frozenset({"full", "lora"}), blocks, since)


def having(*names: str) -> Callable[[Shapes], bool]:
    """A family's `matches_keys`: whether a file has weights of all these names."""
    return lambda shapes: shapes.keys() >= set(names)


def bare(name: str) -> str:
    """A name in a single file without what stands before all of them."""
    return name.removeprefix(next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""))


@dataclass(frozen=True)
class TransformerNames:
    """The names in the single files of one kind of transformer. A name that is not known stays as it is.

    Attributes:
        outside: names outside the blocks.
        blocks: diffusers' name of a kind of blocks -> the file's, and the names within such a block.
        shares: of the rows of a layer within a block, that its parts have; equal where it is not named.
        swapped: layers of the file whose two halves stand the other way round.
        unused: a pattern of names in files that are no weights of the transformer.
        prefix: what is written before the names.
    """

    outside: Names = field(default_factory=dict)
    blocks: Mapping[str, tuple[str, Names]] = field(default_factory=dict)
    shares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    swapped: tuple[str, ...] = ()
    unused: str = r"$^"
    prefix: str = ""

    def place(self, name: str) -> tuple[str, list[str]]:
        """One of diffusers' names -> the file's, and all of diffusers' that are in it, in order."""
        ours, theirs, inside, table = self._block_of(name, of_file=False)
        start = known_start(inside, table)
        if not start:
            return theirs + inside, [name]
        rest = inside.removeprefix(start)
        return theirs + table[start] + rest, [ours + one + rest for one in _made_of(table[start], table)]

    def _block_of(self, name: str, *, of_file: bool) -> tuple[str, str, str, Names]:
        """What stands before a name within its block, in diffusers and in the file; the name there; and such names."""
        for ours, (theirs, table) in self.blocks.items():
            if block := re.match(rf"{theirs if of_file else ours}(\.\d+\.)(.+)", name):
                return ours + block[1], theirs + block[1], block[2], table
        return "", "", name, self.outside

    def shares_of(self, layer: str) -> tuple[int, ...]:
        """Shares of the rows of one of the file's layers that its parts have; () for equal ones."""
        return self.shares.get(self._block_of(layer, of_file=True)[2], ())

    def layer(self, name: str) -> str:
        """One of diffusers' layers -> the file's."""
        return next(iter(self.app_layers([name])))

    def app_layers(self, names: Sequence[str]) -> dict[str, list[str]]:
        """diffusers' layers -> the file's layers, each with those that it is made of, in order."""
        placed = (self.place(f"{name}.weight") for name in names)
        return {found.rpartition(".")[0]: [part.removesuffix(".weight") for part in parts] for found, parts in placed}

    def to_single_file(self, files: ModelFiles) -> Tensors:
        """The transformer's weights by the file's names."""
        ours = files.tensors[FOLDER]
        theirs: Tensors = {}
        for name, value in ours.items():
            found, parts = self.place(name)
            one = halves_swapped(value) if found.rpartition(".")[0] in self.swapped else value
            whole = one if len(parts) == 1 else concatenated([ours[part] for part in parts])
            theirs.setdefault(self.prefix + found, whole)
        return theirs

    def from_single_file(self, tensors: Tensors, family: Family, configs: dict[str, Config]) -> dict[str, Tensors]:
        """The transformer by diffusers' names."""
        ours: Tensors = {}
        for name, value in ((bare(name), value) for name, value in tensors.items()):
            if re.search(self.unused, name):
                continue
            layer, parts = name.rpartition(".")[0], self._parts(name)
            if layer in self.swapped:
                ours[parts[0]] = halves_swapped(value)
            elif len(parts) == 1:
                ours[parts[0]] = value
            else:
                shares = self.shares_of(layer) or (1,) * len(parts)
                rows = [value.rows(start, stop) for start, stop in row_shares(value.shape[0], shares)]
                ours |= dict(zip(parts, rows, strict=True))
        return {FOLDER: ours}

    def _parts(self, name: str) -> list[str]:
        """One of the file's names -> diffusers' names that it is made of."""
        ours, _, inside, table = self._block_of(name, of_file=True)
        known = set(table.values())
        scaled = inside.removesuffix("weight") + "scale"  # a norm's weight: apps have begun to write the other name
        inside = scaled if scaled in known else inside
        start = known_start(inside, known)
        return [ours + one + inside.removeprefix(start) for one in _made_of(start, table)] or [ours + inside]

    def layout(self, lora_for_apps: Literal["kohya", "diffusers", "comfy"]) -> Layout:
        """A family's layout by these names."""
        return Layout(
            self.to_single_file,
            self.from_single_file,
            holds_all=False,
            lora_for_apps=lora_for_apps,
            lora_stem=lambda name, config: self.layer(name).replace(".", "_"),
            app_layers=self.app_layers,
            shares_of=self.shares_of,
            swapped_layers=self.swapped,
        )


def _made_of(theirs: str, table: Names) -> list[str]:
    """diffusers' names that have this one in the file."""
    return [ours for ours, found in table.items() if found == theirs]
