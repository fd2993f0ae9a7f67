"""The catalog at a million clips: what each question and each record of a worker costs, on SQLite and PostgreSQL.

    python -m benchmarks.catalog

A catalog is made as a long run leaves it: 90% of the clips downloaded, measured and judged under two policies, 10%
failed after several tries, 15% in shards, rows in the order of the manifest. PostgreSQL is a server of our own in a
temporary folder, with its standard configuration, and is left out where none is installed. Times are milliseconds of
the wall clock, the median of several repeats; each includes the connection, which the catalog opens for every
transaction.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pwd
import random
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.machine import hardware
from curation.catalog import Attempt, Catalog
from curation.catalog.tables import metadata
from curation.failures import FailureCode, OutageError, UsageError
from curation.files import sha256_json
from curation.outages import patience
from curation.records import ClipRef, CriterionResult, Verdict

POLICY, OTHER_POLICY, NEW_POLICY = "a" * 16, "b" * 16, "c" * 16
SHA = "1" * 64
BATCH = 32
PORTION = 20_000  # clips generated at once
CRITERIA = ("length", "shot", "single", "height", "border", "overlap")
LEASES, OWNERS = 2000, 50
VERDICTS = 1000

Row = tuple[Any, ...]


def ref(number: int) -> ClipRef:
    """Clip `number`; two clips come from one video."""
    video, clip = divmod(number, 2)
    video_id = hashlib.sha256(str(video).encode()).hexdigest()[:11]
    return ClipRef("youtube", video_id, clip * 10_000_000, (clip + 1) * 10_000_000, "train")


def batch_name(number: int) -> str:
    """The name that a worker leases for batch `number`."""
    return sha256_json(["batch", number])[:16]


def verdict(clip_id: str, chance: random.Random, policy_hash: str) -> Verdict:
    """A verdict of the usual size: six criteria with their reasons and figures; a quarter are accepted."""
    failing = chance.choice((*CRITERIA, None, None))
    results = tuple(
        CriterionResult(
            name,
            "fail" if name == failing else "pass",
            (f"{chance.random():.0%} of the frames, {chance.random():.1f} s",) if name == failing else (),
            {"mean": round(chance.random(), 6), "share": round(chance.random(), 6)},
        )
        for name in CRITERIA
    )
    return Verdict(clip_id, "default", policy_hash, "reject" if failing else "accept", results)


def rows(numbers: range, provenance: str, chance: random.Random) -> dict[str, list[Row]]:
    """What a run leaves of these clips: rows by table, columns as the tables have them, without the attempts' ids."""
    made: dict[str, list[Row]] = {table: [] for table in ("clips", "videos", "attempts", "observations")}
    made |= {"verdicts": [], "outputs": []}
    pool = [verdict("", chance, "") for _ in range(256)]
    judged = [(it.decision, it.first_reason, _criteria_json(it)) for it in pool]

    def tried(clip_id: str, stage: str, code: FailureCode | None = None, last: bool = False) -> None:
        transient = code is not None and code.transient
        made["attempts"].append(
            (clip_id, stage, code and code.value, transient, "no answer" if code else "", 1e9, 2.5, "12ab/77", last)
        )

    for number in numbers:
        clip = ref(number)
        id_, key = clip.clip_id, clip.video_key
        made["clips"].append((id_, "youtube", clip.video_id, key, clip.start_us, clip.end_us, "train", 1e9))
        if number // 2 % 10 == 9:
            failures = chance.choices((FailureCode.TIMEOUT, FailureCode.GEO, FailureCode.NETWORK), k=3)
            for index, code in enumerate(failures):
                tried(id_, "download", code, last=index == len(failures) - 1)
            continue
        if number % 2 == 0:
            present = number // 2 % 50 == 0
            path = f"videos/{key}/video.mp4"
            made["videos"].append((key, path, SHA, 2**24, "h264", 1920, 1080, 300, 10.0, 1e9 + number, present, 2))
        tried(id_, "download")
        tried(id_, "observe")
        made["observations"].append((id_, "full", f"observations/{id_[:2]}/{id_}.parquet", SHA, provenance, 1e9))
        for policy_hash in (POLICY, OTHER_POLICY):
            decision, reason, criteria = chance.choice(judged)
            made["verdicts"].append((id_, policy_hash, "default", decision, reason, criteria, SHA, 1e9))
        if number % 20 < 3:
            made["outputs"].append((id_, provenance, 60, 1e9))
    return made


def fill(url: str, clips: int, shown: Callable[[int], None]) -> Catalog:
    """A catalog of that many clips at `url`, written past the Catalog to be quick. shown: told how many there are."""
    catalog = Catalog(url)
    provenance = catalog.put_provenance({"generated": True})
    chance = random.Random(0)
    writer = _sqlite_writer(url) if url.startswith("sqlite") else _postgres_writer(url)
    with writer as write:
        for first in range(0, clips, PORTION):
            numbers = range(first, min(first + PORTION, clips))
            for table, made in rows(numbers, provenance, chance).items():
                write(table, [column.name for column in metadata.tables[table].columns if column.name != "id"], made)
            shown(numbers.stop)
    for number in range(OWNERS):
        mine = range(number * LEASES // OWNERS, (number + 1) * LEASES // OWNERS)
        catalog.claim([batch_name(index) for index in mine], f"owner-{number}", 3600)
    return catalog


def measure(catalog: Catalog, clips: int, repeats: int) -> dict[str, float]:
    """Milliseconds of each piece of work, the median of `repeats`, on clips that are not asked for twice."""
    chance = random.Random(1)
    batches = iter(chance.sample(range(clips // BATCH), min(clips // BATCH, 8 * repeats)))
    names = iter(
        [batch_name(n) for n in range(start, start + 64)] for start in range(LEASES, LEASES + 64 * repeats, 64)
    )

    def batch() -> list[str]:
        first = next(batches) * BATCH
        return [ref(number).clip_id for number in range(first, first + BATCH)]

    def judged(count: int) -> tuple[list[Verdict], dict[str, str]]:
        asked = [ref(number).clip_id for number in chance.sample(range(clips), min(clips, 2 * count))]
        ids = list(catalog.observations(asked))[:count]
        return [verdict(id_, chance, NEW_POLICY) for id_ in ids], dict.fromkeys(ids, SHA)

    def tries(code: FailureCode | None) -> list[Attempt]:
        return [Attempt(id_, "observe", code, "", 1e9, 2.5) for id_ in batch()]

    nothing: Callable[[], tuple[Any, ...]] = tuple
    work: dict[str, tuple[Callable[[], tuple[Any, ...]], Callable[..., Any]]] = {
        "status": (nothing, lambda: catalog.funnel(None, POLICY)),
        "status of a batch of 32": (lambda: (batch(),), lambda ids: catalog.funnel(ids, POLICY)),
        "claim 64 of 31,250 batches": (
            lambda: (next(names),),
            lambda wanted: catalog.claim(wanted, "me", 300),
        ),
        "heartbeat": (nothing, lambda: catalog.extend("owner-0", 3600)),
        "take a turn": (
            nothing,
            lambda: catalog.take_turn("youtube", "me", per_hour=250, pause_s=7.5, patience_s=1e9),
        ),
        "unblock, nothing blocked": (nothing, lambda: catalog.unblock("youtube", "me")),
        "record 32 successes": (lambda: (tries(None),), catalog.record_attempts),
        "record 32 failures": (lambda: (tries(FailureCode.TIMEOUT),), catalog.record_attempts),
        "verdicts of a batch of 32": (lambda: (batch(),), lambda ids: catalog.verdicts(ids, POLICY)),
        "write 1,000 verdicts": (lambda: judged(VERDICTS), catalog.record_verdicts),
        "a page of 1,000 measured clips": (nothing, lambda: next(catalog.observed())),
        "100 finished videos": (nothing, lambda: catalog.finished_videos(POLICY, None, 100)),
        "bytes of videos here": (nothing, catalog.present_bytes),
    }
    figures = {}
    for name, (prepare, do) in work.items():
        times = []
        for _ in range(repeats):
            given = prepare()
            start = time.perf_counter()
            do(*given)
            times.append(time.perf_counter() - start)
        figures[name] = round(1000 * statistics.median(times), 2)
    return figures


@contextmanager
def postgres_server(*options: str) -> Iterator[str]:
    """URL of a PostgreSQL server of our own, on a free loopback port, in a temporary folder.

    Raises UsageError where its programs or its driver are not installed.
    """
    if find_spec("psycopg") is None:
        raise UsageError("There is no psycopg; install the `postgres` extra.")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("postgres") or "/none").parent]
    programs = found[-1]
    if not (programs / "initdb").exists():
        raise UsageError("There are no PostgreSQL server programs on this machine.")
    folder = Path(tempfile.mkdtemp(prefix="unish-postgres-"))
    user = None
    if os.getuid() == 0:  # the server refuses to run as root
        user = "nobody"
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = folder / "data"
    try:
        make = [str(programs / "initdb"), "-D", str(data), "-U", "unish", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(make, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        serve = [str(programs / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
        server = subprocess.Popen([*serve, *options], user=user, cwd=folder, stderr=subprocess.DEVNULL)
        try:
            url = f"postgresql://unish@127.0.0.1:{port}/postgres"
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and server.poll() is None:
                try:
                    with patience(0.1):
                        Catalog(url)
                    break
                except OutageError:
                    time.sleep(0.1)
            yield url
        finally:
            server.send_signal(signal.SIGINT)  # "fast": ends without waiting for clients
            server.wait(timeout=60)
    finally:
        shutil.rmtree(folder)


Write = Callable[[str, list[str], list[Row]], None]


@contextmanager
def _sqlite_writer(url: str) -> Iterator[Write]:
    path = sa.make_url(url).database
    assert path is not None
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for pragma in ("synchronous=OFF", "journal_mode=OFF", "cache_size=-2000000", "foreign_keys=OFF"):
            connection.execute(f"PRAGMA {pragma}")

        def write(table: str, columns: list[str], made: list[Row]) -> None:
            marks = ", ".join("?" * len(columns))
            connection.execute("BEGIN")
            connection.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", made)
            connection.execute("COMMIT")

        yield write
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


@contextmanager
def _postgres_writer(url: str) -> Iterator[Write]:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")  # no look-up of foreign keys, row by row

        def write(table: str, columns: list[str], made: list[Row]) -> None:
            with (
                connection.cursor() as cursor,
                cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy,
            ):
                for row in made:
                    copy.write_row(row)

        yield write
        connection.execute("VACUUM (ANALYZE)")  # what a server does by itself within a minute or so


def _criteria_json(judged: Verdict) -> str:
    from dataclasses import asdict

    return json.dumps([asdict(result) for result in judged.criteria], sort_keys=True, separators=(",", ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="Where the SQLite file is made, and kept; else a temporary one.")
    parser.add_argument("--only", choices=["sqlite", "postgresql"], help="One kind of database.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "catalog.json")
    options = parser.parse_args()
    figures: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    postgres = None
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )

    def run(kind: str, url: str) -> None:
        with bar:
            task = bar.add_task(f"{kind}: clips made", total=options.clips)
            start = time.perf_counter()
            catalog = fill(url, options.clips, lambda done: bar.update(task, completed=done))
            seconds[kind] = round(time.perf_counter() - start, 1)
        figures[kind] = measure(catalog, options.clips, options.repeats)

    if options.only != "postgresql":
        with tempfile.TemporaryDirectory(prefix="unish-catalog-") as temporary:
            folder = options.folder or Path(temporary)
            run("sqlite", f"sqlite:///{folder.absolute() / 'catalog.sqlite'}")
    if options.only != "sqlite":
        try:
            with postgres_server() as url:
                database = Catalog(url)._database
                postgres = database.run(lambda c: c.exec_driver_sql("SHOW server_version").scalar())
                run("postgresql", url)
        except UsageError as error:
            print(f"PostgreSQL is left out: {error}")
    results = {
        "clips": options.clips,
        "repeats": options.repeats,
        "hardware": hardware("sqlalchemy") | {"sqlite": sqlite3.sqlite_version, "postgresql": postgres},
        "seconds_to_generate": seconds,
        "median_ms": figures,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{'milliseconds':34}" + "".join(f"{kind:>12}" for kind in figures))
    for name in next(iter(figures.values()), {}):
        print(f"{name:34}" + "".join(f"{of_kind[name]:12.2f}" for of_kind in figures.values()))


if __name__ == "__main__":
    main()
