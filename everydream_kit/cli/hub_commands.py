"""The command that uploads: push."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

from everydream_kit.cli.command import Command
from everydream_kit.errors import ConfigError


def _add_push_flags(parser: argparse.ArgumentParser) -> None:
    from everydream_kit.export.hub.repository_contents import DEFAULT_WHAT, What

    parser.add_argument("source", help="run folder (its latest checkpoint goes), checkpoint folder, or single file")
    parser.add_argument("repo_id", help="me/jets; created if it does not exist")
    parser.add_argument(
        "--what",
        nargs="+",
        choices=get_args(What),
        default=DEFAULT_WHAT,
        metavar="PART",
        help=f"of {', '.join(get_args(What))} (default {' '.join(DEFAULT_WHAT)}); `diffusers` of a LoRA run is the LoRA, "
        "`training` the settings and curves, `resume` what another machine needs to continue; the model card always goes",
    )
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", help="a repository that is created is private (default)")
    visibility.add_argument("--public", action="store_true", help="a repository that is created is public")
    parser.add_argument("--revision", help="branch to push to; created if it does not exist")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--base_model", help="Hub id of the base, for the card; by default what the run started from")
    parser.add_argument("--license", help="license for the card, by its Hub name; by default the base model's")
    parser.add_argument(
        "--precision", choices=["fp16", "bf16", "fp32"], help="of the single file that is written (default fp16)"
    )
    parser.add_argument("--dry_run", action="store_true", help="list what would be uploaded, without uploading")


def _run_push(options: argparse.Namespace) -> None:
    from everydream_kit.export.hub import push_to_hub

    if options.precision and "single_file" not in options.what:
        raise ConfigError("--precision is that of the single file which is written: add single_file to --what.")
    if options.create_pr and (options.public or options.private):
        flag = "--public" if options.public else "--private"
        raise ConfigError(f"{flag} is for a new repository; a pull request (--create_pr) goes to one that exists.")
    outcome = push_to_hub(
        Path(options.source),
        options.repo_id,
        private=not options.public,
        what=options.what,
        revision=options.revision,
        create_pr=options.create_pr,
        dry_run=options.dry_run,
        license=options.license,
        base_model=options.base_model,
        message=options.message,
        precision=options.precision or "fp16",
        progress=_report_progress,
    )
    print(outcome)


def _report_progress(done: int, total: int, doing: str) -> None:
    print(f"{100 * done // max(total, 1):3d} %  {doing}", file=sys.stderr)


COMMANDS = {
    "push": Command("upload a run, checkpoint or single file to the Hugging Face Hub", _add_push_flags, _run_push),
}
