"""The `unish` command: check the network against golden files, compose a checkpoint to start from, describe one.

Exit codes: 0 done; 1 the command failed, for example a self-check that finds differences; 2 a user error, for example
a missing or wrong file; 130 interrupted. A user error prints one sentence, without a traceback.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from unish_model.network.config import Preset, UniSHConfig

FAILED, MISTAKE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Check the UniSH network, and compose and describe its checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
console = Console()
errors = Console(stderr=True)


def _stop(message: object, code: int = MISTAKE) -> typer.Exit:
    errors.print(str(message), style="red", markup=False, soft_wrap=True)
    return typer.Exit(code)


@app.command()
def selfcheck(
    golden: Annotated[Path, typer.Option(help="folder of golden .npz files", exists=True, file_okay=False)],
    salt: Annotated[str, typer.Option(help="salt that the golden weights were made with")] = "public-1",
    only: Annotated[str | None, typer.Option(help="check only file names that match this regular expression")] = None,
) -> None:
    """Compare this network with every golden file in a folder; exit with 1 if an error exceeds its gate."""
    from unish_model.selfcheck.compare import Check, GoldenError
    from unish_model.selfcheck.run import run_selfcheck

    checks: list[Check] = []
    try:
        re.compile(only or "")
        for check in run_selfcheck(golden, salt, only=only):
            checks.append(check)
            word = "pass" if check.passed else "FAIL"
            errors.print(f"{word} {check.file} {check.output} {check.error:.1e}", markup=False, highlight=False)
    except re.error as error:
        raise _stop(f"--only {only} is not a regular expression: {error}") from error
    except GoldenError as error:
        raise _stop(error) from error
    table = Table("file", "output", "largest relative error", "gate", "")
    for check in checks:
        word = "pass" if check.passed else "[red]FAIL[/red]"
        table.add_row(check.file, check.output, f"{check.error:.1e}", f"{check.gate:.0e}", word)
    console.print(table)
    missed = sum(not check.passed for check in checks)
    console.print(f"{len(checks) - missed} of {len(checks)} outputs within their gates")
    if missed:
        raise typer.Exit(FAILED)


@app.command()
def init(
    pi3: Annotated[str, typer.Option(help="Pi3 checkpoint: a file or a Hugging Face id")],
    camerahmr: Annotated[str, typer.Option(help="CameraHMR checkpoint: a file or a Hugging Face id with :file")],
    out: Annotated[Path, typer.Option(help="the .safetensors file to write")],
    config: Annotated[Preset, typer.Option(help="the network's sizes")] = "released",
    seed: Annotated[int, typer.Option(help="seed of AlignNet's random weights")] = 42,
    ignore: Annotated[list[str] | None, typer.Option(help="further CameraHMR name prefixes to ignore")] = None,
) -> None:
    """Combine Pi3, CameraHMR and a randomly initialised AlignNet into a checkpoint to start training from."""
    from unish_model.network.checkpoint import (
        CAMERAHMR_IGNORED,
        CheckpointError,
        FetchError,
        check_target,
        compose,
        save_unish,
    )

    try:
        check_target(out)  # before reading, which takes minutes
        ignored = CAMERAHMR_IGNORED + tuple(ignore or ())
        network = compose(pi3, camerahmr, UniSHConfig.named(config), seed=seed, ignored=ignored)
        save_unish(network, out)
    except (FetchError, OSError) as error:
        raise _stop(error, FAILED) from error
    except CheckpointError as error:
        raise _stop(error) from error
    console.print(f"{out}: {len(network.state_dict())} tensors", highlight=False)


@app.command()
def info(checkpoint: Annotated[str, typer.Argument(help="a file or a Hugging Face id")]) -> None:
    """Describe a checkpoint by its names and shapes, without reading its values."""
    from unish_model.network.checkpoint import CheckpointError, FetchError, open_tensors, resolve, summarise

    try:
        file = open_tensors(resolve(checkpoint))
        summary = summarise(file)
    except FetchError as error:
        raise _stop(error, FAILED) from error
    except CheckpointError as error:
        raise _stop(error) from error
    console.print(f"{summary.kind}: {summary.tensors} tensors, {summary.parameters:,} numbers, fits {summary.fits}")
    table = Table("part", "tensors", "numbers")
    for part, (count, size) in sorted(summary.parts.items()):
        table.add_row(part, str(count), f"{size:,}")
    console.print(table)
    console.print(f"types: {', '.join(summary.dtypes)}")


def main() -> None:
    """Entry point; Ctrl-C prints one line."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
