"""The command that uploads: push."""

from __future__ import annotations

import argparse
from pathlib import Path

from everydream_kit.cli.command import Command


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


COMMANDS = {
    "push": Command("upload a run or checkpoint to the Hugging Face Hub", _add_push_flags, _run_push),
}
