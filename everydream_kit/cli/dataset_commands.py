"""Commands that look at a dataset and prepare it: prepare, tidy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from everydream_kit.cli.command import Command, Parser

TIDY_STEPS = {
    "resize": "data.tidying.resize_images",
    "convert": "data.tidying.convert_images",
    "set-aside-duplicates": "data.tidying.exclude_duplicates",
    "split-validation": "data.tidying.split_validation",
    "edit-tags": "data.tagging.edit_tags",
    "captions-from-table": "data.tagging.captions_from_table",
    "auto-caption": "data.captioning.auto_caption",
    "undo": "data.changes.undo",
}
"""Steps of preparation by name; a step's flags are its function's arguments."""


def _add_prepare_flags(parser: argparse.ArgumentParser) -> None:
    from everydream_kit.config import EMBEDDED_MODEL, default_of

    parser.add_argument("data_root", help="folder, .json index, archive or Hub dataset id")
    parser.add_argument("--resolution", type=int, nargs="+", default=[default_of("resolution")])
    parser.add_argument("--batch_size", type=int, default=default_of("batch_size"))
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw bucket chart and contact sheet into an image file")
    parser.add_argument(
        "--tokenizer", default=EMBEDDED_MODEL, help="model whose tokenizer counts captions (a diffusers folder)"
    )


def _run_prepare(options: argparse.Namespace) -> None:
    from everydream_kit.data import prepare_dataset
    from everydream_kit.generation import token_counter

    data = prepare_dataset(
        options.data_root, resolution=options.resolution, batch_size=options.batch_size, cache_dir=Path(".edk_cache")
    )
    report = data.report(count_tokens=token_counter(options.tokenizer))
    print(json.dumps(report.to_json(), indent=2) if options.json else report.text)
    if options.plot:
        data.plot().save(options.plot)


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


COMMANDS = {
    "prepare": Command("check a dataset and report", _add_prepare_flags, _run_prepare),
    "tidy": Command("prepare images: resize, convert, duplicates, tags, captions ...", _add_tidy_flags, _run_tidy),
}
