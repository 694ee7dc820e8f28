"""The walk of docs/notebooks.md, from a folder of images to a model on the Hub, with its clicks and typed fields counted."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1800)

REPOSITORY = Path(__file__).parents[2]
MOST_CLICKS, MOST_FIELDS = 12, 4


@dataclass
class Person:
    """Presses and types as a person does, and counts it: a list takes a click to open it and one to choose."""

    driver: object
    clicks: int = 0
    fields: int = 0

    def open(self, address):
        self.driver.open(address)
        self.clicks += 1

    def run_all(self):
        self.driver.run_all()
        self.clicks += 2

    def click(self, locator):
        locator.click()
        self.clicks += 1

    def choose(self, locator, label):
        locator.select_option(label=label)
        self.clicks += 2

    def type(self, locator, text, *, ends_with_enter=False):
        locator.fill(text)
        locator.press("Enter" if ends_with_enter else "Tab")
        self.fields += 1


@pytest.fixture
def images(tmp_path):
    """A folder of a person's own: four images with captions."""
    folder = tmp_path / "my drawings"
    folder.mkdir()
    for source in sorted((REPOSITORY / "everydream_kit" / "demo" / "images").glob("*.webp"))[:4]:
        for path in (source, source.with_suffix(".txt")):
            shutil.copy(path, folder)
    return folder


def written_down():
    """(clicks, typed fields) of the table in docs/notebooks.md."""
    text = (REPOSITORY / "docs" / "notebooks.md").read_text("utf-8")
    rows = re.findall(r"^\| \d+ \| (.*?) \| *(\d*) *\| *(\w*) *\|$", text, re.MULTILINE)
    return sum(int(clicks or 0) for _, clicks, _ in rows), sum(bool(typed) for _, _, typed in rows)


def with_surroundings(lab, address, **variables):
    """Point a notebook's set-up cell at the Hub stand-in."""
    path = lab.root / address.split("/doc/tree/")[1].split("?")[0]
    book = json.loads(path.read_text("utf-8"))
    book["cells"][1]["source"] = f"import os\nos.environ.update({variables!r})"
    path.write_text(json.dumps(book), "utf-8")


def test_the_walk_takes_the_clicks_that_are_written_down_and_leaves_no_token_behind(
    lab, driver, page, tmp_path, images
):
    from hub_runs import TOKEN
    from hub_stand_in import HubStandIn

    project = lab.root / "workspace" / "walk"
    project.mkdir(parents=True)
    few = {"cfgs": [3], "num_inference_steps": 4, "samples": ["guitar, ink drawing"]}
    (project / "sample_prompts.json").write_text(json.dumps(few))
    (project / "settings.json").write_text(json.dumps({"max_epochs": 8}))  # of 40: none of them takes a click
    person = Person(driver)

    driver.open(lab.copy("02_train", PROJECT="walk"))
    person.run_all()
    panel = driver.panel("Training")
    person.type(panel.get_by_label("Dataset folder"), str(images))
    person.choose(panel.get_by_label("Base model").first, "Embedded demo model")
    person.choose(panel.get_by_label("What is trained"), "lora")
    driver.wait_for_text(panel, ".edk-plan", "4 images")
    person.click(panel.get_by_role("button", name="Start training"))
    driver.wait_for_text(panel, ".edk-badge", "finished")

    with HubStandIn(tmp_path / "hub") as hub:
        hub.add_user(TOKEN, "me")
        address = lab.copy("04_share_on_the_hub", PROJECT="walk")
        home = str(tmp_path / "home")
        with_surroundings(lab, address, HF_ENDPOINT=hub.url, HF_HOME=home, HF_HUB_DISABLE_XET="1")
        person.open(address)
        person.run_all()
        setup = driver.panel("Set-up")
        person.type(setup.locator(".edk-token input"), TOKEN, ends_with_enter=True)
        setup.get_by_text("Logged in as me.").wait_for()
        panel = driver.panel("Export and share")
        person.type(panel.get_by_label("Repository"), "me/drawings")
        person.click(panel.get_by_role("button", name="Preview"))
        panel.get_by_text("nothing is uploaded yet").wait_for()
        person.click(panel.get_by_role("button", name="Push to the Hub"))
        driver.wait_while_moving(panel.get_by_role("link", name="me/drawings").count)
        assert "README.md" in hub.repos["me/drawings"].refs["main"][-1].tree
        page.keyboard.press("Escape")
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
    places = [path for path in lab.root.iterdir() if not path.name.startswith(".j")]  # else than Jupyter's own
    written = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    assert {project / "settings.json", lab.root / address.split("/doc/tree/")[1].split("?")[0]} <= set(written)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]

    assert (person.clicks, person.fields) == written_down()
    assert person.clicks <= MOST_CLICKS
    assert person.fields <= MOST_FIELDS
