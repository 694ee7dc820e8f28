"""How soon training begins: from the command to the first step, next to a bare script that does as much.

    python benchmarks/first_step.py              # five rounds, interleaved
    python benchmarks/first_step.py --rounds 9

Ours is `everydream train` on the embedded base and the demo's images at 128 px, everything at its default; its clock
stops when the first step is in `events.jsonl`. The bare script imports torch,
diffusers and transformers, loads the same UNet, VAE, text encoder and tokenizer with `from_pretrained`, encodes four
images and makes one step of AdamW: what whoever uses these libraries cannot skip, with no checks, no run folder and no
    log.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from everydream_kit.demo import base_model_path, images_path

BATCH_SIZE = 4
PATIENCE_SECONDS = 120
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Python keeps the bytecode of what it imports, as it does for people."""

BARE = """
import sys
from pathlib import Path
import numpy as np, torch
from PIL import Image
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

base, images = sys.argv[1:]
unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32)
vae = AutoencoderKL.from_pretrained(base, subfolder="vae", torch_dtype=torch.float32)
text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32)
tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
paths = sorted(Path(images).glob("*.webp"))[:4]
loaded = [np.asarray(Image.open(path).convert("RGB").resize((128, 128))) for path in paths]
pixels = torch.from_numpy(np.stack(loaded)).permute(0, 3, 1, 2).float() / 127.5 - 1
with torch.no_grad():
    latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
optimizer = torch.optim.AdamW([*unet.parameters(), *text_encoder.parameters()], lr=1e-6)
ids = tokenizer(["an image"] * 4, padding="max_length", return_tensors="pt").input_ids
noise, timesteps = torch.randn_like(latents), torch.randint(0, 1000, (4,))
noisy = scheduler.add_noise(latents, noise, timesteps)
predicted = unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample
torch.nn.functional.mse_loss(predicted, noise).backward()
optimizer.step()
print("done", flush=True)
"""


def main() -> None:
    """Measure both in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    base, images = str(base_model_path()), str(images_path())
    time_bare(base, images), time_ours(images)  # files into the system's cache, bytecode onto the disk
    ours, bare = [], []
    for number in range(rounds):
        bare.append(time_bare(base, images))
        ours.append(time_ours(images))
        print(f"round {number + 1}: bare {bare[-1]:.2f} s, everydream train {ours[-1]:.2f} s", flush=True)
    ratio = statistics.median(o / b for o, b in zip(ours, bare, strict=True))
    medians = statistics.median(ours), statistics.median(bare)
    print("first step is done: {:.2f} s after the command, bare script {:.2f} s, ratio {:.2f}".format(*medians, ratio))


def time_bare(base: str, images: str) -> float:
    """Seconds to the end of the bare script's step."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", BARE, base, images],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        times = [time.perf_counter() - began for _ in process.stdout]
    if process.returncode:
        raise SystemExit("The bare script failed; run it by hand to see why.")
    return times[-1]


def time_ours(images: str) -> float:
    """Seconds to the end of our first step."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {"resume_ckpt": "embedded", "data_root": images, "resolution": 128, "batch_size": BATCH_SIZE}
        flags |= {"log_step": 1, "max_epochs": 1, "logdir": folder}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "everydream_kit", "train", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
        )
        try:
            wait_for_loss(Path(folder), process)
            done = time.perf_counter() - began
        finally:
            process.kill()
            process.wait()
    return done


def wait_for_loss(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Until the first step's event is there."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        for path in folder.glob("*/events.jsonl"):
            for line in path.read_text("utf-8").splitlines(keepends=True):
                event = json.loads(line) if line.endswith("\n") else {}
                if event.get("kind") == "loss":
                    return
        time.sleep(0.005)
    raise SystemExit("everydream train made no step; run it by hand to see why.")


if __name__ == "__main__":
    main()
