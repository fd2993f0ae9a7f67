"""The person a clip is about: the part of the picture that a policy uses, and the subject and others in each sample."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from curation.judge.policy import Policy, SingleRule
from curation.observe.observations import Observations
from curation.records import WHOLE, Part

PERSON = "person"


def subject_boxes(observations: Observations, policy: Policy) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The subject's box in every sample: (s, 4) xyxy and (s,) confidence; NaN where it is not seen.

    The boxes are fractions of the part of the picture that the policy uses.
    """
    observations = taken(observations, policy)
    people = Subjects(observations, policy)
    boxes = np.full((people.samples, 4), np.nan, np.float32)
    confidence = np.full(people.samples, np.nan, np.float32)
    for sample, box in enumerate(people.subject):
        if box is not None:
            boxes[sample] = observations.box_xyxy[box]
            confidence[sample] = observations.box_confidence[box]
    return boxes, confidence


class Subjects:
    """The subject and the other people of every sample, with boxes of the same person merged."""

    def __init__(self, observations: Observations, policy: Policy) -> None:
        rule = policy.single
        self.samples = len(observations.sample_times_s)
        self.subject: list[int | None] = []
        self.others: list[list[int]] = []
        self.faint: list[bool] = []
        self._xyxy = observations.box_xyxy
        xyxy, confidence = observations.box_xyxy, observations.box_confidence
        is_person = np.array([name == PERSON for name in observations.box_class], bool)
        for sample in range(self.samples):
            boxes = np.flatnonzero((observations.box_sample == sample) & is_person)
            clear = boxes[confidence[boxes] >= rule.person_confidence]
            if not len(clear):
                self.subject.append(None)
                self.others.append([])
                self.faint.append(False)
                continue
            # Size and confidence: a small person in the background is not the subject, however confident the detector.
            weight = area(xyxy[clear]) * confidence[clear]
            subject = int(clear[np.argmax(weight)])
            rest = [box for box in boxes.tolist() if box != subject]
            rest = [box for box in rest if not _same_person(xyxy, confidence, subject, box, rule)]
            self.subject.append(subject)
            self.others.append([box for box in rest if confidence[box] >= rule.other_confidence])
            self.faint.append(any(confidence[box] >= rule.faint_confidence for box in rest))

    @property
    def seen(self) -> list[int]:
        """Indices of the subject's boxes, where it is seen."""
        return [box for box in self.subject if box is not None]

    @property
    def heights(self) -> NDArray[np.float32]:
        """Heights of the subject's boxes as shares of the image height, where it is seen."""
        boxes = self._xyxy[self.seen]
        return boxes[:, 3] - boxes[:, 1]


def _same_person(
    xyxy: NDArray[np.float32], confidence: NDArray[np.float32], subject: int, box: int, rule: SingleRule
) -> bool:
    shared = intersection(xyxy[subject], xyxy[box])
    areas = float(area(xyxy[subject])), float(area(xyxy[box]))
    if shared / max(areas[0] + areas[1] - shared, 1e-9) >= rule.merge_iou:
        return True
    return confidence[box] <= rule.merge_max_confidence and shared / max(areas[1], 1e-9) >= rule.merge_inside


def area(xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
    """(...,) areas of (..., 4) boxes, as fractions of the picture."""
    return (xyxy[..., 2] - xyxy[..., 0]) * (xyxy[..., 3] - xyxy[..., 1])


def intersection(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The area common to two (4,) boxes, as a fraction of the picture."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return float(max(width, 0.0) * max(height, 0.0))


# Error of the measured edge of a picture over its copy, as a share of the longer side: half a pixel of the thumbnail.
_EDGE_ERROR = 0.5 / 256


def part_taken(observations: Observations, policy: Policy) -> Part:
    """The part of the picture that the policy uses: the whole, or the inner picture over a blurred copy of itself.

    In whole pixels, and inside the measured edge by its possible error, at least one pixel.
    """
    if policy.border.copies != "crop" or observations.surround != "copy":
        return WHOLE
    x1, y1, x2, y2 = observations.active
    width, height = observations.width, observations.height
    margin = max(1.0, _EDGE_ERROR * max(width, height))
    (left, right), (top, bottom) = _inwards(x1, x2, width, margin), _inwards(y1, y2, height, margin)
    return (left, top, right, bottom) if left < right and top < bottom else WHOLE  # `border` then rejects the copy


def _inwards(low: float, high: float, pixels: int, margin: float) -> tuple[float, float]:
    """Both ends of a side moved inwards, as fractions; an end at the whole picture's border stays."""
    first = math.ceil(low * pixels + margin) if low > 0 else 0
    last = math.floor(high * pixels - margin) if high < 1 else pixels
    return first / pixels, last / pixels


def taken(observations: Observations, policy: Policy) -> Observations:
    """The measurements relative to the part that the policy uses, without boxes that have half or less in it.

    People in the inner picture do not reach outside it, so those boxes show people in the blurred copy.
    """
    if (part := part_taken(observations, policy)) == WHOLE:
        return observations
    x1, y1, x2, y2 = part
    moved = (observations.box_xyxy - np.array([x1, y1] * 2)) / np.array([x2 - x1, y2 - y1] * 2)
    boxes = moved.clip(0, 1).astype(np.float32)
    kept = np.flatnonzero(2 * area(boxes) > area(moved))
    return replace(
        observations,
        width=round(observations.width * (x2 - x1)),
        height=round(observations.height * (y2 - y1)),
        surround="none",
        active=WHOLE,
        box_sample=observations.box_sample[kept],
        box_xyxy=boxes[kept],
        box_class=tuple(observations.box_class[n] for n in kept),
        box_confidence=observations.box_confidence[kept],
        box_track=observations.box_track[kept],
    )
