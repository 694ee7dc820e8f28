"""Train the embedded base model from scratch, on two cores, in about two hours of background time.

python recipes/make_emoji_dataset.py DATA
python recipes/train_embedded_base.py vae DATA WORK --minutes 46
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the kit, when it is not installed

from embedded_base import autoencoder
from embedded_base.peers import Peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae"])
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=46)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    autoencoder.train(arguments.data, arguments.work, arguments.minutes, Peers())


if __name__ == "__main__":
    main()
