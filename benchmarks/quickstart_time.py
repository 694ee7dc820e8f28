"""A person's path, timed: from opening `00_quickstart` to the first trained image, and to before and after, in a real browser.

    python benchmarks/quickstart_time.py              # JupyterLab and Chromium; all cells are run, as they are
    python benchmarks/quickstart_time.py --epochs 8   # a shorter training

The kit is installed and the server is up when the clock starts: the notebook is opened then, its kernel starts, *Run All
Cells* is pressed (the second clock starts), and both stop when the last image of the comparison is there. Nothing is scrolled:
an image counts when it lies in the window. Seconds of the wall clock are what a person waits, so let nothing else run;
processor seconds (of everything that was started, browser and server included) say how much work it is on a busy machine, too:
there, OMP_NUM_THREADS=1 keeps threads from spinning while they wait for each other.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from jupyter_lab import VIEWPORT, Driver, open_chromium, serve

TRAINING_PANEL = """() => [...document.querySelectorAll(".edk h3")].some(e => e.textContent === "Training")"""
TRAINED_IMAGE_IN_VIEW = """() => {
  const title = document.querySelector(".edk-latest")?.previousElementSibling?.textContent || "";
  const place = document.querySelector(".edk-latest img")?.getBoundingClientRect();
  return /step [1-9]/.test(title) && place && place.height > 0 && place.top >= 0 && place.bottom <= innerHeight;
}"""
TRAINING_ENDED = """() => [...document.querySelectorAll(".edk-badge")].some(e => e.textContent === "finished")"""
BEFORE_AND_AFTER = (
    """() => [...document.querySelectorAll(".edk-note")].some(e => /images generated/.test(e.textContent))"""
)
POLLING_MILLISECONDS = 200

KINDS = {
    "training": "everydream_kit train",
    "compare": "everydream_kit.actions.background generate",
    "plan": "everydream_kit.actions.background estimate",
    "inspection": "everydream_kit.actions.background inspect",
    "kernel": "ipykernel_launcher",
    "server": "jupyterlab",
    "browser": "chromium",
}
"""What each process is for, by a part of its command line."""


class ProcessorTime(threading.Thread):
    """Processor seconds of all processes below this one, detached ones too: they inherit a mark in the environment.

    Looks twice a second, so what a process does in its last moment is missed.
    """

    MARK = "EDK_BENCHMARK"

    def __init__(self) -> None:
        super().__init__(daemon=True)
        os.environ[self.MARK] = str(os.getpid())
        self._seconds: dict[tuple[int, float], tuple[str, float]] = {}

    def seconds(self) -> dict[str, float]:
        """Processor seconds by kind of process (`KINDS`)."""
        spent = dict.fromkeys([*KINDS, "other"], 0.0)
        for kind, seconds in list(self._seconds.values()):
            spent[kind] += seconds
        return spent

    def run(self) -> None:
        """Look until the program ends."""
        strangers: set[tuple[int, float]] = set()  # not asked for their environment again
        while True:
            for process in psutil.process_iter():
                try:
                    known = process.pid, process.create_time()
                    if known in strangers:
                        continue
                    if not self._is_ours(process):
                        strangers.add(known)
                        continue
                    line, times = " ".join(process.cmdline()), process.cpu_times()
                    kind = next((kind for kind, sign in KINDS.items() if sign in line), "other")
                    self._seconds[known] = kind, times.user + times.system
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            time.sleep(0.5)

    def _is_ours(self, process: psutil.Process) -> bool:
        """By the mark, or by the parent: Chromium's processes write their titles over their environment."""
        parent = process.parent()
        known = parent is not None and (parent.pid, parent.create_time()) in self._seconds
        return known or process.environ().get(self.MARK) == str(os.getpid())


def wait(page: Any, condition: str) -> None:
    """Wait, however long, with little work for the page: it shares the machine with the training."""
    page.wait_for_function(condition, timeout=0, polling=POLLING_MILLISECONDS)


def main() -> int:
    """Take the time and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--screenshot", help="file for the window at the first trained image")
    parser.add_argument("--epochs", type=int, default=0, help="0: as the notebook has it")
    options = parser.parse_args()
    changes = {"MAX_EPOCHS": options.epochs} if options.epochs else {}
    marks: list[tuple[str, float, dict[str, float]]] = []
    processor = ProcessorTime()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as lab, open_chromium() as chromium:
        page = chromium.new_context(viewport=VIEWPORT).new_page()
        driver = Driver(page)
        processor.start()
        time.sleep(1.5)
        begin, before = time.monotonic(), processor.seconds()

        def mark(what: str) -> None:
            spent = {kind: seconds - before[kind] for kind, seconds in processor.seconds().items()}
            marks.append((what, time.monotonic() - begin, spent))

        driver.open(lab.copy("00_quickstart", **changes))
        mark("notebook open, kernel ready")
        driver.run_all()
        pressed = time.monotonic() - begin
        wait(page, TRAINING_PANEL)
        mark("training panel there")
        wait(page, TRAINED_IMAGE_IN_VIEW)
        mark("first trained image in view")
        if options.screenshot:
            page.screenshot(path=options.screenshot)
        wait(page, TRAINING_ENDED)
        mark("training ended")
        wait(page, BEFORE_AND_AFTER)
        mark("before and after there")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    kinds = list(marks[-1][2])
    print("    wall  after Run All  processor", *(f"{kind:>10}" for kind in kinds))
    for what, seconds, spent in marks:
        each = " ".join(f"{spent[kind]:10.1f}" for kind in kinds)
        print(f"{seconds:7.1f}s {max(0.0, seconds - pressed):13.1f}s {sum(spent.values()):9.1f}s {each}  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
