"""The `unish` command: self-check against golden numbers, compose a starting checkpoint, look into one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="The UniSH network: check it, start it, look into it.", no_args_is_help=True)
console = Console()
errors = Console(stderr=True)


@app.callback()
def _root() -> None:
    pass


def _stop(message: object) -> typer.Exit:
    errors.print(str(message), style="red", markup=False)
    return typer.Exit(1)


@app.command()
def selfcheck(
    golden: Annotated[Path, typer.Option(help="folder of golden .npz files", exists=True, file_okay=False)],
    salt: Annotated[str, typer.Option(help="what the golden weights were made with")] = "public-1",
    only: Annotated[str | None, typer.Option(help="regular expression that file names must match")] = None,
) -> None:
    """Run every golden file in a folder against this network; exit with 1 if an output misses its gate."""
    from unish_model.network.selfcheck import Check, GoldenError, run_selfcheck

    checks: list[Check] = []
    try:
        for check in run_selfcheck(golden, salt, only=only):
            checks.append(check)
            word = "pass" if check.passed else "FAIL"
            errors.print(f"{word} {check.file} {check.output} {check.error:.1e}", markup=False, highlight=False)
    except GoldenError as error:
        raise _stop(error) from error
    table = Table("file", "output", "largest relative error", "gate", "")
    for check in checks:
        word = "pass" if check.passed else "[red]FAIL[/red]"
        table.add_row(check.file, check.output, f"{check.error:.1e}", f"{check.gate:.0e}", word)
    console.print(table)
    missed = sum(not check.passed for check in checks)
    console.print(f"{len(checks) - missed} of {len(checks)} outputs within their gates")
    if missed or not checks:
        raise typer.Exit(1)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
