"""The records of the catalog, and how each is read from a row of its table."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from curation.failures import FailureCode
from curation.records import ClipRef, CriterionResult, Verdict, VideoFile

Kind = Literal["full", "keyframes"]


@dataclass(frozen=True, slots=True)
class StoredVideo:
    """A downloaded video. `path` is relative to the work folder; `present` is False once the file was evicted."""

    video_key: str
    path: str
    sha256: str
    size_bytes: int
    codec: str
    width: int
    height: int
    frames: int
    duration_s: float
    downloaded_at: float
    present: bool

    def file(self, root: Path) -> VideoFile:
        """The file itself, below work folder `root`."""
        same = {field.name: getattr(self, field.name) for field in fields(VideoFile)}
        return VideoFile(**same | {"path": root / self.path})


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt of one stage on one clip; `code` is None for a success. `started_at` is Unix time.

    `message` must be safe to store: no title, name, address or path. The catalog fills in `worker` and `transient`; a
    failure is transient if a later attempt may succeed without any intervention.
    """

    clip_id: str
    stage: str
    code: FailureCode | None = None
    message: str = ""
    started_at: float = 0.0
    seconds: float = 0.0
    worker: str = ""
    transient: bool = False


@dataclass(frozen=True, slots=True)
class ObservationFile:
    """The file of a clip's measurements: `path` relative to the work folder; of a full pass, or of key frames only."""

    clip_id: str
    kind: Kind
    path: str
    sha256: str
    provenance_hash: str
    observed_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Output:
    """A clip in the data set of this provenance, and its number of frames. The index knows its shard."""

    clip_id: str
    provenance_hash: str
    frames: int


@dataclass(frozen=True, slots=True)
class Known:
    """What the catalog knows about one clip that decides its next step, under one policy and for one data set.

    failures: for each stage whose last attempt failed, that attempt.
    """

    video: StoredVideo | None = None
    observation: ObservationFile | None = None
    verdict: Verdict | None = None
    output: Output | None = None
    failures: tuple[Attempt, ...] = ()


@dataclass(frozen=True, slots=True)
class ClipHistory:
    """Everything known about one clip, attempts oldest first."""

    ref: ClipRef
    video: StoredVideo | None
    attempts: tuple[Attempt, ...]
    observation: ObservationFile | None
    verdicts: tuple[Verdict, ...]
    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What to delete from disk after videos were forgotten; all paths are relative to the work folder.

    files: to delete. clip_ids: to remove from every data set and from all other derived files. scrubbed: False if a
    reader kept the deleted bytes in the database file; forgetting again (the same or other clips) scrubs again.
    """

    video_keys: tuple[str, ...]
    clip_ids: tuple[str, ...]
    files: tuple[str, ...]
    scrubbed: bool


def ref_of(row: sa.Row[Any]) -> ClipRef:
    return ClipRef(row.platform, row.video_id, row.start_us, row.end_us, row.split)


def video_of(row: sa.Row[Any]) -> StoredVideo:
    fields = {name: value for name, value in row._mapping.items() if name != "clips"}
    return StoredVideo(**fields)


def attempt_of(row: sa.Row[Any]) -> Attempt:
    code = None if row.code is None else FailureCode(row.code)
    return Attempt(row.clip_id, row.stage, code, row.message, row.started_at, row.seconds, row.worker, row.transient)


def output_of(row: sa.Row[Any]) -> Output:
    fields = {name: value for name, value in row._mapping.items() if name != "written_at"}
    return Output(**fields)


def verdict_of(row: sa.Row[Any]) -> Verdict:
    criteria = tuple(
        CriterionResult(item["criterion"], item["outcome"], tuple(item["reasons"]), item["measured"])
        for item in row.criteria
    )
    return Verdict(row.clip_id, row.policy_name, row.policy_hash, row.decision, criteria)


def criterion_json(result: CriterionResult) -> dict[str, Any]:
    measured = {name: float(value) for name, value in result.measured.items() if math.isfinite(value)}
    return {
        "criterion": result.criterion,
        "outcome": result.outcome,
        "reasons": list(result.reasons),
        "measured": measured,
    }
