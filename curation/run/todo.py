"""What is left to do for each clip: `next_step`, a pure function of the catalog's rows and the files found.

The catalog is read once for a batch (`Catalog.known`). Before a stage works, `clips_before` also checks the files that
this stage needs, because a file may be damaged or missing; for everything else the catalog decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from curation.catalog import Known
from curation.failures import FailureCode, Trait
from curation.judge.criteria import judge
from curation.judge.subject import part_taken
from curation.observe.observations import Observations
from curation.records import WHOLE, ClipRef, Decision, VideoFile
from curation.run.context import RunContext
from curation.run.dataset import in_sound_shards
from curation.run.files import frames_name, readable, videos_here

Stage = Literal["download", "observe", "judge", "teach"]
Step = Literal["download", "observe", "judge", "teach", "done", "given up"]


@dataclass(frozen=True, slots=True)
class Facts:
    """All facts that decide the next step of one clip.

    measured: measurements by this run's detector and sampling exist. undecided: they are of key frames only, and leave
    the policy undecided. verdict: the policy's decision on them. written: the clip is in a shard of this data set.
    video: the file exists. refetch: download it again anyway. frames: training frames exist, of the part of the
    picture that the policy takes. given_up: stages whose last attempt failed permanently.
    """

    measured: bool
    undecided: bool
    verdict: Decision | None
    written: bool
    video: bool
    refetch: bool
    frames: bool
    given_up: frozenset[str]


def next_step(clip: Facts) -> Step:
    """The next step of a clip. Doing it changes the facts, so the next call returns another step."""
    if not clip.measured or clip.undecided:
        step: Stage = "observe"
    elif clip.verdict is None:
        step = "judge"
    elif clip.verdict == "accept" and not clip.written:
        step = "teach"
    else:
        return "done"
    if step in clip.given_up:
        return "given up"
    needs_video = step == "observe" or (step == "teach" and not clip.frames)
    if not needs_video or (clip.video and not clip.refetch):
        return step
    return "given up" if clip.given_up & {"download", "observe", "teach"} else "download"


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip before a stage. video: its file, if it was looked for and exists."""

    ref: ClipRef
    known: Known
    video: VideoFile | None
    step: Step


def clips_before(context: RunContext, refs: Sequence[ClipRef], stage: Stage) -> list[Clip]:
    """These clips with the next step of each, as far as this stage depends on it.

    Checks their videos and measurements before download and observe, kept frames before download, and shards on this
    disk before download and teach (a truncated shard is renamed aside, so that its clips are written again).
    """
    known = _known(context, refs)
    facts = {clip_id: facts_of(context, each) for clip_id, each in known.items()}
    videos: dict[str, VideoFile] = {}
    if stage in ("download", "observe"):
        stored = {ref.video_key: video for ref in refs if (video := known[ref.clip_id].video) is not None}
        videos = videos_here(context, stored)
        read = readable(context, [each.observation for each in known.values() if each.observation is not None])
        for ref in refs:
            fact, found, file = facts[ref.clip_id], read.get(ref.clip_id), known[ref.clip_id].observation
            # A crash can leave a full file behind a row that still says key frames: it is measured again.
            sparse = found is not None and file is not None and "keyframes" in (found.kind, file.kind)
            facts[ref.clip_id] = replace(
                fact,
                measured=fact.measured and found is not None,
                undecided=sparse and _decision(context, fact, found) == "unknown",
                video=ref.video_key in videos,
            )
    if stage in ("download", "teach"):
        facts = {clip_id: replace(fact, frames=True) for clip_id, fact in facts.items()}
        if not context.store.has_url:  # an upload was compared with the original when it was sent
            noted = [clip_id for clip_id, fact in facts.items() if fact.verdict == "accept" and fact.written]
            sound = in_sound_shards(context, noted) if noted else frozenset()
            for clip_id in set(noted) - sound:
                facts[clip_id] = replace(facts[clip_id], written=False)
    if stage == "download":
        untaught = [ref for ref in refs if next_step(facts[ref.clip_id]) == "teach"]
        sizes = context.store.sizes_of([frames_name(ref) for ref in untaught])
        for ref, size in zip(untaught, sizes, strict=True):  # kept frames show the whole picture
            frames = size is not None and part_taken(read[ref.clip_id], context.policy) == WHOLE
            facts[ref.clip_id] = replace(facts[ref.clip_id], frames=frames)
        again = FailureCode.having(Trait.REFETCH) & set(context.settings.retry)
        for clip_id, each in known.items():
            facts[clip_id] = replace(facts[clip_id], refetch=any(failure.code in again for failure in each.failures))
    return [Clip(ref, known[ref.clip_id], videos.get(ref.video_key), next_step(facts[ref.clip_id])) for ref in refs]


def finished(context: RunContext, refs: Sequence[ClipRef]) -> bool:
    """Whether nothing is left to do for these clips according to the catalog; checks no file."""
    known = _known(context, refs)
    return all(next_step(facts_of(context, each)) in ("done", "given up") for each in known.values())


def facts_of(context: RunContext, known: Known) -> Facts:
    """The facts according to the catalog alone, which does not record kept frames."""
    file = known.observation
    verdict = None if known.verdict is None else known.verdict.decision
    measured = file is not None and context.measured_as_asked(file)
    return Facts(
        measured=measured,
        undecided=file is not None and file.kind == "keyframes" and verdict == "unknown",
        verdict=verdict,
        written=known.output is not None,
        video=known.video is not None and known.video.present,
        refetch=False,
        frames=False,
        given_up=frozenset(
            failure.stage
            for failure in known.failures
            if failure.code is not None
            and not failure.transient
            and Trait.SETTINGS not in failure.code.traits
            and failure.code.value not in context.settings.retry
        ),
    )


def _known(context: RunContext, refs: Sequence[ClipRef]) -> dict[str, Known]:
    return context.catalog.known(refs, context.policy.hash, context.dataset_hash)


def _decision(context: RunContext, fact: Facts, found: Observations | None) -> Decision | None:
    """The policy's decision on measurements that may not have been judged yet."""
    if fact.verdict is not None or found is None:
        return fact.verdict
    try:
        return judge(found, context.policy).decision
    except Exception:  # the judge stage meets the same error, and records it
        return None
