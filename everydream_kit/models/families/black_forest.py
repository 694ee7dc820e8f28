"""Single files of Black Forest Labs' transformers: the names in them, for FLUX.1 and FLUX.2.

A file holds the transformer alone. Layers that read the same input are one there: q, k and v of a double block, and with
the MLP's first layer those of FLUX.1's single blocks. Norms' weights are called `scale`, and the halves of the last
modulation stand the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from everydream_kit.models.tensors import Tensors, concatenated, halves_swapped, row_shares

if TYPE_CHECKING:
    from everydream_kit.models.family import Config, Family, ModelFiles

PREFIX = "model.diffusion_model."
"""Before the names in files that were cut out of whole checkpoints."""
SWAPPED = "final_layer.adaLN_modulation.1"
"""(shift, scale) in the file and (scale, shift) in diffusers."""
FOLDER = "transformer"

_OUR_BLOCK = re.compile(r"^(single_)?transformer_blocks\.(\d+)\.(.+)$")
_THEIR_BLOCK = re.compile(r"^(double|single)_blocks\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class BlackForestNames:
    """The names of one model's layers.

    Attributes:
        outside: diffusers' layers outside the blocks -> the file's.
        double, single: the same within a block.
        fused: the file's layers within a block -> diffusers' layers that each is made of, in order.
        shares: of such a layer's rows, that its parts have; equal where it is not named.
    """

    outside: Mapping[str, str]
    double: Mapping[str, str]
    single: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]
    shares: Mapping[str, tuple[int, ...]]

    def place(self, layer: str) -> tuple[str, list[str]]:
        """One of diffusers' layers -> the file's layer, and all of diffusers' layers that are in it."""
        block = _OUR_BLOCK.match(layer)
        if block is None:
            return self.outside[layer], [layer]
        kind, table = ("single", self.single) if block[1] else ("double", self.double)
        stem = f"{block[1] or ''}transformer_blocks.{block[2]}"
        theirs = f"{kind}_blocks.{block[2]}"
        if block[3] in table:
            return f"{theirs}.{table[block[3]]}", [layer]
        fused = next(one for one in self._fused_in(kind) if block[3] in self.fused[one])
        return f"{theirs}.{fused}", [f"{stem}.{part}" for part in self.fused[fused]]

    def _fused_in(self, kind: str) -> list[str]:
        """linear1 is a single block's; all others are of double ones."""
        return [one for one in self.fused if (one == "linear1") == (kind == "single")]

    def shares_of(self, layer: str) -> tuple[int, ...]:
        """Shares of the rows of one of the file's layers that its parts have; () for equal ones."""
        block = _THEIR_BLOCK.match(layer)
        return self.shares.get(block[3], ()) if block is not None else ()

    def app_layers(self, names: Sequence[str]) -> dict[str, list[str]]:
        """diffusers' layers -> the file's layers, each with those that it is made of, in order."""
        return dict(self.place(name) for name in names)

    def to_single_file(self, files: ModelFiles) -> Tensors:
        """The transformer's weights by the file's names."""
        ours = files.tensors[FOLDER]
        theirs: Tensors = {}
        for name, value in ours.items():
            layer, _, parameter = name.rpartition(".")
            found, parts = self.place(layer)
            written = f"{found}.{'scale' if found.endswith('_norm') else parameter}"
            if len(parts) > 1:
                theirs.setdefault(written, concatenated([ours[f"{part}.{parameter}"] for part in parts]))
            else:
                theirs[written] = halves_swapped(value) if found == SWAPPED else value
        return theirs

    def from_single_file(self, tensors: Tensors, family: Family, configs: dict[str, Config]) -> dict[str, Tensors]:
        """The transformer by diffusers' names; what is no layer of it keeps its own."""
        ours: Tensors = {}
        for full_name, value in tensors.items():
            layer, _, parameter = full_name.removeprefix(PREFIX).rpartition(".")
            parts = self._parts(layer)
            kept = "weight" if parameter == "scale" else parameter
            if len(parts) == 1:
                ours[f"{parts[0]}.{kept}"] = halves_swapped(value) if layer == SWAPPED else value
                continue
            for part, (start, stop) in zip(
                parts, row_shares(value.shape[0], self.shares_of(layer) or (1,) * len(parts)), strict=True
            ):
                ours[f"{part}.{kept}"] = value.rows(start, stop)
        return {FOLDER: ours}

    def _parts(self, layer: str) -> list[str]:
        """One of the file's layers -> diffusers' layers that it is made of."""
        block = _THEIR_BLOCK.match(layer)
        if block is None:
            return [_backwards(self.outside).get(layer, layer)]
        single = block[1] == "single"
        stem = f"{'single_' if single else ''}transformer_blocks.{block[2]}"
        names = self.fused.get(block[3]) or [_backwards(self.single if single else self.double).get(block[3], block[3])]
        return [f"{stem}.{name}" for name in names]


def _backwards(table: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}
