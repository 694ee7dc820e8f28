"""Lazy tensors and the streaming safetensors writer."""

import hashlib
import json
import struct
import weakref

import pytest
import safetensors.torch
import torch

from everydream_kit.errors import ModelError
from everydream_kit.models import spans
from everydream_kit.models import tensors as tensors_module
from everydream_kit.models.tensors import (
    HASH_KEY,
    MAX_HEADER_BYTES,
    LazyTensor,
    concatenated,
    open_safetensors,
    write_safetensors,
)

FORMATS = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]


def lazily(tensors):
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}


def test_safetensors_own_reader_reads_what_we_write(tmp_path):
    tensors = {f"t{index}": torch.arange(6).reshape(2, 3).to(dtype) for index, dtype in enumerate(FORMATS)}
    tensors |= {"odd": torch.tensor([1, 2, 3], dtype=torch.uint8), "scalar": torch.tensor(2.5), "empty": torch.zeros(0)}
    tensors["strided"] = torch.arange(12.0).reshape(3, 4).t()
    write_safetensors(tmp_path / "a.safetensors", lazily(tensors), {"title": "Bär"})
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert open_safetensors(tmp_path / "a.safetensors")[1] == {"title": "Bär"}
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_the_hash_in_the_header_is_of_all_tensor_bytes(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, lazily({"a": torch.ones(3), "b": torch.zeros(2)}), {HASH_KEY: ""})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert metadata[HASH_KEY] == "0x" + hashlib.sha256(content[8 + length :]).hexdigest()


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    alive = weakref.WeakSet()
    most = 0

    def read():
        nonlocal most
        tensor = torch.ones(1000)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    write_safetensors(
        tmp_path / "a.safetensors", {f"t{i}": LazyTensor((1000,), torch.float32, read) for i in range(20)}
    )
    assert most <= 2  # the one being read, and at most the one before it


@pytest.fixture
def stored(tmp_path):
    """A file of three matrices, opened."""
    made = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(6, 5, generator=made) for name in "qkv"}
    safetensors.torch.save_file(tensors, tmp_path / "stored.safetensors", {"a": "header of any length"})
    return open_safetensors(tmp_path / "stored.safetensors")[0]


@pytest.mark.parametrize("piece_bytes", [4, 28, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_read_in_pieces_is_what_is_read_whole(stored, monkeypatch, dtype, piece_bytes):
    monkeypatch.setattr(spans, "PIECE_BYTES", piece_bytes)
    joined = concatenated([stored[name] for name in "qkv"])
    for lazy in (stored["q"], stored["k"].rows(2, 5), stored["v"].reshaped(5, 6), joined, joined.rows(3, 9)):
        whole = lazy.cast(dtype).read()
        pieces = list(lazy.cast(dtype).pieces())
        assert torch.equal(torch.cat(pieces), whole.flatten())
        if lazy.spans is not None:
            assert max(piece.numel() for piece in pieces) <= piece_bytes // 4
    assert joined.spans is not None and stored["q"].transposed().spans is None
    assert torch.equal(next(iter(stored["q"].transposed().pieces())), stored["q"].read().t().flatten())


def test_a_file_that_goes_while_it_is_converted_is_still_read(stored, tmp_path):
    wanted = {name: lazy.read() for name, lazy in stored.items()}
    (tmp_path / "stored.safetensors").unlink()
    write_safetensors(tmp_path / "b.safetensors", {name: lazy.cast(torch.float16) for name, lazy in stored.items()})
    read = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(read[name], wanted[name].half()) for name in wanted)


def test_a_file_that_shrinks_while_it_is_converted_is_an_error_and_leaves_nothing(stored, tmp_path):
    path = tmp_path / "stored.safetensors"
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 8)
    with pytest.raises(OSError, match="ends at byte"):
        write_safetensors(tmp_path / "b.safetensors", stored)
    assert list(tmp_path.iterdir()) == [path]


def test_where_files_cannot_be_read_in_pieces_tensors_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "CAN_READ_AT", False)
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (lazy,) = open_safetensors(tmp_path / "a.safetensors")[0].values()
    assert lazy.spans is None
    write_safetensors(tmp_path / "b.safetensors", {"a": lazy.cast(torch.float16)})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "b.safetensors")["a"], torch.ones(2).half())


@pytest.mark.parametrize("early_bytes", [1, 2**27])
def test_what_is_sent_to_the_disk_early_is_whole(tmp_path, monkeypatch, early_bytes):
    monkeypatch.setattr(tensors_module, "EARLY_SYNC_BYTES", early_bytes)
    tensors = {f"t{index}": torch.full((500,), float(index)) for index in range(30)}
    write_safetensors(tmp_path / "a.safetensors", lazily(tensors), {HASH_KEY: ""})
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, lazily({"a": torch.ones(2)}))
    before = path.read_bytes()

    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, {"a": LazyTensor((2,), torch.float32, fail)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_lazy_steps_announce_what_they_read():
    base = LazyTensor.of(torch.arange(12.0).reshape(4, 3))
    steps = [
        base.transposed(),
        base.rows(1, 3),
        base.reshaped(2, 6),
        base.cast(torch.float16),
        concatenated([base, base]),
    ]
    for lazy in steps:
        assert tuple(lazy.read().shape) == lazy.shape
        assert lazy.read().dtype == lazy.dtype
    assert LazyTensor.of(torch.arange(3)).cast(torch.float16).dtype == torch.int64  # counts are not rounded


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, lazily({"a": torch.ones(1000)}))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"a\.safetensors: not a complete safetensors file .* Fetch it again"):
        open_safetensors(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1000, 1000, 1000], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 10**15]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
    ],
)
def test_a_header_that_lies_about_sizes_is_refused(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        open_safetensors(tmp_path / "a.safetensors")


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        open_safetensors(tmp_path / "a.safetensors")


def test_a_header_larger_than_any_models_is_refused_before_it_is_read(tmp_path):
    """The library takes a minute for what it allows: a million names, or 100 MB of text."""
    header = b'{"__metadata__":{"a":"' + b"x" * MAX_HEADER_BYTES + b'"}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelError, match="its header is larger than"):
        open_safetensors(path)
