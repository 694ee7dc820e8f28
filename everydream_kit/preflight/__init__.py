"""Before anything is spent: how much memory, time, disk and cost a run needs, and what to change so that it fits.

`memory_estimate` runs the trainer's own step on tensors without values; `probe` measures on a real GPU; `planning` puts memory,
time, disk and cost together. Nothing is imported here, so that each part costs only itself.
"""
