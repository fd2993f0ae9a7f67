"""The commands that work: check a manifest, and run the pipeline without Prefect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from curation.cli.app import CommandFailedError, Manifest, Out, app, counted, option_of, progress_bars, say, show_table
from curation.failures import UsageError
from curation.options import options, parameters, settings_of
from curation.settings import TeacherSettings

_OPTIONS = options(flat=True)
_TEACHER = Annotated[
    str, typer.Option(help="Depth teacher: a MoGe-2 Hugging Face id or local file, a folder of depth, or none.")
]


@app.command("check-manifest")
@parameters([_OPTIONS["http_hosts"], _OPTIONS["allow_loopback"]], option_of)
def check_manifest(manifest: Manifest, **values: Any) -> None:
    """Check a manifest; names every wrong row.

    Does not use the network.
    """
    from curation.manifest import read_manifest

    hosts = tuple(values["http_hosts"])
    refs = read_manifest(manifest, http_hosts=hosts, allow_loopback=values["allow_loopback"])
    if not refs:
        raise UsageError(f"{manifest.name} lists no clips; add a row.")
    videos = len({ref.video_key for ref in refs})
    say(f"{manifest.name} is good: {counted(len(refs), 'clip', 'clips')} of {counted(videos, 'video', 'videos')}")


@app.command()
@parameters([each for each in _OPTIONS.values() if each.name not in ("teacher", "teacher_model")], option_of)
def run(manifest: Manifest, out: Out, *, teacher: _TEACHER = TeacherSettings().model, **values: Any) -> None:
    """Run the whole pipeline on a manifest.

    Downloads, observes, judges, teaches and shards its clips, on this machine, without Prefect. Run it again after any
    interruption: it does only what is missing.
    """
    from curation import pipeline
    from curation.manifest import read_manifest

    settings = settings_of(out, values | teacher_values(teacher, values["teacher_name"]), flat=True)
    refs = read_manifest(
        manifest, http_hosts=settings.download.http_hosts, allow_loopback=settings.download.allow_loopback
    )
    with progress_bars() as show:
        funnel = pipeline.run(settings, refs, show)
    show_table(
        None, ("stage", "clips", "share"), [(row["stage"], str(row["clips"]), row["share"]) for row in funnel.table()]
    )
    say(f"shards: {funnel.folder}")
    if funnel.failed:
        say(f"what failed, and what to do: curation failures --out {out}")
    for platform, left_s in funnel.postponed.items():
        say(pipeline.postponed(platform, left_s))
    if funnel.failed and not funnel.observed:
        raise CommandFailedError("No clip could be measured; see what failed above, and run again.")


def teacher_values(teacher: str, name: str | None) -> dict[str, Any]:
    """The teacher that one word means: none, a folder of depth, or a MoGe-2 model by file or Hugging Face id."""
    if teacher == "none":
        return {"teacher": "none"}
    path = Path(teacher).expanduser()
    if path.is_dir() and not (path / "model.pt").is_file():
        return {"teacher": "folder", "teacher_model": str(path), "teacher_name": name}
    return {"teacher": "moge", "teacher_model": teacher, "teacher_name": name}
