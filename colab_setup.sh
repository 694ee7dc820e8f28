#!/usr/bin/env bash
# Sets EveryDream Kit up on this machine, then does what the first word says.
#
#   bash colab_setup.sh                 set up
#   bash colab_setup.sh demo            set up, then fine-tune the small model that ships with the kit
#   bash colab_setup.sh test [ARGS]     set up with the test tools, then run the tests (ARGS go to pytest)
#   bash colab_setup.sh check [ARGS]    set up with the test tools, then check form, names and types
#
# It needs Python 3.10 to 3.13 and nothing else, and may be called as often as you like: what is there stays.
# On a plain machine everything goes into .venv next to this file. In a notebook, and on Colab, RunPod and Vast, it goes
# into the Python of the kernel, and a torch that is there is never replaced.
#
#   EDK_VENV=FOLDER   another folder for the virtual environment (also on Colab, RunPod and Vast)
#   EDK_PYTHON=PATH   the Python to use, where the first one found is not the one you want
#   EDK_TORCH=cpu     or cuda: which build of torch, where there is none yet (default: cuda if there is an NVIDIA GPU)
#
# This file only finds a Python; the work is in scripts/set_up.py.
set -u

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fits() {
    local program='import sys; print((3, 10) <= sys.version_info[:2] <= (3, 13) and sys.maxsize > 2**32)'
    [ "$("$1" -c "$program" 2>/dev/null)" = True ]
}

if [ -n "${EDK_PYTHON:-}" ]; then
    if ! fits "$EDK_PYTHON"; then
        echo "EDK_PYTHON=$EDK_PYTHON is no 64-bit Python 3.10 to 3.13. Give the path of one that is." >&2
        exit 1
    fi
    exec "$EDK_PYTHON" "$here/scripts/set_up.py" "$@"
fi

for name in python3 python python3.12 python3.11 python3.13 python3.10; do
    if fits "$name"; then
        exec "$name" "$here/scripts/set_up.py" "$@"
    fi
done

{
    echo "EveryDream Kit needs a 64-bit Python 3.10, 3.11, 3.12 or 3.13, and none was found on this machine."
    if version=$(python3 --version 2>&1); then
        echo "(python3 is $version.)"
    fi
    echo "On Debian and Ubuntu:  apt-get install python3 python3-venv"
    echo "On a Mac:              brew install python@3.12"
    echo "If you have one elsewhere:  EDK_PYTHON=/path/to/python3 bash colab_setup.sh"
} >&2
exit 1
