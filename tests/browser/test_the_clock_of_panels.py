"""The page's clock of a panel, in a page of its own whose timers the test turns."""

import base64

import pytest

from everydream_kit.panels.asset_files import read_asset

RENDER = """
async source => {
  const values = {beats: 0, interval: 500, on: true, reveal: 0};
  const get = name => values[name], set = (name, value) => { values[name] = value; };
  window.model = {get, set, save_changes() {}, on() {}, off() {}};
  const clock = await import(`data:text/javascript;base64,${source}`);
  clock.default.render({model, el: document.querySelector(".edk i")});
}
"""


@pytest.mark.parametrize(("top", "beats"), [(0, 16), (5000, 4)], ids=["in view", "out of view"])
def test_a_panel_out_of_view_asks_for_news_four_times_less(page, top, beats):
    page.clock.install()
    page.set_content(f'<div style="height:{top}px"></div><div class="edk" style="height:200px"><i></i></div>')
    page.evaluate(RENDER, base64.b64encode(read_asset("clock.js").encode()).decode())
    page.clock.run_for(8000)
    assert page.evaluate("model.get('beats')") == beats


def test_a_panel_that_comes_into_view_is_asked_for_at_once(page):
    page.clock.install()
    page.set_content('<div style="height:5000px"></div><div class="edk" style="height:200px"><i></i></div>')
    page.evaluate(RENDER, base64.b64encode(read_asset("clock.js").encode()).decode())
    page.clock.run_for(500)
    before = page.evaluate("model.get('beats')")
    page.evaluate("document.querySelector('.edk').scrollIntoView()")
    page.clock.run_for(500)
    assert page.evaluate("model.get('beats')") == before + 1
