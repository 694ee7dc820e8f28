"""A person's way through the notebooks in a real JupyterLab and a real Chromium, on the embedded base."""

import json
import os
import re
import time
import zipfile

import pytest
from PIL import Image
from playwright.sync_api import expect

pytestmark = pytest.mark.timeout(1800)  # a net below the waits, which end when nothing moves any more


def latest_run(project):
    return sorted((project / "logs").glob("*-*"))[-1]


def wait_for_run(status, stall_seconds=150):
    """Wait for the end of a run that no panel shows, for as long as it reports something new."""
    moved, before = time.monotonic(), None
    while True:
        now = status.read_text() if status.exists() else ""
        if now and json.loads(now)["state"] == "finished":
            return
        if now != before:
            moved, before = time.monotonic(), now
        assert time.monotonic() - moved < stall_seconds, now or "the run never began"
        time.sleep(0.5)


def test_the_quickstart_ends_with_before_and_after(lab, driver, page):
    (lab.root / "workspace" / "quick").mkdir(parents=True)
    few = {"cfgs": [3], "num_inference_steps": 4, "samples": ["guitar, ink drawing", "penguin, ink drawing"]}
    (lab.root / "workspace" / "quick" / "sample_prompts.json").write_text(json.dumps(few))
    address = lab.copy("00_quickstart", PROJECT="quick", MAX_EPOCHS=6)
    driver.open(address)
    driver.run_all()
    panel = driver.panel("Training")
    driver.wait_for_text(panel, ".edk-facts", re.compile(r"[1-9]\d* / 36"))
    expect(page.locator(".jp-InputPrompt", has_text="[*]")).to_have_count(0)  # no cell stays with the run
    expect(panel).to_be_in_viewport()  # though Run All leaves the page at the last cell
    panel.get_by_role("button", name="Stop", exact=True).click()  # buttons answer while it trains
    driver.wait_for_text(panel, ".edk-badge", "stopped")
    compare = driver.panel("Compare")
    driver.wait_for_text(compare, ".edk-note", "has not finished (stopped)")

    driver.run_all()  # continues
    driver.wait_for_text(compare, ".edk-note", "images generated")
    expect(compare.get_by_text("after · last-quick", exact=False)).to_be_visible()
    assert compare.locator(".edk-pair img").count() == 2
    assert len(list((lab.root / "workspace" / "quick" / "logs").glob("quick-*"))) == 1

    panel.get_by_role("button", name="Progress", exact=True).click()
    panel.locator(".edk-latest .edk-over > img").first.press("Enter")
    viewer = page.get_by_role("dialog", name="Image")
    expect(viewer).to_contain_text("guitar, ink drawing, step 36")
    page.keyboard.press("ArrowRight")
    expect(viewer).to_contain_text("before training · 2 of 4")
    with page.expect_download() as download:
        viewer.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename.startswith("gs00000-000-guitar")
    page.keyboard.press("Escape")
    expect(viewer).to_have_count(0)

    page.keyboard.press("Control+s")
    page.wait_for_timeout(1500)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name="Shut Down Kernel").click()
    page.wait_for_timeout(1500)
    page.goto(address.replace("&reset", ""))
    error = page.get_by_text("Error displaying widget: model not found").first
    error.wait_for(state="attached")
    said = error.evaluate("e => [getComputedStyle(e).fontSize, getComputedStyle(e, '::after').content]")
    assert said == ["0px", '"This panel is from an earlier session. Run this cell again."']
    assert page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).length") == 0


def test_train_stop_reload_resume_and_finish(lab, driver, page):
    project = lab.project(
        "jets", max_epochs=3, max_steps=14, batch_size=2, sample_steps=12, sample_prompts="prompts.json"
    )
    prompts = {"samples": [{"prompt": "a robot, ink drawing"}], "num_inference_steps": 4, "cfgs": [4]}
    (lab.root / "prompts.json").write_text(json.dumps(prompts))
    address = lab.copy("02_train", PROJECT="jets")
    driver.open(address)
    driver.run_all()
    panel = driver.panel("Training")

    panel.get_by_label("Resolution", exact=True).fill("64")
    expect(panel.get_by_text(re.compile("32 images × 3 epochs → 14 steps"))).to_be_visible()

    rate = panel.get_by_label("Learning rate", exact=True)
    rate.fill("fast")
    expect(panel.locator(".edk-error", has_text="must be a number (got 'fast')")).to_be_visible()
    expect(panel.get_by_role("button", name="Start training")).to_be_disabled()
    rate.fill("1e-4")
    expect(panel.locator(".edk-error")).to_have_count(0)

    panel.get_by_role("button", name="Start training").click()
    driver.wait_for_text(panel, ".edk-facts", re.compile(r"[1-9]\d* / 14"))
    panel.get_by_role("button", name="Stop", exact=False).first.click()
    driver.wait_for_text(panel, ".edk-badge", "stopped")
    run = latest_run(project)
    assert list((run / "ckpts").glob("*/model_index.json"))
    assert json.loads((run / "config.json").read_text())["resolution"] == 64
    stopped_at = json.loads((run / "status.json").read_text())["step"]
    assert 0 < stopped_at < 14

    driver.open(address)  # a reload without saving: the old panel is gone
    driver.run_all()
    panel = driver.panel("Training")
    expect(panel.locator(".edk-badge").first).to_have_text("stopped")
    panel.get_by_role("button", name="Resume").click()
    driver.wait_for_text(panel, ".edk-badge", "finished")
    expect(panel.locator(".edk-facts")).to_contain_text("14 / 14")
    assert json.loads((run / "status.json").read_text())["step"] == 14
    panel.get_by_role("button", name="Progress", exact=True).click()
    expect(panel.locator("svg.edk-chart").first).to_be_visible()
    panel.get_by_role("button", name="Samples", exact=True).click()
    expect(panel.locator(".edk-samples img").first).to_be_visible()


def test_a_run_outlives_its_kernel_and_the_reopened_panel_shows_it(lab, driver, page):
    project = lab.project("night", max_steps=8, batch_size=2, resolution=64, sample_steps=None)
    address = lab.copy("02_train", PROJECT="night")
    driver.open(address)
    driver.run_all()
    panel = driver.panel("Training")
    panel.get_by_role("button", name="Start training").click()
    expect(panel.locator(".edk-badge").first).not_to_have_text("no run yet")
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Restart Kernel…")).click()
    page.get_by_role("dialog").get_by_role("button", name="Confirm Kernel Restart").click()
    status = latest_run(project) / "status.json"
    wait_for_run(status)
    driver.open(address)
    driver.run_all()
    panel = driver.panel("Training")
    expect(panel.locator(".edk-badge").first).to_have_text("finished")
    expect(panel.locator(".edk-facts")).to_contain_text("8 / 8")


def test_captions_are_edited_in_place_and_images_uploaded(lab, driver, page, tmp_path):
    project = lab.project("drawings")
    (project / "input" / "broken.jpg").write_bytes(b"no image")
    driver.open(lab.copy("01_prepare_dataset", PROJECT="drawings"))
    driver.run_all()
    panel = driver.panel("Dataset")
    caption = panel.locator(".edk-card", has_text="balloon.webp").get_by_label("Caption")
    caption.fill("a red balloon, ink drawing")
    caption.blur()
    expect(panel.get_by_text("Caption of balloon.webp written.")).to_be_visible()
    assert (project / "input" / "balloon.txt").read_text() == "a red balloon, ink drawing\n"
    panel.get_by_role("button", name="Undo").click()
    expect(caption).to_have_value("balloon, ink drawing")

    panel.get_by_role("button", name="Report", exact=True).click()
    expect(panel.get_by_role("img", name="Images in each bucket")).to_be_visible()
    panel.get_by_role("button", name="Problems (1)", exact=True).click()
    panel.get_by_role("button", name="Exclude").click()
    expect(panel.get_by_text("No problems")).to_be_visible()
    driver.wait_while_moving(
        (project / "inspect" / "report.json").is_file
    )  # the page's clock had it looked for duplicates

    data = os.urandom(12_000_000)  # more than one message of Jupyter's may hold
    (tmp_path / "big.png").write_bytes(data)
    panel.get_by_role("button", name="Add images", exact=True).click()
    with page.expect_file_chooser() as chooser:
        panel.locator(".edk-drop").click()
    chooser.value.set_files(tmp_path / "big.png")
    driver.wait_for_text(panel, ".edk-note", "1 file received.")
    assert (project / "input" / "big.png").read_bytes() == data

    (tmp_path / "big.png").write_bytes(b"another")
    (tmp_path / "big.txt").write_text("a caption")
    with page.expect_file_chooser() as chooser:
        panel.locator(".edk-drop").click()
    chooser.value.set_files([tmp_path / "big.png", tmp_path / "big.txt"])
    expect(panel.locator(".edk-drop-question")).to_contain_text("big.png already exists.")
    panel.get_by_role("button", name="Keep both").click()
    driver.wait_for_text(panel, ".edk-note", "2 files received.")
    assert (project / "input" / "big.png").read_bytes() == data
    assert (project / "input" / "big-2.png").read_bytes() == b"another"
    assert (project / "input" / "big-2.txt").read_text() == "a caption"
    panel.get_by_role("button", name="Undo").click()
    driver.wait_for_text(panel, ".edk-note", "Undone: upload of 2 files.")
    assert not (project / "input" / "big-2.png").exists()

    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(project / "input" / "balloon.webp", "air/balloon.webp")
    with page.expect_file_chooser() as chooser:
        panel.locator(".edk-drop").click()
    chooser.value.set_files(tmp_path / "more.zip")
    driver.wait_for_text(panel, ".edk-note", "1 files unpacked.")
    assert (project / "input" / "more" / "air" / "balloon.webp").is_file()
    driver.wait_for_text(
        panel, ".edk-tabs", "Problems (2)"
    )  # big.png is not an image, and the balloon is an exact duplicate

    panel.get_by_role("button", name="Masks", exact=True).click()
    canvas = panel.get_by_role("application")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 90, steps=4)
    page.mouse.up()
    panel.get_by_role("button", name="Save mask").click()
    expect(panel.get_by_text("Training uses masks from now on", exact=False)).to_be_visible()
    (file,) = (project / "input").glob("*.mask.png")
    with Image.open(file) as mask:
        painted = mask.histogram()[0]
        assert mask.histogram()[255] > painted > 0
    canvas.focus()  # by keys: the brush begins in the middle
    page.keyboard.press("Space")
    panel.get_by_role("button", name="Save mask").click()
    driver.wait_while_moving(lambda: Image.open(file).histogram()[0] > painted)
