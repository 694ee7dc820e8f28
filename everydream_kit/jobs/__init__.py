"""Training as a process of its own: start it, watch it, ask it to stop, find it again.

A job is a detached process (its own session, so that neither an interrupted cell nor a restarted kernel nor a closed
browser reaches it) and a run folder. Everything known about it is in that folder: `job.json` (written here); what the
trainer writes, `status.json`, `events.jsonl` and `train.log`; and `control.json`, a request to the trainer. So a job
can be attached by anybody who can read the folder, and nothing here keeps state of its own.

`process` knows detached processes, `job` runs, `queue` several of them. Not here: widgets, and the training itself.
"""

from everydream_kit.jobs.job import FINAL_STATES, Job, attach, find_jobs, resume, running_jobs, start, start_module
from everydream_kit.jobs.queue import Queue, entry_settings, start_queue

__all__ = [
    "FINAL_STATES",
    "Job",
    "Queue",
    "attach",
    "entry_settings",
    "find_jobs",
    "resume",
    "running_jobs",
    "start",
    "start_module",
    "start_queue",
]
