"""Stands for the trainer in tests of jobs and panels: writes a run folder as the trainer does, without torch.

Called as `trainer_double.py RUN [--steps N] [--seconds-a-step S] [--die-at N] [--fail-at N]`; continues from
resume.json.
"""

import argparse
import json
import os
import platform
import signal
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds-a-step", type=float, default=0.05)
    parser.add_argument("--die-at", type=int, default=-1)
    parser.add_argument("--fail-at", type=int, default=-1)
    options = parser.parse_args()
    Trainer(options).train()


class Trainer:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.run: Path = options.run
        self.stopping = False
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        self.stopping = True

    def train(self) -> None:
        place = self.run / "resume.json"
        step = json.loads(place.read_text())["step"] if place.exists() else 0
        self.status("starting", step)
        self.event("started", step=step)
        while step < self.options.steps and not self.stopping:
            time.sleep(self.options.seconds_a_step)
            step += 1
            if step == self.options.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if step == self.options.fail_at:
                self.event("error", message="DataError: no images")
                self.status("failed", step, message="no images")
                raise SystemExit(1)
            self.event("loss", step=step, loss=1 / (1 + step), lr=1e-6, images_per_second=12.5, memory_bytes=1 << 30)
            if step % 5 == 0:
                self.sample(step)
            self.obey(step)
            print(f"step {step}", flush=True)
            self.status("running", step)
        self.save(step, "last-")
        place.write_text(json.dumps({"step": step}))
        state = "stopped" if self.stopping else "finished"
        self.event("finished", step=step, state=state)
        self.status(state, step)

    def obey(self, step: int) -> None:
        control = self.run / "control.json"
        if not control.exists():
            return
        action = json.loads(control.read_text())["action"]
        control.unlink()
        if action == "stop":
            self.stopping = True
        elif action == "save":
            self.save(step)
        else:
            self.sample(step)

    def sample(self, step: int) -> None:
        from PIL import Image

        path = self.run / "samples" / f"gs{step:05}-0.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (128, 128), (10 * step % 256, 90, 160)).save(path)
        self.event("sample", step=step, path=f"samples/{path.name}", prompt="a jet")

    def save(self, step: int, prefix: str = "") -> None:
        self.status("saving", step)
        folder = self.run / "ckpts" / f"{prefix}jets-ep00-gs{step:05}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").write_text("{}")
        self.event("saved", step=step, path=str(folder))

    def event(self, kind: str, **facts: object) -> None:
        with (self.run / "events.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, "time": time.time(), **facts}) + "\n")

    def status(self, state: str, step: int, message: str = "") -> None:
        record = {
            "state": state,
            "pid": os.getpid(),
            "host": platform.node(),
            "heartbeat": time.time(),
            "step": step,
            "num_steps": self.options.steps,
            "epoch": 0,
            "loss": 1 / (1 + step),
            "images_per_second": 12.5,
            "eta_seconds": (self.options.steps - step) * self.options.seconds_a_step,
            "message": message,
        }
        alongside = self.run / ".status.tmp"
        alongside.write_text(json.dumps(record))
        alongside.replace(self.run / "status.json")


if __name__ == "__main__":
    main()
