"""What an hour of a GPU costs: as entered, or from a dated table that can be edited.

`prices.json` next to this file holds list prices that somebody published, each with its source and the day it was read.
A `prices.json` in the folder of the runs, or up to two folders above it, is laid over it entry by entry (GPU and host).
A GPU without an entry has no price: nothing is guessed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everydream_kit.errors import ConfigError
from everydream_kit.preflight.gpus import find_gpu
from everydream_kit.strict_json import read_json

FILE_NAME = "prices.json"
FOLDERS_ABOVE = 2


@dataclass(frozen=True)
class Price:
    """The price of one GPU for an hour.

    Attributes:
        usd_per_hour: in US dollars.
        gpu, host: whose GPU where; empty for a price that was entered.
        read_on: day on which it was read, as `2026-11-09`; empty for a price that was entered.
        source: address of what it was read from, or who said so.
        note: which offer it is.
    """

    usd_per_hour: float
    gpu: str = ""
    host: str = ""
    read_on: str = ""
    source: str = "entered"
    note: str = ""

    def cost(self, seconds: float) -> float:
        """US dollars for this many seconds."""
        return self.usd_per_hour * seconds / 3600

    def describe(self) -> str:
        """The price and its source: host, offer and date."""
        if not self.read_on:
            return f"{self.usd_per_hour:g} USD an hour, {self.source}"
        offer = f" ({self.note})" if self.note else ""
        return f"{self.usd_per_hour:g} USD an hour at {self.host}{offer}, read on {self.read_on}"


def entered_price(usd_per_hour: float) -> Price:
    """A price that somebody gave. Raises: ConfigError if it is negative or no number."""
    if not math.isfinite(usd_per_hour) or usd_per_hour < 0:
        raise ConfigError(f"price: must be 0 or more US dollars an hour (got {usd_per_hour!r})")
    return Price(float(usd_per_hour))


def read_prices(near: str | Path | None = None) -> tuple[Price, ...]:
    """The table, with the user's own entries over it.

    Args:
        near: folder of the runs; its `prices.json` and those of the two folders above are used, the nearest winning.

    Raises:
        ConfigError: a file holds something else than prices; the entry is named.
    """
    files = [Path(__file__).parent / FILE_NAME]
    if near is not None:
        folder = Path(near).absolute()
        files += [place / FILE_NAME for place in reversed([folder, *list(folder.parents)[:FOLDERS_ABOVE]])]
    table: dict[tuple[str, str], Price] = {}
    for path in files:
        if path.is_file():
            table.update({(price.gpu, price.host): price for price in _read_file(path)})
    return tuple(table.values())


def find_price(gpu: str, prices: tuple[Price, ...], host: str | None = None) -> Price | None:
    """The price of a GPU: that of this host where it has one, else the lowest; None without an entry.

    Args:
        host: name of the machine's host in any case, such as `runpod`.
    """
    own = [price for price in prices if price.gpu == gpu]
    here = [price for price in own if host is not None and price.host.lower().startswith(host.lower())]
    return min(here or own, key=lambda price: price.usd_per_hour, default=None)


def _read_file(path: Path) -> list[Price]:
    try:
        content = read_json(path, error=ConfigError, expect=None)
    except ConfigError as error:
        raise ConfigError(f"{error} Fix it, or remove it to use the kit's own prices.") from error
    entries = content.get("prices") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ConfigError(f'{path}: must be an object with a list "prices"; the kit\'s own file shows the form.')
    return [_read_entry(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, start=1)]


def _read_entry(entry: Any, place: str) -> Price:
    needed = ("card", "host", "usd_per_hour", "read_on")
    missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
    if missing:
        raise ConfigError(
            f"{place}: has no {', '.join(missing)}; an entry has {', '.join(needed)}, and may have source, note."
        )
    usd = entry["usd_per_hour"]
    if isinstance(usd, bool) or not isinstance(usd, int | float) or not math.isfinite(usd) or usd < 0:
        raise ConfigError(f"{place}: usd_per_hour must be a number, 0 or more (got {usd!r})")
    try:
        gpu = find_gpu(str(entry["card"])).name
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    text = {name: str(entry.get(name, "")) for name in ("host", "read_on", "source", "note")}
    return Price(float(usd), gpu=gpu, **text)
