"""Images per second from large JPEG photographs to 512 px buckets: the kit next to plain Pillow, interleaved.

    python benchmarks/data_pixels.py                    # makes 12-megapixel photographs of scikit-image's images
    python benchmarks/data_pixels.py --folder wallpapers  # your own, for instance from a Debian wallpaper package

Both sides cut the same crop of the same file. Plain Pillow decodes it whole and resizes (Lanczos); the kit decodes at a
reduced scale where three times the pixels remain. Times are processor time of this one thread, so that a busy machine
does not decide; the ratio of each file is the median over rounds. The distance is given twice: in the 8 bits that
training sees, where Pillow's own rounding is the floor (its column: full decode in 8 bits against itself without
rounding), and before rounding, which is what the reduced decode itself does.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from everydream_kit.data.buckets import assign_bucket, bucket_table
from everydream_kit.data.pixels import DRAFT_FACTOR, Crop, draw_crop, load_pixels

PHOTOGRAPHS = ("rocket.jpg", "astronaut.png", "coffee.png", "chelsea.png", "retina.jpg", "hubble_deep_field.jpg")
SIZE = (4000, 3000)
SENSOR_NOISE = 2.0  # standard deviation, of 255


def make_photographs(folder: Path) -> list[Path]:
    """Enlarge scikit-image's photographs to 12 megapixels, add sensor noise, and save them as a camera would."""
    import skimage.data

    rng = np.random.default_rng(0)
    paths = []
    for name in PHOTOGRAPHS:
        with Image.open(Path(skimage.data.__file__).parent / name) as image:
            enlarged = image.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
        noisy = np.asarray(enlarged, np.float32)
        noisy += rng.normal(0, SENSOR_NOISE, noisy.shape).astype(np.float32)
        path = folder / f"{Path(name).stem}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92, subsampling="4:2:0")
        paths.append(path)
    return paths


def plain_pillow(path: Path, bucket: tuple[int, int], crop: Crop) -> np.ndarray:
    """Decode whole and resize the crop."""
    with Image.open(path) as image:
        resized = image.convert("RGB").resize(bucket, Image.Resampling.LANCZOS, box=_box(crop, image.size))
    return np.asarray(resized)


def exact(path: Path, bucket: tuple[int, int], crop: Crop, scale: int = 1) -> np.ndarray:
    """The resize in float32, from a decode at 1/scale: what both would give without rounding to 8 bits."""
    with Image.open(path) as image:
        full = image.size
        if scale > 1:
            image.draft(None, (full[0] // scale, full[1] // scale))
        box = tuple(side / scale for side in _box(crop, full))
        bands = [Image.fromarray(np.asarray(image.convert("RGB"))[..., band].astype(np.float32)) for band in range(3)]
    return np.stack([np.asarray(band.resize(bucket, Image.Resampling.LANCZOS, box=box)) for band in bands], -1)


def _box(crop: Crop, size: tuple[int, int]) -> tuple[float, float, float, float]:
    left, top, right, bottom = crop.box
    return (left, top, min(right, size[0]), min(bottom, size[1]))


def seconds_of(action: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    action()
    return time.process_time() - start


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, of 255."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def scale_taken(path: Path, bucket: tuple[int, int], crop: Crop) -> int:
    """The largest of libjpeg's scales that leaves DRAFT_FACTOR times the pixels."""
    room = min(crop.width / bucket[0], crop.height / bucket[1]) / DRAFT_FACTOR
    return max(scale for scale in (1, 2, 4, 8) if scale <= max(1, room))


def measure(path: Path, resolution: int, rounds: int) -> tuple[float, float]:
    """Measure one file, print its line, and return (seconds of the kit, seconds of plain Pillow)."""
    with Image.open(path) as image:
        width, height = image.size
    bucket = assign_bucket(width, height, bucket_table(resolution))
    crop = draw_crop(width, height, bucket, crop_jitter=0.02, flip_p=0.0, seed=1, address=(0, path.name, 0))
    kit_seconds, plain_seconds = [], []
    for _ in range(rounds):  # side by side, so that both meet the same neighbors
        kit_seconds.append(seconds_of(lambda: load_pixels(path, bucket, crop)))
        plain_seconds.append(seconds_of(lambda: plain_pillow(path, bucket, crop)))
    kit, plain = load_pixels(path, bucket, crop).pixels, plain_pillow(path, bucket, crop)
    whole, reduced = (exact(path, bucket, crop, scale) for scale in (1, scale_taken(path, bucket, crop)))
    seconds = statistics.median(kit_seconds), statistics.median(plain_seconds)
    ratio = statistics.median(p / k for k, p in zip(kit_seconds, plain_seconds, strict=True))
    print(
        f"{path.name[:28]:28} {width:5}x{height:<5} {bucket[0]:4}x{bucket[1]:<4} {1 / seconds[0]:7.1f} "
        f"{1 / seconds[1]:7.1f} {ratio:6.2f} {psnr(kit, plain):7.1f} {psnr(plain, whole):7.1f} "
        f"{psnr(reduced, whole):9.1f}",
        flush=True,
    )
    return seconds


def main() -> None:
    """Print one line for each photograph and the whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="JPEGs to use instead of generated ones")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        paths = sorted(options.folder.rglob("*.jpg")) if options.folder else make_photographs(Path(temporary))
        print(f"{'':28} {'':11} {'':9} {'images/s':>15} {'':6} {'PSNR in dB':>25}")
        print(
            f"{'file':28} {'pixels':11} {'bucket':9} {'kit':>7} {'Pillow':>7} {'ratio':>6} {'8 bits':>7} {'floor':>7} "
            f"{'unrounded':>9}"
        )
        times = [measure(path, options.resolution, options.rounds) for path in paths]
    kit, plain = (sum(column) for column in zip(*times, strict=True))
    print(f"all: {len(times) / kit:.1f} and {len(times) / plain:.1f} images per second, ratio {plain / kit:.2f}")


if __name__ == "__main__":
    main()
