"""What happened to each clip: the only memory of a run. A run can be killed at any moment, resumed and inspected.

SQLite in a work folder, or PostgreSQL by URL, with the same schema; any number of processes write at once.

Never stored: a title, an uploader, a web address, an absolute path, a host name, or the messages of external tools.
Never done here: judging, deleting a file, or deciding what to do next.

Records of clips that the catalog does not hold (never registered, or forgotten while a worker was busy with them) are
not written; every `record_*` returns the ids it left out.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import sqlalchemy as sa

from curation.catalog.database import Database, chunks
from curation.catalog.funnel import Funnel, FunnelCounter
from curation.catalog.leases import Leases
from curation.catalog.rows import (
    Attempt,
    ClipHistory,
    Forgotten,
    Known,
    ObservationFile,
    Output,
    StoredVideo,
    attempt_of,
    criterion_json,
    output_of,
    ref_of,
    verdict_of,
    video_of,
)
from curation.catalog.tables import (
    PRESENT,
    UNRESOLVED,
    attempts,
    clips,
    forgotten,
    index_versions,
    observations,
    outputs,
    provenance,
    verdicts,
    videos,
)
from curation.catalog.turns import Turns
from curation.failures import TRIES, FailureCode, Trait, UsageError
from curation.files import sha256_json
from curation.records import ClipRef, Verdict, VideoFile

_TRY = ("clip_id", "stage", "worker", "started_at", "seconds", "code")  # together unique to one attempt


def forgotten_digest(platform: str, video_id: str) -> str:
    """The hash kept of a forgotten video: SHA-256 of platform, newline, video id."""
    return hashlib.sha256(f"{platform}\n{video_id}".encode()).hexdigest()


def forgotten_clip_digest(clip_id: str) -> str:
    """The hash kept of each of its clips that the catalog held: SHA-256 of "clip", newline, clip id."""
    return hashlib.sha256(f"clip\n{clip_id}".encode()).hexdigest()


class Catalog(Leases, Turns):
    """The catalog at an SQLAlchemy URL, `sqlite:///file` or `postgresql://...`; created or migrated when opened.

    Safe to share between threads, to pickle and to use after a fork. Arguments that name clips accept ClipRefs and
    clip ids. Raises UsageError if the database cannot be opened or written, or is of a newer version.

    Its methods in order: what a run writes, what a run reads, and what is forgotten. Each is one transaction per 500
    clips; leases and turns are in their own modules.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._database = Database(url)

    def __reduce__(self) -> tuple[type[Catalog], tuple[str]]:
        return Catalog, (self.url,)

    # what a run writes

    def register(self, refs: Iterable[ClipRef]) -> frozenset[str]:
        """Add clips, or update a changed split; return the ids of clips refused because they were forgotten."""
        refused: set[str] = set()
        unique = {ref.clip_id: ref for ref in refs}
        for chunk in chunks(sorted(unique)):
            refused |= self._database.run(partial(self._register, [unique[id_] for id_ in chunk]), write=True)
        return frozenset(refused)

    def _register(self, refs: Sequence[ClipRef], connection: sa.Connection) -> set[str]:
        digests = {ref.clip_id: forgotten_digest(ref.platform, ref.video_id) for ref in refs}
        self._lock_forgotten(connection, "SHARE")
        self._database.advisory_lock(connection, "clips of a video")
        asked = forgotten.c.digest.in_(sorted(set(digests.values())))
        gone = set(connection.scalars(sa.select(forgotten.c.digest).where(asked)))
        now = time.time()
        rows = [
            asdict(ref) | {"clip_id": ref.clip_id, "video_key": ref.video_key, "added_at": now}
            for ref in refs
            if digests[ref.clip_id] not in gone
        ]
        self._database.upsert(connection, clips, rows, update=("split",))
        self._count_clips(connection, {row["video_key"] for row in rows})
        return {id_ for id_, digest in digests.items() if digest in gone}

    def record_video(self, video_key: str, file: VideoFile, path: str | PurePosixPath) -> bool:
        """Record a verified download, `path` relative to the work folder; False if no clip of that video is held."""
        now = {"downloaded_at": time.time(), "present": True}
        row = asdict(file) | {"video_key": video_key, "path": _relative(path)} | now

        def work(connection: sa.Connection) -> bool:
            self._database.advisory_lock(connection, "clips of a video", shared=True)
            held = connection.execute(_keep(sa.select(clips.c.clip_id).where(clips.c.video_key == video_key).limit(1)))
            if held.first() is None:
                return False
            self._database.upsert(connection, videos, [row])
            self._count_clips(connection, {video_key})
            return True

        return self._database.run(work, write=True)

    def record_evicted(self, video_keys: Iterable[str]) -> None:
        """Record that the files of these videos were deleted to make room."""
        for chunk in chunks(sorted(set(video_keys))):
            gone = sa.update(videos).where(videos.c.video_key.in_(chunk)).values(present=False)
            self._database.run(partial(_execute, gone), write=True)

    def record_attempt(self, attempt: Attempt) -> frozenset[str]:
        """Add one attempt to the history; see `record_attempts`."""
        return self.record_attempts([attempt])

    def record_attempts(self, tries: Iterable[Attempt]) -> frozenset[str]:
        """Add attempts to the history, in order. Recording the same attempt twice makes two.

        A failure with Trait.THRICE is transient until it is the clip's TRIES-th in that stage since the stage last
        succeeded or last failed permanently.
        """
        written: set[tuple[Any, ...]] = set()  # by an earlier call of `write` whose commit got no answer

        def write(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
            if _try_key(rows[0]) in written:  # a transaction writes all of its rows or none
                same = [attempts.c[name].is_not_distinct_from(rows[0][name]) for name in _TRY]
                if connection.scalar(sa.select(sa.func.count()).where(*same)):
                    return
            written.update(map(_try_key, rows))
            last = {(row["stage"], row["clip_id"]): row for row in rows}
            for stage in {stage for stage, _ in last}:
                tried = attempts.c.clip_id.in_([clip_id for other, clip_id in last if other == stage])
                # not UNRESOLVED: for a few clips SQLite would then search all failures of the stage
                earlier = sa.update(attempts).where(attempts.c.stage == stage, tried, attempts.c.unresolved)
                connection.execute(earlier.values(unresolved=False))
            for row in rows:
                row["unresolved"] = row["code"] is not None and row is last[row["stage"], row["clip_id"]]
            _count_repeated(connection, rows)
            connection.execute(sa.insert(attempts), rows)

        worker = _worker(os.getpid())
        rows = [asdict(a) | {"transient": bool(a.code and a.code.transient), "worker": worker} for a in tries]
        return self._record(rows, write)

    def record_observations(self, files: Iterable[ObservationFile]) -> frozenset[str]:
        """Record measurements in place of earlier ones; delete verdicts on other measurements of the same clip."""

        def write(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
            self._database.upsert(connection, observations, rows)
            current = sa.select(observations.c.sha256).where(observations.c.clip_id == verdicts.c.clip_id)
            stale = verdicts.c.observation_sha256 != current.scalar_subquery()
            held = verdicts.c.clip_id.in_([row["clip_id"] for row in rows])
            connection.execute(sa.delete(verdicts).where(held, stale))

        now = time.time()
        rows = [asdict(f) | {"path": _relative(f.path), "observed_at": f.observed_at or now} for f in files]
        return self._record(_last(rows, "clip_id"), write)

    def record_verdicts(self, judged: Iterable[Verdict], observation_sha256: Mapping[str, str]) -> frozenset[str]:
        """Record verdicts, each on the measurements whose hash `observation_sha256` gives by clip id.

        A verdict on measurements that are not the clip's current ones is left out, like one on an unknown clip.
        Measured values that are not finite are not stored, because JSON has no such number.
        """
        outdated: set[str] = set()

        def write(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
            of_rows = observations.c.clip_id.in_(sorted({row["clip_id"] for row in rows}))
            asked = sa.select(observations.c.clip_id, observations.c.sha256).where(of_rows)
            held = connection.execute(_keep(asked.order_by(observations.c.clip_id)))
            current = {row.clip_id: row.sha256 for row in held}
            outdated.difference_update(row["clip_id"] for row in rows)
            fresh = [row for row in rows if row["observation_sha256"] == current.get(row["clip_id"])]
            outdated.update({row["clip_id"] for row in rows} - {row["clip_id"] for row in fresh})
            self._database.upsert(connection, verdicts, fresh)

        now = time.time()
        rows = [
            {
                "clip_id": verdict.clip_id,
                "policy_hash": verdict.policy_hash,
                "policy_name": verdict.policy_name,
                "decision": verdict.decision,
                "first_reason": verdict.first_reason,
                "criteria": [criterion_json(result) for result in verdict.criteria],
                "observation_sha256": observation_sha256[verdict.clip_id],
                "judged_at": now,
            }
            for verdict in judged
        ]
        return self._record(_last(rows, "clip_id", "policy_hash"), write) | outdated

    def record_outputs(self, written: Iterable[Output]) -> frozenset[str]:
        """Record clips that are in finished shards; a later record of the same clip and provenance replaces it."""
        now = time.time()
        rows = [asdict(output) | {"written_at": now} for output in written]
        rows = _last(rows, "clip_id", "provenance_hash")
        return self._record(rows, lambda connection, held: self._database.upsert(connection, outputs, held))

    def drop_outputs(self, of: Iterable[ClipRef | str], provenance_hash: str) -> None:
        """Record that these clips are not in the shards of this provenance."""
        for chunk in chunks(sorted(set(_ids(of)))):
            here = outputs.c.clip_id.in_(chunk) & (outputs.c.provenance_hash == provenance_hash)
            self._database.run(partial(sa.Connection.execute, statement=sa.delete(outputs).where(here)), write=True)

    def next_index_version(self, name: str, newest: int) -> int:
        """A number greater than `newest` for a version of this data set's index; never given twice."""
        last = index_versions.c.version
        insert = self._database.insert(index_versions).values(name=name, version=newest + 1)
        counted = insert.on_conflict_do_update(
            index_elements=["name"], set_={"version": sa.case((last > newest, last), else_=newest) + 1}
        )
        return self._database.run(lambda connection: int(connection.scalars(counted.returning(last)).one()), write=True)

    def put_provenance(self, value: Mapping[str, Any]) -> str:
        """Store a JSON object of tools, models and parameters; return its `sha256_json`.

        Raises ValueError if a string in it is an absolute path or a web address: provenance holds names and hashes.
        """
        _refuse_places(value)
        digest = sha256_json(value)
        rows = [{"hash": digest, "value": value}]
        self._database.run(lambda connection: self._database.upsert(connection, provenance, rows, ()), write=True)
        return digest

    # what a run reads

    def refs(self, of: Iterable[ClipRef | str]) -> dict[str, ClipRef]:
        """Those of these clips that are registered, by id."""
        return {row.clip_id: ref_of(row) for row in self._rows(clips, clips.c.clip_id, _ids(of))}

    def videos(self, video_keys: Iterable[str]) -> dict[str, StoredVideo]:
        """Those of these videos that were downloaded, by key, evicted ones included."""
        return {row.video_key: video_of(row) for row in self._rows(videos, videos.c.video_key, video_keys)}

    def known(self, of: Iterable[ClipRef], policy_hash: str, provenance_hash: str) -> dict[str, Known]:
        """Everything that decides the next step of these clips, by id, read in one transaction."""
        refs = {ref.clip_id: ref for ref in of}

        def work(connection: sa.Connection) -> dict[str, Known]:
            found: dict[str, Known] = {}
            for chunk in chunks(sorted(refs)):

                def rows(table: sa.Table, *conditions: sa.ColumnElement[bool]) -> dict[str, sa.Row[Any]]:
                    asked = sa.select(table).where(table.c.clip_id.in_(chunk), *conditions)  # noqa: B023 - used at once
                    return {row.clip_id: row for row in connection.execute(asked)}

                keys = sorted({refs[clip_id].video_key for clip_id in chunk})
                of_chunk = sa.select(videos).where(videos.c.video_key.in_(keys))
                stored = {row.video_key: video_of(row) for row in connection.execute(of_chunk)}
                measured = rows(observations)
                judged = rows(verdicts, verdicts.c.policy_hash == policy_hash)
                written = rows(outputs, outputs.c.provenance_hash == provenance_hash)
                failed: dict[str, list[Attempt]] = {}
                of_chunk = (
                    sa.select(attempts).where(attempts.c.clip_id.in_(chunk), UNRESOLVED).order_by(attempts.c.stage)
                )
                for row in connection.execute(of_chunk):
                    failed.setdefault(row.clip_id, []).append(attempt_of(row))
                for clip_id in chunk:
                    found[clip_id] = Known(
                        video=stored.get(refs[clip_id].video_key),
                        observation=ObservationFile(**measured[clip_id]._mapping) if clip_id in measured else None,
                        verdict=verdict_of(judged[clip_id]) if clip_id in judged else None,
                        output=output_of(written[clip_id]) if clip_id in written else None,
                        failures=tuple(failed.get(clip_id, ())),
                    )
            return found

        return self._database.run(work)

    def finished_videos(self, policy_hash: str, provenance_hash: str | None, limit: int) -> list[StoredVideo]:
        """At most `limit` videos that are present but no longer needed, the oldest download first.

        Each of their clips is rejected, undecided after a full measurement, accepted and written (with this provenance,
        or with any for None), or failed permanently. After a transient failure the next attempt needs the video.
        """

        def found(table: sa.Table, beside: sa.Table, *conditions: sa.ColumnElement[bool]) -> sa.Exists:
            return sa.exists().where(table.c.clip_id == beside.c.clip_id, *conditions)

        of_run = [] if provenance_hash is None else [outputs.c.provenance_hash == provenance_hash]
        decision = verdicts.c.decision
        enough = sa.or_(
            decision == "reject",
            (decision == "unknown") & found(observations, verdicts, observations.c.kind == "full"),
            (decision == "accept") & found(outputs, verdicts, *of_run),
        )
        finished = sa.or_(
            found(verdicts, clips, verdicts.c.policy_hash == policy_hash, enough),
            found(attempts, clips, UNRESOLVED, attempts.c.transient.is_(sa.false())),
        )
        wanted = sa.exists().where(clips.c.video_key == videos.c.video_key, ~finished)
        asked = sa.select(videos).where(PRESENT, ~wanted).order_by(videos.c.downloaded_at, videos.c.video_key)
        return [video_of(row) for row in self._all([asked.limit(limit)])]

    def present_bytes(self) -> int:
        """Total size in bytes of the videos that are present."""
        asked = sa.select(sa.func.sum(videos.c.size_bytes)).where(PRESENT)
        return int(self._database.run(lambda connection: connection.scalar(asked)) or 0)

    def failures(self, of: Iterable[ClipRef | str] | None = None, *, code: FailureCode | None = None) -> list[Attempt]:
        """The last attempt of each clip and stage, if it failed; of all clips or these, with any code or one."""
        conditions = [UNRESOLVED, *([] if code is None else [attempts.c.code == code.value])]
        asked = [
            sa.select(attempts).where(*conditions, *([] if subset is None else [attempts.c.clip_id.in_(subset)]))
            for subset in _subsets(of)
        ]
        return sorted(map(attempt_of, self._all(asked)), key=lambda attempt: (attempt.clip_id, attempt.stage))

    def observations(self, of: Iterable[ClipRef | str]) -> dict[str, ObservationFile]:
        """The measurements of these clips, by id."""
        found = self._rows(observations, observations.c.clip_id, _ids(of))
        return {row.clip_id: ObservationFile(**row._mapping) for row in found}

    def observed(self, page: int = 1000) -> Iterator[list[ObservationFile]]:
        """Pages of all measured clips in order of their ids, for judging a whole catalog again."""
        after = ""
        while True:
            asked = sa.select(observations).where(observations.c.clip_id > after).order_by(observations.c.clip_id)
            rows = [ObservationFile(**row._mapping) for row in self._all([asked.limit(page)])]
            if not rows:
                return
            yield rows
            after = rows[-1].clip_id

    def verdicts(self, of: Iterable[ClipRef | str], policy_hash: str) -> dict[str, Verdict]:
        """The policy's verdicts on these clips' current measurements, by id."""
        found = self._rows(verdicts, verdicts.c.clip_id, _ids(of), verdicts.c.policy_hash == policy_hash)
        return {row.clip_id: verdict_of(row) for row in found}

    def outputs(self, of: Iterable[ClipRef | str], provenance_hash: str) -> dict[str, Output]:
        """The records of these clips in shards of this provenance, by id."""
        found = self._rows(outputs, outputs.c.clip_id, _ids(of), outputs.c.provenance_hash == provenance_hash)
        return {row.clip_id: output_of(row) for row in found}

    def clips_of_dataset(self, provenance_hash: str) -> frozenset[str]:
        """The ids of all clips that are in shards of this provenance."""
        asked = sa.select(outputs.c.clip_id).where(outputs.c.provenance_hash == provenance_hash)
        return self._database.run(lambda connection: frozenset(connection.scalars(asked)))

    def forgotten_clips(self, of: Iterable[ClipRef | str]) -> frozenset[str]:
        """Those of these clips that were forgotten while the catalog held them."""
        digests = {forgotten_clip_digest(clip_id): clip_id for clip_id in _ids(of)}
        gone = self._rows(forgotten, forgotten.c.digest, digests)
        return frozenset(digests[row.digest] for row in gone)

    def forgotten_videos(self, video_keys: Iterable[str]) -> frozenset[str]:
        """Those of these videos that were forgotten: a video's key is the start of its digest."""
        keys = frozenset(video_keys)
        gone: set[str] = set()
        for chunk in chunks(sorted(keys)):
            start = sa.func.substr(forgotten.c.digest, 1, 16)
            asked = sa.select(start).where(start.in_(chunk))
            gone.update(row[0] for row in self._database.run(partial(_all, statement=asked)))
        return keys & gone

    def provenance(self, digest: str) -> dict[str, Any] | None:
        """The object stored under this hash."""
        asked = sa.select(provenance.c.value).where(provenance.c.hash == digest)
        return self._database.run(lambda connection: connection.scalar(asked))

    def funnel(
        self, of: Iterable[ClipRef | str] | None, policy_hash: str, provenance_hash: str | None = None
    ) -> Funnel:
        """How far all clips, or these, got under a policy; in shards of one provenance, or of any for None."""
        subsets = list(_subsets(of))

        def work(connection: sa.Connection) -> Funnel:
            tally = FunnelCounter(policy_hash, provenance_hash)
            for subset in subsets:
                tally.add(connection, subset)
            return tally.counts()

        return self._database.run(work)

    def clip(self, prefix: str) -> ClipHistory:
        """Everything about the clip whose id starts with `prefix`; UsageError if no clip does, or several do."""
        if not re.fullmatch("[0-9a-f]{1,16}", prefix):
            raise UsageError(f"{prefix!r} is not a clip id; give its 16 hexadecimal digits, or the first few of them.")

        def work(connection: sa.Connection) -> ClipHistory:
            starts = (clips.c.clip_id >= prefix) & (clips.c.clip_id < prefix + "g")
            found = connection.execute(sa.select(clips).where(starts).order_by(clips.c.clip_id).limit(4)).all()
            if not found:
                raise UsageError(f"No clip starts with {prefix}; check the id, or run its manifest first.")
            if len(found) > 1:
                some = ", ".join(row.clip_id for row in found)
                raise UsageError(f"Several clips start with {prefix} ({some}...); give more digits.")
            row = found[0]

            def rows(table: sa.Table, order: str) -> Sequence[sa.Row[Any]]:
                of_clip = sa.select(table).where(table.c.clip_id == row.clip_id)
                return connection.execute(of_clip.order_by(table.c[order])).all()

            video = connection.execute(sa.select(videos).where(videos.c.video_key == row.video_key)).first()
            observation = rows(observations, "clip_id")
            return ClipHistory(
                ref=ref_of(row),
                video=video_of(video) if video else None,
                attempts=tuple(map(attempt_of, rows(attempts, "id"))),
                observation=ObservationFile(**observation[0]._mapping) if observation else None,
                verdicts=tuple(map(verdict_of, rows(verdicts, "judged_at"))),
                outputs=tuple(map(output_of, rows(outputs, "written_at"))),
            )

        return self._database.run(work)

    # what is deleted

    def forget(self, targets: Iterable[ClipRef | str]) -> Forgotten:
        """Delete every trace of the videos named by ClipRef, video key or clip id, and refuse them from now on.

        All clips of a video are forgotten with it. Only `forgotten_digest`, also of a ClipRef that was never
        registered, and `forgotten_clip_digest` stay; a key or id that the catalog does not hold leaves nothing. The
        database file is rewritten so that it keeps no deleted byte; backups are out of reach.
        """
        asked = list(targets)
        named = {(target.platform, target.video_id) for target in asked if isinstance(target, ClipRef)}
        clip_ids: set[str] = set()
        files: set[str] = set()
        video_keys: set[str] = set()

        def work(connection: sa.Connection) -> None:
            # when called again after a commit without an answer, it finds nothing: keep what it found before
            self._lock_forgotten(connection, "ROW EXCLUSIVE")
            for chunk in chunks(sorted({target for target in asked if isinstance(target, str)})):
                either = clips.c.clip_id.in_(chunk) | clips.c.video_key.in_(chunk)
                found = connection.execute(sa.select(clips.c.platform, clips.c.video_id).where(either).distinct())
                named.update((platform, video_id) for platform, video_id in found)
            now = time.time()
            digests = sorted(forgotten_digest(*name) for name in named)
            stones = [{"digest": digest, "forgotten_at": now} for digest in digests]
            self._database.upsert(connection, forgotten, stones, update=())
            video_keys.update(ClipRef(*name).video_key for name in named)
            for chunk in chunks(sorted(video_keys)):
                of_video = clips.c.video_key.in_(chunk)
                going = sa.select(clips.c.clip_id).where(of_video).order_by(clips.c.clip_id)
                found_ids = list(connection.scalars(going.with_for_update()))
                clip_ids.update(found_ids)
                stones = [{"digest": forgotten_clip_digest(clip_id), "forgotten_at": now} for clip_id in found_ids]
                self._database.upsert(connection, forgotten, stones, update=())
                of_clip = sa.select(clips.c.clip_id).where(of_video)
                files.update(connection.scalars(sa.select(videos.c.path).where(videos.c.video_key.in_(chunk))))
                measured = sa.select(observations.c.path).where(observations.c.clip_id.in_(of_clip))
                files.update(connection.scalars(measured))
                connection.execute(sa.delete(videos).where(videos.c.video_key.in_(chunk)))
                connection.execute(sa.delete(clips).where(of_video))  # the delete cascades to all other tables

        self._database.run(work, write=True)
        return Forgotten(
            video_keys=tuple(sorted(video_keys)),
            clip_ids=tuple(sorted(clip_ids)),
            files=tuple(sorted(files)),
            scrubbed=self._database.scrub(),
        )

    # internals

    def _rows(
        self, table: sa.Table, column: sa.Column[str], keys: Iterable[str], *conditions: sa.ColumnElement[bool]
    ) -> list[sa.Row[Any]]:
        return self._all(
            [sa.select(table).where(column.in_(chunk), *conditions) for chunk in chunks(sorted(set(keys)))]
        )

    def _all(self, asked: Sequence[sa.Select[Any]]) -> list[sa.Row[Any]]:
        """The rows of several queries, run in one transaction."""
        return self._database.run(
            lambda connection: [row for question in asked for row in connection.execute(question)]
        )

    def _record(
        self, rows: Iterable[dict[str, Any]], write: Callable[[sa.Connection, list[dict[str, Any]]], object]
    ) -> frozenset[str]:
        """Write rows of clips that the catalog holds; return the ids of the others.

        Clips are locked in order of their ids until the transaction ends: a clip that is being forgotten cannot come
        back, and two writers cannot deadlock.
        """
        left_out: set[str] = set()
        for chunk in chunks(sorted(rows, key=lambda row: row["clip_id"])):
            left_out |= self._database.run(partial(self._record_chunk, chunk, write), write=True)
        return frozenset(left_out)

    def _record_chunk(
        self,
        rows: Sequence[dict[str, Any]],
        write: Callable[[sa.Connection, list[dict[str, Any]]], object],
        connection: sa.Connection,
    ) -> set[str]:
        ids = {row["clip_id"] for row in rows}
        asked = sa.select(clips.c.clip_id).where(clips.c.clip_id.in_(sorted(ids))).order_by(clips.c.clip_id)
        held = set(connection.scalars(asked.with_for_update(key_share=True)))
        if held:
            write(connection, [row for row in rows if row["clip_id"] in held])
        return ids - held

    def _count_clips(self, connection: sa.Connection, video_keys: set[str]) -> None:
        """Update the clip count in each downloaded video's row, so that the funnel counts all clips quickly."""
        number = sa.select(sa.func.count()).where(clips.c.video_key == videos.c.video_key).scalar_subquery()
        these = videos.c.video_key.in_(sorted(video_keys))
        connection.execute(sa.update(videos).where(these, videos.c.clips != number).values(clips=number))

    def _lock_forgotten(self, connection: sa.Connection, mode: str) -> None:
        """Prevent registering and forgetting at the same time; SQLite has only one writer anyway."""
        if not self._database.is_sqlite:
            connection.exec_driver_sql(f"LOCK TABLE forgotten IN {mode} MODE")


def _execute(statement: sa.Update, connection: sa.Connection) -> None:
    connection.execute(statement)


def _try_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _TRY)


def _all(connection: sa.Connection, statement: sa.Select[Any]) -> Sequence[sa.Row[Any]]:
    return connection.execute(statement).all()


def _keep(statement: sa.Select[Any]) -> sa.Select[Any]:
    """Lock the selected rows against deletion until the transaction ends; no effect in SQLite."""
    return statement.with_for_update(read=True)


def _subsets(of: Iterable[ClipRef | str] | None) -> Iterable[Sequence[str] | None]:
    """Clip ids in chunks, each id once; for all clips the single chunk None."""
    return [None] if of is None else chunks(sorted(set(_ids(of))))


def _ids(of: Iterable[ClipRef | str]) -> Iterator[str]:
    return (item if isinstance(item, str) else item.clip_id for item in of)


def _last(rows: Iterable[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The last of all rows with the same key, so that a batch has the same effect as its rows one by one."""
    return list({tuple(row[key] for key in keys): row for row in rows}.values())


def _count_repeated(connection: sa.Connection, rows: list[dict[str, Any]]) -> None:
    """Make a failure that is transient only a few times in a row permanent at its TRIES-th; the count starts again."""
    repeatable = FailureCode.having(Trait.THRICE)
    repeated = {row["clip_id"] for row in rows if row["code"] in repeatable}
    if not repeated:
        return
    asked = sa.select(attempts.c.clip_id, attempts.c.stage, attempts.c.code, attempts.c.transient)
    earlier = connection.execute(asked.where(attempts.c.clip_id.in_(sorted(repeated))).order_by(attempts.c.id))
    counts: Counter[tuple[str, str, str]] = Counter()

    def count(clip_id: str, stage: str, code: str | None, transient: bool) -> int:
        if code is None or not transient:
            for each in repeatable:
                del counts[clip_id, stage, each.value]
            return 0
        counts[clip_id, stage, code] += 1
        return counts[clip_id, stage, code]

    for found in earlier:
        count(*found)
    for row in rows:
        tries = count(row["clip_id"], row["stage"], row["code"], row["transient"])
        if row["code"] in repeatable and tries >= TRIES:
            row["transient"] = False
            count(row["clip_id"], row["stage"], row["code"], False)


def _relative(path: str | PurePosixPath) -> str:
    checked = PurePosixPath(path)
    if checked.is_absolute() or ".." in checked.parts or not checked.parts:
        raise ValueError("the catalog stores only paths relative to the work folder")
    return str(checked)


def _refuse_places(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_places(key)
            _refuse_places(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_places(item)
    elif isinstance(value, str) and (
        "://" in value or PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    ):
        raise ValueError("provenance names tools and models by name and hash, never by absolute path or address")


@cache
def _worker(pid: int) -> str:
    """A name for this process that reveals nothing about its host; cached by process id, because a fork copies it."""
    return f"{secrets.token_hex(4)}/{pid}"
