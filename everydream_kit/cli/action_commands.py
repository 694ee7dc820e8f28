"""Commands made from the records of actions: prepare, tidy, sample, export, merge, extract, push, fetch."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from everydream_kit.actions.action import Action, Argument, text_of
from everydream_kit.actions.table import ACTIONS, TIDY_STEPS
from everydream_kit.cli.command import Command, Parser
from everydream_kit.share_bar import ShareBar

TYPES = {"int": int, "float": float, "text": str}


def add_action_flags(action: Action, parser: argparse.ArgumentParser) -> None:
    """A flag for every argument that has one, and a place for the others. What is not given is left to the function."""
    for argument in action.arguments.values():
        if argument.kind == "bool":
            _add_switch(parser, argument)
        else:
            _add_value(parser, argument)


def _add_value(parser: argparse.ArgumentParser, argument: Argument) -> None:
    how: dict[str, Any] = {"type": TYPES[argument.kind], "help": _help(argument), "default": argparse.SUPPRESS}
    how |= {"choices": argument.choices} if argument.choices else {}
    if not argument.flag:
        nargs = "+" if argument.many else None if argument.required else "?"
        parser.add_argument(argument.name, nargs=nargs, **how)
        return
    if argument.many:
        how |= {"nargs": "+", "action": "extend"}
    how |= {} if argument.choices else {"metavar": argument.flag.upper()}
    parser.add_argument(f"--{argument.flag}", dest=argument.name, required=argument.required, **how)


def _add_switch(parser: argparse.ArgumentParser, argument: Argument) -> None:
    """`--name` for true; for false its opposite, or `--no-name`."""
    how: dict[str, Any] = {"dest": argument.name, "default": argparse.SUPPRESS}
    if not argument.opposite:
        action = argparse.BooleanOptionalAction if argument.default else "store_true"
        parser.add_argument(f"--{argument.flag}", action=action, help=_help(argument), **how)
        return
    both = parser.add_mutually_exclusive_group()
    both.add_argument(f"--{argument.flag}", action="store_true", help=_help(argument), **how)
    words = f"the opposite of --{argument.flag}"
    both.add_argument(f"--{argument.opposite}", action="store_false", help=words, **how)


def _help(argument: Argument) -> str:
    default = argument.default
    shown = not isinstance(default, bool) and default not in (None, (), "")
    words = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
    several = "; may be repeated" if argument.many and argument.flag else ""
    return (argument.help + several + (f" (default {words})" if shown else "")).replace("%", "%%").replace("`", "")


def run_action(action: Action, options: argparse.Namespace) -> None:
    """Call the function with what was given, show its progress, and print what it returns."""
    with ShareBar(action.function.rpartition(":")[2].replace("_", " ")) as bar:

        def show(done: float, total: float, doing: str = "") -> None:
            if doing:
                print(f"{100 * done // max(total, 1):3.0f} %  {doing}", file=sys.stderr)
            else:
                bar.show(done, max(total, 1))

        result = action.call(vars(options), show)
    print(text_of(result))


def command_of(action: Action) -> Command:
    """The command that does an action."""
    return Command(action.summary, partial(add_action_flags, action), partial(run_action, action))


def _add_tidy_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("step", choices=list(TIDY_STEPS), help="`everydream tidy STEP --help` explains one")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def _run_tidy(options: argparse.Namespace) -> None:
    action = TIDY_STEPS[options.step]
    parser = Parser(prog=f"everydream tidy {options.step}", description=action.description, allow_abbrev=False)
    add_action_flags(action, parser)
    run_action(action, parser.parse_args(options.arguments))


TIDY = Command("prepare images: resize, convert, duplicates, tags, captions ...", _add_tidy_flags, _run_tidy)
COMMANDS = {"tidy": TIDY, **{name: command_of(action) for name, action in ACTIONS.items()}}
