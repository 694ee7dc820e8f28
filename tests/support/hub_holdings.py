"""What the stand-in for the Hub keeps: repositories with their commits, and the local Xet store.

A repository is a list of commits for each ref; a commit is a dictionary from path to entry. Nothing is forgotten, so a
test can count commits.
"""

from __future__ import annotations

import hashlib
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A file of a commit. `sha256` is None for a plain git blob, whose bytes are in `Repository.blobs`."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass
class Commit:
    oid: str
    title: str
    tree: dict[str, Entry]


@dataclass
class Repository:
    private: bool
    refs: dict[str, list[Commit]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, ref: str, title: str, tree: dict[str, Entry]) -> Commit:
        history = self.refs.setdefault(ref, [])
        oid = hashlib.sha1(f"{time.time_ns()} {title} {len(history)}".encode()).hexdigest()
        history.append(Commit(oid, title, tree))
        return history[-1]

    def find(self, revision: str) -> Commit | None:
        if self.refs.get(revision):
            return self.refs[revision][-1]
        commits = (commit for history in self.refs.values() for commit in history)
        return next((commit for commit in commits if commit.oid == revision), None)

    def add_blob(self, content: bytes) -> Entry:
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.blobs[oid] = content
        return Entry(oid, len(content))


def xet_hashes(store: Path) -> dict[str, str]:
    """sha256 -> Xet hash, from the shards of a local Xet store: the client never sends them.

    A shard is made of 48-byte records: a header, then for each file a record with its hash, flags and number of
    segments, the segments, as many verification records (flag bit 31), and a record with the SHA-256 (bit 30). Hashes
    are four little-endian words, printed as numbers.
    """

    def spell(raw: bytes) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))

    found: dict[str, str] = {}
    for path in store.glob("xet/xorbs/shards/*.mdb"):
        shard, at = path.read_bytes(), 48
        while at + 48 <= len(shard) and shard[at : at + 32] != b"\xff" * 32:
            file_hash, (flags, segments) = spell(shard[at : at + 32]), struct.unpack_from("<II", shard, at + 32)
            at += 48 * (1 + segments * (2 if flags & 1 << 31 else 1))
            if flags & 1 << 30:
                found[spell(shard[at : at + 32])] = file_hash
                at += 48
    return found
