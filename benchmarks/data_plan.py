"""Scan speed and memory, and epoch plans at 10³ to 10⁶ images.

    python benchmarks/data_plan.py [--files 100000] [--folder DIR]

Makes a folder of small images with captions (kept if --folder is given), scans it cold, warm, and with another
run's cache; then plans epochs over datasets of growing size. Every measurement runs in a process of its own, so that
memory is its own: "bytes an image" is the rise of the peak resident size over that of a process that did the same
with next to no images.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from everydream_kit.data.dataset import FROM_TEXT, Dataset, DatasetBuilder, Defaults
from everydream_kit.data.epoch_plan import PlanSettings, plan_epoch
from everydream_kit.data.scanning import scan_dataset

IMAGES_PER_FOLDER = 1000


def make_files(folder: Path, count: int) -> None:
    """Small JPEGs of four shapes, each with a caption next to it."""
    shapes = [(64, 64), (96, 64), (64, 96), (128, 64)]
    rng = np.random.default_rng(0)
    samples = []
    for width, height in shapes:
        path = folder / "sample.jpg"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(path)
        samples.append(path.read_bytes())
        path.unlink()
    for number in range(count):
        place = folder / f"{number // IMAGES_PER_FOLDER:04}"
        place.mkdir(exist_ok=True)
        (place / f"{number:07}.jpg").write_bytes(samples[number % len(samples)])
        (place / f"{number:07}.txt").write_text(f"an image of thing {number % 977}, red, small, by foo, high quality")


def make_dataset(count: int) -> Dataset:
    """Rows as a scan would give them, of widely differing shapes, a tenth with a multiplier."""
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(400, 3000, (2, count)).tolist()
    builder = DatasetBuilder(["/data/images"])
    for number in range(count):
        builder.add(
            f"{number // 1000:04}/{number:07}.jpg",
            width=widths[number],
            height=heights[number],
            caption=f"an image of thing {number % 977}, red, small, by foo, high quality",
            caption_kind=FROM_TEXT,
            multiply=1.3 if number % 10 == 0 else 1.0,
        )
    return builder.build(Defaults())


def measure(task: Callable[..., dict], *args: object) -> dict:
    """Run a task in a fresh process; its peak memory comes with its answer."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, task, args))
    process.start()
    answer = receiver.recv()
    process.join()
    return answer


def _run(sender: multiprocessing.connection.Connection, task: Callable[..., dict], args: tuple) -> None:
    answer = task(*args)
    answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sender.send(answer)


def scan_task(folder: str, cache: str | None) -> dict:
    start, busy = time.perf_counter(), time.process_time()
    dataset = scan_dataset(folder, cache_dir=cache)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return {"seconds": seconds, "busy": busy, "pictures": len(dataset), "problems": len(dataset.problems)}


def plan_task(count: int) -> dict:
    dataset = make_dataset(count)
    columns = dataset.num_bytes
    settings = PlanSettings(batch_size=8, grad_accum=2)
    first, busy = time.perf_counter(), time.process_time()
    plan = plan_epoch(dataset, settings, 0)
    second, busy = time.perf_counter(), time.process_time() - busy
    plan = plan_epoch(dataset, settings, 1)
    end = time.perf_counter()
    walk = time.perf_counter()
    for step in range(min(1000, plan.num_steps)):
        plan.step(step)
    return {
        "first_seconds": second - first,
        "first_busy": busy,
        "seconds": end - second,
        "step_us": (time.perf_counter() - walk) / min(1000, plan.num_steps) * 1e6,
        "columns_bytes": columns,
        "steps": plan.num_steps,
    }


def show_scans(folder: Path, count: int) -> None:
    print(f"Scan of {count:,} small JPEGs, each with a caption file")
    print(f"{'':<28}{'seconds':>9}{'CPU s':>8}{'files/s':>10}{'peak MB':>9}{'bytes/image':>15}")
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryDirectory() as cache:
        base = measure(scan_task, empty, None)["peak_bytes"]
        for name, where in (("nothing remembered", None), ("remembering", cache), ("second start, unchanged", cache)):
            row = measure(scan_task, str(folder), where)
            per_image = (row["peak_bytes"] - base) / row["pictures"]
            print(
                f"{name:<28}{row['seconds']:>9.2f}{row['busy']:>8.2f}{row['pictures'] / row['seconds']:>10,.0f}"
                f"{row['peak_bytes'] / 1e6:>9.0f}{per_image:>15.0f}"
            )


def show_plans() -> None:
    print("\nEpoch plan, batch 8 x 2, 512 px (first: with the keys' hashes, once for each dataset)")
    print(
        f"{'pictures':>10}{'first s':>9}{'CPU s':>8}{'next s':>9}{'us/step':>9}"
        f"{'columns B':>11}{'peak MB':>9}{'bytes/image':>15}"
    )
    base = measure(plan_task, 1)["peak_bytes"]
    for count in (10**3, 10**4, 10**5, 10**6):
        row = measure(plan_task, count)
        print(
            f"{count:>10,}{row['first_seconds']:>9.3f}{row['first_busy']:>8.3f}{row['seconds']:>9.3f}"
            f"{row['step_us']:>9.1f}"
            f"{row['columns_bytes'] / count:>11.0f}{row['peak_bytes'] / 1e6:>9.0f}"
            f"{(row['peak_bytes'] - base) / count:>15.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where the images are made, or lie from an earlier run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if not folder.is_dir() or not any(folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            make_files(folder, options.files)
        show_scans(folder, sum(1 for _ in folder.glob("*/*.jpg")))
    show_plans()


if __name__ == "__main__":
    main()
