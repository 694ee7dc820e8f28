"""A million strings in two arrays.

A Python string costs 50 bytes before its first letter. A `StringColumn` keeps the bytes of all strings in one buffer
and where each ends, so a column of a million file names costs little more than the names. It is read-only; a
`StringColumnBuilder` grows one. The price: reading a string makes a new object each time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np


class StringColumn:
    """Read-only strings by index.

    Undecodable bytes of file names (which Python shows as surrogates) survive.

    Args:
        data: (N bytes,) uint8, the strings one after another.
        ends: (n,) int64, where each string ends in `data`.
    """

    __slots__ = ("data", "ends")

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        whole = self.data.tobytes()
        start = 0
        for end in self.ends.tolist():
            yield whole[start:end].decode("utf-8", "surrogateescape")
            start = end

    def take(self, indices: np.ndarray) -> StringColumn:
        """The strings at `indices`, in that order."""
        starts = np.concatenate([[0], self.ends[:-1]])[: len(self.ends)][indices]
        lengths = self.ends[indices] - starts
        ends = np.cumsum(lengths)
        positions = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return StringColumn(self.data[positions], ends)


class StringColumnBuilder:
    """Grows a `StringColumn`."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = array("q")

    def append(self, text: str) -> None:
        self._data += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._data))

    def extend(self, column: StringColumn) -> None:
        """Append all strings of another column."""
        start = len(self._data)
        self._data += column.data.tobytes()
        self._ends.frombytes((column.ends + start).astype(np.int64).tobytes())

    def build(self) -> StringColumn:
        """The column so far. The builder must not be used afterwards: they share memory."""
        return StringColumn(np.frombuffer(self._data, np.uint8), np.frombuffer(self._ends, np.int64))
