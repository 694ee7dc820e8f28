"""Every name in a run folder and in a checkpoint. Whoever needs a path asks `RunFolder` or `Checkpoint`, which know these.

    <logdir>/<project>-<YYYYMMDD-HHMMSS>/
        config.json  config-<step>.json  environment.json  origin.json      settings, versions, where a fetched run came from
        train.log  events.jsonl  status.json  plan.json  job.json           what is written while it runs
        control.json  live.json                                             what others write and the trainer reads
        samples/  losses/ep<N>.json  ep<N>_batch_schedule.txt  ep<N>_uses.txt  undersized_images.txt
        ckpts/<project>-ep<NN>-gs<NNNNN>/   ckpts/..._ema/   ckpts/best/    checkpoints; with averaged weights; the best
            model_index.json or adapter.json, unet/ ...                     the model, as diffusers names it
            resume/*.safetensors  resume/state.json  resume/manifest.json   what a resume needs as well

A new file gets its name here, and in the same commit a writer elsewhere. `CHECKPOINT_FILE` is what may come from a stranger.
"""

from __future__ import annotations

import re
from datetime import datetime

# In a run folder
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
ORIGIN = "origin.json"
LOG = "train.log"
EVENTS = "events.jsonl"
STATUS = "status.json"
PLAN = "plan.json"
JOB = "job.json"
REQUEST = "control.json"
LIVE_SETTINGS = "live.json"
UNDERSIZED = "undersized_images.txt"
CHANGED_CONFIG = "config-{step:05}.json"
"""The settings as they were before a resume changed them at this step."""
LOSSES_OF_EPOCH = "ep{epoch}.json"
"""The losses of an epoch, image by image, in the folder of losses."""
SCHEDULE, USES = "ep{epoch}_batch_schedule.txt", "ep{epoch}_uses.txt"
"""The batches of an epoch, for people, and how often it uses each image."""
SAMPLES = "samples"
LOSSES = "losses"
CHECKPOINTS = "ckpts"
UPLOADING = ".uploading"
"""Hard links to checkpoints that are on their way to the Hub, in a folder of the same depth as CHECKPOINTS."""
LOCK = ".lock"
STARTING_LOCK = ".starting"

RUN_FOLDER_VARIABLE = "EVERYDREAM_RUN_FOLDER"
"""Environment variable by which whoever starts a process names the run folder that was made for it."""

# In the folder of checkpoints
BEST = "best"
AVERAGED_SUFFIX = "_ema"
PARTIAL, REMOVED, REPLACED = ".partial-", ".gone-", ".old-"
"""Prefixes of folders that are being written, removed or replaced; no reader takes them for checkpoints."""
LEFTOVERS = (PARTIAL, REMOVED, REPLACED)
"""What a killed process leaves among its checkpoints."""

# In a checkpoint
ADAPTER_FILE = "adapter.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
"""diffusers' own name: `pipe.load_lora_weights(folder)` finds it."""
TOKENS_FILE = "learned_embeds.safetensors"
MODEL_FILES = ("model_index.json", ADAPTER_FILE)
"""One of these makes a folder a checkpoint: a whole model's, or a small one's that names its base."""
RESUME = "resume"
RESUME_MANIFEST = "resume/manifest.json"
RESUME_STATE = "resume/state.json"
TENSORS_SUFFIX = ".safetensors"

RUN_NAME = re.compile(r"(?P<project>.+)-(?P<time>\d{8}-\d{6})(?:-(?P<number>\d{1,6}))?")
CHECKPOINT_NAME = re.compile(rf".+-ep(?P<epoch>\d{{1,9}})-gs(?P<step>\d{{1,9}})(?P<averaged>{AVERAGED_SUFFIX})?")
SAMPLE_NAME = re.compile(r"gs(?P<step>\d+)-(?P<index>\d+)(?P<averaged>-ema(?=-))?(?:-(?P<prompt>.*))?\.jpg")
LOSSES_NAME = re.compile(r"ep(?P<epoch>\d+)\.json")
CHECKPOINT_FILE = re.compile(
    rf"(modular_)?model_index\.json|{'|'.join(map(re.escape, (ADAPTER_FILE, LORA_FILE, TOKENS_FILE)))}"
    r"|(unet|transformer|vae|text_encoder(_2)?|text_conditioner)"
    r"/(config\.json|(diffusion_pytorch_model|model)\.safetensors)"
    r"|(t5_)?tokenizer(_2)?/(vocab|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
    r"|(t5_)?tokenizer(_2)?/(merges\.txt|chat_template\.jinja)"
    r"|scheduler/scheduler_config\.json"
    rf"|{RESUME}/[a-z_]{{1,40}}\{TENSORS_SUFFIX}"
    rf"|{re.escape(RESUME_STATE)}|{re.escape(RESUME_MANIFEST)}"
)
"""Every file that the kit writes into a checkpoint, by its path in there. None of them can hold code."""


def run_name(project: str, time: datetime, number: int = 1) -> str:
    """`<project>-<YYYYMMDD-HHMMSS>`; a second run of the same second ends with `-2`."""
    name = f"{project}-{time.strftime('%Y%m%d-%H%M%S')}"
    return name if number == 1 else f"{name}-{number}"


def checkpoint_name(project: str, epoch: int, step: int, *, prefix: str = "") -> str:
    """`<prefix><project>-ep<NN>-gs<NNNNN>`: epochs that have ended and optimizer steps done, as EveryDream 2 names them."""
    return f"{prefix}{project}-ep{epoch:02}-gs{step:05}"
