"""What is said of a disk that will not do."""

import shutil
from pathlib import Path

import pytest

from everydream_kit.data.cache_room import check_room
from everydream_kit.disk_space import compare_sizes, lack_of_room
from everydream_kit.errors import DiskSpaceError
from everydream_kit.export.single_file_export import check_free_space
from everydream_kit.training.checkpoints import require_disk


@pytest.mark.parametrize(
    ("needed", "free", "said"),
    [
        (6_000_000_000, 5_000_000_000, "needs 6.0 GB, and 5.0 GB are free"),
        (40_200_000, 39_900_000, "needs 40.2 MB, and 39.9 MB are free"),
        (2_041_000_000, 2_039_000_000, "needs 2.041 GB, and 2.039 GB are free"),
        (16_800_000, 0, "needs 16.8 MB, and 0 B are free"),
        (1_000_000_005, 1_000_000_001, "needs 1,000,000,005 B, and 1,000,000,001 B are free"),
    ],
)
def test_two_sizes_that_differ_read_differently(needed, free, said):
    assert compare_sizes(needed, free) == said


def test_what_fits_lacks_nothing(tmp_path):
    assert lack_of_room(tmp_path / "not" / "there" / "yet", 1) is None


NEEDS = {
    "a checkpoint": lambda folder: require_disk(folder, 40_200_000, "a checkpoint"),
    "a single file": lambda folder: check_free_space(folder, 40_200_000 - 16 * 2**20),
    "the latent cache": lambda folder: check_room(folder, [((512, 512), False)] * 610),
}


@pytest.mark.parametrize("need", NEEDS.values(), ids=list(NEEDS))
def test_a_short_disk_is_said_in_numbers_that_differ(tmp_path, monkeypatch, need):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 0, 39_900_000))
    with pytest.raises(DiskSpaceError, match=rf"needs 40\.\d MB, and 39\.9 MB are free in {tmp_path}"):
        need(tmp_path)


@pytest.mark.skipif(
    not Path("/proc/self").is_dir(), reason="only Linux has /proc, a folder that takes no files even from root"
)
@pytest.mark.parametrize("need", NEEDS.values(), ids=list(NEEDS))
def test_a_folder_that_takes_no_files_is_said_to_be_so(need):
    with pytest.raises(DiskSpaceError, match="nothing can be written in /proc: it is read-only, belongs to"):
        need(Path("/proc/runs"))
