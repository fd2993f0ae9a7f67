"""The commands that ask: judge again, and show what became of clips, shards and labelled cases."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from curation.cli.app import (
    CatalogUrl,
    CommandFailedError,
    Out,
    PolicyOption,
    app,
    console,
    counted,
    option_of,
    progress_bars,
    say,
    show_table,
)
from curation.failures import FailureCode, Trait, UsageError
from curation.options import options, parameters
from curation.settings import ObserveSettings, Settings

if TYPE_CHECKING:
    from curation.catalog import Catalog

_OPTIONS = options(flat=True)


@app.command()
@parameters([_OPTIONS["storage"]], option_of)
def judge(out: Out, policy: PolicyOption = Path("default"), *, catalog_url: CatalogUrl = None, **values: Any) -> None:
    """Judge all measured clips under a policy.

    Decodes nothing; needs no video.
    """
    from curation.catalog import Catalog
    from curation.judge.policy import load_policy
    from curation.run import stages

    settings = _existing(out, catalog_url).model_copy(update={"policy": policy, "storage": values["storage"]})
    with progress_bars() as show:
        judged = stages.judge_all(settings, lambda done, total: show("judge", done, total))
    rule = load_policy(policy)
    counts = Catalog(settings.database).funnel(None, rule.hash)
    say(f"{counted(judged, 'clip', 'clips')} newly judged under {rule.name} ({rule.hash})")
    rows = [("accept", "", str(counts.accepted))]
    rows += [("reject", reason, str(clips)) for reason, clips in sorted(counts.rejected_by.items())]
    rows += [("unknown", reason, str(clips)) for reason, clips in sorted(counts.unknown_by.items())]
    show_table(None, ("decision", "first reason", "clips"), rows)


@app.command()
def status(out: Out, policy: PolicyOption = Path("default"), catalog_url: CatalogUrl = None) -> None:
    """Show how many clips got how far.

    Shows also how many batches are in work, and which platforms limit requests.
    """
    from curation.catalog import Catalog
    from curation.judge.policy import load_policy

    catalog = Catalog(_existing(out, catalog_url).database)
    counts = catalog.funnel(None, load_policy(policy).hash)
    rows = [("registered", counts.clips), ("downloaded", counts.downloaded), ("observed", counts.observed)]
    rows += [("accepted", counts.accepted)]
    rows += [(f"rejected: {reason}", clips) for reason, clips in sorted(counts.rejected_by.items())]
    rows += [("undecided", counts.unknown)]
    rows += [(f"failed in {stage}: {code}", clips) for (stage, code), clips in sorted(counts.failed.items())]
    rows += [(f"in shards of {_data_set(catalog, key)}", clips) for key, clips in sorted(counts.datasets.items())]
    if not counts.datasets:
        rows += [("in shards", 0)]
    total = max(counts.clips, 1)
    shown = [(name, str(clips), f"{clips / total:.1%}") for name, clips in rows]
    show_table(None, ("stage", "clips", "share"), shown)
    held = [lease for lease in catalog.leases() if lease.expires_in_s > 0 and not lease.name.startswith("index:")]
    if held:
        workers = len({lease.owner for lease in held})
        say(f"{counted(len(held), 'batch', 'batches')} in work by {counted(workers, 'worker', 'workers')}")
    _say_blocks(catalog)


@app.command()
def failures(
    out: Out,
    code: Annotated[str | None, typer.Option(help="Only this failure code.")] = None,
    catalog_url: CatalogUrl = None,
) -> None:
    """Show which clips failed, and what to do."""
    from curation.catalog import Catalog

    if code is not None and code not in set(FailureCode):
        raise UsageError(f"--code {code} is no failure code; known are {', '.join(FailureCode)}.")
    catalog = Catalog(_existing(out, catalog_url).database)
    found = catalog.failures(code=FailureCode(code) if code else None)
    rows = [(attempt.clip_id, attempt.stage, str(attempt.code), attempt.message) for attempt in found]
    show_table(counted(len(found), "failure", "failures"), ("clip", "stage", "code", "what"), rows)
    for each, transient in sorted({(attempt.code, attempt.transient) for attempt in found if attempt.code}):
        tried = transient or Trait.SETTINGS in each.traits
        again = "the next run tries again" if tried else f"tried again only with --retry {each.value}"
        say(f"{each.value} ({again}): {each.advice}")
    _say_blocks(catalog)


@app.command()
def inspect(
    clip_id: Annotated[str, typer.Argument(help="A clip id, or its first digits.")],
    out: Out,
    catalog_url: CatalogUrl = None,
) -> None:
    """Print all that is known of one clip.

    JSON: video, measurements, verdicts with every reason, attempts, and the data sets that hold it.
    """
    from curation.catalog import Catalog

    catalog = Catalog(_existing(out, catalog_url).database)
    history = catalog.clip(clip_id)
    record: dict[str, Any] = {"clip_id": history.ref.clip_id, **asdict(history)}
    if history.observation is not None:
        record["measured_with"] = catalog.provenance(history.observation.provenance_hash)
    console().print_json(json.dumps(record, default=str))


@app.command()
@parameters([_OPTIONS[name] for name in ("detector", "workers", "debug_file")], option_of)
def evaluate(
    cases: Annotated[Path, typer.Option(help="CSV of file, expected, first_reason and, optionally, the criteria.")],
    policy: PolicyOption = Path("default"),
    *,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    **values: Any,
) -> None:
    """Compare a policy with labelled clips.

    Observes and judges the clips that lie beside a CSV, and shows where the policy disagrees with the labels.
    """
    from curation.judge import cases as evaluation
    from curation.judge.policy import load_policy

    rule = load_policy(policy)
    labelled = evaluation.read_cases(cases)
    settings = ObserveSettings(detector=values["detector"])
    with progress_bars() as show:
        results = evaluation.evaluate(
            labelled, cases.parent, rule, settings, values["workers"], partial(show, "evaluate"), values["debug_file"]
        )
    if json_out is not None:
        evaluation.write_results(results, json_out)
    say(evaluation.summary(results))


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="A folder of shards behind a URL, as a run prints it.")],
    folder: Annotated[Path, typer.Argument(help="Where on this disk the shards go.")],
) -> None:
    """Copy a shared data set to this disk.

    Files that are here and whole are not fetched again.
    """
    from curation.shards.remote import pull as bring

    with progress_bars() as show:
        shards = bring(source, folder, lambda done, total: show("pull", done, total))
    say(f"{counted(len(shards), 'shard', 'shards')} in {folder}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder of shards on this disk.")],
    repair: Annotated[bool, typer.Option(help="First make the index again from the shard files.")] = False,
    decode: Annotated[bool, typer.Option(help="Decode every frame too.")] = True,
) -> None:
    """Check a folder of shards.

    Checks every file against the index and its hash, and every frame.
    """
    from curation.shards.schema import ShardError
    from curation.shards.verify import verify as check
    from curation.shards.writer import rebuild_index

    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give a folder of shards, as a run prints it.")
    try:
        if repair:
            rebuild_index(folder)
        shards = check(folder, decode=decode)
    except ShardError as error:
        raise CommandFailedError(str(error)) from error
    clips = sum(len(shard.clips) for shard in shards)
    say(f"{counted(clips, 'clip', 'clips')} in {counted(len(shards), 'shard', 'shards')}: all is well")


def _existing(out: Path, catalog_url: str | None) -> Settings:
    if catalog_url is None and not (out / "catalog.sqlite").is_file():
        raise UsageError(f"There is no catalog in {out}; give the --out of a run.")
    return Settings(out=out, catalog_url=catalog_url)


def _data_set(catalog: Catalog, key: str) -> str:
    """A data set as its folder of shards is called: policy, teacher, and the first digits of what it was made with."""
    made_with = catalog.provenance(key) or {}
    names = [made_with.get(part, {}).get("name") for part in ("policy", "teacher")]
    return "-".join([*filter(None, names), key[:8]])


def _say_blocks(catalog: Catalog) -> None:
    """Which platforms limit requests, with what answer, and until when."""
    from curation.pipeline import postponed

    left_s: dict[tuple[str, str], float] = {}
    for block in catalog.blocks():  # of plain links many hosts, none of which has a name here
        key = block.service.partition("-")[0], block.code.value
        left_s[key] = max(block.left_s, left_s.get(key, 0.0))
    for (platform, code), seconds in sorted(left_s.items()):
        say(f"{code}: {postponed(platform, seconds)}")
