"""The command `curation`: check a manifest, run the pipeline, judge again, and ask what became of each clip.

Thin: every command calls one function of the library. Errors a user can mend are one sentence, without a traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from curation.failures import FailureCode, OutageError, UsageError
from curation.settings import DownloadSettings, ObserveSettings, Settings, TeacherSettings

if TYPE_CHECKING:
    from curation.catalog import Catalog, Funnel

_INTERRUPTED = 130  # the exit code of a command ended by Ctrl-C
_OUTAGE = 75  # EX_TEMPFAIL of sysexits.h: the same command may work later
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console()

Manifest = Annotated[Path, typer.Argument(help="CSV, JSONL or Parquet with platform, video_id, start_s, end_s.")]
Out = Annotated[Path, typer.Option(help="Folder of the run: catalog, videos, observations, shards.")]
PolicyOption = Annotated[Path, typer.Option(help="A policy file, or the name of a built-in one: default, paper.")]
Detector = Annotated[str | None, typer.Option(help="ultralytics weights; the policy's own by default.")]
Hosts = Annotated[list[str] | None, typer.Option("--http-host", help="Host allowed for platform http; repeatable.")]
Loopback = Annotated[bool, typer.Option("--allow-loopback", help="Permit loopback addresses; for tests only.")]
CatalogUrl = Annotated[
    str | None,
    typer.Option(envvar="UNISH_CATALOG_URL", help="SQLAlchemy URL of the catalog; SQLite below --out by default."),
]
Storage = Annotated[
    str | None, typer.Option(envvar="UNISH_STORAGE", help="fsspec URL that machines share, such as s3://bucket/run.")
]
DebugFile = Annotated[
    Path | None, typer.Option(help="Keep what unexpected errors say in this file; it may hold titles and addresses.")
]
TeacherOption = Annotated[
    str, typer.Option(help="Depth teacher: a MoGe-2 Hugging Face id or file, a folder of depth, or none.")
]


@app.command("check-manifest")
def check_manifest(manifest: Manifest, http_host: Hosts = None, allow_loopback: Loopback = False) -> None:
    """Read a manifest and say what is wrong with it, every row at once. Touches no network."""
    from curation.manifest import read_manifest

    refs = read_manifest(manifest, http_hosts=tuple(http_host or ()), allow_loopback=allow_loopback)
    if not refs:
        raise UsageError(f"{manifest.name} lists no clips; add a row.")
    videos = len({ref.video_key for ref in refs})
    console.print(f"{manifest.name} is good: {len(refs)} clips of {videos} videos", soft_wrap=True, markup=False)


@app.command()
def run(
    manifest: Manifest,
    out: Out,
    policy: PolicyOption = Path("default"),
    detector: Detector = None,
    teacher: TeacherOption = "Ruicheng/moge-2-vitl-normal",
    teacher_name: Annotated[str | None, typer.Option(help="Name recorded for a depth folder, such as megasam.")] = None,
    num_tokens: Annotated[int, typer.Option(help="MoGe-2 tokens per frame.")] = 1800,
    http_host: Hosts = None,
    local_root: Annotated[Path | None, typer.Option(help="Folder below which platform local may read.")] = None,
    max_height: Annotated[int, typer.Option(help="Cap on the short side of a stream, in pixels.")] = 1080,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    batch_clips: Annotated[int, typer.Option(help="Clips per batch and shard.")] = 32,
    workers: Annotated[int | None, typer.Option(help="Observing processes; one per core by default.")] = None,
    retry: Annotated[list[str] | None, typer.Option(help="Failure code to try again; repeatable.")] = None,
    catalog_url: CatalogUrl = None,
    storage: Storage = None,
    lease_s: Annotated[float, typer.Option(help="A worker silent for so long loses its batches.")] = 120.0,
    patience_s: Annotated[float, typer.Option(help="How long to wait for a platform to be asked again.")] = 3600.0,
    session: Annotated[str, typer.Option(help="Workers behind one address share a name, and its rates.")] = "default",
    videos_per_hour: Annotated[int, typer.Option(help="Per platform and session; 0 for no limit.")] = 250,
    pause: Annotated[tuple[float, float], typer.Option(help="Least and most seconds between videos.")] = (
        5.0,
        10.0,
    ),
    bytes_per_s: Annotated[int | None, typer.Option(help="No video is fetched faster than this.")] = None,
    max_video_mb: Annotated[int, typer.Option(help="Larger videos are not fetched.")] = 8192,
    min_free_mb: Annotated[int, typer.Option(help="Disk space that a download leaves free.")] = 2048,
    budget_mb: Annotated[int | None, typer.Option(help="Videos kept; the oldest finished ones make room.")] = None,
    cookies: Annotated[Path | None, typer.Option(help="Netscape cookie file; neither changed nor logged.")] = None,
    proxy_file: Annotated[Path | None, typer.Option(help="File with the address of a proxy; never logged.")] = None,
    clip_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds for one clip in a stage; by default a generous one by its length.")
    ] = None,
    debug_file: DebugFile = None,
    allow_loopback: Loopback = False,
) -> None:
    """Download, observe, judge, teach and shard the clips of a manifest, here, without Prefect.

    Run it again after anything: it does only what is missing.
    """
    from curation import pipeline
    from curation.manifest import read_manifest

    settings = Settings(
        out=out,
        policy=policy,
        download=DownloadSettings(
            max_height=max_height, http_hosts=tuple(http_host or ()), local_root=local_root,
            allow_loopback=allow_loopback, session=session, videos_per_hour=videos_per_hour, pause_s=pause,
            bytes_per_s=bytes_per_s, max_video_mb=max_video_mb, min_free_mb=min_free_mb, budget_mb=budget_mb,
            cookies=cookies, proxy_file=proxy_file,
        ),
        observe=ObserveSettings(detector=detector, device=device),
        teacher=teacher_settings(teacher, teacher_name, num_tokens, device),
        batch_clips=batch_clips,
        workers=workers,
        retry=tuple(retry or ()),
        catalog_url=catalog_url,
        storage=storage,
        lease_s=lease_s,
        patience_s=patience_s,
        clip_timeout_s=clip_timeout_s,
        debug_file=debug_file,
    )  # fmt: skip
    for code in settings.retry:
        if code not in set(FailureCode):
            raise UsageError(f"--retry {code} is no failure code; known are {', '.join(FailureCode)}.")
    refs = read_manifest(manifest, http_hosts=settings.download.http_hosts, allow_loopback=allow_loopback)
    with _bars() as show:
        funnel = pipeline.run(settings, refs, show)
    _print_funnel(funnel)
    console.print(f"shards: {funnel.folder}", soft_wrap=True, markup=False)
    if funnel.failed:
        console.print(f"what failed, and what to do: curation failures --out {out}", soft_wrap=True, markup=False)
    for platform, left_s in funnel.postponed.items():
        console.print(pipeline.postponed(platform, left_s), soft_wrap=True, markup=False)
    if funnel.failed and not funnel.observed:
        raise UsageError("No clip could be measured; see what failed above, and run again.")


@app.command()
def judge(
    out: Out, policy: PolicyOption = Path("default"), catalog_url: CatalogUrl = None, storage: Storage = None
) -> None:
    """Judge every observed clip under a policy. Decodes nothing; needs no video."""
    from curation.catalog import Catalog
    from curation.judge.policy import load_policy
    from curation.run import stages

    settings = _existing(out, catalog_url).model_copy(update={"policy": policy, "storage": storage})
    with _bars() as show:
        judged = stages.judge_all(settings, lambda done, total: show("judge", done, total))
    rule = load_policy(policy)
    counts = Catalog(settings.database).funnel(None, rule.hash)
    console.print(f"{judged} clips judged anew under {rule.name} ({rule.hash})")
    table = Table("decision", "first reason", "clips")
    table.add_row("accept", "", str(counts.accepted))
    for reason, clips in sorted(counts.rejected_by.items()):
        table.add_row("reject", reason, str(clips))
    for reason, clips in sorted(counts.unknown_by.items()):
        table.add_row("unknown", reason, str(clips))
    console.print(table)


@app.command()
def status(out: Out, policy: PolicyOption = Path("default"), catalog_url: CatalogUrl = None) -> None:
    """How many clips got how far, who works on the rest, and which platforms must be left alone."""
    from curation.catalog import Catalog
    from curation.judge.policy import load_policy

    catalog = Catalog(_existing(out, catalog_url).database)
    counts = catalog.funnel(None, load_policy(policy).hash)
    table = Table("stage", "clips", "share")
    rows = [("registered", counts.clips), ("downloaded", counts.downloaded), ("observed", counts.observed)]
    rows += [("accepted", counts.accepted)]
    rows += [(f"rejected: {reason}", clips) for reason, clips in sorted(counts.rejected_by.items())]
    rows += [("undecided", counts.unknown)]
    rows += [(f"failed in {stage}: {code}", clips) for (stage, code), clips in sorted(counts.failed.items())]
    rows += [(f"in shards of {_data_set(catalog, key)}", clips) for key, clips in sorted(counts.datasets.items())]
    if not counts.datasets:
        rows += [("in shards", 0)]
    for name, clips in rows:
        table.add_row(escape(name), str(clips), f"{clips / max(counts.clips, 1):.1%}")
    console.print(table)
    held = [lease for lease in catalog.leases() if lease.expires_in_s > 0 and not lease.name.startswith("index:")]
    if held:
        workers = len({lease.owner for lease in held})
        console.print(f"{_many(len(held), 'batch', 'batches')} in work by {_many(workers, 'worker', 'workers')}")
    _print_blocks(catalog)


@app.command()
def failures(
    out: Out,
    code: Annotated[str | None, typer.Option(help="Only this failure code.")] = None,
    catalog_url: CatalogUrl = None,
) -> None:
    """Which clips failed, why, and what to do about it."""
    from curation.catalog import Catalog

    if code is not None and code not in set(FailureCode):
        raise UsageError(f"--code {code} is no failure code; known are {', '.join(FailureCode)}.")
    catalog = Catalog(_existing(out, catalog_url).database)
    found = catalog.failures(code=FailureCode(code) if code else None)
    table = Table("clip", "stage", "code", "what", title=f"{len(found)} failures")
    for attempt in found:
        table.add_row(attempt.clip_id, attempt.stage, str(attempt.code), escape(attempt.message))
    console.print(table)
    for each, transient in sorted({(attempt.code, attempt.transient) for attempt in found if attempt.code}):
        again = "may work if run again" if transient else f"tried again only with --retry {each.value}"
        console.print(f"{each.value} ({again}): {each.advice}", soft_wrap=True)
    _print_blocks(catalog)


@app.command()
def inspect(
    clip_id: Annotated[str, typer.Argument(help="A clip id, or its first digits.")],
    out: Out,
    catalog_url: CatalogUrl = None,
) -> None:
    """Everything known of one clip: video, measurements, verdicts with every reason, tries, shards."""
    from curation.catalog import Catalog

    catalog = Catalog(_existing(out, catalog_url).database)
    history = catalog.clip(clip_id)
    record: dict[str, Any] = {"clip_id": history.ref.clip_id, **asdict(history)}
    if history.observation is not None:
        record["measured_with"] = catalog.provenance(history.observation.provenance_hash)
    console.print_json(json.dumps(record, default=str))


@app.command()
def evaluate(
    cases: Annotated[Path, typer.Option(help="CSV of file, expected, first_reason and, optionally, the criteria.")],
    detector: Detector = None,
    policy: PolicyOption = Path("default"),
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one per core by default.")] = None,
    debug_file: DebugFile = None,
) -> None:
    """Observe and judge labelled clips that lie beside a CSV, and show where the policy disagrees with the labels."""
    from curation.judge import cases as evaluation
    from curation.judge.policy import load_policy

    rule = load_policy(policy)
    labelled = evaluation.read_cases(cases)
    settings = ObserveSettings(detector=detector)
    with _bars() as show:
        results = evaluation.evaluate(
            labelled, cases.parent, rule, settings, workers, partial(show, "evaluate"), debug_file
        )
    if json_out is not None:
        evaluation.write_results(results, json_out)
    console.print(evaluation.summary(results), markup=False, highlight=False, soft_wrap=True)


def teacher_settings(teacher: str, name: str | None, num_tokens: int, device: str) -> TeacherSettings:
    """The teacher that one word means: none, a folder of depth, or a MoGe-2 model by file or Hugging Face id."""
    if teacher == "none":
        return TeacherSettings(kind="none")
    path = Path(teacher).expanduser()
    if path.is_dir() and not (path / "model.pt").is_file():
        return TeacherSettings(kind="folder", model=str(path), name=name)
    return TeacherSettings(kind="moge", model=teacher, name=name, num_tokens=num_tokens, device=device)


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="A folder of shards behind a URL, as a run prints it.")],
    folder: Annotated[Path, typer.Argument(help="Where on this disk the shards go.")],
) -> None:
    """Bring a shared data set to this disk, to train from it; what is here and whole is not fetched again."""
    from curation.shards.remote import pull as bring

    with _bars() as show:
        shards = bring(source, folder, lambda done, total: show("pull", done, total))
    console.print(f"{len(shards)} shards in {folder}", soft_wrap=True, markup=False)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of shards on this disk.")],
    repair: Annotated[bool, typer.Option(help="First make the index anew from the shard files.")] = False,
    decode: Annotated[bool, typer.Option(help="Decode every frame too.")] = True,
) -> None:
    """Check a folder of shards: every file against the index and its hash, and every frame."""
    from curation.shards.reader import verify as check
    from curation.shards.schema import ShardError
    from curation.shards.writer import rebuild_index

    try:
        if repair:
            rebuild_index(folder)
        shards = check(folder, decode=decode)
    except ShardError as error:
        raise UsageError(str(error)) from error
    clips = sum(len(shard.clips) for shard in shards)
    console.print(f"{_many(clips, 'clip', 'clips')} in {_many(len(shards), 'shard', 'shards')}: all is well")


def _existing(out: Path, catalog_url: str | None) -> Settings:
    if catalog_url is None and not (out / "catalog.sqlite").is_file():
        raise UsageError(f"There is no catalog in {out}; give the --out of a run.")
    return Settings(out=out, catalog_url=catalog_url)


def _data_set(catalog: Catalog, key: str) -> str:
    """A data set as its folder of shards is called: policy, teacher, and the first digits of what it was made with."""
    made_with = catalog.provenance(key) or {}
    names = [made_with.get(part, {}).get("name") for part in ("policy", "teacher")]
    return "-".join([*filter(None, names), key[:8]])


def _print_blocks(catalog: Catalog) -> None:
    """Which platforms asked to be left alone, with what answer, and until when."""
    from curation.pipeline import postponed

    left_s: dict[tuple[str, str], float] = {}
    for block in catalog.blocks():  # of plain links many hosts, none of which has a name here
        key = block.service.partition("-")[0], block.code.value
        left_s[key] = max(block.left_s, left_s.get(key, 0.0))
    for (platform, code), seconds in sorted(left_s.items()):
        console.print(f"{code}: {postponed(platform, seconds)}", soft_wrap=True, markup=False)


def _many(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def _print_funnel(funnel: Funnel) -> None:
    table = Table("stage", "clips", "share")
    for row in funnel.table():
        table.add_row(row["stage"], str(row["clips"]), row["share"])
    console.print(table)


@contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
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
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield show


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2, an outage that lasts is one and exit code 75."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a name on disk need not be text in the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except SystemExit as ended:
        if ended.code != _INTERRUPTED:
            raise
        # At once: whatever still runs may die anywhere, and nothing is lost by it.
        Console(stderr=True).print("stopped; run again, what is done is kept.")
        os._exit(_INTERRUPTED)
    except UsageError as error:
        _fail(str(error))
    except OutageError as error:
        _fail(str(error), _OUTAGE)
    except ValidationError as error:
        first = error.errors()[0]
        _fail(f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}.")


def _fail(sentence: str, code: int = 2) -> NoReturn:
    Console(stderr=True).print(f"error: {sentence}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
