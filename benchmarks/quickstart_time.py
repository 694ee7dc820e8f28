"""A person's path, timed: from opening `00_quickstart` to the finished picture of before and after, in a real browser.

    python benchmarks/quickstart_time.py              # JupyterLab and Chromium; all cells are run, as they are
    python benchmarks/quickstart_time.py --epochs 8   # a shorter training

The kit is installed and the server is up when the clock starts: the notebook is opened then, its kernel starts, *Run All
Cells* is pressed, and the clock stops when the last picture of the comparison is there. Seconds are of the wall clock, so let
nothing else run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from jupyter_lab import VIEWPORT, Driver, open_chromium, serve


def main() -> int:
    """Take the time and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=0, help="0: as the notebook has it")
    options = parser.parse_args()
    changes = {"MAX_EPOCHS": options.epochs} if options.epochs else {}
    marks: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as lab, open_chromium() as chromium:
        page = chromium.new_context(viewport=VIEWPORT).new_page()
        driver = Driver(page)
        begin = time.monotonic()

        def mark(what: str) -> None:
            marks.append((what, time.monotonic() - begin))

        driver.open(lab.copy("00_quickstart", **changes))
        mark("notebook open, kernel ready")
        driver.run_all()
        driver.wait_while_moving(page.get_by_role("heading", name="Training", exact=True).count)
        mark("machine and pictures shown, training started")
        driver.wait_while_moving(page.get_by_role("heading", name="Compare", exact=True).count)
        mark("training ended")
        driver.wait_for_text(driver.panel("Compare"), ".edk-note", "pictures drawn")
        mark("before and after drawn")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    before = 0.0
    for what, seconds in marks:
        print(f"{seconds:7.1f} s  (+{seconds - before:.1f})  {what}")
        before = seconds
    return 0


if __name__ == "__main__":
    sys.exit(main())
