"""A real JupyterLab on the loopback address and a real Chromium, one of each for the whole session.

The server gets configuration, kernels and workspace folders of its own below a temporary folder, and is ended with its
process group. A failed test leaves a screenshot in `tests/browser/failures/`.
"""

import json
import os
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
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
         f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}", "--LabApp.news_url=None",
         "--LabApp.extension_manager=readonly", "--ServerApp.terminals_enabled=False"],
        cwd=root,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **{name: str(root / path) for name, path in folders.items()}},
        stdout=(root / "server.log").open("wb"),
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


@pytest.fixture(scope="session")
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
    context = browser.new_context(viewport={"width": 1180, "height": 1000})
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


def open_notebook(page, address):
    """Open a notebook and wait until its kernel is really connected: Run All before that does nothing, silently."""
    page.goto(address)
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=60_000)


def run_all(page):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def photograph(locator, name):
    """A panel's picture for the documentation; never wider than it is on the page."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    locator.screenshot(path=SHOTS / f"panel-{name}.png")
