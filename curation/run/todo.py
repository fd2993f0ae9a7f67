"""What is left to do for each clip: `next_step`, a pure function of what the catalog and the files say.

The catalog is read once for a batch (`Catalog.known`). Before a stage works, `clips_before` also looks at the files
that this stage depends on, because a file may be damaged or gone; everything else is as the catalog says.
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
    """All that decides what is next for one clip.

    measured: measurements of this run's detector and sampling exist. undecided: they are of key frames only, and leave
    the policy undecided. verdict: what the policy said of them. written: the clip is in a shard of this data set.
    video: the file is here. refetch: it is to be downloaded again all the same. frames: training frames of the part of
    the picture that is taken are here. given_up: stages whose last attempt failed for good.
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
    """The one step that brings a clip further. Doing it changes the facts so that another step, or none, is next."""
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
    """A clip before a stage: video is its file, if that was looked for and is here."""

    ref: ClipRef
    known: Known
    video: VideoFile | None
    step: Step


def clips_before(context: RunContext, refs: Sequence[ClipRef], stage: Stage) -> list[Clip]:
    """These clips with what is next for each, as far as this stage depends on it.

    Looks at their videos and measurements before download and observe, at kept frames before download, and before
    download and teach at shards on this disk (a cut one is put aside, so that its clips are written again).
    """
    known = _known(context, refs)
    facts = {clip_id: facts_of(context, each) for clip_id, each in known.items()}
    videos: dict[str, VideoFile] = {}
    if stage in ("download", "observe"):
        stored = {ref.video_key: video for ref in refs if (video := known[ref.clip_id].video) is not None}
        videos = videos_here(context, stored)
        read = readable(context, [each.observation for each in known.values() if each.observation is not None])
        for ref in refs:
            fact, found = facts[ref.clip_id], read.get(ref.clip_id)
            facts[ref.clip_id] = replace(
                fact,
                measured=fact.measured and found is not None,
                undecided=found is not None
                and found.kind == "keyframes"
                and _decision(context, fact, found) == "unknown",
                video=ref.video_key in videos,
            )
    if stage in ("download", "teach"):
        facts = {clip_id: replace(fact, frames=True) for clip_id, fact in facts.items()}
        if not context.store.has_url:  # what is sent to a URL is compared there
            noted = [clip_id for clip_id, fact in facts.items() if fact.verdict == "accept" and fact.written]
            sound = in_sound_shards(context, noted) if noted else frozenset()
            for clip_id in set(noted) - sound:
                facts[clip_id] = replace(facts[clip_id], written=False)
    if stage == "download":
        untaught = [ref for ref in refs if next_step(facts[ref.clip_id]) == "teach"]
        sizes = context.store.sizes_of([frames_name(ref) for ref in untaught])
        for ref, size in zip(untaught, sizes, strict=True):  # kept frames are of the whole picture
            frames = size is not None and part_taken(read[ref.clip_id], context.policy) == WHOLE
            facts[ref.clip_id] = replace(facts[ref.clip_id], frames=frames)
        again = FailureCode.having(Trait.REFETCH) & set(context.settings.retry)
        for clip_id, each in known.items():
            facts[clip_id] = replace(facts[clip_id], refetch=any(failure.code in again for failure in each.failures))
    return [Clip(ref, known[ref.clip_id], videos.get(ref.video_key), next_step(facts[ref.clip_id])) for ref in refs]


def finished(context: RunContext, refs: Sequence[ClipRef]) -> bool:
    """Whether the catalog says that nothing is left to do for any of these clips; looks at no file."""
    known = _known(context, refs)
    return all(next_step(facts_of(context, each)) in ("done", "given up") for each in known.values())


def facts_of(context: RunContext, known: Known) -> Facts:
    """The facts as the catalog alone has them; it knows nothing of kept frames."""
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
    """What the policy says of measurements that were perhaps not judged yet."""
    if fact.verdict is not None or found is None:
        return fact.verdict
    try:
        return judge(found, context.policy).decision
    except Exception:  # the stage that judges finds the same error, and records it
        return None
