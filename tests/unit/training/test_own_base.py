"""The base of an adapter's run: the file's own for a run that was made here, the person's for one that was fetched."""

from __future__ import annotations

from pathlib import Path

from everydream_kit.config import TrainConfig
from everydream_kit.foreign import Origin, write_origin
from everydream_kit.runs import RunFolder
from everydream_kit.training.base_model import _own_base


def test_an_adapter_of_a_fetched_run_takes_the_base_that_a_person_gave(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.make_folders()
    run.config_path.write_text("{}", "utf-8")
    checkpoint = run.checkpoint("jets-ep01-gs00020")
    checkpoint.folder.mkdir()
    (checkpoint.folder / "adapter.json").write_text("{}", "utf-8")
    config = TrainConfig(resume_ckpt="me/base", base_revision="v2")
    assert _own_base(config, checkpoint) is None
    assert _own_base(config, None) is None
    write_origin(tmp_path, Origin("hf://stranger/x", "c", "hf://stranger/x"))
    assert _own_base(config, checkpoint) == {"source": "me/base", "revision": "v2"}
