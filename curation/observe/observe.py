"""One decode pass over a clip: shot measures on every frame, people and training frames at 6 frames a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.observe.bars import BarFinder
from curation.observe.frames import grid_stretch, refuse_long, training_grid
from curation.observe.observations import Observations, Surround
from curation.observe.sampling import SAMPLER, sample_indices
from curation.observe.shots import THUMB_LONG_SIDE, ShotMeasures, ShotMeter
from curation.observe.surround import SurroundFinder
from curation.people.detector import Detections, Detector
from curation.people.tracker import PeopleTracker
from curation.records import WHOLE, ClipRef, Frames, Part, Transfer
from curation.settings import ObserveSettings
from curation.shards.codec import encode_jpeg
from curation.video.decode import decode, decode_key_frames, halved, resize, thumbnail, to_rgb
from curation.video.hdr import OPERATOR, transfer_of
from curation.video.index import VideoIndex, index_video, with_index

_WAITING = 256  # thumbnails, at most 50 MB


def observe(
    ref: ClipRef, path: Path, settings: ObserveSettings, detector: Detector,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Observations, Frames]:  # fmt: skip
    """Measure every frame of the clip and sample its training frames, in one sequential decode.

    Raises ClipFailure: CORRUPT, NO_VIDEO, WRONG_KIND, TOO_LARGE or SPAN_OUT_OF_RANGE.
    """
    return with_index(path, lambda index: _observe(ref, index, settings, detector, progress), settings.limits)


def _observe(
    ref: ClipRef, index: VideoIndex, settings: ObserveSettings, detector: Detector,
    progress: Callable[[int, int], None] | None,
) -> tuple[Observations, Frames]:  # fmt: skip
    first, last = index.span(ref.start_s, ref.end_s)
    samples = first + sample_indices(index.times_s[first:last], settings.sample_fps)
    refuse_long(len(samples), settings)
    wanted = set(samples.tolist())
    width, height = training_grid(index, settings.frame_long_side)
    thumb, seen = _scaled(index, THUMB_LONG_SIDE), _scaled(index, detector.long_side)
    larger = max(width, seen[0]), max(height, seen[1])
    gaps = np.diff(index.times_s[first:last])
    usual = float(np.median(gaps)) if len(gaps) else 1 / 25
    meter = ShotMeter(max(usual, 1 / settings.limits.max_fps))
    tracker = PeopleTracker(detector.person)
    bars, copies = BarFinder(), SurroundFinder()
    found: list[Detections] = []
    tracks: list[NDArray[np.int32]] = []
    jpeg: list[bytes] = []
    person: NDArray[np.float32] | None = None
    transfer: Transfer = "sdr"
    # A batch of samples, and all thumbnails since its first one: the meter needs the person's box with each frame.
    images: list[NDArray[np.uint8]] = []
    waiting: list[tuple[NDArray[np.uint8], bool]] = []

    def flush() -> None:
        nonlocal person
        results = iter(detector(images) if images else [])
        for small, sampled in waiting:
            if sampled:
                result = next(results)
                found.append(result)
                tracks.append(tracker(result, index.width, index.height))
                person = _largest_person(result, detector.person, person)
                bars.add(small)
                copies.add(small)
            meter.add(small, None if person is None else person.tolist())
        images.clear()
        waiting.clear()

    for number, frame in decode(index, first, last):
        transfer = transfer_of(frame) if transfer == "sdr" else transfer
        sampled = number in wanted
        waiting.append((thumbnail(frame, index, *thumb), sampled))
        if sampled:
            stored = halved(to_rgb(frame), index, *larger)
            images.append(resize(stored, index, *seen))
            jpeg.append(encode_jpeg(resize(stored, index, width, height)))
        if len(images) in (0, detector.batch) or len(waiting) == _WAITING:
            flush()
        if progress is not None:
            progress(number - first + 1, last - first)
    flush()
    times = index.times_s[samples]
    active = bars.active()
    surround: Surround = "none" if active == WHOLE else "bars"
    if surround == "none" and (inner := copies.inner()) is not None:
        active, surround = inner, "copy"
    observations = _assemble(
        ref, index, "full", transfer, first, last, times, found, tracks, meter.finish(), surround, active, settings,
        detector,
    )  # fmt: skip
    stretch = grid_stretch(index, width, height)
    return observations, Frames(width=width, height=height, times_s=times, jpeg=tuple(jpeg), stretch=stretch)


def prescreen(
    ref: ClipRef, path: Path, settings: ObserveSettings, detector: Detector, share: float = 0.0
) -> Observations | None:
    """Detect people in the key frames of the clip that the full pass also samples, with identical pixels.

    Costs about a thirteenth of a full decode, or nothing: returns None if fewer samples than
    `settings.prescreen_key_frames`, or at most `share` of them, can be seen this way. Raises ClipFailure as `observe`.
    """
    index = index_video(path, settings.limits)
    first, last = index.span(ref.start_s, ref.end_s)
    samples = first + sample_indices(index.times_s[first:last], settings.sample_fps)
    keys, limit = samples[index.key[samples]], 4 * settings.prescreen_key_frames
    if len(keys) < settings.prescreen_key_frames or min(len(keys), limit) <= share * len(samples):
        return None
    numbers: list[int] = []
    found: list[Detections] = []
    transfer: Transfer = "sdr"
    for number, frame in decode_key_frames(index, keys, limit=limit):
        transfer = transfer_of(frame) if transfer == "sdr" else transfer
        numbers.append(number)
        found += detector([resize(to_rgb(frame), index, *_scaled(index, detector.long_side))])
    tracks = [np.zeros(len(result.klass), np.int32) for result in found]
    none = ShotMeasures(*(np.zeros(0, np.float32) for _ in ShotMeasures._fields))
    return _assemble(
        ref, index, "keyframes", transfer, first, last, index.times_s[numbers], found, tracks, none,
        "none", WHOLE, settings, detector,
    )  # fmt: skip


def _assemble(
    ref: ClipRef, index: VideoIndex, kind: Any, transfer: Transfer, first: int, last: int, times: NDArray[np.float64],
    found: list[Detections], tracks: list[NDArray[np.int32]], shots: ShotMeasures,
    surround: Surround, active: Part, settings: ObserveSettings, detector: Detector,
) -> Observations:  # fmt: skip
    counts = [len(result.klass) for result in found]
    end = index.end_s if ref.end_s is None or last == len(index.times_s) else float(index.times_s[last])
    return Observations(
        clip_id=ref.clip_id,
        kind=kind,
        width=index.width,
        height=index.height,
        transfer=transfer,
        start_s=float(index.times_s[first]),
        end_s=end,
        surround=surround,
        active=active,
        times_s=index.times_s[first:last] if kind == "full" else np.zeros(0),
        **shots._asdict(),
        sample_times_s=times,
        box_sample=np.repeat(np.arange(len(found), dtype=np.int32), counts),
        box_xyxy=np.concatenate([np.zeros((0, 4), np.float32), *(result.xyxy for result in found)]),
        box_class=tuple(detector.names[int(k)] for result in found for k in result.klass),
        box_confidence=np.concatenate([np.zeros(0, np.float32), *(result.confidence for result in found)]),
        box_track=np.concatenate([np.zeros(0, np.int32), *tracks]),
        provenance={
            "detector": detector.provenance,
            "sampler": SAMPLER,
            "sample_fps": settings.sample_fps,
            "hdr": OPERATOR,
        },
    )


def _scaled(index: VideoIndex, long_side: int) -> tuple[int, int]:
    scale = long_side / max(index.width, index.height)
    return max(2, round(index.width * scale)), max(2, round(index.height * scale))


def _largest_person(found: Detections, person: int, fallback: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    people = np.flatnonzero(found.klass == person)
    if not len(people):
        return fallback
    boxes = found.xyxy[people]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return boxes[int(np.argmax(area * found.confidence[people]))]
