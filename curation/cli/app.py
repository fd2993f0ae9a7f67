"""What all commands share: where they are registered, the options that several take, progress bars and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from curation.options import Option

app = typer.Typer(rich_markup_mode=None)  # plain help: drawing it in boxes takes as long as all else together


class CommandFailedError(Exception):
    """What the command was asked for failed, by no mistake of the user; one sentence for the user, exit code 1."""


def option_of(option: Option) -> Any:
    """An option of Settings as Typer understands it."""
    said = f"{option.field.description} May be repeated." if option.many else option.field.description
    shown = typer.Option(option.flag, help=said, envvar=option.env)
    return Annotated[option.type, shown]


Manifest = Annotated[Path, typer.Argument(help="CSV, JSONL or Parquet file with platform, video_id, start_s, end_s.")]
Out = Annotated[Path, typer.Option(help="Folder of the run: catalog, videos, observations, shards.")]
PolicyOption = Annotated[
    Path, typer.Option(help="Policy: the name of a built-in one (default, paper) or the path of a file.")
]
CatalogUrl = Annotated[
    str | None,
    typer.Option(envvar="UNISH_CATALOG_URL", help="SQLAlchemy URL of the catalog; SQLite below --out by default."),
]


@cache
def console(*, stderr: bool = False) -> Console:
    """Where the commands write."""
    from rich.console import Console

    return Console(stderr=stderr)


def say(line: str) -> None:
    """One line of output, as it is."""
    console().print(line, soft_wrap=True, markup=False, highlight=False)


def show_table(title: str | None, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """A table on standard output."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def counted(number: int, one: str, more: str) -> str:
    """A number with its noun."""
    return f"{number} {one if number == 1 else more}"


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars, one per stage, with the time left; on standard error, so that output can be piped."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield show
