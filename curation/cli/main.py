"""The entry point of `curation`: runs a command, and turns its errors into one sentence and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from typing import Any, NoReturn

import typer
import typer.main
from typer.core import TyperGroup

from curation.cli.app import CommandFailedError, app, console
from curation.failures import LostError, OutageError, UsageError

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130

COMMANDS = {
    "check-manifest": "Check a manifest; names every wrong row.",
    "run": "Run the whole pipeline on a manifest.",
    "status": "Show how many clips got how far.",
    "failures": "Show which clips failed, and what to do.",
    "inspect": "Print all that is known of one clip.",
    "judge": "Judge all measured clips under a policy.",
    "evaluate": "Compare a policy with labelled clips.",
    "verify": "Check a folder of shards.",
    "pull": "Copy a shared data set to this disk.",
}


class Commands(TyperGroup):
    """Loads the commands when one is asked for; the list of them needs neither settings nor options."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name, or None."""
        if not self.commands:
            from curation.cli import ask, curate  # noqa: F401 - each registers its commands

            self.commands.update(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


root = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Curate clips of people from videos: check a manifest, run the pipeline, judge again, and ask what became of "
    "each clip. Exit code 0: done; 1: what was asked for failed; 2: a mistake in the command or the set-up; 130: "
    "interrupted.",
)


@root.callback()
def _root() -> None:
    """Makes a group of the application before it has a command."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 what was asked for failed, 2 the user's mistake, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name on disk need not be text in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        root()
    except SystemExit as ended:
        if ended.code != INTERRUPTED:
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not turn this into a traceback
        # At once: whatever still runs may die anywhere, and nothing is lost by it.
        console(stderr=True).print("stopped; run again, finished work is kept.")
        os._exit(INTERRUPTED)
    except UsageError as error:
        _fail(str(error), MISTAKE)
    except (CommandFailedError, OutageError, LostError) as error:
        _fail(str(error), FAILED)


def _fail(sentence: str, code: int) -> NoReturn:
    console(stderr=True).print(f"error: {sentence}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)
