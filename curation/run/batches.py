"""Batches of clips, and the report of a stage on a batch: plain data of the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from curation.files import sha256_json
from curation.records import ClipRef
from curation.settings import Settings

Progress = Callable[[int, int], None]


class StageStopped(BaseException):
    """Raised by a Progress to end a stage at its next clip. Not an Exception, because no clip has failed."""


@dataclass(frozen=True)
class Batch:
    """Clips that pass through the stages together: the unit of a task and of a shard.

    `batch_id` depends on the clips alone.
    """

    index: int
    refs: tuple[ClipRef, ...]
    batch_id: str


@dataclass(frozen=True)
class StageReport:
    """How many clips of a batch a stage handled, and how; `failed` maps a failure code to its number of clips.

    postponed: clips that wait for a blocked platform.
    """

    stage: str
    done: int = 0
    skipped: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    postponed: int = 0


def read_batches(refs: Sequence[ClipRef], settings: Settings) -> list[Batch]:
    """Split a manifest into batches, in its order, but with the clips of one video kept together."""
    by_video: dict[str, list[ClipRef]] = {}
    for ref in refs:
        by_video.setdefault(ref.video_key, []).append(ref)
    batches: list[Batch] = []
    current: list[ClipRef] = []

    def close() -> None:
        if current:
            batches.append(Batch(len(batches), tuple(current), sha256_json([ref.clip_id for ref in current])[:16]))
            current.clear()

    for clips in by_video.values():
        for start in range(0, len(clips), settings.batch_clips):
            part = clips[start : start + settings.batch_clips]
            if len(current) + len(part) > settings.batch_clips:
                close()
            current.extend(part)
    close()
    return batches
