"""A JupyterLab and a Chromium for the browser tests. A failed test leaves a screenshot in `tests/browser/failures/`."""

import shutil
from pathlib import Path

import pytest
from jupyter_lab import VIEWPORT, Driver, open_chromium, serve
from playwright.sync_api import expect

expect.set_options(timeout=30_000)  # as long as a page's own waits: a busy machine is slow, not broken
FAILURES = Path(__file__).parent / "failures"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    if shutil.which("chromium") is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with serve(tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture(scope="module")  # not session: while it lives, its event loop would keep nbclient from running
def browser():
    with open_chromium() as chromium:
        yield chromium


def open_page(browser):
    """A page of a browser context of its own, which takes cookies, storage and the page along when it is closed."""
    page = browser.new_context(viewport=VIEWPORT).new_page()
    page.set_default_timeout(30_000)
    return page


@pytest.fixture
def page(browser):
    page = open_page(browser)
    yield page
    page.context.close()


@pytest.fixture(scope="module")
def shared_page(browser):
    """For tests that look at the same panels: opening a notebook takes 15 s of processor time."""
    page = open_page(browser)
    yield page
    page.context.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    page = item.funcargs.get("page") or item.funcargs.get("shared_page")
    if report.when == "call" and report.failed and page is not None:
        FAILURES.mkdir(exist_ok=True)
        page.screenshot(path=FAILURES / f"{item.name}.png")
    return report


@pytest.fixture
def driver(page):
    return Driver(page)
