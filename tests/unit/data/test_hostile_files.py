"""What folders really hold: the scan ends, each bad file is named with its cause, and good ones are all used."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from everydream_kit.data import image_files
from everydream_kit.data.scanning import scan_dataset
from everydream_kit.data.textfiles import TextError, parse_yaml, read_text


def noise(width: int = 160, height: int = 120, mode: str = "RGB") -> Image.Image:
    """An image that does not compress, so that files are several kilobytes long."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, bands), np.uint8)
    return Image.merge(mode, [Image.fromarray(pixels[:, :, band]) for band in range(bands)])


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scan_bytes(root: Path, files: dict[str, bytes]):
    """Scan the given files next to one good image, which must always be found."""
    Image.new("RGB", (48, 32)).save(root / "good.png")
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    dataset = scan_dataset(root)
    used = list(dataset.paths)
    assert "good.png" in used
    return sorted(set(used) - {"good.png"}), {Path(p.path).name: p for p in dataset.problems}


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("JPEG", "a.jpg", {"quality": 95}),
        ("JPEG", "a.jpg", {"quality": 95, "progressive": True}),
        ("PNG", "a.png", {}),
        ("WEBP", "a.webp", {"quality": 95}),
        ("WEBP", "a.webp", {"lossless": True}),
        ("BMP", "a.bmp", {}),
    ],
)
def test_an_image_cut_off_at_any_kilobyte_is_named(tmp_path, kind, name, options):
    data = encode(noise(), kind, **options)
    cuts = [*range(0, len(data), 1024), len(data) - 1]
    assert len(cuts) > 8
    used, problems = scan_bytes(tmp_path, {f"{cut}_{name}": data[:cut] for cut in cuts})
    assert used == []
    assert set(problems) == {f"{cut}_{name}" for cut in cuts}
    assert problems[f"0_{name}"].cause == "the file is empty"
    assert all(p.skipped and p.cause and p.cure.endswith(".") for p in problems.values())


def test_a_cut_off_image_says_so(tmp_path):
    data = encode(noise(), "JPEG", quality=95)
    _, problems = scan_bytes(tmp_path, {"a.jpg": data[: len(data) // 2]})
    assert problems["a.jpg"].cause == "the file is cut off: its end is missing"


AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", AVIF])
def test_a_wrong_extension_is_a_note(tmp_path, kind):
    name = "a.jpg" if kind != "JPEG" else "a.png"
    used, problems = scan_bytes(tmp_path, {name: encode(noise(), kind)})
    assert used == [name]
    assert problems[name].cause == f"named {name[1:]}, but is {'an' if kind == 'AVIF' else 'a'} {kind} file"
    assert not problems[name].skipped


def test_images_with_something_after_their_end_are_used(tmp_path):
    """Phones append films to JPEGs, editors leave padding, and some sites add their mark."""
    tail = bytes(range(256)) * 40
    files = {
        f"a.{ext}": encode(noise(), kind) + tail for ext, kind in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))
    }
    files["padded.jpg"] = encode(noise(), "JPEG") + bytes(30)
    used, problems = scan_bytes(tmp_path, files)
    assert (used, problems) == (sorted(files), {})


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"hello, I am a text", "not an image in a format that is read, or its beginning is damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image in a format"),
        (b"\xff\xd8\xff", ""),
        (bytes(5000), "not an image"),
        (_png(50_000, 50_000), "claims to have more than 178 million pixels"),
        (_png(0, 10), ""),
    ],
)
def test_what_is_no_image_is_named_with_its_cause(tmp_path, data, cause):
    used, problems = scan_bytes(tmp_path, {"a.png": data})
    assert used == []
    assert problems["a.png"].cause.startswith(cause)


def test_a_large_image_below_the_limit_is_used_without_a_warning(tmp_path):
    used, problems = scan_bytes(tmp_path, {"a.png": _png(12_000, 12_000)})  # 144 million, Pillow warns from 89
    assert (used, problems) == (["a.png"], {})


def test_every_kind_of_pixel_is_accepted(tmp_path):
    files = {
        "cmyk.jpg": encode(noise(mode="CMYK"), "JPEG"),
        "gray.jpg": encode(noise(mode="L"), "JPEG"),
        "alpha.png": encode(noise(mode="RGBA"), "PNG"),
        "palette.png": encode(noise().convert("P"), "PNG"),
        "bits16.png": encode(Image.fromarray(np.zeros((32, 32), np.uint16)), "PNG"),
        "bilevel.bmp": encode(noise().convert("1"), "BMP"),
    }
    assert scan_bytes(tmp_path, files) == (sorted(files), {})


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF"])
def test_animations_are_used_with_a_note(tmp_path, kind):
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    name = {"WEBP": "a.webp"}.get(kind, "a.png")
    used, problems = scan_bytes(tmp_path, {name: encode(frames[0], kind, save_all=True, append_images=frames[1:])})
    assert used == [name]
    assert problems[name].cause == "animated: only its first frame is trained on"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_headers_never_end_a_scan(tmp_path, data):
    kind, name = data.draw(st.sampled_from([("JPEG", "a.jpg"), ("PNG", "a.png"), ("WEBP", "a.webp"), ("BMP", "a.bmp")]))
    exif = Image.Exif()
    exif[0x0112] = 6
    original = encode(Image.new("RGB", (40, 30), "red"), kind, **({} if kind == "BMP" else {"exif": exif}))
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, min(len(damaged), 200) - 1))] = data.draw(st.integers(0, 255))
    for old in tmp_path.iterdir():
        old.unlink()
    used, problems = scan_bytes(tmp_path, {name: bytes(damaged)})
    assert (name in used) or problems[name].skipped


NAMES = [
    "кошка.png",
    "猫.png",
    "قطة.png",
    "חתול.png",
    "naïve.png",
    "🐈.png",
    "a'b\"c.png",
    "a\\b.png",
    "new\nline.png",
    "%20.png",
]


def test_names_in_every_script_are_used_and_give_captions_and_keys(tmp_path):
    for name in NAMES:
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    dataset = scan_dataset(tmp_path)
    assert sorted(dataset.paths) == sorted(NAMES)
    assert dataset.problems == []
    keys = [dataset.key(i) for i in range(len(dataset))]
    assert all("\n" not in key for key in keys)
    assert len(set(dataset.key_hashes.tolist())) == len(NAMES)
    assert all(Path(dataset.path(i)).is_file() for i in range(len(dataset)))


def test_a_name_that_is_no_text_is_used_and_printable(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    data = encode(Image.new("RGB", (32, 32)), "PNG")
    try:
        Path(os.fsdecode(path)).write_bytes(data)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    dataset = scan_dataset(tmp_path)
    assert dataset.key(0) == "caf\\xe9.png"
    assert os.path.isfile(dataset.path(0))


def test_a_key_is_the_same_whichever_way_accents_are_stored(tmp_path):
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    keys = []
    for folder, name in (("a", composed), ("b", decomposed)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / folder / name)
        dataset = scan_dataset(tmp_path / folder)
        keys.append((dataset.key(0), dataset.key_hashes.tolist()))
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom", "utf-16-be-bom", "utf-32", "latin-1"]
)
def test_captions_are_read_in_every_common_encoding(tmp_path, encoding):
    text = "ein schöner Garten, grün\r\n"
    bom = {"utf-16-le-bom": b"\xff\xfe", "utf-16-be-bom": b"\xfe\xff"}.get(encoding, b"")
    (tmp_path / "a.txt").write_bytes(bom + text.encode(encoding.removesuffix("-bom")))
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    dataset = scan_dataset(tmp_path)
    assert dataset.caption(0).text == "ein schöner Garten, grün"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"\x00\x01\x02\xff\xfe", r"it is not text in UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", r"it is not text in UTF-8"),
        (b"\xff\xfea", "damaged utf-16 text at byte"),
        (b"a" * (1 << 20) + b"b", "larger than 1 MiB"),
    ],
)
def test_a_caption_that_is_no_text_takes_its_image_out(tmp_path, data, cause):
    used, problems = scan_bytes(tmp_path, {"a.txt": data, "a.png": encode(noise(), "PNG")})
    assert used == []
    assert cause in problems["a.txt"].cause
    assert "until then its image is skipped" in problems["a.txt"].cure


LAUGHS = "a: &a [lol, lol]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: v}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("main_prompt:\ta cat\n\tflip_p: 1", "line 2, column 1: not valid YAML"),
        ("flip_p: half", "flip_p: a number from 0 to 1 is expected, found half"),
        ("flip_p: 1.5", "flip_p: a number from 0 to 1"),
        ("multiply: -1", "multiply: a number from 0 to 10000"),
        ("multiply: .nan", "multiply: a number"),
        ("multiply: 1e999", "multiply: a number"),
        ("multiply: [1, 2]", "found a list"),
        ("keep_tags: 1.5", "keep_tags: a whole number is expected, found 1.5"),
        ("shuffle_tags: perhaps", "shuffle_tags: true or false is expected, found perhaps"),
        ("tags: {a: b}", "tags: a weighted tag has the form"),
        ("tags: [[a]]", "tags: a text is expected, found a list"),
        ("main_prompt: {a: b}", "main_prompt: a text is expected, found a mapping"),
        ("rating: x\nflip_p: y", "rating: a number from 0 to 1000000 is expected, found x; flip_p: a number"),
        ("just a sentence", "holds a text where settings are expected"),
        ("- a\n- b", "holds a list where settings are expected"),
        ("multiply: 1\n---\nmultiply: 2", "line 2: a second document"),
        ("multiply: *nothing", "line 1: *nothing refers to nothing"),
        ("? [a, b]\n: c", "a name is expected, found a list"),
        ("a: " + "[" * 10_000, "nested too deeply"),
        ("- " * 10_000 + "a", "nested too deeply"),
        (LAUGHS + "tags: *i", "tags: a text is expected, found a list"),
    ],
)
def test_settings_that_cannot_be_understood_are_named_and_take_out_what_they_govern(tmp_path, text, cause):
    image = encode(Image.new("RGB", (32, 32)), "PNG")
    files = {
        "sub/a.yaml": text.encode(),
        "sub/a.png": image,
        "other/local.yaml": text.encode(),
        "other/b.png": image,
    }
    used, problems = scan_bytes(tmp_path, files)
    assert used == []
    assert cause in problems["a.yaml"].cause
    assert cause in problems["local.yaml"].cause
    assert "until then its 1 images are skipped" in problems["local.yaml"].cure


def test_a_broken_global_file_takes_out_all_below_and_counts_them(tmp_path):
    image = encode(Image.new("RGB", (32, 32)), "PNG")
    files = {"s/global.yaml": b"multiply: x", **{f"s/{name}.png": image for name in ("a", "d/b", "d/e/c")}}
    used, problems = scan_bytes(tmp_path, files)
    assert used == []
    assert "its 3 images are skipped" in problems["global.yaml"].cure


@pytest.mark.parametrize("text", [LAUGHS, MERGES, "x: !!python/object/apply:os.system [echo]", "x: &a [*a]"])
def test_tricks_in_yaml_come_to_nothing(tmp_path, text):
    files = {"a.yaml": text.encode(), "a.png": encode(Image.new("RGB", (32, 32)), "PNG")}
    _, problems = scan_bytes(tmp_path, files)
    assert "a.yaml" in problems  # refused, or its names are unknown


def test_anchors_and_merge_keys_work(tmp_path):
    text = "defaults: &d {flip_p: 0.5, multiply: 2}\n<<: *d\nmultiply: 3\ntags: [&t red, *t, blue]\n"
    assert parse_yaml(text) == {
        "defaults": {"flip_p": "0.5", "multiply": "2"},
        "flip_p": "0.5",
        "multiply": "3",
        "tags": ["red", "red", "blue"],
    }


def test_of_several_merged_mappings_the_first_wins():
    text = "a: &a {flip_p: 1, rating: 2}\nb: &b {flip_p: 0, multiply: 3}\n<<: [*a, *b]\n"
    merged = parse_yaml(text)
    assert (merged["flip_p"], merged["rating"], merged["multiply"]) == ("1", "2", "3")


def test_unknown_settings_are_notes_that_name_the_nearest(tmp_path):
    files = {"a.yaml": b"flip: 0.5\nfoo_bar_baz: 1", "a.png": encode(Image.new("RGB", (32, 32)), "PNG")}
    Image.new("RGB", (48, 32)).save(tmp_path / "good.png")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    dataset = scan_dataset(tmp_path)
    assert sorted(dataset.paths) == ["a.png", "good.png"]
    assert [(p.cause, p.cure, p.skipped) for p in dataset.problems] == [
        ("flip: there is no such setting", "Did you mean flip_p?", False),
        ("foo_bar_baz: there is no such setting", "Remove it, or see the list of settings in docs/data.md.", False),
    ]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"multiply": NaN}',
        "[" * 100_000,
        '{"a": 1',
        "[1]",
        '{"flip_p": true}',
        '{"multiply": 1e999}',
        '{"multiply": ' + "1" * 5000 + "}",
        '{"caption": "half \\ud800"}',
        '{"tags": ["a\\u0000b"]}',
        '{"\\ud800": 1, "flip_p": 2}',
    ],
)
def test_broken_json_next_to_an_image_is_named(tmp_path, content):
    files = {"a.json": content.encode(), "a.png": encode(Image.new("RGB", (32, 32)), "PNG")}
    used, problems = scan_bytes(tmp_path, files)
    assert used == []
    assert problems["a.json"].skipped


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!?|>#,'\"\n \t~0.%@`<")) | st.text())
def test_yaml_of_any_kind_is_read_or_refused(text):
    try:
        parse_yaml(text)
    except TextError as error:
        assert str(error)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_text_or_refused(tmp_path, data):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    try:
        assert "\0" not in read_text(path)
    except TextError as error:
        assert str(error)


def test_dead_links_folders_with_image_names_and_unreadable_files_are_handled(tmp_path):
    (tmp_path / "dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    used, problems = scan_bytes(tmp_path, {})
    assert used == []
    assert {name: p.cause for name, p in problems.items()} == {
        "dead.png": "the link leads nowhere",
        "pipe.jpg": "not a regular file",
    }


def test_problems_are_plain_data(tmp_path):
    _, problems = scan_bytes(tmp_path, {"a.png": b""})
    problem = problems["a.png"]
    assert json.loads(json.dumps([problem.path, problem.cause, problem.cure, problem.skipped]))[3] is True


@pytest.mark.parametrize("image", ["a\\u0000.png", "\\ud800.png", ".", "", " ", "x" * 5000 + ".png"])
def test_paths_in_an_index_that_cannot_exist_are_named(tmp_path, image):
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    (tmp_path / "index.json").write_text(f'[{{"image": "{image}"}}, {{"image": "good.png", "\\ud800": 1}}]')
    dataset = scan_dataset(tmp_path / "index.json")
    assert list(dataset.paths) == ["good.png"]
    assert [p.skipped for p in dataset.problems].count(True) == 1
    assert json.dumps([p.cause for p in dataset.problems])


def test_links_in_a_circle_cost_no_other_file(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "loop.png").symlink_to("loop.png")
    used, problems = scan_bytes(tmp_path, {"a.png": encode(noise(), "PNG")})
    assert used == ["a.png"]
    assert [(name, problem.cause) for name, problem in problems.items()] == [("loop.png", "the link leads nowhere")]


def test_a_caption_that_is_no_file_is_said(tmp_path):
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "b.yaml")
    images = {name: encode(noise(), "PNG") for name in ("a.png", "b.png")}
    used, problems = scan_bytes(tmp_path, images)
    assert used == ["a.png", "b.png"]
    assert {name: problem.skipped for name, problem in problems.items()} == {"a.txt": False, "b.yaml": False}


def test_many_small_bombs_are_not_all_unpacked(tmp_path, monkeypatch):
    """Each below the limit of a chunk: 300 of them would be 300 MB."""
    bomb = zlib.compress(b"A" * 1_000_000, 9)
    chunk = struct.pack(">I", len(bomb) + 3) + b"zTXtk\0\0" + bomb
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    plain = encode(noise(), "PNG")
    unpacked = []
    monkeypatch.setattr(
        image_files,
        "_decompressed",
        lambda *words, real=image_files._decompressed: unpacked.append(real(*words)) or unpacked[-1],
    )
    used, problems = scan_bytes(tmp_path, {"a.png": plain[:33] + chunk * 300 + plain[33:]})
    assert (used, problems) == (["a.png"], {})
    assert sum(unpacked) < 80e6
