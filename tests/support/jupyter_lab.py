"""A real JupyterLab and a real Chromium, and what a person does with them: for the browser tests and the benchmark.

Waiting has no fixed end where something visibly continues (`Driver.wait_while_moving`): a busy machine is slow, not
broken.
"""

import contextlib
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

from PIL import Image

REPOSITORY = Path(__file__).parents[2]
SHOTS = REPOSITORY / "docs" / "images"
VIEWPORT = {"width": 1180, "height": 1000}
TALLEST_IMAGE = 1250
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

LOOK_MILLISECONDS = 200
STILL = f"""
async (panel, looks) => {{
  for (let shown = null, same = 0; same < looks; ) {{
    await new Promise(resolve => setTimeout(resolve, {LOOK_MILLISECONDS}));
    const now = panel.outerHTML;
    same = now === shown ? same + 1 : 0;
    shown = now;
  }}
}}
"""
"""Looks from within the page: a panel's HTML has up to 240 KB, and bringing it out five times a second keeps a core busy."""


def notebook_of(*sources):
    """A notebook of code cells. By hand: importing nbformat takes two seconds of processor time in each test process."""
    cells = [
        {
            "id": f"cell-{number}",
            "cell_type": "code",
            "source": source,
            "metadata": {},
            "outputs": [],
            "execution_count": None,
        }
        for number, source in enumerate(sources)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


@dataclass
class Lab:
    """A running server: `root` holds the notebooks that it shows."""

    address: str
    token: str
    root: Path

    def write(self, name, *cells):
        """A notebook of code cells; returns its address as a page of its own."""
        (self.root / name).write_text(json.dumps(notebook_of(*cells)), "utf-8")
        return self.page(name)

    def copy(self, name, **parameters):
        """One of the kit's notebooks, with other values in its cell of parameters; returns its address."""
        text = (REPOSITORY / "notebooks" / f"{name}.ipynb").read_text("utf-8")
        book = json.loads(text)
        for cell in book["cells"]:
            if "parameters" in cell["metadata"].get("tags", ()):
                source = "".join(cell["source"])
                for key, value in parameters.items():
                    source = re.sub(rf"^{key} = .*$", f"{key} = {value!r}", source, flags=re.MULTILINE)
                cell["source"] = source
        target = f"{name}-{secrets.token_hex(3)}.ipynb"
        (self.root / target).write_text(json.dumps(book), "utf-8")
        return self.page(target)

    def project(self, name, **settings):
        """A project with the demo's images and these settings, as notebooks in `root` find it by its name."""
        folder = self.root / "workspace" / name
        shutil.copytree(REPOSITORY / "everydream_kit" / "demo" / "images", folder / "input")
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


def wait_for(address, seconds=120):
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end, f"no answer from {address}"
            time.sleep(0.2)


@contextlib.contextmanager
def serve(root):
    """A JupyterLab on the loopback address that shows `root`, with configuration and kernels of its own; ended with its group."""
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
         "--LabApp.extension_manager=readonly", "--LabApp.expose_app_in_browser=True", "--ServerApp.terminals_enabled=False"],
        cwd=root,
        env={**os.environ, **{name: str(root / path) for name, path in folders.items()}},
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
        server.wait(timeout=60)
        log.close()


@contextlib.contextmanager
def open_chromium():
    """Debian's Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), headless=True, args=CHROMIUM_ARGUMENTS
        )
        yield chromium
        chromium.close()


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

    def choose_theme(self, theme):
        """Change to JupyterLab's `Light` or `Dark` theme, and wait until its colors are there."""
        self.page.evaluate(
            "t => jupyterapp.commands.execute('apputils:change-theme', {theme: `JupyterLab ${t}`})", theme
        )
        self.page.wait_for_function(
            """isDark => document.body.dataset.jpThemeLight === String(!isDark)
                && (getComputedStyle(document.body).getPropertyValue('--jp-layout-color1').trim() !== 'white') === isDark""",
            arg=theme == "Dark",
        )

    def wait_while_moving(self, is_done, *, stall_seconds=150, most_seconds=1500):
        """Wait until something is so, for as long as what the panels show still changes: a slow machine is not a
        failure."""
        start = moved = time.monotonic()
        before = None
        while not is_done():
            now = time.monotonic()
            shown = self.page.evaluate("() => [...document.querySelectorAll('.edk')].map(e => e.innerText).join()")
            if shown != before:
                before, moved = shown, now
            assert now - moved < stall_seconds, f"nothing has moved for {stall_seconds} s:\n{shown[-600:]}"
            assert now - start < most_seconds, f"not done after {most_seconds} s:\n{shown[-600:]}"
            self.page.wait_for_timeout(250)

    def wait_until_still(self, panel, *, still_seconds=1.2):
        """Wait until a panel has stayed the same for two beats of its clock, which names what widgets leave nameless."""
        panel.evaluate(STILL, round(still_seconds * 1000 / LOOK_MILLISECONDS))

    def wait_for_text(self, panel, selector, text):
        """Wait until a part of a panel holds a text, or matches a pattern, while something moves."""
        place = panel.locator(selector).first

        def is_there():
            found = place.inner_text() if place.count() else ""
            return bool(re.search(text, found)) if isinstance(text, re.Pattern) else text in found

        self.wait_while_moving(is_there)

    def photograph(self, locator, name, *, tallest=TALLEST_IMAGE):
        """A panel's image for the documentation: 256 colors are enough, and small."""
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.mouse.move(0, 0)
        self.page.evaluate("() => document.activeElement.blur()")
        self.page.set_viewport_size({"width": 1180, "height": 2600})
        self.page.wait_for_timeout(1500)  # JupyterLab goes back to the cell that ran last
        locator.evaluate("element => element.scrollIntoView()")
        self.page.wait_for_timeout(500)
        box = locator.bounding_box()
        box["height"] = min(box["height"], tallest)
        path = SHOTS / f"panel-{name}.png"
        self.page.screenshot(path=path, clip=box)
        with Image.open(path) as image:
            small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
        self.page.set_viewport_size(VIEWPORT)
