"""`python -m everydream_kit.jobs QUEUE.json`: the process that works through a queue."""

import sys
from pathlib import Path

from everydream_kit.jobs.queue import run_queue

if __name__ == "__main__":
    run_queue(Path(sys.argv[1]))
