"""How many clips got how far: the counting queries, fast even with a million clips.

For all clips the database counts, with indexes that cover the queries; for a chunk of clips this module counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from curation.catalog.tables import UNRESOLVED, attempts, clips, observations, outputs, verdicts, videos


@dataclass(frozen=True, slots=True)
class Funnel:
    """How many clips got how far.

    failed: (stage, code) -> clips whose last attempt at that stage failed. rejected_by, unknown_by: first reason ->
    clips. datasets: provenance hash -> sharded clips. A run adds: shards, the files that hold its clips; folder, where
    they are, for display; postponed, blocked platform -> seconds, from the time of counting, until its breaker lapses.
    """

    clips: int
    downloaded: int
    observed: int
    accepted: int
    rejected: int
    unknown: int
    sharded: int
    failed: dict[tuple[str, str], int]
    rejected_by: dict[str, int]
    unknown_by: dict[str, int]
    datasets: dict[str, int]
    shards: tuple[str, ...] = ()
    folder: str = ""
    postponed: dict[str, float] = field(default_factory=dict)

    @property
    def failed_by_code(self) -> dict[str, int]:
        """Failure code -> clips, over all stages; at most the number of all clips."""
        summed: Counter[str] = Counter()
        for (_, code), number in self.failed.items():
            summed[code] += number
        return {code: min(number, self.clips) for code, number in summed.items()}

    @property
    def pending(self) -> int:
        """Number of clips about which nothing is known yet."""
        return max(0, self.clips - self.observed - sum(self.failed_by_code.values()))

    def table(self) -> list[dict[str, Any]]:
        """Rows of stage, clips and share, for a table."""
        rows = [
            ("in the manifest", self.clips),
            ("video here or seen", self.downloaded),
            ("observed", self.observed),
            ("accepted", self.accepted),
            *((f"rejected: {reason}", clips) for reason, clips in sorted(self.rejected_by.items())),
            ("undecided", self.unknown),
            *((f"failed: {code}", clips) for code, clips in sorted(self.failed_by_code.items())),
            *([("not yet tried", self.pending)] if self.pending else []),
            ("in shards", self.sharded),
        ]
        total = max(self.clips, 1)
        return [{"stage": stage, "clips": clips, "share": f"{clips / total:.1%}"} for stage, clips in rows]


class FunnelCounter:
    """Counts all clips, or chunk after chunk, under a policy; in shards of one provenance, or of any for None."""

    def __init__(self, policy_hash: str, provenance_hash: str | None) -> None:
        self._policy = verdicts.c.policy_hash == policy_hash
        self._dataset = [] if provenance_hash is None else [outputs.c.provenance_hash == provenance_hash]
        self._total: Counter[str] = Counter()
        self._decisions: Counter[tuple[Any, ...]] = Counter()
        self._failed: Counter[tuple[Any, ...]] = Counter()
        self._datasets: Counter[tuple[Any, ...]] = Counter()

    def add(self, connection: sa.Connection, subset: Sequence[str] | None) -> None:
        """Count these clips, all of them new to this counter; None means all clips."""
        count = sa.func.count()
        if subset is None:
            downloaded = sa.select(sa.func.sum(videos.c.clips))
        else:
            fetched = clips.join(videos, clips.c.video_key == videos.c.video_key)
            downloaded = sa.select(count).select_from(fetched).where(*_within(clips, subset))
        for name, question in {
            "clips": sa.select(count).select_from(clips).where(*_within(clips, subset)),
            "downloaded": downloaded,
            "observed": sa.select(count).select_from(observations).where(*_within(observations, subset)),
        }.items():
            self._total[name] += int(connection.scalar(question) or 0)
        datasets = _grouped(connection, subset, outputs, ["provenance_hash"], *self._dataset)
        self._datasets += datasets
        if len(datasets) < 2:  # a clip is in one data set only once
            self._total["sharded"] += sum(datasets.values())
        else:
            each = sa.select(sa.func.count(outputs.c.clip_id.distinct())).where(*_within(outputs, subset))
            self._total["sharded"] += connection.scalar(each) or 0
        self._decisions += _grouped(connection, subset, verdicts, ["decision", "first_reason"], self._policy)
        self._failed += _grouped(connection, subset, attempts, ["stage", "code"], UNRESOLVED)

    def counts(self) -> Funnel:
        """The counts so far."""
        reasons: dict[str, dict[str, int]] = {"accept": {}, "reject": {}, "unknown": {}}
        for (decision, reason), number in self._decisions.items():
            reasons[decision][reason or ""] = number
        return Funnel(
            clips=self._total["clips"],
            downloaded=self._total["downloaded"],
            observed=self._total["observed"],
            accepted=sum(reasons["accept"].values()),
            rejected=sum(reasons["reject"].values()),
            unknown=sum(reasons["unknown"].values()),
            sharded=self._total["sharded"],
            failed={(stage, code): number for (stage, code), number in self._failed.items()},
            rejected_by=reasons["reject"],
            unknown_by=reasons["unknown"],
            datasets={dataset: number for (dataset,), number in self._datasets.items()},
        )


def _within(table: sa.Table, subset: Sequence[str] | None) -> list[sa.ColumnElement[bool]]:
    return [] if subset is None else [table.c.clip_id.in_(subset)]


def _grouped(
    connection: sa.Connection,
    subset: Sequence[str] | None,
    table: sa.Table,
    names: Sequence[str],
    *conditions: sa.ColumnElement[bool],
) -> Counter[tuple[Any, ...]]:
    """The number of rows for each combination of values in the named columns.

    A chunk is counted here: to group it, SQLite would scan the index in group order, which covers the whole catalog,
    for each chunk.
    """
    columns = [table.c[name] for name in names]
    if subset is None:
        grouped = sa.select(*columns, sa.func.count()).where(*conditions).group_by(*columns)
        return Counter({tuple(values): number for *values, number in connection.execute(grouped)})
    rows = connection.execute(sa.select(*columns).where(*conditions, *_within(table, subset)))
    return Counter(map(tuple, rows))
