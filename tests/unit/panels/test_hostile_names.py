"""Names that strangers give reach no `description`, which ipywidgets 7 puts into the page as HTML, and no HTML unescaped."""

import ipywidgets as widgets
import pytest
from hostile_project import SCRIPT, make_hostile_project
from panel_parts import all_widgets

from everydream_kit import panels
from everydream_kit.doctor import Check, Diagnosis

BUILDERS = {
    "setup": lambda folder: panels.setup(folder, diagnosis=Diagnosis((Check(SCRIPT, "warning", SCRIPT, SCRIPT),))),
    "dataset": panels.dataset,
    "train": panels.train,
    "compare": panels.compare,
    "share": panels.share,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_hostile_project(tmp_path_factory.mktemp("work"))


def use(name, panel):
    """Do what shows further names."""
    if name == "train":
        for fold in [*panel.form.folds, panel.plan.fold]:
            fold.set_open(True)
        panel.form.set_values({"project_name": SCRIPT})
        panel.runs.value  # noqa: B018
    if name == "dataset":
        panel.gallery.choose_found.click()
        panel.tag.value = SCRIPT
        panel.add_tag_button.click()
        panel.source.value = f"/{SCRIPT}"
        panel.source_button.click()
    if name == "compare":
        for check in panel.checks.values():
            check.value = True
        panel.comparison = panel.asked()
        panel._render(force=True)
    if name == "share":
        panel.repo.value = SCRIPT
        panel.preview_button.click()
    panel.refresh()


@pytest.mark.parametrize("name", BUILDERS)
def test_no_name_reaches_a_description_or_stands_unescaped(name, project):
    panel = BUILDERS[name](project)
    use(name, panel)
    shown = list(all_widgets(panel.box))
    html = [widget for widget in shown if isinstance(widget, widgets.HTML)]
    assert any("&lt;img src=x" in widget.value for widget in html), "the names are shown somewhere"
    assert [widget.value for widget in html if "<img src=x" in widget.value] == []
    described = [w for w in shown if hasattr(w, "description") and not isinstance(w, widgets.Button)]
    assert [w.description for w in described if "<" in w.description or "&lt;" in w.description] == []
