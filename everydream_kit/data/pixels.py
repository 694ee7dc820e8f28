"""From a file and a crop to uint8 pixels of one bucket's size.

Here: choosing a crop (`draw_crop`, `center_crop`: pure geometry), reading it (`load_pixels`), and the loss mask that
goes with it. Not here: which image goes into which bucket (`buckets`), and tensors (`loader`).

The trade-off: one resampling, never two. A crop is a box in the source's own pixels, possibly of fractional size, and
the box is resampled straight to the bucket (Lanczos down, bicubic up). JPEGs are decoded at the smallest of libjpeg's
scales (1, 1/2, 1/4, 1/8) that still has three times the pixels wanted in each direction: before the rounding to 8 bits
photographs at 512 px came out 60 dB or more from the full decode, in under half of the time and a quarter of the
memory. Twice the pixels, which is often advised, gave 52 to 58 dB (docs/data-pixels.md has the numbers).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from everydream_kit import draws
from everydream_kit.config import default_of
from everydream_kit.data.image_files import IMAGE_ERRORS, LYING, open_image, orientation
from everydream_kit.data.records import Size
from everydream_kit.errors import DataError

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""

ImageTransform = Callable[[Image.Image], Image.Image]
"""A plug-in's change to the cropped image: takes and returns an RGB image of the bucket's size."""

DRAFT_FACTOR = 3
"""JPEGs are decoded with at least this many times the pixels wanted, in each direction."""

LATENT_CELL_PIXELS = 8
"""Pixels per latent cell, in each direction: loss masks have one value per cell."""

_TRANSPOSE = {  # EXIF orientation -> what turns the stored image into the displayed one (EXIF 2.32, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class Crop:
    """What is cut from an image, in pixels of the displayed (EXIF-rotated) file, before mirroring.

    The size may be fractional, so that the crop has the bucket's aspect ratio exactly; the corner is a whole pixel, so
    that an image which needs no scaling is not blurred.
    """

    left: int
    top: int
    width: float
    height: float
    flip: bool = False

    @property
    def box(self) -> Box:
        return (self.left, self.top, self.left + self.width, self.top + self.height)

    def top_left_in_bucket(self, image_width: int, bucket: Size) -> tuple[int, int]:
        """Pixels cut away (left, top) at the bucket's scale, seen after mirroring: SDXL's `crop_top_left`."""
        scale = bucket[0] / self.width
        left = image_width - self.left - self.width if self.flip else self.left
        return (max(0, round(left * scale)), max(0, round(self.top * bucket[1] / self.height)))


@dataclass(frozen=True, slots=True)
class LoadedPixels:
    """A decoded crop.

    Attributes:
        pixels: (H, W, 3) uint8, RGB.
        mask: (H/8, W/8) float32 in 0..1, or None where the image has no loss mask.
    """

    pixels: np.ndarray
    mask: np.ndarray | None


def draw_crop(
    width: int,
    height: int,
    bucket: Size,
    *,
    crop_jitter: float,
    flip_p: float,
    seed: int,
    address: tuple[int | str, ...],
) -> Crop:
    """Draw crop and mirroring for one use of an image, from its address alone.

    Where the image is larger than its bucket, each side loses up to `crop_jitter` of the shorter side at random; the
    rest is trimmed to the bucket's aspect ratio at an offset drawn from a triangular distribution, so mostly near the
    middle (the rule of EveryDream 2, whose draws came from a global generator).

    Args:
        width, height: size of the image in pixels, after EXIF rotation.
        bucket: wanted size in pixels.
        crop_jitter: largest share of the shorter side that each side may lose.
        flip_p: probability of mirroring left to right.
        seed, address: of the draw, normally (epoch, image key, repeat).
    """
    rng = draws.generator(seed, "crop", *address)
    room = min((width - bucket[0]) / bucket[0], (height - bucket[1]) / bucket[1])
    most = int(min(width, height) * min(max(room, 0.0), crop_jitter))
    left, top, right, bottom = (int(lost) for lost in rng.integers(0, most, size=4, endpoint=True))
    crop = _trim((left, top), (width - left - right, height - top - bottom), bucket, rng)
    return replace(crop, flip=draw_flip(flip_p, seed=seed, address=address))


def draw_flip(flip_p: float, *, seed: int, address: tuple[int | str, ...]) -> bool:
    """Draw whether one use of an image is mirrored left to right."""
    return flip_p > 0 and bool(draws.generator(seed, "flip", *address).random() < flip_p)


def center_crop(width: int, height: int, bucket: Size) -> Crop:
    """The largest crop of the bucket's aspect ratio, from the middle: for validation, where nothing is drawn."""
    return _trim((0, 0), (width, height), bucket, None)


def _trim(corner: Size, size: Size, bucket: Size, rng: np.random.Generator | None) -> Crop:
    """Trim a box to the bucket's aspect ratio, on one axis."""
    (left, top), (width, height) = corner, size
    aspect = bucket[0] / bucket[1]
    if width > height * aspect:
        return Crop(left + _offset(width - height * aspect, rng), top, height * aspect, float(height))
    return Crop(left, top + _offset(height - width / aspect, rng), float(width), width / aspect)


def _offset(excess: float, rng: np.random.Generator | None) -> int:
    """Where within the excess a trimmed box starts: a whole pixel, near the middle."""
    most = math.floor(excess)
    if most <= 0:
        return 0
    return min(most, round(excess / 2 if rng is None else rng.triangular(0, excess / 2, excess)))


def load_pixels(
    path: str | Path,
    bucket: Size,
    crop: Crop,
    *,
    size: Size | None = None,
    background: str = default_of("background"),
    mask_path: str | Path | None = None,
    transform: ImageTransform | None = None,
    draft: bool = True,
) -> LoadedPixels:
    """Decode one crop of one image at its bucket's size.

    Args:
        path: image file. Palette, gray, 16-bit gray and CMYK become RGB; of an animation the first frame counts.
        bucket: (width, height) in pixels, both divisible by 8.
        crop: what to cut, in pixels of the displayed image.
        size: (width, height) that the crop was chosen for; a file that has changed since is refused.
        background: "#rrggbb" put behind transparent images.
        mask_path: loss mask (white counts, black does not); equal to `path` it means the image's own transparency.
        transform: a plug-in's change to the image, after cropping and before mirroring.
        draft: decode JPEGs at a reduced scale where enough pixels remain.

    Raises:
        DataError: the file cannot be read or decoded; the message has the cause.
    """
    try:
        with open_image(path) as image:
            rgb, alpha = _read_crop(image, bucket, crop, size=size, background=background, draft=draft)
        mask = _read_mask(path, mask_path, bucket, crop, alpha=alpha, size=size)
    except IMAGE_ERRORS as error:
        raise DataError(
            f"{path}: cannot be decoded ({error}). Replace it with an intact copy, or delete it."
        ) from error
    if transform is not None:
        rgb = transform(rgb)
        if rgb.size != bucket or rgb.mode != "RGB":
            raise DataError(
                f"{path}: the plug-in returned a {rgb.mode} image of {rgb.size}; RGB of {bucket} is needed."
            )
    pixels = np.asarray(rgb)
    return LoadedPixels(pixels[:, ::-1] if crop.flip else pixels, mask)


def _read_crop(
    image: Image.Image, bucket: Size, crop: Crop, *, size: Size | None, background: str, draft: bool
) -> tuple[Image.Image, Image.Image | None]:
    """Decode and resample: an RGB image of the bucket's size, not mirrored, and the alpha of the same crop if any."""
    turn = orientation(image)
    stored = image.size
    displayed = (stored[1], stored[0]) if turn in LYING else stored
    if size is not None and displayed != tuple(size):
        raise ValueError(f"it is {displayed} pixels now and was {tuple(size)} when the dataset was read")
    box = _stored_box(crop.box, turn, stored)
    wanted = (bucket[1], bucket[0]) if turn in LYING else bucket
    if draft:
        scale = _draft(image, wanted, box)
        box = (box[0] / scale, box[1] / scale, box[2] / scale, box[3] / scale)
    # Rounding must not put the box outside by a hair: Pillow refuses that.
    box = (max(0.0, box[0]), max(0.0, box[1]), min(box[2], image.width), min(box[3], image.height))
    source = _to_rgb_or_premultiplied(image)
    shrinks = crop.width >= bucket[0]
    resized = source.resize(wanted, Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC, box=box)
    if turn in _TRANSPOSE:
        resized = resized.transpose(_TRANSPOSE[turn])
    if resized.mode == "RGB":
        return resized, None
    return _composite(resized, background), resized.getchannel("a")


def _draft(image: Image.Image, wanted: Size, box: Box) -> int:
    """Ask libjpeg for a smaller scale where it leaves DRAFT_FACTOR times the pixels wanted; returns the scale."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    least = [DRAFT_FACTOR * wanted[0] / (box[2] - box[0]), DRAFT_FACTOR * wanted[1] / (box[3] - box[1])]
    full = image.size
    image.draft(None, (math.ceil(full[0] * least[0]), math.ceil(full[1] * least[1])))
    return round(full[0] / image.width)  # sides are rounded up, so the quotient is at most the scale


def _stored_box(box: Box, turn: int, stored: Size) -> Box:
    """A box of the displayed image in coordinates of the stored one."""
    left, top, right, bottom = box
    width, height = stored
    return {
        2: (width - right, top, width - left, bottom),
        3: (width - right, height - bottom, width - left, height - top),
        4: (left, height - bottom, right, height - top),
        5: (top, left, bottom, right),
        6: (top, height - right, bottom, height - left),
        7: (width - bottom, height - right, width - top, height - left),
        8: (width - bottom, left, width - top, right),
    }.get(turn, box)


def _to_rgb_or_premultiplied(image: Image.Image) -> Image.Image:
    """RGB, or RGBa (colors multiplied by alpha) where there is transparency: both can be resampled without fringes."""
    if image.mode.startswith("I"):  # 16-bit gray: Pillow's own conversion would clip everything above 255 to white
        gray = np.asarray(image).astype(np.uint32).clip(0, 65535)
        return Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point images have no agreed range; save it as 8-bit PNG")
    if image.has_transparency_data:
        return image.convert("RGBA").convert("RGBa")
    return image.convert("RGB")


def _composite(premultiplied: Image.Image, background: str) -> Image.Image:
    """Put a color behind an image whose colors are multiplied by alpha."""
    color = np.array([int(background[i : i + 2], 16) for i in (1, 3, 5)], np.uint16)
    values = np.asarray(premultiplied).astype(np.uint16)
    behind = ((255 - values[..., 3:]) * color + 127) // 255
    return Image.fromarray(np.minimum(values[..., :3] + behind, 255).astype(np.uint8))


def _read_mask(
    path: str | Path,
    mask_path: str | Path | None,
    bucket: Size,
    crop: Crop,
    *,
    alpha: Image.Image | None,
    size: Size | None,
) -> np.ndarray | None:
    """The loss mask of a crop, (H/8, W/8) float32 in 0..1, averaged by area; mirrored with the crop."""
    if mask_path is None:
        return None
    cells = (bucket[0] // LATENT_CELL_PIXELS, bucket[1] // LATENT_CELL_PIXELS)
    if Path(mask_path) == Path(path):
        if alpha is None:  # nothing is transparent
            return np.ones((cells[1], cells[0]), np.float32)
        small = alpha.resize(cells, Image.Resampling.BOX)
    else:
        small = _read_mask_file(mask_path, cells, crop, size)
    values = np.asarray(small, np.float32) / 255
    return np.ascontiguousarray(values[:, ::-1]) if crop.flip else values


def _read_mask_file(mask_path: str | Path, cells: Size, crop: Crop, size: Size | None) -> Image.Image:
    """Cut the same part from a mask file, which may be of another size than its image."""
    with open_image(mask_path) as image:
        turn = orientation(image)
        gray: Image.Image = image.convert("L")
    if turn in _TRANSPOSE:
        gray = gray.transpose(_TRANSPOSE[turn])
    width, height = size or gray.size
    x, y = gray.width / width, gray.height / height
    left, top, right, bottom = crop.box
    box = (left * x, top * y, min(right * x, gray.width), min(bottom * y, gray.height))
    return gray.resize(cells, Image.Resampling.BOX, box=box)
