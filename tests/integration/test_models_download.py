"""Models from the Hub: which files come, and what is said when they cannot; the real client against the stand-in."""

import logging
import re
import shutil

import pytest
from hub_runs import TOKEN
from hub_stand_in import HubStandIn
from huggingface_hub import HfApi
from tiny_models import draw, tiny_folder

from everydream_kit.errors import DiskSpaceError, ModelError
from everydream_kit.export.single_file_export import export_checkpoint
from everydream_kit.models.download import choose_files, fetch_model, is_hub_id
from everydream_kit.models.loading import load_model, open_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubStandIn(tmp_path / "hub") as server:
        server.add_user(TOKEN, "me")
        api = HfApi(endpoint=server.url, token=TOKEN)
        api.create_repo("me/tiny", private=True)
        api.upload_folder(repo_id="me/tiny", folder_path=tiny_folder("sd1"))
        api.upload_file(repo_id="me/tiny", path_in_repo="extra.ckpt", path_or_fileobj=b"not wanted")
        yield server


def test_a_private_model_comes_down_announced_and_loads(hub, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        folder = fetch_model("me/tiny", token=TOKEN, endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert re.search(r"me/tiny: \d+ files, 0\.0\d GB to download", caplog.text)
    assert TOKEN not in caplog.text
    assert not (folder / "extra.ckpt").exists()
    assert (draw(load_model(folder)) == draw(load_model(tiny_folder("sd1")))).all()


def test_what_was_downloaded_serves_when_the_hub_is_away(hub, tmp_path, caplog):
    place = {"token": TOKEN, "endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    folder = fetch_model("me/tiny", **place)
    hub.fail("GET", "/api/models/me/tiny", times=50, status=500)
    assert fetch_model("me/tiny", **place) == folder
    assert "using what an earlier download left" in caplog.text


def test_errors_name_the_repository_and_the_cure(hub, tmp_path):
    place = {"endpoint": hub.url, "cache_dir": tmp_path / "cache"}
    with pytest.raises(ModelError, match=r"me/absent: no such file or folder here, and no such model on the Hub"):
        fetch_model("me/absent", token=TOKEN, **place)
    with pytest.raises(ModelError, match="no revision 'v9'"):
        fetch_model("me/tiny", revision="v9", token=TOKEN, **place)
    with pytest.raises(ModelError, match="hf auth login"):
        fetch_model("me/tiny", token=False, **place)


def test_too_little_room_is_said_before_anything_comes(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(DiskSpaceError, match=r"the download needs .* Nothing was downloaded"):
        fetch_model("me/tiny", token=TOKEN, endpoint=hub.url, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["tiny.sft", "TINY.SAFETENSORS", "tiny.safetensors"])
def test_a_single_file_is_found_by_any_name_of_safetensors(hub, tmp_path, name):
    HfApi(endpoint=hub.url, token=TOKEN).create_repo("me/single", private=True)
    file = export_checkpoint(tiny_folder("sd1"), tmp_path / "x.safetensors", "fp32")
    HfApi(endpoint=hub.url, token=TOKEN).upload_file(repo_id="me/single", path_in_repo=name, path_or_fileobj=file)
    found = fetch_model("me/single", token=TOKEN, endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert found.name == name
    assert open_model(found).family.name == "sd1"


def test_one_set_of_weights_is_chosen():
    stem = "unet/diffusion_pytorch_model"
    names = [
        "model_index.json",
        "README.md",
        "v1-5.ckpt",
        "v1-5.safetensors",
        "unet/config.json",
        "safety_checker/model.safetensors",
    ]
    names += [f"{stem}.safetensors", f"{stem}.bin", f"{stem}.fp16.safetensors", f"{stem}.non_ema.safetensors"]
    names += ["text_encoder/pytorch_model.bin", "text_encoder/config.json", "tokenizer/vocab.json"]
    sizes = dict.fromkeys(names, 1)
    common = {"model_index.json", "unet/config.json", "text_encoder/pytorch_model.bin"}
    common |= {"text_encoder/config.json", "tokenizer/vocab.json"}
    assert set(choose_files("a/b", sizes)) == common | {f"{stem}.safetensors"}
    assert set(choose_files("a/b", sizes, variant="fp16")) == common | {f"{stem}.fp16.safetensors"}
    assert choose_files("a/b", {"x.safetensors": 1, "README.md": 1}) == ["x.safetensors"]
    with pytest.raises(ModelError, match=r"several single files \(x.safetensors, y.safetensors\)"):
        choose_files("a/b", {"x.safetensors": 1, "y.safetensors": 1})
    with pytest.raises(ModelError, match="holds no model"):
        choose_files("a/b", {"README.md": 1})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("me/jets", True),
        ("hf://me/jets", True),
        ("./me/jets", False),
        ("/me/jets", False),
        ("jets", False),
        ("a/b/c", False),
    ],
)
def test_hub_ids_are_reported_from_paths(source, expected):
    assert is_hub_id(source) == expected
