"""Commands that say how things stand: runs, doctor, parameters."""

from __future__ import annotations

import argparse

from everydream_kit.cli.command import EXIT_PROBLEM, Command, no_flags


def _add_runs_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--logdir", default="logs")


def _run_runs(options: argparse.Namespace) -> None:
    from everydream_kit.workspace import list_runs

    for run in list_runs(options.logdir):
        status = run.status()
        print(f"{status.get('state', 'unknown'):<10} step {status.get('step', 0):>7}  {run.folder}")


def _run_doctor(options: argparse.Namespace) -> int:
    from everydream_kit.doctor import diagnose
    from everydream_kit.preflight.cards import describe_cards

    diagnosis = diagnose()
    for check in diagnosis.checks:
        print(f"{check.status:<8} {check.name}: {check.text}")
        if check.cure:
            print(f"{'':<8} {check.cure}")
    print(f"{'ok':<8} cards that `everydream plan --gpu NAME` knows: {describe_cards()}")
    return EXIT_PROBLEM if any(check.status == "error" for check in diagnosis.checks) else 0


def _run_parameters(options: argparse.Namespace) -> None:
    from everydream_kit.params import reference_page

    print(reference_page(), end="")


COMMANDS = {
    "runs": Command("list runs and how they stand", _add_runs_flags, _run_runs),
    "doctor": Command("say what is installed, which device is used, what is missing", no_flags, _run_doctor),
    "parameters": Command("print the reference page of all parameters", no_flags, _run_parameters),
}
