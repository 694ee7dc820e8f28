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
