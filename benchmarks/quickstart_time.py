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

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from jupyter_lab import VIEWPORT, Driver, open_chromium, serve

TRAINED_IMAGE_IN_VIEW = """() => {
  const title = document.querySelector(".edk-latest")?.previousElementSibling?.textContent || "";
  const place = document.querySelector(".edk-latest img")?.getBoundingClientRect();
  return /step [1-9]/.test(title) && place && place.height > 0 && place.top >= 0 && place.bottom <= innerHeight;
}"""


class ProcessorTime(threading.Thread):
    """Processor seconds of all processes below this one, detached ones too: they inherit a mark in the environment.

    Looks twice a second, so what a process does in its last moment is missed.
    """

    MARK = "EDK_BENCHMARK"

    def __init__(self) -> None:
        super().__init__(daemon=True)
        os.environ[self.MARK] = str(os.getpid())
        self._seconds: dict[tuple[int, float], float] = {}

    @property
    def seconds(self) -> float:
        return sum(self._seconds.values())

    def run(self) -> None:
        """Look until the program ends."""
        while True:
            for process in psutil.process_iter():
                try:
                    if process.environ().get(self.MARK) == str(os.getpid()):
                        times = process.cpu_times()
                        self._seconds[process.pid, process.create_time()] = times.user + times.system
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            time.sleep(0.5)


def main() -> int:
    """Take the time and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--screenshot", help="file for the window at the first trained image")
    parser.add_argument("--epochs", type=int, default=0, help="0: as the notebook has it")
    options = parser.parse_args()
    changes = {"MAX_EPOCHS": options.epochs} if options.epochs else {}
    marks: list[tuple[str, float, float]] = []
    processor = ProcessorTime()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as lab, open_chromium() as chromium:
        page = chromium.new_context(viewport=VIEWPORT).new_page()
        driver = Driver(page)
        processor.start()
        time.sleep(1.5)
        begin, spent = time.monotonic(), processor.seconds

        def mark(what: str) -> None:
            marks.append((what, time.monotonic() - begin, processor.seconds - spent))

        driver.open(lab.copy("00_quickstart", **changes))
        mark("notebook open, kernel ready")
        driver.run_all()
        pressed = time.monotonic() - begin
        driver.wait_while_moving(page.get_by_role("heading", name="Training", exact=True).count)
        mark("training panel there")
        driver.wait_while_moving(lambda: page.evaluate(TRAINED_IMAGE_IN_VIEW))
        mark("first trained image in view")
        if options.screenshot:
            page.screenshot(path=options.screenshot)
        driver.wait_for_text(driver.panel("Training"), ".edk-badge", "finished")
        mark("training ended")
        driver.wait_for_text(driver.panel("Compare"), ".edk-note", "images generated")
        mark("before and after there")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    print("   wall   after Run All   processor")
    for what, seconds, processor_seconds in marks:
        print(f"{seconds:7.1f} s  {max(0.0, seconds - pressed):7.1f} s  {processor_seconds:7.1f} s  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
