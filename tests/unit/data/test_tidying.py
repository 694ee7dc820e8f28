"""Preparation steps: originals stay, dry runs touch nothing, and what was changed can be undone."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from everydream_kit.data.changes import undo
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.data.tagging import captions_from_table, edit_tags
from everydream_kit.data.tidying import convert_images, exclude_duplicates, resize_images, split_validation
from everydream_kit.errors import ConfigError, DataError


def noise(width, height, seed):
    """Coarse colored noise: an image of its own for each seed, that survives being resized."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "cats"
    (root / "sub").mkdir(parents=True)
    noise(400, 300, 0).save(root / "a.jpg", quality=95)
    noise(300, 400, 1).save(root / "sub" / "b.png")
    noise(60, 40, 2).save(root / "small.png")
    (root / "a.txt").write_text("a cat, gray, sitting")
    (root / "sub" / "b.txt").write_text("a cat, black\na black cat, night")
    (root / "sub" / "multiply.txt").write_text("2")
    return root


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


STEPS = {
    "resize": lambda root, **o: resize_images(root, root.parent / "out", megapixels=0.03, **o),
    "convert": lambda root, **o: convert_images(root, root.parent / "out", **o),
    "duplicates": lambda root, **o: exclude_duplicates(root, root.parent / "out", **o),
    "split": lambda root, **o: split_validation(root, root.parent / "out", share=0.4, **o),
    "tags": lambda root, **o: edit_tags(root, add=["indoors"], **o),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_dry_run_says_what_would_happen_and_touches_nothing(folder, step):
    noise(400, 300, 0).save(folder / "again.png")
    before = snapshot(folder.parent)
    estimated = STEPS[step](folder, dry_run=True)
    assert snapshot(folder.parent) == before
    assert estimated.changes
    assert "nothing was touched" in estimated.text
    done = STEPS[step](folder)
    assert done.changes == estimated.changes
    assert snapshot(folder.parent) != before


@pytest.mark.parametrize("step", ["duplicates", "split", "tags"])
def test_what_changes_the_dataset_can_be_undone(folder, step):
    noise(400, 300, 0).save(folder / "again.png")
    before = snapshot(folder)
    report = STEPS[step](folder)
    assert snapshot(folder) != before
    assert str(report.journal) in report.text
    undo(report.journal)
    assert snapshot(folder) == before
    with pytest.raises(DataError, match="no such journal"):
        undo(report.journal)


@pytest.mark.parametrize("step", ["duplicates", "split", "tags"])
def test_a_journal_goes_where_its_folders_go(folder, tmp_path, step):
    noise(400, 300, 0).save(folder / "again.png")
    before = snapshot(folder)
    report = STEPS[step](folder)
    assert str(tmp_path) not in report.journal.read_text()
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    undo(moved / report.journal.relative_to(tmp_path))
    assert snapshot(moved / folder.relative_to(tmp_path)) == before
    moved.rename(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        {"do": "write", "path": ["root", "../victim.txt"], "before": None},
        {"do": "write", "path": ["root", "{victim}"], "before": "AAAA"},
        {"do": "write", "path": ["root", "out/victim.txt"], "before": "AAAA"},
        {"do": "move", "path": ["root", "out/victim.txt"], "to": ["root", "a.txt"]},
        {"do": "move", "path": ["root", "a.txt"], "to": ["root", "../victim.txt"]},
        {"do": "write", "path": ["elsewhere", "victim.txt"], "before": None},
        {"do": "write", "path": ["root", "a.txt"], "before": "no base64!"},
        {"do": "delete", "path": ["root", "a.txt"], "before": None},
        {"do": "write", "path": 7, "before": None},
        ["write", "{victim}", None],
    ],
    ids=str,
)
def test_a_strangers_journal_names_no_file_outside(folder, tmp_path, line):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    (folder / "out").symlink_to(tmp_path)
    journal = tmp_path / "undo.jsonl"
    text = json.dumps(line).replace("{victim}", str(victim))
    journal.write_text(json.dumps({"undo": 2, "root": "cats"}) + "\n" + text + "\n")
    before = snapshot(folder)
    if isinstance(line, list):  # a line that is not a step is skipped, and reported
        assert len(undo(journal).problems) == 1
    else:
        with pytest.raises(DataError, match=r"undo\.jsonl: "):
            undo(journal)
    assert victim.read_text() == "mine"
    assert snapshot(folder) == before


@pytest.mark.parametrize("root", ["/", "..", "../..", "../../home", "a/b", "{absolute}", None, "C:\\Users"])
def test_a_strangers_journal_chooses_no_far_folder(folder, tmp_path, root):
    journal = folder / "undo.jsonl"
    named = str(tmp_path) if root == "{absolute}" else root
    journal.write_text(
        json.dumps({"undo": 2, "root": named}) + "\n" + '{"do": "write", "path": ["root", "x.txt"], "before": "AAAA"}\n'
    )
    with pytest.raises(DataError, match=r"undo\.jsonl: "):
        undo(journal)
    assert not list(tmp_path.rglob("x.txt"))


def test_undo_of_a_step_whose_side_folder_stands_far_away_is_reported_the_folders(folder, tmp_path):
    noise(400, 300, 0).save(folder / "again.png")
    before = snapshot(folder)
    report = exclude_duplicates(folder, tmp_path / "far" / "away" / "side")
    with pytest.raises(DataError, match=r"is not next to it\. If that is right, give root="):
        undo(report.journal)
    undo(report.journal, root=folder)
    assert snapshot(folder) == before


def test_a_journal_that_a_kill_cut_off_still_undoes_the_rest_and_takes_a_second_step(folder):
    before = snapshot(folder)
    report = STEPS["tags"](folder)
    with report.journal.open("a") as file:
        file.write('{"do": "write", "pa')
    edit_tags(folder, add=["later"])
    undone = undo(report.journal)
    assert snapshot(folder) == before
    assert len(undone.problems) == 1


@pytest.mark.parametrize("step", ["duplicates", "split", "tags"])
def test_a_step_changes_nothing_behind_a_link_out_of_the_dataset(folder, tmp_path, step):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number in range(6):
        noise(200, 150, number).save(elsewhere / f"again{number}.png")
        (elsewhere / f"again{number}.txt").write_text("not yours")
    (folder / "linked").symlink_to(elsewhere)
    before = snapshot(elsewhere)
    report = STEPS[step](folder)
    assert snapshot(elsewhere) == before
    assert any("a link leads to" in problem.cause for problem in report.problems)


@pytest.mark.parametrize("step", ["resize", "convert", "tags"])
def test_prepared_links_at_temporary_names_are_not_written_through(folder, tmp_path, step):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a.txt.partial", "a.jpg.partial", "a.webp.partial"):
        (folder / name).symlink_to(victim)
        (out / name).symlink_to(victim)
    STEPS[step](folder)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("step", ["resize", "convert"])
def test_copies_leave_the_originals_and_take_captions_and_settings_along(folder, step):
    before = snapshot(folder)
    STEPS[step](folder)
    assert snapshot(folder) == before
    copies = snapshot(folder.parent / "out")
    texts = {name: content for name, content in before.items() if name.endswith(".txt")}
    assert {name: content for name, content in copies.items() if name.endswith(".txt")} == texts
    assert len(copies) == len(before)
    again = STEPS[step](folder)
    assert not again.changes


def test_only_large_images_are_resized(folder):
    report = resize_images(folder, folder.parent / "out", megapixels=0.03, quality=90)
    out = folder.parent / "out"
    with Image.open(out / "a.jpg") as a, Image.open(out / "sub" / "b.png") as b:
        assert (a.size, a.format) == ((200, 150), "JPEG")
        assert (b.size, b.format) == ((150, 200), "PNG")
    assert (out / "small.png").read_bytes() == (folder / "small.png").read_bytes()
    assert [change.what for change in report.changes].count("resized") == 2


def test_resizing_follows_exif_and_keeps_the_color_profile(folder):
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(400, 300, 5).save(folder / "turned.jpg", exif=exif, icc_profile=profile)
    resize_images(folder, folder.parent / "out", megapixels=0.03)
    with Image.open(folder.parent / "out" / "turned.jpg") as image:
        assert image.size == (150, 200)
        assert image.getexif().get(0x0112, 1) == 1
        assert image.info["icc_profile"] == profile


def test_converting_puts_a_background_behind_transparency_for_jpeg_only(folder):
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folder / "clear.png")
    convert_images(folder, folder.parent / "jpg", suffix=".jpg", background="#0000ff")
    convert_images(folder, folder.parent / "webp", suffix=".webp")
    with Image.open(folder.parent / "jpg" / "clear.jpg") as image:
        assert image.getpixel((30, 30))[2] > 250
    with Image.open(folder.parent / "webp" / "clear.webp") as image:
        assert image.mode == "RGBA"
    assert (folder.parent / "jpg" / "a.jpg").read_bytes() == (folder / "a.jpg").read_bytes()


def test_two_images_that_would_become_one_file_are_named(folder):
    noise(100, 100, 9).save(folder / "a.png")
    report = convert_images(folder, folder.parent / "out", suffix=".webp")
    assert ["another image becomes a.webp too" in problem.cause for problem in report.problems] == [True]


def test_the_best_of_duplicates_stays_and_the_others_go_with_their_captions(folder):
    noise(200, 150, 0).save(folder / "smaller copy.jpg", quality=80)
    (folder / "smaller copy.txt").write_text("a copy")
    (folder / "sub" / "same.png").write_bytes((folder / "sub" / "b.png").read_bytes())
    report = exclude_duplicates(folder)
    side = folder.parent / "cats-duplicates"
    exclude = {str(p.relative_to(side)) for p in side.rglob("*") if p.is_file()} - {"undo.jsonl"}
    assert exclude == {"smaller copy.jpg", "smaller copy.txt", "sub/same.png"}
    assert (folder / "a.jpg").exists()
    assert (folder / "sub" / "b.png").exists()  # it has the caption
    assert any("duplicate of a.jpg" in change.what for change in report.changes)


def test_without_near_only_equal_files_go(folder):
    noise(200, 150, 0).save(folder / "smaller copy.jpg", quality=80)
    assert exclude_duplicates(folder, near=False).changes == []


def test_a_split_moves_a_share_and_keeps_what_looks_alike_together(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    for number in range(16):
        noise(120, 90, number).save(root / f"{number:02}.png")
        noise(80, 60, number).save(root / f"{number:02} small.png")
    (root / "local.yaml").write_text("multiply: 2\n")
    split_validation(root, tmp_path / "val", share=0.25, seed=3)
    moved = {path.name for path in (tmp_path / "val").glob("*.png")}
    assert len(moved) == 8
    assert all(("small" in name and name.replace(" small", "") in moved) or "small" not in name for name in moved)
    assert (tmp_path / "val" / "local.yaml").read_text() == "multiply: 2\n"
    assert (root / "local.yaml").exists()
    assert len(list(root.glob("*.png"))) == 24


@pytest.mark.parametrize("target", [".", "sub/out", ".."])
def test_targets_in_or_around_the_dataset_are_refused(folder, target):
    with pytest.raises(ConfigError, match="must lie outside"):
        resize_images(folder, folder / target)


# --- captions ------------------------------------------------------------------------------------------------------


def test_tags_are_added_once_and_removed_from_every_line(folder):
    edit_tags(folder, add=["indoors", "Sitting"], remove=["BLACK"])
    assert (folder / "a.txt").read_text() == "a cat, gray, sitting, indoors"
    assert (folder / "sub" / "b.txt").read_text() == "a cat, indoors, Sitting\na black cat, night, indoors, Sitting"
    assert (folder / "small.txt").read_text() == "small, indoors, Sitting"  # it was captioned by its name
    edit_tags(folder, add=["first"], position="start")
    assert (folder / "a.txt").read_text() == "a cat, first, gray, sitting, indoors"


def test_captions_in_settings_files_are_left_alone_by_name(folder):
    (folder / "small.yaml").write_text("main_prompt: a cat # mine\n")
    report = edit_tags(folder, add=["indoors"])
    assert (folder / "small.yaml").read_text() == "main_prompt: a cat # mine\n"
    assert not (folder / "small.txt").exists()
    assert [p.path.endswith("small.png") for p in report.problems] == [True]


@pytest.mark.parametrize("options", [{}, {"add": ["a, b"]}, {"remove": ["a, b"]}])
def test_tags_that_mean_nothing_are_refused(folder, options):
    with pytest.raises(ConfigError, match="edit_tags"):
        edit_tags(folder, **options)


ROWS = [("small.png", "a small cat"), ("sub/b.png", "the black cat"), ("missing.png", "none")]
TABLES = {
    "t.csv": "file_name,text\n" + "".join(f"{name},{text}\n" for name, text in ROWS),
    "t.tsv": "\ufeffImage\tCaption\n" + "".join(f"{name}\t{text}\n" for name, text in ROWS),
    "t.jsonl": "".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in ROWS),
    "t.json": json.dumps(dict(ROWS)),
    "list.json": json.dumps([{"image": n, "caption": t} for n, t in ROWS]),
}


@pytest.mark.parametrize("name", TABLES)
def test_captions_come_from_tables_of_every_kind(folder, tmp_path, name):
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8")
    report = captions_from_table(tmp_path / name, folder)
    assert (folder / "small.txt").read_text() == "a small cat"
    assert (folder / "sub" / "b.txt").read_text().startswith("a cat, black")  # there was one
    assert [p.path.rpartition("/")[2] for p in report.problems] == ["b.png", "missing.png"]
    captions_from_table(tmp_path / name, folder, overwrite=True)
    assert (folder / "sub" / "b.txt").read_text() == "the black cat"
    undo(report.journal)
    assert (folder / "sub" / "b.txt").read_text().startswith("a cat, black")
    assert not (folder / "small.txt").exists()


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"image": ' + "9" * 6000 + "}", "[3]", "{"], ids=len)
def test_a_table_that_is_no_json_is_one_error(folder, tmp_path, suffix, text):
    table = tmp_path / f"t{suffix}"
    table.write_text(text)
    with pytest.raises(DataError, match="cannot be read as a table of captions"):
        captions_from_table(table, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a,b\n1,2\n", "none of the columns"), ("image,caption\n", "has no rows"), ("image,caption\nx.png\n", "row 1")],
)
def test_a_table_that_cannot_be_used_is_said_with_its_cause(folder, tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        captions_from_table(tmp_path / "t.csv", folder)


def test_a_kohya_table_gets_a_cure_that_works(tmp_path):
    for number, name in enumerate(["x/a.png", "x/twin.png", "y/twin.png"]):
        noise(60, 40, number).save(_made(tmp_path / "set" / name))
    table = tmp_path / "set" / "meta_cap.json"
    table.write_text(json.dumps({"gone": "z"}))
    [problem] = scan_dataset(tmp_path / "set").problems
    assert "captions-from-table" not in problem.cure
    table.write_text(json.dumps({"a": "a cat", "twin": "two", "gone": "z"}))
    [problem] = scan_dataset(tmp_path / "set").problems
    assert f"everydream tidy captions-from-table {table} {tmp_path / 'set'} writes" in problem.cure
    report = captions_from_table(table, tmp_path / "set")
    assert (tmp_path / "set" / "x" / "a.txt").read_text() == "a cat"
    causes = {one.path: str(one) for one in report.problems}
    assert causes["twin"] == "twin: 2 images have this name: x/twin.png, y/twin.png. Give its path in the folder."
    assert causes["gone"].startswith("gone: there is no such image in the folder. ")


@pytest.mark.parametrize("step", ["convert", "split"])
def test_captions_of_a_folders_table_go_with_copied_and_moved_images(tmp_path, step):
    names = [f"x/{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        noise(60, 40, number).save(_made(tmp_path / "set" / name))
    table = "".join(json.dumps({"file_name": name, "text": f"image {name[2]}"}) + "\n" for name in names)
    (tmp_path / "set" / "metadata.jsonl").write_text(table)
    if step == "convert":
        convert_images(tmp_path / "set", tmp_path / "new", suffix=".webp")
    else:
        split_validation(tmp_path / "set", tmp_path / "new", share=0.5)
    dataset = scan_dataset(tmp_path / "new")
    assert len(dataset) == (4 if step == "convert" else 2)
    for index in range(len(dataset)):
        assert dataset.caption(index).text == f"image {Path(dataset.path(index)).stem}"


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
