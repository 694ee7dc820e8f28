"""Wrong types for the public functions: one clear error, wherever a path or a text is expected."""

import pytest

import everydream_kit as edk
from everydream_kit.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("export_checkpoint", ("m", 5), r"out_path: takes str \| Path \(got 5, which is int\)"),
        ("export_checkpoint", (["m"], "x"), "checkpoint_folder: takes .* which is list"),
        ("sample", (5, "a cat"), "checkpoint: takes .*got 5"),
        ("push_to_hub", (b"m", "me/jets"), "run_or_checkpoint: takes .*which is bytes"),
        ("push_to_hub", ("m", 7), r"repo_id: takes str \(got 7"),
        ("attach", (None,), r"folder: takes str \| Path \(got None"),
        ("train", (True,), "config: takes TrainConfig .*got True"),
        ("resume", (1.5,), "run: takes .*got 1.5"),
        ("load_model", (5,), "source: takes"),
        ("load_config", (5,), "path: takes"),
    ],
)
def test_what_is_no_path_is_refused_by_name(name, arguments, words):
    with pytest.raises(ConfigError, match=words):
        getattr(edk, name)(*arguments)


def test_everything_else_reaches_the_function(tmp_path):
    config, warnings = edk.load_config(None, {"resume_ckpt": "embedded"})
    assert config.resume_ckpt == "embedded" and not warnings
    with pytest.raises(DataError, match="there is no such folder"):
        edk.prepare_dataset([str(tmp_path / "none")], cache_dir=None)
    assert edk.load_config.__doc__.startswith("Read settings from a JSON file")
