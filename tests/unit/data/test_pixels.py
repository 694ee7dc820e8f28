"""From a file and a crop to pixels: geometry, kinds of files, and what a reduced decode costs."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from everydream_kit.data import pixels
from everydream_kit.data.pixels import Crop, center_crop, draw_crop, load_pixels
from everydream_kit.errors import DataError

SIDES = st.integers(40, 3000)
BUCKETS = st.sampled_from([(64, 64), (512, 512), (768, 320), (128, 576), (48, 80)])


def photograph(width, height, seed=0):
    """A smooth image with some detail: gradients, waves and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [120 + 60 * np.sin(x / a + y / b) + 0.02 * x for a, b in ((31, 57), (17, 23), (71, 13))]
    values = np.stack(waves, -1) + rng.normal(0, 2, (height, width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def psnr(a, b):
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


def draw(width, height, bucket, **options):
    options = {"crop_jitter": 0.02, "flip_p": 0.5, "seed": 1, "address": (0, "a.jpg", 0)} | options
    return draw_crop(width, height, bucket, **options)


# --- crops ---------------------------------------------------------------------------------------------------------


@given(SIDES, SIDES, BUCKETS, st.integers(0, 10**6))
def test_a_crop_lies_inside_and_has_the_buckets_aspect_ratio(width, height, bucket, epoch):
    crop = draw(width, height, bucket, address=(epoch, "a.jpg", 0))
    left, top, right, bottom = crop.box
    assert 0 <= left < right <= width + 1e-6
    assert 0 <= top < bottom <= height + 1e-6
    assert crop.width / crop.height == pytest.approx(bucket[0] / bucket[1])


@given(SIDES, SIDES, BUCKETS, st.integers(0, 10**6))
def test_jitter_takes_at_most_its_share_and_nothing_from_small_images(width, height, bucket, epoch):
    crop = draw(width, height, bucket, address=(epoch, "a.jpg", 0))
    widest = center_crop(width, height, bucket)
    lost = max(widest.width - crop.width, widest.height - crop.height)
    aspect = max(bucket) / min(bucket)
    assert lost <= 2 * 0.02 * min(width, height) * aspect + 1
    if width < bucket[0] or height < bucket[1]:
        assert lost == pytest.approx(0, abs=1e-6)


def test_crops_are_drawn_from_the_address_alone():
    same = [draw(1000, 800, (512, 512), address=(3, "a/b.jpg", 1)) for _ in range(2)]
    assert same[0] == same[1]
    addresses = [(3, "a/b.jpg", 2), (4, "a/b.jpg", 1), (3, "a/c.jpg", 1)]
    others = {draw(1000, 800, (512, 512), address=address) for address in addresses}
    assert len(others) == 3
    assert same[0] not in others


def test_trimming_favors_the_middle():
    lefts = [draw(1000, 500, (512, 512), crop_jitter=0.0, address=(epoch, "a.jpg", 0)).left for epoch in range(2000)]
    # triangular on 0..500 around 250: mean 250, standard deviation 500/sqrt(24) = 102
    assert np.mean(lefts) == pytest.approx(250, abs=10)
    assert np.std(lefts) == pytest.approx(102, abs=8)
    assert min(lefts) >= 0
    assert max(lefts) <= 500


def test_mirroring_has_its_probability():
    flips = [draw(600, 600, (512, 512), flip_p=0.3, address=(epoch, "a.jpg", 0)).flip for epoch in range(2000)]
    assert np.mean(flips) == pytest.approx(0.3, abs=0.04)
    assert not draw(600, 600, (512, 512), flip_p=0.0).flip
    assert draw(600, 600, (512, 512), flip_p=1.0).flip


# --- pixels --------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(60, 300), st.integers(60, 300), st.sampled_from([(64, 64), (96, 48)]), st.integers(0, 10**6))
def test_the_reported_crop_reproduces_the_pixels(tmp_path_factory, width, height, bucket, epoch):
    path = tmp_path_factory.getbasetemp() / "crop.png"
    source = photograph(width, height)
    source.save(path)
    crop = draw(width, height, bucket, address=(epoch, "crop.png", 0))
    loaded = load_pixels(path, bucket, crop)
    method = Image.Resampling.LANCZOS if crop.width >= bucket[0] else Image.Resampling.BICUBIC
    box = (crop.left, crop.top, min(crop.left + crop.width, width), min(crop.top + crop.height, height))
    again = source.resize(bucket, method, box=box)
    assert np.array_equal(loaded.pixels, ImageOps.mirror(again) if crop.flip else again)


@pytest.mark.parametrize("flip", [False, True])
def test_the_reported_corner_is_where_the_bucket_lies_in_the_scaled_image(tmp_path, flip):
    # of 400 x 200, 160 x 160 becomes 64 x 64, scale 0.4; 100 px (40) are cut on one side, 140 (56) on the other
    source = photograph(400, 200)
    source.save(tmp_path / "a.png")
    crop = Crop(100, 20, 160.0, 160.0, flip)
    assert crop.top_left_in_bucket(400, (64, 64)) == ((56, 8) if flip else (40, 8))
    whole = source.resize((160, 80), Image.Resampling.LANCZOS)
    whole = ImageOps.mirror(whole) if flip else whole
    left, top = crop.top_left_in_bucket(400, (64, 64))
    expected = whole.crop((left, top, left + 64, top + 64))
    assert psnr(load_pixels(tmp_path / "a.png", (64, 64), crop).pixels, expected) > 38  # the borders see less context


def test_an_image_of_its_buckets_size_is_not_touched(tmp_path):
    source = photograph(96, 64)
    source.save(tmp_path / "a.png")
    crop = draw(96, 64, (96, 64), flip_p=0.0)
    assert np.array_equal(load_pixels(tmp_path / "a.png", (96, 64), crop).pixels, source)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_exif_orientation_is_followed(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    photograph(200, 120).save(path, exif=exif, **({"quality": 95} if suffix == ".jpg" else {}))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    crop = Crop(10, 20, 100.0, 100.0)
    expected = upright.resize((64, 64), Image.Resampling.LANCZOS, box=crop.box)
    loaded = load_pixels(path, (64, 64), crop, size=upright.size)
    assert psnr(loaded.pixels, expected) > 50  # rows before columns or after: Pillow rounds in between


PHOTOGRAPHS = ["rocket.jpg", "retina.jpg", "astronaut.png", "coffee.png"]


@pytest.mark.parametrize(
    ("name", "subsampling"), [(name, "4:2:0") for name in [*PHOTOGRAPHS, "generated"]] + [("coffee.png", "4:4:4")]
)
def test_a_reduced_jpeg_decode_stays_within_60_db(name, subsampling):
    """Measured before the rounding to 8 bits, which alone is worth 56 to 59 dB: `docs/data-pixels.md`."""
    size, bucket = (3584, 2784), (576, 448)
    if name == "generated":
        source = photograph(size[0] // 2, size[1] // 2).resize(size, Image.Resampling.LANCZOS)
    else:
        folder = Path(pytest.importorskip("skimage.data", reason="scikit-image has the photographs").__file__).parent
        source = Image.open(folder / name).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    source.save(file, "JPEG", quality=92, subsampling=subsampling)
    crop = Crop(10, 6, 576 * 6.2, 448 * 6.2)
    results = []
    for draft in (False, True):
        image = Image.open(io.BytesIO(file.getvalue()))
        scale = pixels._draft(image, bucket, crop.box) if draft else 1
        assert scale == (2 if draft else 1)
        box = tuple(side / scale for side in crop.box)
        bands = [np.asarray(image)[..., band].astype(np.float32) for band in range(3)]
        results.append([Image.fromarray(b).resize(bucket, Image.Resampling.LANCZOS, box=box) for b in bands])
    assert psnr(*[np.stack([np.asarray(band) for band in bands]) for bands in results]) >= 60


def test_a_reduced_decode_is_nearly_as_true_as_the_full_one(tmp_path):
    """Both in the 8 bits that training sees, against the exact resize of the full decode."""
    path = tmp_path / "a.jpg"
    photograph(2000, 1500).save(path, quality=92)
    crop = Crop(0, 0, 2000.0, 1500.0)
    with Image.open(path) as image:
        bands = [Image.fromarray(np.asarray(image)[..., band].astype(np.float32)) for band in range(3)]
    exact = np.stack([np.asarray(b.resize((256, 192), Image.Resampling.LANCZOS)) for b in bands], -1)
    reduced = psnr(load_pixels(path, (256, 192), crop).pixels, exact)
    full = psnr(load_pixels(path, (256, 192), crop, draft=False).pixels, exact)
    assert full < 61  # rounding between and after Pillow's two passes
    assert reduced > full - 3


# --- kinds of files ------------------------------------------------------------------------------------------------

WHOLE = Crop(0, 0, 64.0, 64.0)


def load(path, **options):
    return load_pixels(path, (64, 64), WHOLE, **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "LA", "RGBA"])
def test_every_color_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    source = photograph(64, 64).convert(mode)
    source.save(path)
    expected = source.convert("RGB")
    assert psnr(load(path).pixels, expected) > (30 if mode == "CMYK" else 60)


def test_16_bit_gray_keeps_its_gradation(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "a.png")
    loaded = load(tmp_path / "a.png").pixels
    assert np.abs(loaded[..., 0].astype(float) - values / 257).max() <= 0.51
    assert np.array_equal(loaded[..., 0], loaded[..., 2])


def test_of_an_animation_the_first_frame_counts(tmp_path):
    frames = [Image.new("RGB", (64, 64), color) for color in ("#c80000", "#0000c8")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert load(tmp_path / "a.webp").pixels[32, 32].tolist() == [200, 0, 0]


def test_transparency_shows_the_background_and_not_hidden_colors(tmp_path):
    values = np.zeros((64, 64, 4), np.uint8)
    values[..., 0] = 255  # red everywhere, also where it cannot be seen
    values[:32, :, 3] = 255
    values[32:, :32, 3] = 127
    Image.fromarray(values).save(tmp_path / "a.png")
    loaded = load(tmp_path / "a.png", background="#0000ff").pixels
    assert loaded[5, 5].tolist() == [255, 0, 0]
    assert loaded[60, 60].tolist() == [0, 0, 255]
    assert loaded[60, 5].tolist() == [127, 0, 128]


def test_palette_transparency_counts_too(tmp_path):
    source = Image.new("P", (64, 64), 1)
    source.putpalette([255, 0, 0, 0, 255, 0])
    source.paste(0, (0, 0, 64, 32))
    source.save(tmp_path / "a.png", transparency=1)
    loaded = load(tmp_path / "a.png", background="#102030").pixels
    assert loaded[0, 0].tolist() == [255, 0, 0]
    assert loaded[63, 0].tolist() == [16, 32, 48]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_truncated_file_is_named_with_its_cause(tmp_path, suffix):
    whole = tmp_path / f"whole{suffix}"
    photograph(64, 64).save(whole)
    data = whole.read_bytes()
    broken = tmp_path / f"broken{suffix}"
    for length in range(0, len(data) - 16, max(1, len(data) // 40)):
        broken.write_bytes(data[:length])
        try:
            loaded = load(broken)
        except DataError as error:
            assert re.search(r"broken\.\w+: cannot be decoded \(.+\)\. Replace it", str(error))
        else:  # only a PNG's check sums were cut off
            assert np.array_equal(loaded.pixels, load(whole).pixels)
            assert length > 0.98 * len(data)


def test_a_file_that_changed_since_the_scan_is_refused(tmp_path):
    photograph(70, 64).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"it is \(70, 64\) pixels now and was \(64, 64\)"):
        load(tmp_path / "a.png", size=(64, 64))


def test_damaged_exif_is_as_good_as_none(tmp_path):
    photograph(64, 64).save(tmp_path / "a.jpg", exif=b"Exif\0\0not a TIFF at all", quality=95)
    assert load(tmp_path / "a.jpg", size=(64, 64)).pixels.shape == (64, 64, 3)


# --- masks and plug-ins --------------------------------------------------------------------------------------------


def test_a_mask_file_is_cut_and_averaged_with_its_image(tmp_path):
    photograph(128, 64).save(tmp_path / "a.png")
    mask = Image.new("L", (256, 128))  # twice the image's size
    mask.paste(255, (128, 0, 256, 128))  # the right half counts
    mask.save(tmp_path / "a.mask.png")
    crop = Crop(36, 0, 64.0, 64.0)  # 28 pixels without, 36 with
    loaded = load_pixels(tmp_path / "a.png", (64, 64), crop, size=(128, 64), mask_path=tmp_path / "a.mask.png")
    assert loaded.mask.shape == (8, 8)
    # cells of 8 pixels: three without, one half (24..32), four with
    assert loaded.mask[0].tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1, 1, 1], abs=0.01)
    mirrored = load_pixels(
        tmp_path / "a.png", (64, 64), Crop(36, 0, 64.0, 64.0, True), size=(128, 64), mask_path=tmp_path / "a.mask.png"
    )
    assert np.array_equal(mirrored.mask, loaded.mask[:, ::-1])


def test_transparency_can_be_the_mask(tmp_path):
    source = photograph(64, 64).convert("RGBA")
    source.putalpha(Image.linear_gradient("L").resize((64, 64)))
    path = tmp_path / "a.png"
    source.save(path)
    mask = load(path, mask_path=path).mask
    assert mask[0].max() < 0.1
    assert mask[7].min() > 0.9
    photograph(64, 64).save(path)
    assert load(path, mask_path=path).mask.min() == 1


def test_a_plug_in_sees_the_cropped_image_before_it_is_mirrored(tmp_path):
    photograph(64, 64).save(tmp_path / "a.png")
    loaded = load_pixels(tmp_path / "a.png", (64, 64), Crop(0, 0, 64.0, 64.0, True), transform=ImageOps.invert)
    assert np.array_equal(loaded.pixels, ImageOps.mirror(ImageOps.invert(photograph(64, 64))))
    with pytest.raises(DataError, match="the plug-in returned a L image"):
        load(tmp_path / "a.png", transform=ImageOps.grayscale)
