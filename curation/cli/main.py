"""The entry point of `curation`: runs a command, and turns its errors into one sentence and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from typing import NoReturn

from pydantic import ValidationError

from curation.cli import curate  # noqa: F401 - adds its commands to the application, as the next does

# isort: split
from curation.cli import ask  # noqa: F401
from curation.cli.app import CommandFailedError, app, console
from curation.failures import LostError, OutageError, UsageError

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 what was asked for failed, 2 the user's mistake, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name on disk need not be text in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
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
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}.", MISTAKE)


def _fail(sentence: str, code: int) -> NoReturn:
    console(stderr=True).print(f"error: {sentence}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)
