"""Pickled weights: what a trainer left next to them is passed over, and what could run is refused and never runs."""

import builtins
import collections
import io
import os
import random
import subprocess
import sys
import types
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import draw, tiny_folder

from everydream_kit.errors import ModelError
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.loading import load_model
from everydream_kit.models.weight_files import open_pickle, open_weights


class Call:
    """Unpickled by an ordinary reader, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@contextmanager
def importable(*full_names, base=object, content=None):
    """Classes under the names of modules that are not installed, for as long as a file is written."""
    made, before = [], dict(sys.modules)
    for full_name in full_names:
        module_name, _, name = full_name.rpartition(".")
        parts = module_name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        made.append(type(name, (base,), {"__module__": module_name, **(content or {})}))
        setattr(sys.modules[module_name], name, made[-1])
    try:
        yield made
    finally:
        for name in sys.modules.keys() - before.keys():
            del sys.modules[name]


def lightning_content():
    """What PyTorch Lightning 1.4 wrote next to the weights of the first Stable Diffusion files, class by class."""
    names = ("callbacks.model_checkpoint.ModelCheckpoint", "utilities.enums.Mode", "utilities.parsing.AttributeDict")
    full = [f"pytorch_lightning.{name}" for name in names]
    with (
        importable(*full[:2], "omegaconf.listconfig.ListConfig") as (callback, mode, listed),
        importable(full[2], base=dict) as (table,),
    ):
        settings = listed()
        settings.__dict__.update({"_metadata": mode(), "_content": [1, 2]})
        counts = collections.defaultdict(int, {"a": 1})
        yield {
            "epoch": 3,
            "pytorch-lightning_version": "1.4.2",
            "callbacks": {callback: {"best_model_score": torch.ones(1), "best": np.float64(0.5), "counts": counts}},
            "hyper_parameters": table(lr=1e-4, betas=settings),
            "optimizer_states": [{"state": {}, "param_groups": [{"lr": 1e-4}]}],
        }


def test_a_lightning_checkpoint_gives_its_weights(tmp_path):
    for content in lightning_content():
        torch.save({**content, "state_dict": {"a": torch.arange(3.0)}}, tmp_path / "old.ckpt")
    assert "pytorch_lightning" not in sys.modules
    with pytest.raises(Exception, match="pytorch_lightning"):
        torch.load(tmp_path / "old.ckpt", weights_only=True)
    torch.save({"a": torch.zeros(1)}, tmp_path / "plain.ckpt")
    open_pickle(tmp_path / "plain.ckpt")  # at the first file torch allows more classes of its own
    allowed = set(torch.serialization.get_safe_globals())
    tensors, metadata = open_pickle(tmp_path / "old.ckpt")
    assert tensors.keys() == {"a"}
    assert torch.equal(tensors["a"].read(), torch.arange(3.0))
    assert metadata == {}
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_a_whole_model_from_a_lightning_checkpoint_draws(tmp_path):
    plain = torch.load(export_checkpoint(tiny_folder("sd1"), tmp_path / "plain.ckpt", "fp32"), weights_only=True)
    for content in lightning_content():
        torch.save({**content, **plain}, tmp_path / "old.ckpt")
    np.testing.assert_array_equal(draw(load_model(tmp_path / "old.ckpt")), draw(load_model(tiny_folder("sd1"))))


CALLS = {
    "open": (builtins.open, "PROOF", "w"),
    "eval": (builtins.eval, "open('PROOF', 'w')"),
    "exec": (builtins.exec, "open('PROOF', 'w')"),
    "os.system": (os.system, "touch PROOF"),
    "os.mkdir": (os.mkdir, "PROOF"),
    "subprocess.Popen": (subprocess.Popen, ("touch", "PROOF")),
    "getattr": (builtins.getattr, "text", "upper"),
    "numpy.save": (np.save, "PROOF", np.ones(1)),
    "torch.load": (torch.load, "PROOF"),
    "pickle.loads": (__import__("pickle").loads, b"cos\nsystem\n(S'touch PROOF'\ntR."),
}


@pytest.mark.parametrize("alongside_lightning", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_pickle_with_code_is_refused_and_nothing_in_it_runs(tmp_path, monkeypatch, call, zipped, alongside_lightning):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"a": torch.ones(1)}, "x": Call(*call)}
    if alongside_lightning:
        for alongside in lightning_content():
            torch.save({**alongside, **content}, "evil.ckpt", _use_new_zipfile_serialization=zipped)
    else:
        torch.save(content, "evil.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"evil\.ckpt: refused\. .*nothing in it was run"):
        open_pickle(tmp_path / "evil.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.ckpt"]


def test_a_trainers_own_class_is_never_called_even_where_the_trainer_is_installed(tmp_path):
    proof, name = tmp_path / "ran", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"

    def run(self, *_, **__):
        proof.touch()

    with importable(name, content={"__init__": run, "__setstate__": run}) as (callback,):
        made = callback.__new__(callback)
        made.__dict__["x"] = 1
        torch.save({"a": torch.ones(1), "called": Call(callback, 1, 2), "built": made}, tmp_path / "old.ckpt")
        assert open_pickle(tmp_path / "old.ckpt")[0].keys() == {"a"}
        assert not proof.exists()
        torch.load(tmp_path / "old.ckpt", weights_only=False)
        assert proof.exists()  # an ordinary reader does run it


@pytest.mark.parametrize(
    "name", ["pytorch_lightning.os.system", "pytorch_lightning_evil.run", "builtins.dict.__class__"]
)
def test_names_that_only_look_like_a_trainers_run_nothing(tmp_path, name):
    """The pickle is written byte by byte: GLOBAL name, one argument, REDUCE."""
    module, _, attribute = name.rpartition(".")
    program = b"\x80\x02}X\x01\x00\x00\x00xc" + f"{module}\n{attribute}\n".encode()
    program += b"X\x09\x00\x00\x00touch ran\x85Rs."
    rewrite(tmp_path / "a.ckpt", program)
    marker = types.ModuleType("pytorch_lightning_evil")
    marker.run = lambda command: (tmp_path / "ran").touch()
    sys.modules["pytorch_lightning_evil"] = marker
    try:
        if name.startswith("pytorch_lightning."):
            assert open_pickle(tmp_path / "a.ckpt")[0] == {}
        else:
            with pytest.raises(ModelError, match="refused"):
                open_pickle(tmp_path / "a.ckpt")
    finally:
        del sys.modules["pytorch_lightning_evil"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def rewrite(path, program, content=None):
    """A checkpoint file of torch's zip form whose pickle is these bytes."""
    buffer = io.BytesIO()
    torch.save(content or {}, buffer)
    with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(path, "w") as out:
        for entry in whole.namelist():
            out.writestr(entry, program if entry.endswith("data.pkl") else whole.read(entry))


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x02\x00\x00\x00zz\x86R.",
        b"\x80\x02}}}s.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02u.",
    ],
    ids=["unknown encoding", "dict as key", "too few arguments", "empty stack"],
)
def test_a_program_that_makes_no_sense_is_one_clear_error(tmp_path, program):
    rewrite(tmp_path / "a.ckpt", program)
    with pytest.raises(ModelError, match=r"a\.ckpt: (cannot be read|refused)"):
        open_pickle(tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"not a checkpoint at all", b"\x80\x02}q\x00."])
def test_a_damaged_pickle_is_one_clear_error(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.ckpt: (cannot be read|refused)"):
        open_pickle(path)


def test_a_pickle_with_bytes_changed_is_read_or_one_clear_error(tmp_path):
    content = {"state_dict": {"a": torch.arange(3.0), "b": torch.ones(2, 2)}, "metadata": {"k": "v"}}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as whole:
        program = next(whole.read(entry) for entry in whole.namelist() if entry.endswith("data.pkl"))
    draws = random.Random(0)
    refused = 0
    for _ in range(200):
        changed = bytearray(program)
        for _ in range(draws.randint(1, 3)):
            changed[draws.randrange(len(changed))] = draws.randrange(256)
        rewrite(tmp_path / "a.ckpt", bytes(changed), content)
        try:
            open_pickle(tmp_path / "a.ckpt")
        except ModelError:
            refused += 1
    assert refused > 30


def test_a_class_whose_name_acts_on_terminals_is_named_as_text(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"\x80\x02c\x1b[2Jos\nsystem\n.")
    with pytest.raises(ModelError, match="refused") as caught:
        open_pickle(tmp_path / "a.ckpt")
    assert "\\x1b[2Jos.system" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.sft", "a.ckpt", "a.pt", "A.BIN"])
@pytest.mark.parametrize("padding", [0, 0x80 + (2 << 8)])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
def test_the_content_says_what_a_file_is_and_not_its_name(tmp_path, kind, padding, name):
    """A header of 0x280 bytes begins as a pickle does."""
    weights, path = {"w": torch.arange(3.0)}, tmp_path / name
    if kind == "safetensors":
        save_file(weights, path, {"note": ""})
        missing = max(0, padding - int.from_bytes(path.read_bytes()[:8], "little"))
        save_file(weights, path, {"note": "-" * missing})
        assert not padding or path.read_bytes()[:2] == b"\x80\x02"
    else:
        torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=kind == "zip")
    tensors, _ = open_weights(path)
    assert {key: value.read().tolist() for key, value in tensors.items()} == {"w": [0.0, 1.0, 2.0]}


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
def test_code_in_a_pickle_of_any_name_is_refused(tmp_path, name):
    torch.save({"state_dict": {}, "x": Call(os.mkdir, str(tmp_path / "ran"))}, tmp_path / name)
    with pytest.raises(ModelError, match="refused"):
        open_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.ckpt"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 4265380512\n", "git lfs pull"),
        ("\n<!DOCTYPE html><html><body>404</body></html>", "a web page.*Download the file itself"),
        ("\ufeff<html>404", "a web page"),
        ('{"error": "Unauthorized"}', "this is text.*Unauthorized.*logged in"),
    ],
)
def test_what_a_download_left_in_place_of_weights_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=said):
        open_weights(tmp_path / name)


def test_a_file_that_holds_neither_is_read_as_its_name_says(tmp_path):
    for name, said in {"a.safetensors": "not a complete safetensors file", "a.ckpt": "cannot be read|refused"}.items():
        (tmp_path / name).write_bytes(b"\x00" * 64)
        with pytest.raises(ModelError, match=said):
            open_weights(tmp_path / name)
