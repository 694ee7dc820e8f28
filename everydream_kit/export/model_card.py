"""The model card: README.md with the metadata that the Hub reads, written from what a run says about itself.

The card names the base and the license, shows samples and curves, says how to load the model, and lists the settings
that the training ran with. It shows no training image and no folder of the machine. Text is plain Markdown put
together here: the client's own card template needs jinja2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from everydream_kit.config import facts
from everydream_kit.errors import ExportError
from everydream_kit.export.license import header_metadata
from everydream_kit.runs.layout import LORA_FILE, TOKENS_FILE
from everydream_kit.strict_json import read_json

MAIN_SETTINGS = (
    *("resolution", "batch_size", "grad_accum", "max_epochs", "lr", "lr_scheduler", "optimizer", "training_kind"),
    *("clip_skip", "cond_dropout", "flip_p", "shuffle_tags", "seed", "loss_type", "min_snr_gamma"),
)
"""Always in the table, in this order; of the others, those that were changed."""
NAMED_AND_SHOWN = ("base_revision", "base_subfolder", "base_variant", "optimizer", "lora_targets", "ema_device")
HIDDEN_SETTINGS = frozenset(
    {"version", "project_name", "run_name", "push_every", "gpuid", "num_workers"}
    | {name for name, one in facts().items() if one.names and name not in NAMED_AND_SHOWN}
)
"""Settings that say nothing about the model, or name a place or a service of the machine that trained it."""
ARCHITECTURE_KEY = "modelspec.architecture"
"""Of a file's header: what it is of, with `/lora` behind it for a LoRA."""
PIPELINES = {
    "StableDiffusionPipeline": ("stable-diffusion", "stable-diffusion-diffusers"),
    "StableDiffusionXLPipeline": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
}
DIFFUSION = (*PIPELINES, "DiffusionPipeline")
"""Pipelines whose weights fit float16; the general name stands where a base is not known."""


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    Attributes:
        title, repo_id: of the model.
        base_model: Hub id of the base, if it has one.
        license: metadata of the license: `license`, and for `other` also `license_name` and `license_link`.
        config: the run's settings, without folders of the machine.
        events: the run's events.
        pipeline_class: diffusers class that loads it.
        tags: of a family that is not Stable Diffusion.
        is_lora: LoRA weights, to be loaded over the base.
        learned_tokens: words that were learned, each with the number of text encoders that know it.
        single_file: name of the single file next to it, if there is one.
        holds_all: the single file is a complete model; else it is the denoiser alone.
        family_title: of a family that is not Stable Diffusion.
        has_folder: it can be loaded with from_pretrained.
        samples: (path in the repository, prompt, negative prompt).
        curves: path of the training curves in the repository.
    """

    title: str
    repo_id: str
    base_model: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    pipeline_class: str = "DiffusionPipeline"
    tags: tuple[str, ...] = ()
    holds_all: bool = True
    family_title: str = ""
    is_lora: bool = False
    learned_tokens: Mapping[str, int] = field(default_factory=dict)
    single_file: str | None = None
    has_folder: bool = True
    samples: Sequence[tuple[str, str, str]] = ()
    curves: str | None = None


def make_model_card(facts: CardFacts) -> str:
    """The whole README.md."""
    parts = [
        _metadata(facts),
        f"# {_inline(facts.title)}",
        _introduction(facts),
        "<Gallery />" if facts.samples else "",
        *_section("Use", _usage(facts)),
        *_section("Training data", dataset_summary(facts.events, facts.config)),
        *_section("Training settings", settings_table(facts.config)),
        *_section("Results", _results(facts)),
        *_section("License", _license(facts)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, text: str) -> tuple[str, ...]:
    return (f"## {title}", text) if text else ()


def _metadata(facts: CardFacts) -> str:
    tags = ["text-to-image", *_pipeline_tags(facts), "diffusers"]
    if facts.is_lora:
        tags += ["lora", "template:sd-lora"]
    else:
        tags.append("textual_inversion" if facts.learned_tokens else "diffusers-training")
    tags.append("everydream-kit")
    card: dict[str, Any] = {**facts.license}
    if facts.base_model:
        card |= {"base_model": facts.base_model, "base_model_relation": _relation(facts)}
    card |= {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags, "inference": True}
    if facts.samples:
        card["widget"] = [
            {"text": prompt or " ", "output": {"url": path}}
            | ({"parameters": {"negative_prompt": negative}} if negative else {})
            for path, prompt, negative in facts.samples
        ]
    return f"---\n{yaml.safe_dump(card, sort_keys=False, allow_unicode=True)}---"


def _relation(facts: CardFacts) -> str:
    return "adapter" if facts.is_lora or facts.learned_tokens else "finetune"


def _pipeline_tags(facts: CardFacts) -> tuple[str, ...]:
    """Tags that the Hub finds models by: Stable Diffusion's, or the name of a later family."""
    fallback = ("stable-diffusion",) if facts.pipeline_class in DIFFUSION else facts.tags
    return PIPELINES.get(facts.pipeline_class, fallback)


def _introduction(facts: CardFacts) -> str:
    kind = "A LoRA for" if facts.is_lora else "New words for" if facts.learned_tokens else "Fine-tuned from"
    base = (
        f"[{_inline(facts.base_model)}](https://huggingface.co/{quote(facts.base_model)})"
        if facts.base_model
        else "a local base model"
    )
    tokens = ", ".join(f"`{_inline(str(token))}`" for token in facts.config.get("new_tokens") or {})
    words = f" New tokens: {tokens}." if tokens else ""
    return f"{kind} {base} with EveryDream Kit.{words}"


def _usage(facts: CardFacts) -> str:
    blocks = []
    if facts.has_folder or facts.is_lora or facts.learned_tokens:
        blocks.append("```python\n" + "\n".join(_usage_lines(facts)) + "\n```")
    if facts.single_file:
        blocks.append(f"`{_inline(facts.single_file)}` {_use_of_file(facts)}")
    return "\n\n".join(blocks)


def _use_of_file(facts: CardFacts) -> str:
    if facts.is_lora and not facts.has_folder:
        return "goes into an image app's folder of LoRAs, and is used over its base model."
    if not facts.holds_all:
        return f"holds the denoiser of {facts.family_title} alone, for image apps that load its text encoder and VAE themselves."
    return "loads in every image app that takes checkpoint files."


def _usage_lines(facts: CardFacts) -> list[str]:
    prompt = facts.samples[0][1] if facts.samples else "your prompt"
    skip = facts.config.get("clip_skip")
    skip = skip if isinstance(skip, int) else 0
    argument = f", clip_skip={skip - 1}" if skip > 1 else ""  # diffusers counts the layers that are skipped
    source = facts.repo_id if facts.has_folder and not facts.is_lora else facts.base_model or "the-base-model"
    file = f", weight_name={facts.single_file!r}" if facts.single_file and not facts.has_folder else ""
    lora = [f"pipeline.load_lora_weights({facts.repo_id!r}{file})"] if facts.is_lora else []
    if facts.pipeline_class.endswith("ModularPipeline"):
        return [*_modular_lines(source), *lora, f"image = pipeline(prompt={prompt!r}).get('images')[0]"]
    dtype = "float16" if facts.pipeline_class in DIFFUSION else "bfloat16"
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipeline = DiffusionPipeline.from_pretrained({source!r}, torch_dtype=torch.{dtype}).to('cuda')",
        *lora,
    ]
    if facts.learned_tokens:
        lines += _token_lines(facts)
    return [*lines, f"image = pipeline({prompt!r}{argument}).images[0]"]


def _modular_lines(source: str) -> list[str]:
    """A modular pipeline names its parts first and loads them then."""
    return [
        "import torch",
        "from diffusers import ModularPipeline",
        "",
        f"pipeline = ModularPipeline.from_pretrained({source!r})",
        f"pipeline.load_components(pretrained_model_name_or_path={source!r}, torch_dtype=torch.bfloat16)",
        "pipeline.to('cuda')",
    ]


def _token_lines(facts: CardFacts) -> list[str]:
    """diffusers takes learned words by their vectors, for each text encoder."""
    lines = [
        "",
        "from huggingface_hub import hf_hub_download",
        "from safetensors.torch import load_file",
        "",
        f"vectors = load_file(hf_hub_download({facts.repo_id!r}, {TOKENS_FILE!r}))",
    ]
    for token, num_encoders in facts.learned_tokens.items():
        for number in range(num_encoders):
            key, end = (token, "") if number == 0 else (f"{token}|{number}", f"_{number + 1}")
            parts = f"text_encoder=pipeline.text_encoder{end}, tokenizer=pipeline.tokenizer{end}"
            lines.append(f"pipeline.load_textual_inversion(vectors[{key!r}], token={token!r}, {parts})")
    return lines


def dataset_summary(events: Iterable[Mapping[str, Any]], config: dict[str, Any]) -> str:
    """Size of the dataset and a summary of its captions, from the run's `dataset` event. No image, no caption."""
    event = next((event for event in events if event.get("kind") == "dataset"), None)
    lines = []
    count = event.get("images", event.get("pictures")) if event else None  # runs before the renaming wrote "images"
    if isinstance(count, int):
        resolution = config.get("resolution")
        sizes = resolution if isinstance(resolution, list) else [resolution]
        at = f", trained at {' and '.join(_value(size) for size in sizes)} px" if resolution else ""
        lines.append(f"{count} image{'' if count == 1 else 's'}{at}.")
    captions = event.get("captions") if event else None
    if isinstance(captions, dict):
        lines += [f"- {_inline(name.replace('_', ' '))}: {_value(value)}" for name, value in captions.items()]
    return "\n".join(lines)


def settings_table(config: dict[str, Any]) -> str:
    """Main settings, and every other one that differs from its default."""
    if not config:
        return ""
    from everydream_kit.config import TrainConfig

    defaults = {name: field.default for name, field in TrainConfig.model_fields.items()}
    names = [name for name in MAIN_SETTINGS if config.get(name) is not None]
    names += [
        name
        for name, value in config.items()
        if name not in names and name not in HIDDEN_SETTINGS and name in defaults and value != defaults[name]
    ]
    rows = [f"| {name} | {_value(config[name])} |" for name in names]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _results(facts: CardFacts) -> str:
    events = list(facts.events)
    lines = [line for line in (_last_words(events), _hours(events)) if line]
    if facts.curves:
        lines.append(f"![Training curves]({facts.curves})")
    return "\n\n".join(lines)


def _last_words(events: Sequence[Mapping[str, Any]]) -> str:
    losses = [e for e in events if e.get("kind") in ("loss", "epoch") and isinstance(e.get("loss"), float)]
    if not losses:
        return ""
    last = losses[-1]
    num_epochs = last["epoch"] + 1 if isinstance(last.get("epoch"), int) else 0
    epochs = f" ({num_epochs} epoch{'' if num_epochs == 1 else 's'})" if num_epochs else ""
    logged = last.get("step", 0)  # a run may end between two points of its log
    step = max([logged, *(e["step"] for e in events if e.get("kind") == "saved" and isinstance(e.get("step"), int))])
    where = "at the end" if step == logged else f"at step {_value(logged)}"
    checked = [e for e in events if e.get("kind") == "validation" and isinstance(e.get("loss"), float)]
    validated = f"; validation loss {checked[-1]['loss']:.4f}" if checked else ""
    return f"{_value(step)} optimizer steps{epochs}; training loss {where} {last['loss']:.4f}{validated}."


def _hours(events: Sequence[Mapping[str, Any]]) -> str:
    minutes = sum(e["minutes"] for e in events if e.get("kind") == "epoch" and isinstance(e.get("minutes"), float))
    return f"Training took {minutes / 60:.1f} hours." if minutes >= 6 else ""


def _license(facts: CardFacts) -> str:
    if facts.license.get("license"):
        return f"`{_inline(facts.license.get('license_name') or facts.license['license'])}`"
    return "Not stated. The license of the base model binds what is made from it."


def read_base(config: dict[str, Any]) -> str | None:
    """Hub id of the model that a run started from, or None where it was a file or folder."""
    base = config.get("resume_ckpt")
    if not isinstance(base, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", base) or Path(base).exists():
        return None
    return None if Path(base).suffix in (".safetensors", ".ckpt") else base


def read_kind(checkpoint: Path | None, file: Path | None) -> dict[str, Any]:
    """What `CardFacts` says of the family: from a checkpoint's model_index.json, or from the header of a LoRA or single
    file."""
    index = checkpoint / "model_index.json" if checkpoint else None
    if index is not None and index.is_file():
        named = str(read_json(index, error=ExportError).get("_class_name", "DiffusionPipeline"))
    else:
        header = header_metadata(checkpoint / LORA_FILE if checkpoint else file or Path())
        named = header.get(ARCHITECTURE_KEY, "").partition("/")[0]
    if not named or named in PIPELINES:
        return {"pipeline_class": named} if named else {}
    from everydream_kit.models.families import FAMILIES

    family = next((one for one in FAMILIES.values() if named in (one.pipeline_class, one.modelspec_architecture)), None)
    if family is None:
        return {"pipeline_class": named} if index is not None and index.is_file() else {}
    return {
        "pipeline_class": family.pipeline_class,
        "tags": (family.name.replace("_", "-"),),
        "holds_all": family.layout.holds_all,
        "family_title": family.title,
    }


def _inline(text: str) -> str:
    """Text on one line, without what Markdown or HTML would act on: names come from files, and files from anywhere."""
    text = "".join(one if one.isprintable() else " " for one in text)
    return re.sub(r"[<>\[\]`|]", " ", text).strip()


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return _inline(text) if len(text) <= 120 else _inline(text[:117]) + "..."
