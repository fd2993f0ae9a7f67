"""The whole pipeline on the embedded world: render clips, serve them like a platform, curate them, check the results.

    python -m flows.demo [FOLDER] [--teacher oracle]

All downloads come from this machine. The last table compares each result with the known truth; the exit code is 0 only
if every decision is right (the first of several reasons may differ, because the demonstration's detector is small). A
second run does only what is missing. After a success the Prefect service keeps running; if the demonstration fails or
is stopped, it leaves the service as it was before.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from curation.failures import FailureCode, UsageError
from curation.files import atomic_path
from curation.manifest import write_manifest
from curation.records import ClipRef

if TYPE_CHECKING:
    from curation.synthetic.clips import ClipPlan
    from flows.service import Service

SEED = 7
SECONDS = 3.0
FPS = 15  # more than the six samples per second; rendering takes most of the demonstration's time
LIMITED = "limited.mp4"
GONE = ("gone.mp4", "lost.mp4")
console = Console()


@dataclass(frozen=True)
class Expected:
    """The expected result for one file of the demonstration: accept, reject or error, and the reason."""

    file: str
    decision: str
    reason: str


class _Platform(SimpleHTTPRequestHandler):
    """Serves the clips. Two ids are gone; one is rate-limited unless `forgiving`."""

    protocol_version = "HTTP/1.1"
    forgiving = False

    def do_GET(self) -> None:
        name = Path(self.path).name
        if name in GONE:
            self.send_error(410)
        elif name == LIMITED and not self.forgiving:
            self.send_response(429)
            self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the pipeline reports what happened."""


@contextmanager
def platform(folder: Path, port: int, forgiving: bool) -> Iterator[str]:
    """Serve a folder on loopback; yields host:port. The port stays the same, so the clip ids do too."""
    handler = type("Handler", (_Platform,), {"forgiving": forgiving})
    with ThreadingHTTPServer(("127.0.0.1", port), lambda *a: handler(*a, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.shutdown()


def prepare(folder: Path, clips: int) -> tuple[list[ClipPlan], list[Expected], int]:
    """Render the clips once; returns their plans, the expected result of every file, and the platform's port."""
    from curation.synthetic.clips import make_clips, plan_clips

    plans = plan_clips(clips, SEED, fps=FPS, seconds=SECONDS)
    record = folder / "demo.json"
    if not record.is_file():
        with _bar("rendering") as show:
            make_clips(folder / "clips", plans, progress=show)
        with (folder / "clips" / "cases.csv").open(newline="", encoding="utf-8") as stream:
            truth = [Expected(row["file"], row["expected"], row["first_reason"]) for row in csv.DictReader(stream)]
        truth = [Expected(e.file, e.decision, "corrupt") if e.decision == "error" else e for e in truth]
        good = next(e for e in truth if e.decision == "accept")
        (folder / "clips" / LIMITED).write_bytes((folder / "clips" / good.file).read_bytes())
        truth += [Expected(name, "error", FailureCode.REMOVED.value) for name in GONE]
        truth += [Expected(LIMITED, "error", FailureCode.RATE_LIMITED.value)]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with atomic_path(record) as path:
            path.write_text(json.dumps({"port": port, "truth": [asdict(e) for e in truth]}))
    known = json.loads(record.read_text())
    return plans, [Expected(**e) for e in known["truth"]], known["port"]


def demo(folder: Path, clips: int = 28, teacher: Literal["small", "oracle"] = "small") -> bool:
    """Run the demonstration; True if every decision is right. Otherwise it stops the service if it started it.

    teacher: `small` is a MoGe-2 of 2.3 M parameters trained on this world, `oracle` is the world's exact depth.
    Raises UsageError if the service cannot be started.
    """
    from flows import service

    found_running = service.running()
    agreed = False
    try:
        agreed = _demonstrate(folder.absolute(), clips, teacher)
    finally:
        if not agreed and not found_running:
            console.print("Stopping the Prefect service that this demonstration started.")
            service.stop()
    return agreed


def _demonstrate(folder: Path, clips: int, teacher: Literal["small", "oracle"]) -> bool:
    from curation.catalog import Catalog
    from curation.judge.policy import load_policy
    from curation.settings import Settings
    from curation.synthetic import teacher as small
    from curation.synthetic.detector import LONG_SIDE, POLICY, WEIGHTS
    from flows.service import login

    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "data"
    forgiving = (out / "catalog.sqlite").is_file()
    console.rule("1. render clips of the embedded world")
    with _started_beside() as starting:
        plans, truth, port = prepare(folder, clips)
        if forgiving:
            truth = [Expected(e.file, "accept", "") if e.file == LIMITED else e for e in truth]
        refs = {e.file: ClipRef("http", f"http://127.0.0.1:{port}/{e.file}") for e in truth}
        manifest = folder / "manifest.csv"
        write_manifest(list(refs.values()), manifest)
        if teacher == "small":
            taught = {"teacher": "moge", "teacher_model": small.WEIGHTS, "teacher_name": small.NAME}
            taught |= {"num_tokens": small.NUM_TOKENS}
        else:
            depths = _true_depth(folder / "depth", plans, truth, refs)
            taught = {"teacher": "folder", "teacher_model": depths, "teacher_name": "oracle"}
        console.print(f"{len(truth)} rows in {manifest}", soft_wrap=True)
        service = starting.result()

    console.rule("2. prefect deployment run curate --watch")
    with platform(folder / "clips", port, forgiving) as host:
        parameters = {
            "manifest": manifest,
            "out": out,
            "policy": POLICY,
            "detector": WEIGHTS,
            "detector_long_side": LONG_SIDE,
            "download_retries": 1,
            "http_hosts": json.dumps([host]),
            "allow_loopback": "true",
            **taught,
        }
        words = [word for name, value in parameters.items() for word in ("--param", f"{name}={value}")]
        command = [str(Path(sys.executable).with_name("prefect")), "deployment", "run", "curate", "--watch", *words]
        checkout = Path(__file__).resolve().parents[1]
        ran = subprocess.run(command, cwd=checkout, env=service.environment("worker"), check=False)
    if ran.returncode:
        console.print("[red]The run failed; its messages are above.")
        return False

    console.rule("3. compare each result with the truth")
    catalog = Catalog(Settings(out=out).database)
    verdicts = catalog.verdicts(refs.values(), load_policy(POLICY).hash)
    failed = {attempt.clip_id: attempt for attempt in catalog.failures(refs.values())}
    table = Table("clip", "true", "found", "")
    agreed = named = 0
    for e in truth:
        clip_id = refs[e.file].clip_id
        verdict, failure = verdicts.get(clip_id), failed.get(clip_id)
        if failure is not None and failure.code is not None:
            found = ("error", failure.code.value)
        else:
            found = (verdict.decision, verdict.first_reason or "") if verdict else ("error", "nothing recorded")
        agreed += found[0] == e.decision
        named += found == (e.decision, e.reason)
        remark = "[red]differs" if found[0] != e.decision else "" if found[1] == e.reason else "another reason first"
        table.add_row(e.file, f"{e.decision} {e.reason}", " ".join(found), remark)
    console.print(table)
    shards = sorted((out / "shards").glob("*/shard-*.parquet"))
    counts = catalog.funnel(refs.values(), load_policy(POLICY).hash)
    console.print(
        f"{agreed} of {len(truth)} decisions are right, {named} with the true first reason: "
        f"{counts.accepted} accepted, {counts.rejected} rejected, {sum(counts.failed.values())} failed; "
        f"{counts.sharded} in {len(shards)} shards"
    )
    console.rule("next")
    here = Path(os.path.relpath(folder))
    for line in (
        f"shards:              {shards[0].parent if shards else out}",
        f"all reasons:         curation inspect CLIP_ID --out {here / 'data'}",
        f"Prefect's pages:     {service.ui_url}   (stop: make stop)",
        f"                     {login(service)}",
        "run it again:        make demo   (downloads the rate-limited clip, and repeats nothing else)",
        "your own videos:     make curate MANIFEST=my.csv OUT=data",
    ):
        console.print(line, soft_wrap=True, highlight=False)
    return agreed == len(truth)


@contextmanager
def _started_beside() -> Iterator[Future[Service]]:
    """Start the Prefect service in a thread while the body runs; give up the start when the body fails.

    Raises UsageError before the body runs if the start fails within a second.
    """
    from flows.service import start

    given_up = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        starting = beside.submit(start, given_up=given_up)
        try:
            if wait([starting], timeout=1).done:
                starting.result()
            yield starting
        finally:
            given_up.set()


def _true_depth(folder: Path, plans: list[ClipPlan], truth: list[Expected], refs: dict[str, ClipRef]) -> Path:
    """A depth folder with the exact depth of every clip that should be accepted."""
    from curation.synthetic.clips import write_oracle

    folder.mkdir(exist_ok=True)
    files = {f"{plan.name}.mp4": plan for plan in plans}
    wanted = [e.file for e in truth if e.decision == "accept" and e.file != LIMITED]
    files[LIMITED] = files[wanted[0]]  # it is a copy of that clip
    with _bar("true depth") as show:
        for done, file in enumerate([*wanted, LIMITED], 1):
            if not (folder / f"{refs[file].clip_id}.npz").is_file():
                write_oracle(files[file], refs[file].clip_id, folder)
            show(done, len(wanted) + 1)
    return folder


@contextmanager
def _bar(what: str) -> Iterator[Any]:
    columns = (TextColumn(f"{what:12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def main(
    folder: Annotated[Path, typer.Argument(help="Folder for clips, depth and data.")] = Path("demo"),
    clips: Annotated[int, typer.Option(help="Clips to render; 28 cover every case.")] = 28,
    teacher: Annotated[
        Literal["small", "oracle"], typer.Option(help="A small MoGe-2 trained on this world, or exact depth.")
    ] = "small",
) -> None:
    """Run the whole pipeline on the embedded world, and compare the results with the truth."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up, as after Ctrl-C
    try:
        agreed = demo(folder, clips, teacher)
    except UsageError as error:
        sys.exit(f"Error: {error}")
    raise typer.Exit(0 if agreed else 1)


if __name__ == "__main__":
    typer.run(main)
