"""The commands that say what a run takes before it starts: plan, bench."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from everydream_kit.cli.command import Command
from everydream_kit.cli.training_commands import add_train_flags, read_setting_flags


def _add_plan_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings", nargs="?", metavar="CONFIG", help="settings file, or a run folder; flags win over it"
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="GPU to plan for, such as T4 (default: this machine's, or its CPU)"
    )
    parser.add_argument("--price", type=float, metavar="USD", help="price of the GPU, US dollars an hour")
    parser.add_argument("--advise", action="store_true", help="also find the largest batch and resolution that fit")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_train_flags(parser)


def _run_plan(options: argparse.Namespace) -> None:
    from everydream_kit.preflight.planning import plan

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that a rehearsal does not need
    made = plan(_read_settings(options), options.gpu, options.price, advise=options.advise)
    print(json.dumps(made.to_json(), indent=1, ensure_ascii=False) if options.json else made.text)


def _read_settings(options: argparse.Namespace) -> Any:
    """Settings from a file and flags; a run folder is handed on as it is, unless flags change it."""
    from pathlib import Path

    from everydream_kit.errors import ConfigError
    from everydream_kit.runs import RunFolder
    from everydream_kit.settings import load_config

    if options.settings is not None and options.config is not None:
        raise ConfigError(f"--config: two settings files are given ({options.settings} and {options.config}); give one")
    path, changes = options.settings or options.config, read_setting_flags(options)
    if path is not None and Path(path).is_dir():
        if not changes:
            return path
        path = RunFolder(Path(path)).config_path
    config, warnings = load_config(path, changes)
    for warning in warnings:
        logging.getLogger("everydream_kit").warning(warning)
    return config


def _add_bench_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--logdir", default="logs", metavar="DIR", help="folder of the runs whose plans use the figures (default: logs)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _run_bench(options: argparse.Namespace) -> None:
    from everydream_kit.preflight.bench import bench

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    notify = logging.getLogger("everydream_kit").info
    found = bench(options.logdir, notify=lambda name: notify(f"Measuring: {name} …"))
    print(json.dumps(found.to_json(), indent=1, ensure_ascii=False) if options.json else found.text)


COMMANDS = {
    "plan": Command(
        "estimate a run before it starts: memory, time, disk, cost; and what would fit",
        _add_plan_flags,
        _run_plan,
        usage="everydream plan [CONFIG] [--gpu T4] [--price 0.35] [--advise] [--json] [--name value ...]",
    ),
    "bench": Command(
        "measure what a training step takes on this machine, for its plans; some minutes on a GPU",
        _add_bench_flags,
        _run_bench,
    ),
}
