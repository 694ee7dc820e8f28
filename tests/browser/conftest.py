"""A real JupyterLab on the loopback address and a real Chromium, one of each for the whole session.

The server gets configuration, kernels and workspace folders of its own below a temporary folder, and is ended with its
process group. A failed test leaves a screenshot in `tests/browser/failures/`. With EDK_SCREENSHOTS=1 the pictures of
the panels in `docs/images/` are taken anew.
"""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest

REPOSITORY = Path(__file__).parents[2]
SHOTS = REPOSITORY / "docs" / "images"
FAILURES = Path(__file__).parent / "failures"
VIEWPORT = {"width": 1180, "height": 1000}
TALLEST_PICTURE = 1250
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@dataclass
class Lab:
    """A running server: `root` holds the notebooks that it shows."""

    address: str
    token: str
    root: Path

    def write(self, name, *cells):
        """A notebook of code cells; returns its address as a page of its own."""
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, self.root / name)
        return self.page(name)

    def copy(self, name, **parameters):
        """One of the kit's notebooks, with other values in its cell of parameters; returns its address."""
        text = (REPOSITORY / "notebooks" / f"{name}.ipynb").read_text("utf-8")
        book = nbformat.reads(text, as_version=4)
        for cell in book.cells:
            if "parameters" in cell.metadata.get("tags", ()):
                for key, value in parameters.items():
                    cell.source = re.sub(rf"^{key} = .*$", f"{key} = {value!r}", cell.source, flags=re.MULTILINE)
        target = f"{name}-{secrets.token_hex(3)}.ipynb"
        nbformat.write(book, self.root / target)
        return self.page(target)

    def project(self, name, **settings):
        """A project with the demo's pictures and these settings, as notebooks in `root` find it by its name."""
        folder = self.root / "workspace" / name
        shutil.copytree(REPOSITORY / "everydream_kit" / "demo" / "pictures", folder / "input")
        (folder / "input" / "SOURCE.md").unlink()
        base = {"resume_ckpt": "embedded", "resolution": 128, "batch_size": 4, "lr": 1e-4, "log_step": 1}
        (folder / "settings.json").write_text(json.dumps({**base, **settings}))
        return folder

    def page(self, name):
        return f"{self.address}/doc/tree/{name}?token={self.token}&reset"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address, seconds=40):
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end, f"no answer from {address}"
            time.sleep(0.2)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    root = tmp_path_factory.mktemp("lab")
    settings = root / ".js" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(quiet))
    port, token = free_port(), secrets.token_hex(8)
    folders = {
        "JUPYTER_CONFIG_DIR": ".jc",
        "JUPYTER_DATA_DIR": ".jd",
        "JUPYTER_RUNTIME_DIR": ".jr",
        "IPYTHONDIR": ".ip",
        "JUPYTERLAB_SETTINGS_DIR": ".js",
        "JUPYTERLAB_WORKSPACES_DIR": ".jw",
    }
    log = (root / "server.log").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}", "--LabApp.news_url=None",
         "--LabApp.extension_manager=readonly", "--ServerApp.terminals_enabled=False"],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "2", **{name: str(root / path) for name, path in folders.items()}},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api/status?token={token}")
        yield Lab(address, token, root)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=20)
        log.close()


@pytest.fixture(scope="module")  # not session: while it lives, its event loop would keep nbclient from running
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), headless=True, args=CHROMIUM_ARGUMENTS
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, request):
    context = browser.new_context(viewport=VIEWPORT)
    page = context.new_page()
    page.set_default_timeout(30_000)
    yield page
    report = getattr(request.node, "report", None)
    if report is not None and report.failed:
        FAILURES.mkdir(exist_ok=True)
        page.screenshot(path=FAILURES / f"{request.node.name}.png")
    context.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call":
        item.report = report
    return report


@pytest.fixture
def driver(page):
    return Driver(page)


@dataclass
class Driver:
    """What a person does with a notebook page."""

    page: object

    def open(self, address):
        """Open a notebook and wait until its kernel is really connected: Run All before that does nothing, silently."""
        self.page.goto(address)
        self.page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=90_000)

    def run_all(self):
        self.menu("Run", "Run All Cells")

    def menu(self, name, item):
        self.page.get_by_role("menuitem", name=name, exact=True).click()
        self.page.get_by_role("menuitem", name=item).first.click()

    def panel(self, title):
        """The first panel of this title, once it is there."""
        panel = self.page.locator(".edk").filter(has=self.page.get_by_role("heading", name=title, exact=True)).first
        panel.wait_for(timeout=120_000)
        return panel

    def photograph(self, locator, name):
        """A panel's picture for the documentation, when they are wanted."""
        if os.environ.get("EDK_SCREENSHOTS") != "1":
            return
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.mouse.move(0, 0)
        self.page.set_viewport_size({"width": 1180, "height": 2400})
        locator.evaluate("element => element.scrollIntoView()")
        self.page.wait_for_timeout(1200)
        box = locator.bounding_box()
        box["height"] = min(box["height"], TALLEST_PICTURE)
        self.page.screenshot(path=SHOTS / f"panel-{name}.png", clip=box)
        self.page.set_viewport_size(VIEWPORT)
