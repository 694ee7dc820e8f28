"""Commands that report the status: runs, doctor, parameters."""

from __future__ import annotations

import argparse
import sys

from everydream_kit.cli.command import EXIT_PROBLEM, Command


def _run_runs(options: argparse.Namespace) -> None:
    from everydream_kit.jobs import Job
    from everydream_kit.runs import list_runs

    runs = list_runs(options.logdir)
    if not runs:
        print(f"{options.logdir}: holds no run.", file=sys.stderr)
    for run in runs:
        status = Job(run.folder).status()
        print(f"{status['state']:<10} step {status['step']:>7}  {run.folder}")


def _run_doctor(options: argparse.Namespace) -> int:
    from everydream_kit.doctor import diagnose
    from everydream_kit.preflight.gpus import describe_gpus

    diagnosis = diagnose()
    if options.json:
        import json
        from dataclasses import asdict

        from everydream_kit import __version__

        facts = {
            "everydream_kit": __version__,
            "status": diagnosis.status,
            "checks": list(map(asdict, diagnosis.checks)),
        }
        print(json.dumps(facts, indent=2))
    else:
        print(f"{diagnosis}\n{'ok':<8} GPUs that `everydream plan --gpu NAME` knows: {describe_gpus()}")
    return EXIT_PROBLEM if diagnosis.status == "error" else 0


def _run_parameters(options: argparse.Namespace) -> None:
    from everydream_kit.params import reference_page

    print(reference_page(), end="")


def _run_notebooks(options: argparse.Namespace) -> None:
    from everydream_kit.notebook_files import copy_notebooks

    copied, kept = copy_notebooks(options.folder)
    for path in kept:
        print(f"kept     {path} (already there)")
    for path in copied:
        print(f"copied   {path}")
    print(f"Open them with: jupyter lab {options.folder}")


JSON_HELP = "print one JSON object, for an issue; it holds no token"
FOLDER_HELP = "target folder; existing files stay"
COMMANDS = {
    "runs": Command(
        "list runs and their status", lambda parser: parser.add_argument("--logdir", default="logs"), _run_runs
    ),
    "doctor": Command(
        "report what is installed, which device is used, what is missing",
        lambda parser: parser.add_argument("--json", action="store_true", help=JSON_HELP),
        _run_doctor,
    ),
    "parameters": Command("print the reference page of all parameters", lambda parser: None, _run_parameters),
    "notebooks": Command(
        "copy the notebooks into a folder",
        lambda parser: parser.add_argument("folder", nargs="?", default="notebooks", help=FOLDER_HELP),
        _run_notebooks,
    ),
}
