"""Scanning folders, indexes and several roots: every rule of who says what about an image."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from scanned_folders import put, scan

from everydream_kit.actions.dataset_report import report_dataset
from everydream_kit.data.captions import Tag
from everydream_kit.data.dataset import Defaults
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.errors import DataError


def test_every_extension_is_found_in_every_folder_but_dot_names(tmp_path):
    names = ["a.jpg", "b.JPEG", "c.png", "d.bmp", "e.webp", "sub/f.jfif", "sub/deep/g.PNG"]
    for name in [*names, ".hidden.png", ".git/h.png"]:
        if name.endswith("jfif"):
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (48, 32)).save(path, "JPEG")
        else:
            put(tmp_path, name)
    put(tmp_path, "notes.md", "no image")
    assert sorted(scan(tmp_path)) == sorted(names)


def test_captions_come_from_text_next_to_the_image_or_from_its_name(tmp_path):
    for name in ("a red car_1.png", "b.png", "c.png", "d_2.png"):
        put(tmp_path, name)
    put(tmp_path, "b.txt", "a cat, red\n")
    put(tmp_path, "c.caption", "a dog")
    put(tmp_path, "d_2.txt", "")
    found = scan(tmp_path)
    assert {key: image.caption.text for key, image in found.items()} == {
        "a red car_1.png": "a red car",
        "b.png": "a cat, red",
        "c.png": "a dog",
        "d_2.png": "",  # an empty file is the empty caption, not the file name
    }


def test_a_yaml_says_everything_about_its_image(tmp_path):
    put(tmp_path, "a.png")
    put(
        tmp_path,
        "a.yaml",
        "main_prompt: a cat\nrating: 0.5\nmax_caption_length: 30\nmultiply: 2.5\ncond_dropout: 0\nflip_p: 0.5\n"
        "shuffle_tags: yes\nkeep_tags: 1\nbatch_id: cats\nloss_scale: 0.25\n"
        "tags:\n  - tag: red\n  - small\n  - {tag: big hat, weight: 3}\n",
    )
    image = scan(tmp_path, cond_dropout=0.1)["a.png"]
    assert image.caption.main_prompt == "a cat"
    assert image.caption.tags == (Tag("big hat", 3.0), Tag("red"), Tag("small"))  # heavy ones first
    assert image.caption.max_length == 30
    assert (image.multiply, image.cond_dropout, image.flip_p, image.rating) == (2.5, 0.0, 0.5, 0.5)
    assert (image.shuffle_tags, image.keep_tags, image.batch_id, image.loss_scale) == (True, 1, "cats", 0.25)


def test_words_stay_words_in_yaml(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "a.yml", "main_prompt: 1984\ntags: [no, 2020-01-01, 'on', 007]\n")
    assert scan(tmp_path)["a.png"].caption.text == "1984, no, 2020-01-01, on, 007"


@pytest.mark.parametrize(
    ("sidecar", "expected"),
    [
        ({"caption": "a cat, red"}, ["a cat, red"]),
        ({"caption": ["a cat, red", "a photo"]}, ["a cat, red", "a photo"]),
        ({"main_prompt": "a cat", "tags": "red, blue"}, ["a cat, red, blue"]),
        ({"tags": ["red"]}, ["name, red"]),
        ({"multiply": 2}, ["name"]),
        ({"main_prompt": ""}, [""]),
    ],
)
def test_a_json_next_to_an_image_speaks_like_a_yaml(tmp_path, sidecar, expected):
    put(tmp_path, "name_1.png")
    put(tmp_path, "name_1.json", json.dumps(sidecar))
    assert [choice.text for choice in scan(tmp_path)["name_1.png"].caption.choices] == expected


def test_later_files_next_to_an_image_win_and_their_tags_add_up(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "a.txt", "from txt, one")
    put(tmp_path, "a.yaml", "main_prompt: from yaml\ntags: [two]")
    assert scan(tmp_path)["a.png"].caption.text == "from yaml, two, one"


def test_several_lines_are_one_caption_or_one_each(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "a.txt", "a cat, red\na photo of a cat\n")
    assert scan(tmp_path)["a.png"].caption.text == "a cat, red a photo of a cat"
    choices = scan(tmp_path, caption_lines="choose")["a.png"].caption.choices
    assert [choice.text for choice in choices] == ["a cat, red", "a photo of a cat"]


def test_a_folders_tags_are_added_to_every_one_of_several_captions(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "a.txt", "a cat, red\na photo of a cat\n")
    put(tmp_path, "global.yaml", "tags: [by foo]")
    choices = scan(tmp_path, caption_lines="choose")["a.png"].caption.choices
    assert [choice.text for choice in choices] == ["a cat, red, by foo", "a photo of a cat, by foo"]


def test_global_settings_reach_down_and_local_ones_stay(tmp_path):
    for name in ("a.png", "sub/b.png", "sub/deep/c.png", "other/d.png"):
        put(tmp_path, name)
    put(tmp_path, "global.yaml", "flip_p: 0.5\nshuffle_tags: true\ntags: [by foo]")
    put(tmp_path, "sub/local.yaml", "flip_p: 0.25\nshuffle_tags: false\nmultiply: 3")
    found = scan(tmp_path)
    assert {key: (p.flip_p, p.shuffle_tags, p.multiply) for key, p in found.items()} == {
        "a.png": (0.5, True, 1.0),
        "sub/b.png": (0.25, False, 3.0),
        "sub/deep/c.png": (0.5, True, 1.0),
        "other/d.png": (0.5, True, 1.0),
    }
    assert found["sub/deep/c.png"].caption.text == "c, by foo"


def test_a_nearer_global_wins_over_one_above(tmp_path):
    put(tmp_path, "sub/a.png")
    put(tmp_path, "global.yaml", "multiply: 2\nloss_scale: 0.5\nmain_prompt: above")
    put(tmp_path, "sub/global.yaml", "multiply: 3\nmain_prompt: near")
    image = scan(tmp_path)["sub/a.png"]
    assert (image.multiply, image.loss_scale, image.caption.text) == (3.0, 0.5, "near")


@pytest.mark.parametrize(
    ("file", "content", "attribute", "value"),
    [
        ("multiply.txt", "2.5\n", "multiply", 2.5),
        ("multiply.txt", "0", "multiply", 0.0),
        ("cond_dropout.txt", "0.3", "cond_dropout", 0.3),
        ("flip_p.txt", " 0.5 ", "flip_p", 0.5),
        ("shuffle_tags.txt", "", "shuffle_tags", True),
        ("shuffle_tags.txt", "false", "shuffle_tags", False),
        ("batch_id.txt", "night\n", "batch_id", "night"),
        ("loss_scale.txt", "0.1", "loss_scale", 0.1),
    ],
)
def test_one_value_files_hold_for_their_folder_only(tmp_path, file, content, attribute, value):
    put(tmp_path, "here/a.png")
    put(tmp_path, "here/below/b.png")
    put(tmp_path, f"here/{file}", content)
    defaults = {"cond_dropout": 0.04, "shuffle_tags": True}
    found = scan(tmp_path, **defaults)
    assert getattr(found["here/a.png"], attribute) == value
    plain = {"multiply": 1.0, "flip_p": 0.0, "batch_id": None, "loss_scale": 1.0, **defaults}
    assert getattr(found["here/below/b.png"], attribute) == plain[attribute]


def test_run_defaults_reach_every_image_that_says_nothing_else(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "sub/b.png")
    put(tmp_path, "sub/local.yaml", "flip_p: 0\nkeep_tags: 0")
    found = scan(tmp_path, flip_p=0.5, shuffle_tags=True, keep_tags=2, cond_dropout=0.2)
    assert (found["a.png"].flip_p, found["a.png"].shuffle_tags, found["a.png"].keep_tags) == (0.5, True, 2)
    assert (found["sub/b.png"].flip_p, found["sub/b.png"].keep_tags, found["sub/b.png"].cond_dropout) == (0, 0, 0.2)
    dataset = replace(scan_dataset(tmp_path, flip_p=0.5), defaults=Defaults(flip_p=0.0, cond_dropout=0.0))
    assert (dataset.image(0).flip_p, dataset.image(0).cond_dropout) == (0.0, 0.0)


def test_an_index_lists_images_relative_to_itself(tmp_path, monkeypatch):
    for name in ("pics/a_1.png", "pics/b.png", "elsewhere/c.png"):
        put(tmp_path, name)
    put(tmp_path, "pics/b.txt", "from next to")
    entries = [
        {"image": "pics/a_1.png", "caption": "a cat, red", "multiply": 2},
        {"image": "pics/b.png", "flip_p": 0.5},
        {"image": str(tmp_path / "elsewhere/c.png"), "caption": ""},
    ]
    index = put(tmp_path, "index.json", json.dumps(entries))
    monkeypatch.chdir("/")  # the working folder means nothing
    dataset = scan_dataset(index)
    assert dataset.problems == []
    images = [dataset.image(i) for i in range(3)]
    assert [(p.caption.text, p.multiply, p.flip_p) for p in images] == [
        ("a cat, red", 2.0, 0.0),
        ("from next to", 1.0, 0.5),
        ("", 1.0, 0.0),
    ]
    assert dataset.key(0) == "pics/a_1.png"
    assert all(Path(p.path).is_file() for p in images)


def test_broken_index_entries_are_named_and_the_others_used(tmp_path):
    put(tmp_path, "a.png")
    entries = [{"image": "a.png"}, {"caption": "x"}, 7, {"image": "gone.png"}, {"image": "a.png", "flip_p": 2}]
    dataset = scan_dataset(put(tmp_path, "index.json", json.dumps(entries)))
    assert len(dataset) == 1
    causes = sorted(problem.cause for problem in dataset.problems)
    assert causes == [
        "an object with an image is expected, found a number",
        "cannot be read: No such file or directory",
        "flip_p: a number from 0 to 1 is expected, found 2",
        "there is no image in it",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{]", r"line 1, column 2: not valid JSON"),
        ("{}", "holds a mapping, but an index is a list"),
        ("[NaN]", "NaN"),
        ('{"a": {"caption": "x"}}', r"everydream tidy captions-from-table .*index\.json FOLDER"),
    ],
)
def test_an_index_that_is_none_is_an_error(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        scan_dataset(put(tmp_path, "index.json", content))


def test_several_roots_in_all_forms(tmp_path):
    put(tmp_path, "one/a.png")
    put(tmp_path, "two/a.png")
    put(tmp_path, "x/two/a.png")
    index = put(tmp_path, "three/list.json", json.dumps([{"image": "../one/a.png", "caption": "listed"}]))
    multi = {
        "resolver": "multi",
        "resolvers": [
            {"resolver": "directory", "path": str(tmp_path / "one")},
            {"resolver": "json", "path": str(index)},
        ],
    }
    dataset = scan_dataset(multi)
    assert [dataset.image(i).caption.text for i in range(2)] == ["a", "listed"]
    dataset = scan_dataset([str(tmp_path / "one"), tmp_path / "two", multi, str(tmp_path / "x/two")])
    keys = [dataset.key(i) for i in range(len(dataset))]
    assert keys == ["one/a.png", "two/a.png", "one#2/a.png", "three/../one/a.png", "two#4/a.png"]
    assert len(set(dataset.key_hashes.tolist())) == 5


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("no/such/folder/at all", "there is no such folder. Check the spelling"),
        ([], "the list is empty"),
        ({"resolver": "magic"}, "an object names a resolver"),
        ({"resolver": "multi"}, "an object names a resolver"),
        (7, "a folder is expected, found a number"),
        (__file__, r"not a folder, a \.json index or an archive"),
    ],
)
def test_roots_of_no_known_kind_are_refused(root, message):
    with pytest.raises(DataError, match=message):
        scan_dataset(root)


def test_sizes_are_those_after_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.png", "c.webp"):
        Image.new("RGB", (48, 32)).save(tmp_path / name, exif=exif)
    assert {(p.width, p.height) for p in scan(tmp_path).values()} == {(32, 48)}


def test_masks_are_no_images_and_are_found_when_asked_for(tmp_path):
    put(tmp_path, "a.png")
    put(tmp_path, "a.mask.png")
    put(tmp_path, "alone.mask.png")
    Image.new("RGBA", (48, 32)).save(tmp_path / "b.png")
    assert {key: p.mask_path for key, p in scan(tmp_path).items()} == dict.fromkeys(
        ["a.png", "alone.mask.png", "b.png"]
    )
    masks = {key: p.mask_path for key, p in scan(tmp_path, loss_mask="file").items()}
    assert masks == {"a.png": str(tmp_path / "a.mask.png"), "alone.mask.png": None, "b.png": None}
    assert scan(tmp_path, loss_mask="alpha")["b.png"].mask_path == str(tmp_path / "b.png")


MASK_NAMES = {
    "the stem": ("cat.jpg", "cat.mask.png"),
    "upper case": ("cat.jpg", "CAT.MASK.PNG"),
    "the image in upper case": ("IMG_1.JPG", "img_1.mask.png"),
    "the whole name": ("cat.jpg", "cat.jpg.mask.png"),
    "decomposed": ("b\u00e4r.jpg", "ba\u0308r.mask.png"),
    "composed": ("ba\u0308r.jpg", "b\u00e4r.Mask.Png"),
}


@pytest.mark.parametrize("with_cache", [False, True])
@pytest.mark.parametrize("name", MASK_NAMES)
def test_masks_are_matched_like_captions(tmp_path, name, with_cache):
    image, mask = MASK_NAMES[name]
    put(tmp_path, f"sub/{image}")
    put(tmp_path, f"sub/{mask}")
    how = {"loss_mask": "file", **({"cache_dir": tmp_path / ".cache"} if with_cache else {})}
    for _ in range(2):
        dataset = scan_dataset(tmp_path, **how)
        assert [dataset.image(n).mask_path for n in range(len(dataset))] == [str(tmp_path / "sub" / mask)]


def test_a_mask_that_fits_another_image_to_the_letter_is_that_images(tmp_path):
    for one in ("cat.png", "CAT.png", "cat.mask.png"):
        put(tmp_path, one)
    masks = {key: p.mask_path for key, p in scan(tmp_path, loss_mask="file").items()}
    assert masks == {"cat.png": str(tmp_path / "cat.mask.png"), "CAT.png": None}


def test_an_index_finds_captions_and_masks_as_a_folder_does(tmp_path):
    for one in ("IMG_1.JPG", "img_1.mask.png", "cat.png", "cat.png.mask.png"):
        put(tmp_path, one)
    (tmp_path / "IMG_1.TXT").write_text("a red car")
    (tmp_path / "cat.png.txt").write_text("a cat")
    (tmp_path / "index.json").write_text('[{"image": "IMG_1.JPG"}, {"image": "cat.png"}, {"image": "no/x.png"}]')
    dataset = scan_dataset(tmp_path / "index.json", loss_mask="file")
    found = {Path(dataset.image(n).path).name: dataset.image(n) for n in range(len(dataset))}
    assert {name: dataset.caption(n).text for n, name in enumerate(found)} == {
        "IMG_1.JPG": "a red car",
        "cat.png": "a cat",
    }
    masks = {name: Path(image.mask_path).name for name, image in found.items()}
    assert masks == {"IMG_1.JPG": "img_1.mask.png", "cat.png": "cat.png.mask.png"}


def test_the_order_does_not_depend_on_threads_and_progress_counts_to_the_end(tmp_path):
    for number in range(600):
        put(tmp_path, f"f{number % 3}/{number}.bmp")
    seen: list[int] = []
    one = scan_dataset(tmp_path, num_threads=1)
    many = scan_dataset(tmp_path, num_threads=8, progress=seen.append)
    assert list(one.paths) == list(many.paths)
    assert seen[-1] == 600
    assert seen == sorted(seen)


def test_links_to_folders_are_followed_once_round(tmp_path):
    put(tmp_path, "data/a.png")
    put(tmp_path, "other/b.png")
    (tmp_path / "data/link").symlink_to(tmp_path / "other")
    (tmp_path / "data/loop").symlink_to(tmp_path / "data")
    dataset = scan_dataset(tmp_path / "data")
    assert list(dataset.paths) == ["a.png", "link/b.png"]
    assert [(p.cause, p.skipped) for p in dataset.problems] == [("a link back to a folder above it", False)]


def test_a_subset_keeps_keys_captions_and_settings(tmp_path):
    for number in range(5):
        put(tmp_path, f"{number}.png")
        put(tmp_path, f"{number}.txt", f"caption {number}")
    dataset = scan_dataset(tmp_path)
    part = dataset.subset([3, 1])
    assert [part.key(i) for i in range(2)] == ["3.png", "1.png"]
    assert [part.image(i) for i in range(2)] == [dataset.image(3), dataset.image(1)]
    assert part.key_hashes.tolist() == dataset.key_hashes[[3, 1]].tolist()
    assert len(dataset.subset([])) == 0


def test_an_empty_folder_is_an_empty_dataset_with_a_cure(tmp_path):
    dataset = scan_dataset(tmp_path)
    assert len(dataset) == 0
    assert [str(problem) for problem in dataset.problems] == [
        f"{tmp_path}: holds no image (.jpg, .jpeg, .jfif, .jpe, .png, .bmp, .webp, .gif, .tif, .tiff, .avif, .heic, "
        ".heif). Give the folder that holds yours."
    ]


def test_an_empty_index_says_that_it_holds_no_image(tmp_path):
    index = put(tmp_path, "index.json", "[]")
    [problem] = scan_dataset(index).problems
    assert (problem.path, problem.cause.partition(" (")[0]) == (str(index), "holds no image")


def test_a_folder_of_archives_says_to_give_the_archive(tmp_path):
    for name in ("a.zip", "b.tar.gz"):
        (tmp_path / name).write_bytes(b"")
    [problem] = scan_dataset(tmp_path).problems
    assert problem.cause == "holds no image, but a.zip, b.tar.gz"
    assert problem.cure == f"Give the archive as data_root, such as {tmp_path / 'a.zip'}, or unpack it."


@pytest.mark.parametrize(
    ("files", "cure"), [(["a.psd"], "Fix what is listed above."), ([], "Give the folder that holds yours.")]
)
def test_a_report_without_an_image_ends_with_the_cure_that_fits(tmp_path, monkeypatch, files, cure):
    monkeypatch.chdir(tmp_path)
    for name in files:
        put(tmp_path, name, "")
    with pytest.raises(DataError) as raised:
        report_dataset(str(tmp_path))
    assert str(raised.value).endswith(f"holds no image that can be trained on. {cure}")


def test_a_folder_named_after_kohyas_repeats_gets_a_note(tmp_path):
    for name in ("10_cat", "1_dog", "20_bird", "2024_trip"):
        put(tmp_path, f"{name}/a.png")
    put(tmp_path, "20_bird/multiply.txt", "1")
    [problem] = scan_dataset(tmp_path).problems
    assert problem.path == str(tmp_path / "10_cat")
    assert "multiply.txt with 10" in problem.cure
    assert not problem.skipped
