#!/usr/bin/env bash
# What the container of the Dockerfile runs: JupyterLab behind the password in JUPYTER_PASSWORD, and TensorBoard behind JupyterLab.
#
#   JUPYTER_PASSWORD     needed, at least eight characters; none is built in, and the container does not start without one
#   JUPYTER_PORT         8888
#   EDK_WORKSPACE        /workspace: where the volume is mounted
#   TENSORBOARD_LOGDIR   /workspace/everydream
#   TENSORBOARD_PUBLIC   1 opens TensorBoard on port 6006 to everybody who knows the address; it has no password
set -eu

if [ -z "${JUPYTER_PASSWORD:-}" ]; then
    echo "Set JUPYTER_PASSWORD to a password of your own (a pod's environment variables, or docker run -e)." >&2
    echo "Without one anybody who finds the address could use this machine, so nothing was started." >&2
    exit 1
fi

# Blanks at the ends do not count: a form may add them, and nobody types them in.
if ! [[ "$JUPYTER_PASSWORD" =~ [^[:space:]].{6,}[^[:space:]] ]]; then
    echo "JUPYTER_PASSWORD is shorter than eight characters. Everybody on the net can try passwords here: take a longer one." >&2
    exit 1
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export EDK_WORKSPACE=${EDK_WORKSPACE:-/workspace}
workspace=$EDK_WORKSPACE
logs=${TENSORBOARD_LOGDIR:-$workspace/everydream}
mkdir -p "$logs"
# The notebooks are copied once, so that a person's changes lie on the volume and stay.
if [ ! -e "$workspace/notebooks" ]; then
    cp -r "$here/notebooks" "$workspace/notebooks"
fi

# The hash goes into a file that only we can read: a command line can be read by everybody on the machine.
umask 077
config=$(mktemp -d)/jupyter_server_config.json
python - "$config" <<'PYTHON'
import json
import os
import sys

from jupyter_server.auth import passwd

settings = {
    "PasswordIdentityProvider": {"hashed_password": passwd(os.environ["JUPYTER_PASSWORD"]), "password_required": True},
    "ServerApp": {
        "ip": "0.0.0.0",  # the host forwards the port from outside the container
        "port": int(os.environ.get("JUPYTER_PORT", "8888")),
        "open_browser": False,
        "allow_root": True,  # containers run as root
        "allow_remote_access": True,
        "trust_xheaders": True,  # RunPod's proxy speaks https for us
        "root_dir": os.environ["EDK_WORKSPACE"],
    },
}
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(settings, file)
PYTHON
unset JUPYTER_PASSWORD
umask 022

if [ "${TENSORBOARD_PUBLIC:-}" = 1 ]; then
    tensorboard --logdir "$logs" --port 6006 --bind_all &
else
    tensorboard --logdir "$logs" --port 6006 --host 127.0.0.1 &
fi

exec jupyter lab --config "$config"
