"""The Hugging Face Hub: pushing runs and checkpoints, uploads while training, and fetching a run to continue with.

`connection` talks, `access` checks who may push where, `repository_contents` lists what goes, `upload` sends it; `push`,
`uploader` and `fetch` are the three faces. Tokens come from huggingface_hub's own login or HF_TOKEN and are written
nowhere.
"""

from everydream_kit.export.hub.access import HubAccess, check_hub_access
from everydream_kit.export.hub.fetch import fetch_run, parse_run_reference
from everydream_kit.export.hub.push import PushPreview, preview_push, push_to_hub
from everydream_kit.export.hub.uploader import HubUploader

__all__ = [
    "HubAccess",
    "HubUploader",
    "PushPreview",
    "check_hub_access",
    "fetch_run",
    "parse_run_reference",
    "preview_push",
    "push_to_hub",
]
