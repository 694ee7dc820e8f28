"""Commands that train: demo, train, resume, chain."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from everydream_kit.cli.command import Command

EXIT_STOPPED = {"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}


RETIRED_PREFIX = "retired_"


def add_setting_flags(parser: argparse.ArgumentParser, *, skip: Collection[str] = ()) -> None:
    """A flag for every setting."""
    from everydream_kit.params import format_value, parameters

    groups: dict[str, Any] = {}
    for record in parameters():
        if record.name in skip:
            continue
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


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every setting, and `--config`."""
    parser.add_argument("--config", metavar="FILE", help="settings from a JSON file; flags win over it")
    add_setting_flags(parser)
    add_retired_flags(parser)


def add_retired_flags(parser: argparse.ArgumentParser) -> None:
    """EveryDream 2's flags that are no longer used: accepted, and not listed in the help."""
    from everydream_kit.config import RETIRED
    from everydream_kit.everydream2.run_file import FORK, FORK_WITHOUT_EFFECT, RENAMED

    taken = set(parser._option_string_actions)
    for name in sorted({*RETIRED, *RENAMED, *FORK, *FORK_WITHOUT_EFFECT, "lora"}):
        if f"--{name}" not in taken:
            parser.add_argument(
                f"--{name}",
                dest=f"{RETIRED_PREFIX}{name}",
                nargs="?",
                const=True,
                default=argparse.SUPPRESS,
                help=argparse.SUPPRESS,
            )


def read_retired_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Those that were given, by name."""
    from everydream_kit.everydream2.run_file import RENAMED
    from everydream_kit.params import parse_text

    given = {
        name.removeprefix(RETIRED_PREFIX): value
        for name, value in vars(options).items()
        if name.startswith(RETIRED_PREFIX)
    }
    return {name: parse_text(RENAMED[name], str(value)) if name in RENAMED else value for name, value in given.items()}


def read_setting_flags(options: argparse.Namespace, *, skip: Collection[str] = ()) -> dict[str, Any]:
    """What was given as flags, as values; all that cannot be read is reported together."""
    from everydream_kit.errors import ConfigError
    from everydream_kit.params import parameters, parse_text

    values: dict[str, Any] = {}
    problems = []
    for record in parameters():
        if record.name not in skip and hasattr(options, record.name):
            try:
                values[record.name] = parse_text(record.name, getattr(options, record.name))
            except ConfigError as problem:
                problems.append(str(problem))
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def _run_train(options: argparse.Namespace) -> int:
    from everydream_kit.settings import load_config

    config, warnings = load_config(options.config, {**read_setting_flags(options), **read_retired_flags(options)})
    for warning in warnings:
        logging.getLogger("everydream_kit").warning(warning)
    from everydream_kit.sessions import train

    return _report_outcome(train(config))


def _add_resume_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="run folder, its name, or hf://me/repo; by default the latest run")
    parser.add_argument("--logdir", default="logs", help="folder of the runs (default logs)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting from here on; may be repeated. --NAME VALUE does the same",
    )
    parser.add_argument("--base", help="base model of a LoRA checkpoint, where the one that it names has moved")
    add_setting_flags(parser, skip=("logdir",))
    add_retired_flags(parser)


def _run_resume(options: argparse.Namespace) -> int:
    from everydream_kit.config import TrainConfig
    from everydream_kit.errors import ConfigError
    from everydream_kit.params import parse_text

    changes = {**read_setting_flags(options, skip=("logdir",)), **read_retired_flags(options)}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: give it as NAME=VALUE, for instance --set lr=1e-6")
        changes[name] = parse_text(name, value) if name in TrainConfig.model_fields else value
    from everydream_kit.sessions import resume

    return _report_outcome(resume(options.run, logdir=options.logdir, changes=changes, adapter_base=options.base))


def _add_chain_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="settings files, trained one after the other")


def _run_chain(options: argparse.Namespace) -> int:
    from everydream_kit.sessions import train
    from everydream_kit.settings import load_config

    configs = []
    for path in options.configs:  # all of them are checked before the first one starts
        config, warnings = load_config(path)
        for warning in warnings:
            logging.getLogger("everydream_kit").warning("%s: %s", path, warning)
        configs.append(config)
    for config in configs:
        status = _report_outcome(train(config))
        if status:
            return status
    return 0


def _report_outcome(run: Any) -> int:
    """Say where everything is. Returns the exit status: 0, or that of the signal which stopped the run."""
    status = run.status()
    print(f"\n{status['state']}: {run.folder}")
    checkpoints = run.checkpoints(averaged=False)
    if checkpoints:
        print(f"checkpoint: {checkpoints[-1].folder}")
    written = [event["files"] for event in run.events("saved") if event["files"]]
    for path in written[-1] if written else ():  # live weights, and averaged ones
        print(f"single file: {path}")
    if run.samples():
        print(f"samples: {run.samples_folder}")
    if status["state"] == "stopped" and checkpoints:
        print(f"continue with: everydream resume {run.folder}")
    elif status["state"] == "stopped":
        print(f"nothing is trained yet; begin again with: everydream train --config {run.config_path}")
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


COMMANDS = {
    "demo": Command("train the embedded model on the demo images; show before and after", _add_demo_flags, _run_demo),
    "train": Command(
        "fine-tune a model on your images",
        add_train_flags,
        _run_train,
        usage="everydream train [--config FILE] [--name value ...]",
    ),
    "resume": Command(
        "resume a run exactly where it stopped",
        _add_resume_flags,
        _run_resume,
        usage="everydream resume [RUN] [--logdir FOLDER] [--name value ...]",
    ),
    "chain": Command("train several configs, one after another", _add_chain_flags, _run_chain),
}
