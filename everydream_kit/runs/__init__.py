"""Run folders: every file name and format in them, and the one reader of them.

`layout` has the names, `schema` the JSON objects, `run_folder` a run and its checkpoints, `resume_state` what a resume needs of a
state, `history` the curves that a run has written so far, `finding` runs by name or project.
"""

from everydream_kit.runs.finding import DEFAULT_LOGDIR, find_last_checkpoint, find_run, list_runs
from everydream_kit.runs.run_folder import Checkpoint, RunFolder
from everydream_kit.runs.schema import ENDED_STATES, Action, Event, Status

__all__ = [
    "DEFAULT_LOGDIR",
    "ENDED_STATES",
    "Action",
    "Checkpoint",
    "Event",
    "RunFolder",
    "Status",
    "find_last_checkpoint",
    "find_run",
    "list_runs",
]
