"""The command line: `everydream COMMAND`, the same as `python -m everydream_kit COMMAND`.

A command is made from the record of an action (`actions/table.py`), or it is a row of the table `COMMANDS` in one of the
files here: its flags and the one library function that it calls. A new file's table is added to `COMMANDS` below, in the
order of the help page.

Only what the chosen command needs is imported, so `everydream --help` answers at once. Problems that the user can fix
are printed as one clear message; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import logging
import sys

from everydream_kit.cli import action_commands, plan_commands, status_commands, training_commands
from everydream_kit.cli.command import EXIT_PROBLEM, Command, Parser
from everydream_kit.errors import KitError
from everydream_kit.optional_packages import hide_unused
from everydream_kit.plain_text import PlainFormatter, plain_lines

COMMANDS: dict[str, Command] = {
    **training_commands.COMMANDS,
    **plan_commands.COMMANDS,
    **action_commands.COMMANDS,
    **status_commands.COMMANDS,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit status."""
    if arguments is None:
        hide_unused()  # this process is ours alone
    words = sys.argv[1:] if arguments is None else arguments
    parser = _outer_parser()
    if not words or words[0] in ("-h", "--help") or words[0] not in COMMANDS:
        parser.parse_args(words)
        return 0
    command = COMMANDS[words[0]]
    inner = Parser(prog=f"everydream {words[0]}", usage=command.usage, description=command.summary, allow_abbrev=False)
    command.add_flags(inner)
    options, unknown = inner.parse_known_args(words[1:])
    if unknown:
        inner.error(_describe_unknown(inner, unknown[0]))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "httpx2", "huggingface_hub", "PIL", "bitsandbytes", "torch", "diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return command.run(options) or 0
    except KitError as problem:
        print(f"error: {plain_lines(str(problem))}", file=sys.stderr)
        return EXIT_PROBLEM


def _outer_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="everydream",
        usage="everydream COMMAND [flags]      (everydream COMMAND --help explains one)",
        description=f"Fine-tune text-to-image models on your images.\n\ncommands:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def _describe_unknown(parser: argparse.ArgumentParser, word: str) -> str:
    import difflib

    from everydream_kit.config import OTHER_TRAINERS

    shown = [action for action in parser._actions if action.help is not argparse.SUPPRESS]
    known = {flag.lstrip("-"): flag for action in shown for flag in action.option_strings}
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag: the one before it takes fewer values; --help lists the flags."
    name = word.split("=", maxsplit=1)[0].lstrip("-").lower().replace("-", "_")
    holding = [one for one in known if set(name.split("_")) <= set(one.split("_"))]  # steps: num_inference_steps
    near = [OTHER_TRAINERS[name]] if OTHER_TRAINERS.get(name) in known else holding if len(holding) == 1 else []
    near = near or difflib.get_close_matches(name, list(known), n=1)
    return f"unknown flag {word}" + (f"; did you mean {known[near[0]]}?" if near else "; --help lists the flags.")
