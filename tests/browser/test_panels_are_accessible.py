"""Every control of every panel, as a keyboard and a screen reader meet it: it has a name and takes the focus."""

import re

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.timeout(600)

PANELS = {
    "Set-up": "edk.panels.setup('reach')",
    "Dataset": "edk.panels.dataset('reach')",
    "Training": "edk.panels.train('reach')",
    "Compare": "edk.panels.compare('reach')",
    "Export and share": "edk.panels.share('reach')",
}
OPEN_FOLDS = """
panel = edk.panels.train('reach')
[fold.set_open(True) for fold in panel.form.folds]
panel
"""
CONTROLS = """
panel => {
  const kinds = 'button, input, select, textarea, a[href], [tabindex]:not([tabindex="-1"]), [contenteditable=true]';
  const nameOf = element => {
    const label = element.id && panel.querySelector(`label[for="${element.id}"]`);
    const around = element.closest('label');
    const words = [element.getAttribute('aria-label'), label && label.textContent, around && around.textContent,
                   element.tagName === 'BUTTON' || element.tagName === 'A' ? element.textContent : '', element.title];
    return words.map(word => (word || '').trim()).find(word => word) || '';
  };
  return [...panel.querySelectorAll(kinds)].filter(e => e.checkVisibility({visibilityProperty: true}) && !e.disabled).map(e => {
    e.focus();
    return {what: e.outerHTML.slice(0, 160), name: nameOf(e), focused: document.activeElement === e,
            hint: (e.closest('.edk-hint, .widget-hbox') || e).textContent.length};
  });
}
"""
LEAST = {"Set-up": 3, "Dataset": 50, "Training": 150, "Compare": 20, "Export and share": 12}
"""Controls that there must be at least, so that an empty panel does not pass."""


def test_every_control_has_a_name_and_takes_the_focus(lab, driver, page):
    from hub_runs import make_run

    project = lab.project("reach")
    make_run(project / "logs")
    cells = [OPEN_FOLDS if title == "Training" else call for title, call in PANELS.items()]
    driver.open(lab.write("reach.ipynb", "import everydream_kit as edk", *cells))
    driver.run_all()
    for title in PANELS:
        panel = driver.panel(title)
        tabs = panel.locator(".edk-tab")
        seen = []
        for number in range(max(1, tabs.count())):
            if tabs.count():
                tabs.nth(number).click()
                expect(tabs.nth(number)).to_have_class(re.compile("edk-current"))  # the kernel turns the page
            driver.wait_until_still(panel)
            seen += panel.evaluate(CONTROLS)
        assert len(seen) >= LEAST[title], f"{title}: only {len(seen)} controls"
        assert [control["what"] for control in seen if not control["name"]] == [], title
        assert [control["what"] for control in seen if not control["focused"]] == [], title


def test_pages_folds_and_sliders_work_from_the_keyboard(lab, driver, page):
    lab.project("keys")
    driver.open(lab.write("keys.ipynb", "import everydream_kit as edk\nedk.panels.train('keys')"))
    driver.run_all()
    panel = driver.panel("Training")
    fold = panel.locator(".edk-fold").first
    fold.focus()
    page.keyboard.press("Enter")
    panel.locator('.edk-fold[aria-expanded="true"]').wait_for()
    panel.get_by_label("Find a setting").fill("clip_skip")
    handle = panel.get_by_role("slider", name="Clip skip").first
    handle.focus()
    page.keyboard.press("ArrowRight")
    panel.locator(".widget-slider", has_text="Clip skip").first.locator(".widget-readout", has_text="1").wait_for()
    panel.get_by_role("button", name="Log", exact=True).focus()
    page.keyboard.press("Space")
    panel.get_by_role("log").wait_for()
    expect(panel.get_by_role("button", name="Log", exact=True)).to_have_attribute("aria-pressed", "true")
