"""The panels with Colab's versions: ipywidgets 7.7.1, ipykernel 6.17.1, IPython 7.34, Notebook 6.5.7, traitlets of that
time.

A second environment holds these and sees everything else through this one's site-packages. All plain panel tests run in
it (but those of what happens in separate processes), and one panel is driven in a browser. Colab's own
widget manager cannot be had here; core widgets behave alike in both.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from hostile_project import make_hostile_project
from installing import install
from jupyter_lab import REPOSITORY, VIEWPORT, free_port, notebook_of, wait_for
from PIL import Image
from playwright.sync_api import expect

pytestmark = pytest.mark.timeout(600)

COLAB = [
    *("notebook==6.5.7", "ipywidgets==7.7.1", "widgetsnbextension==3.6.10", "ipykernel==6.17.1", "ipython==7.34.0"),
    *("jupyter_client==7.4.9", "anywidget==0.9.21", "setuptools<80"),
]


@pytest.fixture(scope="module")
def colab_python(tmp_path_factory):
    """The Python of the second environment."""
    if sys.version_info >= (3, 12):
        pytest.skip(
            "IPython 7.34 and Notebook 6.5 of Colab's patched Python cannot be installed from PyPI on 3.12 and later"
        )
    folder = tmp_path_factory.mktemp("colab") / "venv"
    venv.create(folder, with_pip=False)  # another environment installs into it: half the time
    python = folder / "bin" / "python"
    problem = install(COLAB, ["--python", python])
    if problem:  # no network, or no wheels for this machine; the report of skips says it
        pytest.skip(f"Colab's versions cannot be installed here: {problem[-300:]}")
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "zz_rest.pth").write_text(f"{sysconfig.get_path('purelib')}\n{REPOSITORY}\n")  # after its own
    return python


def test_plain_panel_tests_pass_with_colabs_versions(colab_python):
    versions = "import ipywidgets, IPython, anywidget; print(ipywidgets.__version__, IPython.__version__)"
    seen = subprocess.run([colab_python, "-c", versions], check=True, capture_output=True, text=True).stdout
    assert seen.split() == ["7.7.1", "7.34.0"]
    ran = subprocess.run(
        [colab_python, "-m", "pytest", "tests/unit/panels", "-q", "-m", "not background", "-p", "no:cacheprovider",
         "-p", "no:xdist", "-o", "addopts=", "-W", "ignore::DeprecationWarning"],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:]


CELL = """
import sys
import everydream_kit as edk
double = [sys.executable, {double!r}, "{{run}}", "--steps", "40", "--seconds-a-step", "0.1"]
edk.panels.train("ws/jets", command=double)
"""


@pytest.fixture
def classic(colab_python, tmp_path):
    """Serves a Notebook 6 in a folder: `classic(cells)` writes them as one notebook there, and gives its address."""
    port, token = free_port(), secrets.token_hex(8)
    folders = {
        "JUPYTER_CONFIG_DIR": ".jc",
        "JUPYTER_DATA_DIR": ".jd",
        "JUPYTER_RUNTIME_DIR": ".jr",
        "IPYTHONDIR": ".ip",
    }

    def write(*cells):
        (tmp_path / "panel.ipynb").write_text(json.dumps(notebook_of(*cells)), "utf-8")
        return f"http://127.0.0.1:{port}/notebooks/panel.ipynb?token={token}"

    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [colab_python, "-m", "notebook", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
             f"--NotebookApp.token={token}"],
            cwd=tmp_path,
            env={**os.environ, **{name: str(tmp_path / path) for name, path in folders.items()}},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", 120)
            yield write
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(timeout=60)


def run_all(page, address):
    page.set_viewport_size(VIEWPORT)
    page.goto(address)
    page.wait_for_function("window.Jupyter && Jupyter.notebook && Jupyter.notebook.kernel", timeout=60_000)
    page.wait_for_function("Jupyter.notebook.kernel.is_connected()", timeout=60_000)
    page.wait_for_timeout(3000)
    page.evaluate("Jupyter.notebook.execute_all_cells()")


def test_the_training_panel_lives_in_notebook_6(classic, page, tmp_path):
    images = tmp_path / "ws" / "jets" / "input"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(images / "a jet.png")
    double = Path(__file__).parents[1] / "fakes" / "trainer_double.py"
    run_all(page, classic(CELL.format(double=str(double))))
    panel = page.locator(".edk").first
    panel.wait_for(timeout=60_000)
    panel.get_by_label("Learning rate", exact=True).fill("fast")
    expect(panel.locator(".edk-error", has_text="must be a number")).to_be_visible()
    panel.get_by_label("Learning rate", exact=True).fill("1e-5")
    panel.get_by_role("button", name="Start training").click()
    expect(panel.locator(".edk-badge")).to_have_text("finished", timeout=120_000)  # so the clock beats here, too
    expect(panel.locator(".edk-facts")).to_contain_text("40 / 40")


HOSTILE_CELLS = (
    "import everydream_kit as edk\nproject = {project!r}\nedk.panels.setup(project)",
    "edk.panels.dataset(project)",
    "panel = edk.panels.train(project)\n[fold.set_open(True) for fold in [*panel.form.folds, panel.plan.fold]]\npanel",
    "panel = edk.panels.compare(project)\npanel.comparison = panel.asked()\npanel._render(force=True)\npanel",
    "edk.panels.share(project)",
)


def test_names_of_strangers_run_nothing_in_the_page(classic, page, tmp_path):
    project = make_hostile_project(tmp_path)
    cells = [HOSTILE_CELLS[0].format(project=str(project)), *HOSTILE_CELLS[1:]]
    run_all(page, classic(*cells))
    expect(page.locator(".edk")).to_have_count(5, timeout=120_000)
    expect(page.locator(".edk-head", has_text="Export and share")).to_be_visible(timeout=60_000)
    for tab in page.locator(".edk-tab").all():
        tab.click()
        page.wait_for_timeout(150)
    assert page.locator(".edk").get_by_text("onerror=window.taken=1", exact=False).count() >= 10  # as text
    assert page.locator('img[src="x"]').count() == 0
    assert page.evaluate("window.taken") is None
