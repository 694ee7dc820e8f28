"""A plan: what a run will take, in numbers, in one line, as a report, and as JSON. How it is made is in `planning`.

Every number carries its right: measured here, published by somebody, or computed; what had to be assumed is listed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from everydream_kit.preflight.gpus import GIB
from everydream_kit.preflight.units import cost, duration, size

if TYPE_CHECKING:
    from everydream_kit.config import TrainConfig
    from everydream_kit.preflight.advice import Advice
    from everydream_kit.preflight.cost import Price
    from everydream_kit.preflight.disk import DiskUse
    from everydream_kit.preflight.gpus import GpuSpec
    from everydream_kit.preflight.memory_records import MemoryEstimate
    from everydream_kit.preflight.step_time import StepSeconds


def with_article(gpu: str) -> str:
    """A GPU's name with "a" or "an", as its letters are spoken."""
    return f"{'an' if gpu[0] in 'AHLR' else 'a'} {gpu}"


@dataclass(frozen=True)
class StepCount:
    """How many optimizer steps a run has.

    Attributes:
        num_images: usable images that are trained on; None where the dataset was not looked at.
        num_epochs: as requested.
        per_epoch, num_steps: optimizer steps of an epoch and of the run; None where they are not known.
        basis: `planned` from the first epoch, `counted` from the number of files, or `unknown`.
    """

    num_images: int | None
    num_epochs: int
    per_epoch: int | None
    num_steps: int | None
    basis: Literal["planned", "counted", "unknown"]


@dataclass(frozen=True)
class Offer:
    """The most that would fit, everything else as it is: a batch size, a resolution."""

    batch_size: int | None
    resolution: int | None


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        config: the settings, with a number as batch size.
        gpu_spec: that is planned for; None for this machine's CPU.
        steps: how many.
        memory: what it needs of the device; None where the base could not be read.
        room_bytes: what the device has for it, the margin taken off.
        device_bytes: all that the device has.
        step: the time of one step, or None where nothing is known of it.
        seconds_of: seconds by part of the run: training, samples, latents, captions.
        disk: files by kind, and the file systems that hold them.
        price: of an hour of the GPU, or None.
        latents: where encoded images are kept: off, memory, disk.
        steps_done: of a run that is under way.
        advice: what to change, where it does not fit.
        offer: how far it could go, if requested.
        assumptions, warnings: sentences.
    """

    config: TrainConfig
    gpu_spec: GpuSpec | None
    steps: StepCount
    memory: MemoryEstimate | None
    room_bytes: int
    device_bytes: int
    step: StepSeconds | None
    seconds_of: dict[str, float] = field(default_factory=dict)
    disk: DiskUse | None = None
    price: Price | None = None
    latents: str = "off"
    steps_done: int = 0
    advice: Advice | None = None
    offer: Offer | None = None
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """The device in words."""
        return self.gpu_spec.name if self.gpu_spec is not None else "this CPU"

    @property
    def fits(self) -> bool | None:
        """Whether it fits the device with the margin; None where the memory is not known."""
        return None if self.memory is None else self.memory.peak_bytes <= self.room_bytes

    @property
    def seconds(self) -> float | None:
        """Of the whole run, or None."""
        return sum(self.seconds_of.values()) if self.seconds_of else None

    @property
    def seconds_left(self) -> float | None:
        """Of what is still to be done, or None."""
        if self.seconds is None or not self.steps.num_steps:
            return None
        return self.seconds * max(0.0, 1 - self.steps_done / self.steps.num_steps)

    @property
    def cost(self) -> float | None:
        """US dollars of the whole run, or None."""
        return None if self.price is None or self.seconds is None else self.price.cost(self.seconds)

    @property
    def cost_left(self) -> float | None:
        """US dollars of what is still to be done, or None."""
        return None if self.price is None or self.seconds_left is None else self.price.cost(self.seconds_left)

    @property
    def line(self) -> str:
        """The plan in one line."""
        parts = [self._length_words()]
        if self.memory is not None:
            parts.append(self._memory_words())
        if self.disk is not None:
            parts.append(f"{size(self.disk.most_bytes)} disk")
        if self.cost is not None and self.price is not None:
            dated = f" (price of {self.price.read_on})" if self.price.read_on else ""
            parts.append(f"about {cost(self.cost)}{dated}")
        return " · ".join(parts)

    @property
    def text(self) -> str:
        """The plan as a report."""
        rows = [("plan", self.line)]
        if self.steps_done:
            rows.append(("left", self._left_words()))
        rows += [("steps", self._steps_words()), ("time", self._time_words())]
        rows += [("memory", line) for line in self._memory_lines()]
        rows += [("disk", line) for line in self._disk_lines()]
        rows += [("cost", line) for line in self._cost_lines()]
        rows += [("advice", line) for line in self._advice_lines()]
        rows += [("assumed", line) for line in self.assumptions]
        rows += [("warning", line) for line in self.warnings]
        lines, before = [], ""
        for name, words in rows:
            lines.append(f"{'' if name == before else name:<8} {words}")
            before = name
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, with the line and the report."""
        return {
            "version": 1,
            "line": self.line,
            "device": self.device,
            "fits": self.fits,
            "batch_size": self.config.batch_size,
            "steps": {**asdict(self.steps), "done": self.steps_done},
            "step_seconds": None if self.step is None else asdict(self.step),
            "seconds": self.seconds,
            "seconds_left": self.seconds_left,
            "seconds_of": self.seconds_of,
            "memory": None if self.memory is None else self.memory.to_json(),
            "room_bytes": self.room_bytes,
            "device_bytes": self.device_bytes,
            "latents": self.latents,
            "disk": None if self.disk is None else self._disk_json(),
            "price": None if self.price is None else asdict(self.price),
            "cost_usd": self.cost,
            "cost_left_usd": self.cost_left,
            "idle_usd_per_hour": None if self.price is None else self.price.usd_per_hour,
            "advice": None if self.advice is None else self._advice_json(),
            "offer": None if self.offer is None else asdict(self.offer),
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "config": self.config.model_dump(mode="json"),
        }

    def _length_words(self) -> str:
        steps = self.steps
        epochs = "1 epoch" if steps.num_epochs == 1 else f"{steps.num_epochs:,} epochs"
        where = f"on {with_article(self.device)}" if self.gpu_spec is not None else "on this CPU"
        if steps.num_steps is None:
            return f"{epochs} → steps are known once the dataset is there → {where}"
        time = f"about {duration(self.seconds)}" if self.seconds is not None else "time known after the first steps"
        return f"{epochs} → {steps.num_steps:,} steps → {time} {where}"

    def _memory_words(self) -> str:
        assert self.memory is not None
        words = f"{self.memory.peak_bytes / GIB:.1f} of {self.device_bytes / GIB:.1f} GiB"
        return words if self.fits else f"does not fit: {words}"

    def _left_words(self) -> str:
        assert self.steps.num_steps is not None
        left = self.steps.num_steps - self.steps_done
        words = f"{left:,} of {self.steps.num_steps:,} steps, about {duration(self.seconds_left)}"
        return words if self.cost_left is None else f"{words}, about {cost(self.cost_left)}"

    def _steps_words(self) -> str:
        steps, config = self.steps, self.config
        if steps.num_steps is None:
            return "unknown: the dataset is not on this machine"
        per_step = f"{config.batch_size} × {config.grad_accum}" if config.grad_accum > 1 else f"{config.batch_size}"
        how = "planned from the first epoch" if steps.basis == "planned" else "counted from the number of files"
        images = f"{steps.num_images:,} images" if steps.num_images is not None else "images"
        return f"{images}, {per_step} in a step: {steps.per_epoch:,} steps an epoch ({how})"

    def _time_words(self) -> str:
        if self.step is None:
            return "not known before the first steps: no run, figure or computation fits"
        parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in self.seconds_of.items())
        return f"{self.step.seconds:.2f} s a step, {self.step.basis}: {self.step.source}" + (
            f"; {parts}" if parts else ""
        )

    def _memory_lines(self) -> list[str]:
        if self.memory is None:
            return []
        lines = [f"{phase.name}: {phase.peak_bytes / GIB:.2f} GiB" for phase in self.memory.phases]
        alongside = "context and gaps of the allocator" if self.gpu_spec is not None else "the process itself"
        lines.append(f"{alongside}: {self.memory.allowance_bytes / GIB:.2f} GiB (an allowance)")
        verdict = "fits" if self.fits else "does not fit"
        room, whole = self.room_bytes / GIB, self.device_bytes / GIB
        lines.append(f"{verdict}: estimated {self.memory.peak_bytes / GIB:.2f} GiB, room {room:.2f} of {whole:.2f} GiB")
        return lines

    def _disk_lines(self) -> list[str]:
        if self.disk is None:
            return []
        items = [
            f"{item.name}: at most {size(item.most_bytes)}, {size(item.last_bytes)} at the end ({item.note}) in {item.folder}"
            for item in self.disk.items
        ]
        return items + [f"{place.folder}: {size(place.free_bytes)} free" for place in self.disk.places]

    def _cost_lines(self) -> list[str]:
        if self.price is None:
            return ["no price is known for it; give --price in US dollars an hour"] if self.gpu_spec is not None else []
        lines = [self.price.describe()]
        if self.cost is not None:
            lines[0] += f"; the run about {cost(self.cost)}, an idle hour {cost(self.price.usd_per_hour)}"
        if self.price.read_on:
            lines.append(f"prices move: {self.price.source}")
        return lines

    def _advice_lines(self) -> list[str]:
        lines = []
        if self.advice is not None and self.advice.changes:
            head = "to make it fit" if self.advice.fits else "even with all of this it does not fit"
            after = f"{self.advice.estimate.peak_bytes / GIB:.1f} GiB"
            lines.append(f"{head} ({after}):")
            lines += [f"  {reason}" for reason in self.advice.reasons]
        if self.offer is not None:
            batch, resolution = self.offer.batch_size, self.offer.resolution
            lines.append(f"largest batch that fits: {batch if batch is not None else 'none'}")
            lines.append(f"largest resolution that fits: {f'{resolution} px' if resolution is not None else 'none'}")
        return lines

    def _disk_json(self) -> dict[str, Any]:
        assert self.disk is not None
        return {
            "most_bytes": self.disk.most_bytes,
            "last_bytes": self.disk.last_bytes,
            "items": [{**asdict(item), "folder": str(item.folder)} for item in self.disk.items],
            "places": [{**asdict(place), "folder": str(place.folder)} for place in self.disk.places],
        }

    def _advice_json(self) -> dict[str, Any]:
        assert self.advice is not None
        return {
            "fits": self.advice.fits,
            "changes": self.advice.changes,
            "reasons": list(self.advice.reasons),
            "peak_bytes": self.advice.estimate.peak_bytes,
        }
