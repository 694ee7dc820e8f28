"""The command line: `everydream COMMAND`, the same as `python -m everydream_kit COMMAND`.

Each command is a row of `COMMANDS`: its flags and the one library function that it calls. Only what the chosen command
needs is imported, so `everydream --help` answers at once. Problems that the user can mend are printed as one clear message;
anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from everydream_kit.errors import KitError

EXIT_PROBLEM = 1
EXIT_USAGE = 2
EXIT_STOPPED = {"SIGINT": 130, "SIGTERM": 143}


@dataclass(frozen=True)
class Command:
    """A row of the table: what it does in a line, its flags, what it runs (returning an exit status or None)."""

    summary: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]


class Parser(argparse.ArgumentParser):
    """argparse, with the nearest known flag in the message."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = _outer_parser()
    if not words or words[0] in ("-h", "--help") or words[0] not in COMMANDS:
        parser.parse_args(words)
        return 0
    command = COMMANDS[words[0]]
    name = words[0]
    inner = Parser(prog=f"everydream {name}", description=command.summary, allow_abbrev=False)
    if name == "train":
        inner.usage = "everydream train [--config FILE] [--name value ...]"
    command.add_flags(inner)
    options, unknown = inner.parse_known_args(words[1:])
    if unknown:
        inner.error(_describe_unknown(inner, unknown[0]))
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "huggingface_hub", "PIL", "bitsandbytes", "torch", "diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return command.run(options) or 0
    except KitError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return EXIT_PROBLEM


def _outer_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="everydream",
        usage="everydream COMMAND [flags]      (everydream COMMAND --help explains one)",
        description=f"Fine-tune Stable Diffusion.\n\ncommands:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _describe_unknown(parser: argparse.ArgumentParser, word: str) -> str:
    import difflib

    known = [flag for action in parser._actions for flag in action.option_strings]
    near = difflib.get_close_matches(word.split("=", maxsplit=1)[0], known, n=1, cutoff=0.6)
    return f"unknown flag {word}" + (f"; did you mean {near[0]}?" if near else "; --help lists the flags.")


# --- training --------------------------------------------------------------------------------------------------------


def _add_train_flags(parser: argparse.ArgumentParser) -> None:
    from everydream_kit.params import format_value, parameters

    parser.add_argument("--config", metavar="FILE", help="settings from a JSON file; flags win over it")
    groups: dict[str, Any] = {}
    for record in parameters():
        group = groups.setdefault(record.group, parser.add_argument_group(record.group))
        default = "required" if record.required else f"default {format_value(record.default)}"
        nargs: str | None = "?" if record.kind == "bool" else "+" if record.many else None
        group.add_argument(
            f"--{record.name}",
            dest=record.name,
            nargs=nargs,
            const="on" if record.kind == "bool" else None,
            default=argparse.SUPPRESS,
            metavar="VALUE" if record.kind != "bool" else "on|off",
            help=f"{record.help} ({'; '.join(part for part in (record.range_text, default) if part)})".replace(
                "%", "%%"
            ),
        )


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """What was given as flags, as values; all that cannot be read is reported together."""
    from everydream_kit.errors import ConfigError
    from everydream_kit.params import parameters, parse_text

    values: dict[str, Any] = {}
    problems = []
    for record in parameters():
        if hasattr(options, record.name):
            try:
                values[record.name] = parse_text(record.name, getattr(options, record.name))
            except ConfigError as problem:
                problems.append(str(problem))
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def _run_train(options: argparse.Namespace) -> int:
    from everydream_kit.config import load_config

    config, warnings = load_config(options.config, _overrides(options))
    for warning in warnings:
        logging.getLogger("everydream_kit").warning(warning)
    from everydream_kit.training.sessions import train

    return _tell_outcome(train(config))


def _add_resume_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="run folder, its name, or hf://me/repo; by default the newest run")
    parser.add_argument("--logdir", default="logs", help="where runs are looked for (default logs)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting from here on; may be repeated",
    )


def _run_resume(options: argparse.Namespace) -> int:
    from everydream_kit.errors import ConfigError
    from everydream_kit.params import parse_text

    changes = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: give it as NAME=VALUE, for instance --set lr=1e-6")
        changes[name] = parse_text(name, value)
    from everydream_kit.training.sessions import resume

    return _tell_outcome(resume(options.run, logdir=options.logdir, changes=changes))


def _add_chain_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="settings files, trained one after the other")


def _run_chain(options: argparse.Namespace) -> int:
    from everydream_kit.config import load_config
    from everydream_kit.training.sessions import train

    configs = [load_config(path)[0] for path in options.configs]  # all of them are checked before the first one starts
    for config in configs:
        status = _tell_outcome(train(config))
        if status:
            return status
    return 0


def _tell_outcome(run: Any) -> int:
    """Say where everything is. Returns the exit status: 0, or that of the signal which stopped the run."""
    status = run.status()
    print(f"\n{status['state']}: {run.folder}")
    checkpoints = run.checkpoints()
    if checkpoints:
        print(f"checkpoint: {checkpoints[-1].folder}")
    files = [path for event in run.events("saved") for path in event["files"]]
    if files:
        print(f"single file: {files[-1]}")
    if run.samples():
        print(f"samples: {run.samples_folder}")
    if status["state"] == "stopped":
        print(f"go on with: everydream resume {run.folder}")
    return EXIT_STOPPED.get(status.get("stopped_by", ""), 0)


def _add_demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="demo-run", help="folder for everything that the demo makes (default demo-run)"
    )
    parser.add_argument("--max_epochs", type=int, help="train for another number of epochs")
    parser.add_argument("--seed", type=int, default=555)


def _run_demo(options: argparse.Namespace) -> None:
    from everydream_kit.demo.main import run_demo

    outcome = run_demo(Path(options.out), max_epochs=options.max_epochs, seed=options.seed)
    print("\nDone. What the demo made:")
    for name, value in outcome.describe().items():
        print(f"  {name:<20} {value}")


# --- looking at data, models and runs --------------------------------------------------------------------------------


def _add_prepare_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data_root", help="folder, .json index, archive or Hub dataset id")
    parser.add_argument("--resolution", type=int, nargs="+", default=[512])
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw bucket chart and contact sheet into a picture file")
    parser.add_argument(
        "--tokenizer", default="embedded", help="model whose tokenizer counts captions (a diffusers folder)"
    )


def _run_prepare(options: argparse.Namespace) -> None:
    from everydream_kit.data import prepare_dataset
    from everydream_kit.drawing import token_counter

    data = prepare_dataset(
        options.data_root, resolution=options.resolution, batch_size=options.batch_size, cache_dir=Path(".edk_cache")
    )
    report = data.report(count_tokens=token_counter(options.tokenizer))
    print(json.dumps(report.to_json(), indent=2) if options.json else report.text)
    if options.plot:
        data.plot().save(options.plot)


TIDY_STEPS = {
    "resize": "data.prep.resize_pictures",
    "convert": "data.prep.convert_pictures",
    "set-aside-duplicates": "data.prep.set_aside_duplicates",
    "split-validation": "data.prep.split_validation",
    "edit-tags": "data.tagging.edit_tags",
    "captions-from-table": "data.tagging.captions_from_table",
    "auto-caption": "data.captioning.auto_caption",
    "undo": "data.changes.undo",
}
"""Steps of preparation by name; a step's flags are its function's arguments."""


def _add_tidy_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("step", choices=list(TIDY_STEPS), help="`everydream tidy STEP --help` explains one")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def _run_tidy(options: argparse.Namespace) -> None:
    """Call the step's function with what was typed, flag by argument."""
    import importlib
    import inspect

    module_name, _, function_name = TIDY_STEPS[options.step].rpartition(".")
    function = getattr(importlib.import_module(f"everydream_kit.{module_name}"), function_name)
    parser = Parser(
        prog=f"everydream tidy {options.step}",
        description=inspect.getdoc(function),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "progress":
            continue
        kind = str(parameter.annotation)
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            optional = parameter.default is not inspect.Parameter.empty
            parser.add_argument(name, nargs="?" if optional else None, default=parameter.default if optional else None)
        elif kind == "bool":
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=parameter.default)
        elif kind.startswith(("Sequence", "list")):
            parser.add_argument(f"--{name}", nargs="+", default=parameter.default)
        else:
            typed = {"int": int, "float": float}.get(kind.split(" ", maxsplit=1)[0], str)
            parser.add_argument(f"--{name}", type=typed, default=parameter.default)
    given = vars(parser.parse_args(options.arguments))
    positional = [
        given.pop(name)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]
    print(function(*positional, **given).text)


def _add_sample_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="diffusers folder, single file, Hub id, run folder, or `embedded`")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--cfg", type=float, nargs="+", default=[7.0], help="guidance scales, side by side")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=555)
    parser.add_argument("--num_images", type=int, default=1, help="pictures of each prompt, with seeds counting up")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--clip_skip", type=int, default=0)
    parser.add_argument("--lora", help="LoRA weights to draw with")
    parser.add_argument("--out", default="samples", help="folder for the pictures (default samples)")


def _run_sample(options: argparse.Namespace) -> None:
    from everydream_kit.drawing import sample

    paths = sample(
        options.checkpoint,
        options.prompt,
        negative_prompt=options.negative_prompt,
        cfgs=options.cfg,
        scheduler=options.scheduler,
        num_inference_steps=options.num_inference_steps,
        seed=options.seed,
        num_images=options.num_images,
        width=options.width,
        height=options.height,
        clip_skip=options.clip_skip,
        lora=options.lora,
        out=options.out,
    )
    for path in paths:
        print(path)


def _add_export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint folder, or a run folder for its last one")
    parser.add_argument("out", help="file to write: .safetensors or .ckpt")
    parser.add_argument("--precision", choices=["fp16", "bf16", "fp32"], default="fp16")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")


def _run_export(options: argparse.Namespace) -> None:
    from everydream_kit.export.single_file import export_checkpoint
    from everydream_kit.workspace import RunFolder

    source = Path(options.checkpoint)
    if (source / "ckpts").is_dir():
        source = RunFolder(source).last_checkpoint
    print(export_checkpoint(source, options.out, precision=options.precision, ema=options.ema))


def _no_flags(parser: argparse.ArgumentParser) -> None:
    pass


def _run_doctor(options: argparse.Namespace) -> int:
    from everydream_kit.doctor import diagnose

    diagnosis = diagnose()
    for check in diagnosis.checks:
        print(f"{check.status:<8} {check.name}: {check.text}")
        if check.cure:
            print(f"{'':<8} {check.cure}")
    return EXIT_PROBLEM if any(check.status == "error" for check in diagnosis.checks) else 0


def _add_runs_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--logdir", default="logs")


def _run_runs(options: argparse.Namespace) -> None:
    from everydream_kit.workspace import list_runs

    for run in list_runs(options.logdir):
        status = run.status()
        print(f"{status.get('state', 'unknown'):<10} step {status.get('step', 0):>7}  {run.folder}")


def _run_parameters(options: argparse.Namespace) -> None:
    from everydream_kit.params import reference_page

    print(reference_page(), end="")


def _add_push_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="run folder or checkpoint folder")
    parser.add_argument("repo_id", help="me/jets")
    parser.add_argument("--public", action="store_true", help="by default the repository is private")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--create_pr", action="store_true", help="push as a pull request")
    parser.add_argument("--license", help="licence for the model card; by default the base model's")
    parser.add_argument("--dry_run", action="store_true", help="say what would be uploaded, and upload nothing")


def _run_push(options: argparse.Namespace) -> None:
    from everydream_kit.export.hub import push_to_hub

    outcome = push_to_hub(
        Path(options.source),
        options.repo_id,
        private=not options.public,
        revision=options.revision,
        create_pr=options.create_pr,
        license=options.license,
        dry_run=options.dry_run,
    )
    print(outcome)


COMMANDS: dict[str, Command] = {
    "demo": Command("train the embedded model on the demo pictures; show before and after", _add_demo_flags, _run_demo),
    "train": Command("fine-tune a model on your pictures", _add_train_flags, _run_train),
    "resume": Command("go on with a run that was stopped, exactly where it was", _add_resume_flags, _run_resume),
    "chain": Command("train several configs, one after the other", _add_chain_flags, _run_chain),
    "prepare": Command("check a dataset and report", _add_prepare_flags, _run_prepare),
    "tidy": Command("prepare pictures: resize, convert, duplicates, tags, captions ...", _add_tidy_flags, _run_tidy),
    "sample": Command("draw pictures with a checkpoint", _add_sample_flags, _run_sample),
    "export": Command("write a checkpoint as one file that every image app loads", _add_export_flags, _run_export),
    "push": Command("upload a run or checkpoint to the Hugging Face Hub", _add_push_flags, _run_push),
    "runs": Command("list runs and how they stand", _add_runs_flags, _run_runs),
    "doctor": Command("say what is installed, which device is used, what is missing", _no_flags, _run_doctor),
    "parameters": Command("print the reference page of all parameters", _no_flags, _run_parameters),
}
