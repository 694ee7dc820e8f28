"""`python -m everydream_kit` is `everydream`."""

import os
import sys

if __name__ == "__main__":
    # Python puts the working folder first, which may be an unpacked dataset: its `yaml.py` would be imported.
    if sys.path and sys.path[0] in {"", os.getcwd()} and not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    from everydream_kit.cli import main

    sys.exit(main())
