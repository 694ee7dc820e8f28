"""The style sheet's colors: texts of every tone have a contrast of 4.5 or better in both themes (WCAG 2.1, 1.4.3)."""

import re
from pathlib import Path

import pytest

import everydream_kit.panels as panels

CSS = (Path(panels.__file__).parent / "assets" / "panel.css").read_text()
LAB = {"--jp-ui-font-color1": "#212121", "--jp-layout-color1": "#ffffff", "--jp-layout-color2": "#eeeeee"}
"""JupyterLab's light theme; 0.87 of black on white is #212121."""
LAB_DARK = {"--jp-ui-font-color1": "#e2e2e2", "--jp-layout-color1": "#212121", "--jp-layout-color2": "#424242"}
"""And its dark one; 0.87 of white on #212121 is #e2e2e2."""
THEMES = {
    "plain": [".edk {"],
    "light": [".edk {"],
    "dark": [".edk {", '[data-jp-theme-light="false"] .edk {'],
    "Colab's dark": [".edk {", 'html[theme="dark"] .edk {'],
}


def variables(theme):
    """Every `--edk-` color of a theme, with the page's own variables filled in."""
    found = {}
    for head in THEMES[theme]:
        block = CSS[CSS.index("\n" + head if not CSS.startswith(head) else head) :].split("}")[0]
        found.update(re.findall(r"(--edk-[\w]+): ([^;]+);", block))
    page = {"light": LAB, "dark": LAB_DARK}.get(theme, {})
    fill = lambda match: page.get(match[1], match[2])  # noqa: E731
    return {name: re.sub(r"var\((--[\w-]+), (#\w+)\)", fill, value) for name, value in found.items()}


def luminance(color):
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    values = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_formula_is_the_standards():
    assert contrast("#000", "#ffffff") == 21
    assert contrast("#767676", "#fff") == pytest.approx(4.54, abs=0.01)  # the palest gray that passes on white


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("tone", ["text", "dim", "accent", "good", "warn", "bad"])
@pytest.mark.parametrize("ground", ["ground", "soft"])
def test_every_tone_can_be_read_on_every_ground(theme, tone, ground):
    colors = variables(theme)
    assert contrast(colors[f"--edk-{tone}"], colors[f"--edk-{ground}"]) >= 4.5
