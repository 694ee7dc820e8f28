"""`python -m everydream_kit` is `everydream`."""

import sys

from everydream_kit.cli import main

if __name__ == "__main__":
    sys.exit(main())
