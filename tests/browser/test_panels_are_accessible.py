"""Every control of every panel, as a keyboard and a screen reader meet it: it has a name, takes the focus, and can be read."""

import re

import pytest
from hub_runs import make_run
from jupyter_lab import Driver
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
CONTRASTS = """
panel => {
  const paper = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const rgba = color => {
    paper.clearRect(0, 0, 1, 1); paper.fillStyle = color; paper.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = paper.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const groundOf = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.push(rgba(getComputedStyle(e).backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reduceRight((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const luminance = color => {
    const [r, g, b] = color.slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = [...panel.querySelectorAll('input:not([type=checkbox], [type=range]), select, textarea')].map(e => [e, e.value]);
  const walker = document.createTreeWalker(panel, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) texts.push([walker.currentNode.parentElement, walker.currentNode.textContent]);
  const isRead = e => {
    const place = e.getBoundingClientRect();
    return !['STYLE', 'OPTION', 'TITLE'].includes(e.tagName) && place.width > 2 && place.height > 2
      && e.checkVisibility({visibilityProperty: true}) && !e.closest(':disabled');
  };
  const contrastOf = (e, color) => {
    const ground = groundOf(e), seen = over(rgba(color), ground);
    const [high, low] = [luminance(seen), luminance(ground)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const colorOf = e => e instanceof SVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color;
  const curves = [...panel.querySelectorAll('.edk-chart .edk-line:not(.edk-faint)')].filter(isRead);
  return [
    ...texts.filter(([e, text]) => text.trim() && isRead(e)).map(([e, text]) => (
      {what: text.trim().slice(0, 60), least: 4.5, contrast: contrastOf(e, colorOf(e))})),
    ...curves.map(e => ({what: e.outerHTML.slice(0, 60), least: 3, contrast: contrastOf(e, getComputedStyle(e).stroke)})),
  ];
}
"""
"""Of texts and of curves; what they must have at least is WCAG 2.1, 1.4.3 and 1.4.11."""
LEAST = {"Set-up": 3, "Dataset": 50, "Training": 150, "Compare": 20, "Export and share": 12}
"""Controls that there must be at least, so that an empty panel does not pass."""


@pytest.fixture(scope="module")
def driver(lab, shared_page):
    """Of a page with all panels, of a project that has a run."""
    make_run(lab.project("reach") / "logs")
    driver = Driver(shared_page)
    cells = [OPEN_FOLDS if title == "Training" else call for title, call in PANELS.items()]
    driver.open(lab.write("reach.ipynb", "import everydream_kit as edk", *cells))
    driver.run_all()
    return driver


def turn_pages(driver, panel):
    """A panel's pages, one after the other, each once it stands still."""
    tabs = panel.locator(".edk-tab")
    for number in range(max(1, tabs.count())):
        if tabs.count():
            tabs.nth(number).click()
            expect(tabs.nth(number)).to_have_class(re.compile("edk-current"))  # the kernel turns the page
        driver.wait_until_still(panel)
        yield number


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_every_control_has_a_name_and_takes_the_focus_and_every_text_can_be_read(driver, theme):
    driver.choose_theme(theme)
    for title in PANELS:
        panel = driver.panel(title)
        seen = []
        for number in turn_pages(driver, panel):
            found = panel.evaluate(CONTRASTS)
            assert len(found) >= 3, (title, number)
            assert [one for one in found if one["contrast"] < one["least"]] == [], (title, number)
            if theme == "Light":  # names and focus are the same in both
                seen += panel.evaluate(CONTROLS)
        if theme == "Light":
            assert len(seen) >= LEAST[title], f"{title}: only {len(seen)} controls"
            assert [control["what"] for control in seen if not control["name"]] == [], title
            assert [control["what"] for control in seen if not control["focused"]] == [], title


CHART_TEXTS = """
panel => [...panel.querySelectorAll('.edk-chart text')].filter(text => text.checkVisibility()).map(text => {
  const chart = text.ownerSVGElement;
  return parseFloat(getComputedStyle(text).fontSize) * chart.getBoundingClientRect().width / chart.viewBox.baseVal.width;
})
"""
LEAST_PIXELS = 9.5


@pytest.mark.parametrize("width", [1180, 900, 640])
def test_texts_of_charts_can_be_read_in_wide_and_narrow_windows(driver, width):
    driver.page.set_viewport_size({"width": width, "height": 1000})
    for title, tab in (("Dataset", "Report"), ("Training", "Progress")):
        panel = driver.panel(title)
        panel.get_by_role("button", name=tab, exact=True).click()
        panel.locator(".edk-chart:visible").first.wait_for()
        driver.wait_until_still(panel)
        sizes = panel.evaluate(CHART_TEXTS)
        assert len(sizes) > 3
        assert min(sizes) >= LEAST_PIXELS, title


def test_pages_folds_and_sliders_work_from_the_keyboard(driver):
    panel, keyboard = driver.panel("Training"), driver.page.keyboard
    panel.get_by_role("button", name="Settings", exact=True).focus()
    keyboard.press("Space")
    fold = panel.locator(".edk-fold:visible").first
    expect(fold).to_have_attribute("aria-expanded", "false")
    fold.focus()
    keyboard.press("Enter")
    expect(fold).to_have_attribute("aria-expanded", "true")
    panel.get_by_label("Find a setting").fill("clip_skip")
    handle = panel.get_by_role("slider", name="Clip skip").first
    handle.focus()
    keyboard.press("ArrowRight")
    panel.locator(".widget-slider", has_text="Clip skip").first.locator(".widget-readout", has_text="1").wait_for()
    panel.get_by_role("button", name="Log", exact=True).focus()
    keyboard.press("Space")
    panel.get_by_role("log").wait_for()
    expect(panel.get_by_role("button", name="Log", exact=True)).to_have_attribute("aria-pressed", "true")
