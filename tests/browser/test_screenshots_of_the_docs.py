"""Takes the screenshots of the panels in `docs/images/` anew, of the quickstart's project; only when asked, since they
change."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from PIL import Image

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(os.environ.get("EDK_SCREENSHOTS") != "1", reason="takes screenshots: set EDK_SCREENSHOTS=1"),
]

TRAIN = """
import everydream_kit as edk
panel = edk.panels.train({folder!r}, preset="demo", settings={{"max_epochs": {epochs}, "sample_steps": 48}})
panel
"""
EPOCHS = int(os.environ.get("EDK_EPOCHS", "24"))


@pytest.fixture
def project():
    """The quickstart's project in a place whose name may be seen; made anew with every session of tests."""
    folder = Path(tempfile.gettempdir()) / "everydream" / "workspace" / "quickstart"
    mark = folder / f"made-by-{os.getpid()}"
    if not mark.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.touch()
    return folder


def test_the_dataset_panel(lab, driver, project):
    driver.open(lab.write("d.ipynb", f"import everydream_kit as edk\nedk.panels.dataset({str(project)!r}, demo=True)"))
    driver.run_all()
    panel = driver.panel("Dataset")
    driver.photograph(panel, "dataset", tallest=1000)
    panel.get_by_role("button", name="Report", exact=True).click()
    driver.photograph(panel, "dataset-report")


def test_the_form_of_an_action(lab, driver, project):
    source = f"import everydream_kit as edk\nedk.panels.action({str(project)!r}, 'merge')"
    driver.open(lab.write("a.ipynb", source))
    driver.run_all()
    panel = driver.panel("Merge")
    panel.get_by_label("Strength").fill("strong")
    panel.get_by_label("Model").fill("logs/jets")
    panel.get_by_label("Other").fill("lora.safetensors")
    panel.get_by_label("Out").fill("merged.safetensors")
    panel.get_by_role("button", name="Start", exact=True).click()
    driver.wait_for_text(panel, ".edk-note", "must be a number")
    driver.photograph(panel, "action")


def test_the_problems_of_a_dataset(lab, driver, project):
    mixed = project.with_name("mixed")
    shutil.rmtree(mixed, ignore_errors=True)
    shutil.copytree(Path(__file__).parents[2] / "everydream_kit" / "demo" / "images", mixed / "input")
    (mixed / "input" / "SOURCE.md").unlink()
    (mixed / "settings.json").write_text('{"resolution": 128, "resume_ckpt": "embedded", "batch_size": 4}')
    shutil.copy(mixed / "input" / "cactus.webp", mixed / "input" / "cactus (copy).webp")
    with Image.open(mixed / "input" / "guitar.webp") as image:
        image.convert("RGB").resize((image.width // 3, image.height // 3)).save(mixed / "input" / "guitar small.jpg")
    (mixed / "input" / "from-the-web.jpg").write_bytes(b"<!doctype html>")
    driver.open(lab.write("p.ipynb", f"import everydream_kit as edk\nedk.panels.dataset({str(mixed)!r})"))
    driver.run_all()
    panel = driver.panel("Dataset")
    driver.wait_for_text(panel, ".edk-tabs", "Problems (4)")
    panel.get_by_role("button", name="Problems").click()
    driver.photograph(panel, "dataset-problems")
    shutil.rmtree(mixed)


def test_the_training_panel(lab, driver, page, project):
    driver.open(lab.write("t.ipynb", TRAIN.format(folder=str(project), epochs=EPOCHS)))
    driver.run_all()
    panel = driver.panel("Training")
    if not list((project / "logs").glob("*/config.json")):
        panel.get_by_role("button", name="Start training").click()
    driver.wait_for_text(panel, ".edk-badge", "finished")
    for title in ("Progress", "Samples"):
        panel.get_by_role("button", name=title, exact=True).click()
        driver.wait_for_text(panel, ".edk-plan", "GiB memory")
        driver.photograph(panel, f"train-{title.lower()}")
    panel.get_by_role("button", name="Settings", exact=True).click()
    panel.get_by_label("Learning rate", exact=True).fill("fast")
    driver.photograph(panel, "train-settings")
    for rate in ("2e-4", "4e-4"):
        panel.get_by_role("button", name="Settings", exact=True).click()
        panel.get_by_label("Learning rate", exact=True).fill(rate)
        panel.get_by_role("button", name="Queue").click()
        panel.get_by_role("button", name="Add these settings").click()
    driver.wait_for_text(panel, ".edk-tabs", "Queue (2)")
    driver.wait_for_text(panel, ".edk-plan", "GiB memory")
    driver.photograph(panel, "train-queue")
    (project / "queue.json").unlink()


def test_set_up_compare_and_share(lab, driver, project):
    cells = (f"edk.panels.setup({str(project)!r})", f"edk.panels.compare({str(project)!r})")
    share = f"edk.panels.share({str(project)!r})"
    driver.open(lab.write("s.ipynb", "import everydream_kit as edk", *cells, share))
    driver.run_all()
    driver.photograph(driver.panel("Set-up"), "setup")
    panel = driver.panel("Compare")
    panel.get_by_role("button", name="Generate images").click()
    driver.wait_while_moving(lambda: panel.locator(".edk-pair img").count() == 2)
    driver.wait_while_moving(lambda: panel.get_by_role("button", name="Generate images").is_enabled())
    driver.photograph(panel, "compare")
    panel = driver.panel("Export and share")
    panel.get_by_label("Repository").fill("me/ink")
    panel.get_by_role("button", name="Preview").click()
    driver.wait_for_text(panel, ".edk-note", "nothing is uploaded yet")
    driver.photograph(panel, "share", tallest=1000)
