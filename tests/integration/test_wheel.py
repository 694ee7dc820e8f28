"""What people get from an index: wheel and source archive are complete, and the wheel works in a new environment."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)


def run(*words, cwd, **options):
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the source archive, made from a copy of what is under version control."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = run("git", "ls-files", "-z", cwd=REPOSITORY).split("\0")
    for name in filter(None, tracked):
        if (REPOSITORY / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((REPOSITORY / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", out, source, cwd=out)
    return out


def test_an_index_accepts_both(built):
    files = sorted(path.name for path in built.iterdir())
    assert [name.endswith((".whl", ".tar.gz")) for name in files] == [True, True]
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)


def test_both_hold_the_base_model_the_images_and_the_notebooks(built):
    (wheel,) = built.glob("*.whl")
    (archive,) = built.glob("*.tar.gz")
    in_wheel = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(archive) as file:
        in_archive = file.getnames()
    wanted = (
        "demo/features.safetensors",
        "demo/images/automobile.webp",
        "00_quickstart.ipynb",
        "preflight/prices.json",
    )
    for ending in wanted:
        assert any(name.endswith(ending) for name in in_wheel), ending
        assert any(name.endswith(ending) for name in in_archive), ending
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in in_wheel)


def test_the_installed_wheel_works_from_an_empty_folder(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    packages = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    (packages / "zz_rest.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n", encoding="utf-8"
    )  # dependencies, after it
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(python, "-c", "import everydream_kit; print(everydream_kit.__file__)", cwd=empty)
    assert where.startswith(str(packages))
    run(python.parent / "everydream", "notebooks", "mine", cwd=empty)
    assert len(list((empty / "mine").glob("*.ipynb"))) == 5
    sampled = ("sample", "embedded", "--prompt", "a cat", "--num_inference_steps", "1", "--out", "cat")
    run(python, "-m", "everydream_kit", *sampled, cwd=empty)
    assert list(empty.glob("cat*"))
