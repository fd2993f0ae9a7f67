"""Policies: thresholds as data, and the pure function from a clip's observations to a verdict with every reason.

Never touches pixels, files or the network. A criterion passes, fails or is unknown; unknown is not rejected.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from curation.failures import UsageError
from curation.files import sha256_json
from curation.observe.observations import Observations
from curation.observe.sampling import TIE_S
from curation.records import WHOLE, CriterionResult, Outcome, Part, Verdict

# The order in which a first reason is named.
CRITERIA = ("too_short", "hdr", "shot", "single", "height", "border", "overlap")
PERSON = "person"
# How far off the edge of a picture over its copy may be, over the longer side: half a pixel of what it is measured in.
_EDGE_ERROR = 0.5 / 256
# Whoever comes within this share of the whole picture's border does so inside any bars: those of two opposite sides
# are thick at a ratio of 0.8 at least.
_MARGIN_IN_BARS = 0.4

_Share = Field(ge=0, le=1)
_MAX_COUNT = 1_000_000  # of samples or frames: more than any clip has
_MOST = 1e9  # of any figure: it must fit into the single precision of the measurements
_MAX_BYTES = 1 << 16  # of a policy file: many times what ours have, and read within seconds


class _Part(BaseModel):
    # strict: neither yes nor "0.4" is a number
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LengthRule(_Part):
    """How much of a clip there must be."""

    min_duration_s: float = Field(ge=0, le=_MOST)
    min_samples: int = Field(ge=1, le=_MAX_COUNT)


class EditLine(_Part):
    """A change of at least `gap` that exceeds the changes around it `ratio` times is an edit."""

    gap: float = Field(ge=0, le=_MOST)
    ratio: float = Field(ge=0, le=_MOST)


class ShotRule(_Part):
    """What breaks a continuous shot."""

    edits: tuple[EditLine, ...] = Field(strict=False)
    person_edits: tuple[EditLine, ...] = Field(strict=False)
    cut_content: float = Field(ge=0, le=_MOST)
    cut_gap: float = Field(ge=0, le=_MOST)
    ratio_window_s: float = Field(gt=0, le=_MOST)
    flash_luma: float = Field(ge=0, le=_MOST)
    flash_gap: float = Field(ge=0, le=_MOST)
    edge_frames: int = Field(ge=0, le=_MAX_COUNT)
    fade_contrast: float = _Share
    fade_s: float = Field(gt=0, le=_MOST)
    dissolve: float = _Share
    dissolve_frames: int = Field(ge=1, le=_MAX_COUNT)
    max_heights_per_s: float | None = Field(gt=0, le=_MOST)


class SingleRule(_Part):
    """Who counts as a person, which boxes are one person, and in how many samples the count may be wrong."""

    person_confidence: float = _Share
    other_confidence: float = _Share
    faint_confidence: float = _Share
    faint_share: float = _Share
    merge_iou: float = _Share
    merge_inside: float = _Share
    merge_max_confidence: float = _Share
    tolerance: float = _Share


class HeightRule(_Part):
    """Mean height of the subject's box over the height of the image must exceed this."""

    min_mean: float = _Share


class BorderRule(_Part):
    """How near to the border counts as truncated, and in how many samples it may."""

    margin: float = Field(ge=0, lt=0.5)
    inside_bars: bool
    copies: Literal["refuse", "keep", "crop"]
    tolerance: float = _Share


class OverlapRule(_Part):
    """Which other boxes count as overlapping the subject, and in how many samples they may."""

    confidence: float = _Share
    min_of_subject: float = _Share
    min_of_other: float = _Share
    merge_iou: float = _Share
    ignore_classes: tuple[str, ...] = Field(strict=False)
    tolerance: float = _Share


class Policy(_Part):
    """All thresholds of one policy; see policies/default.yaml for what each is for and its evidence."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    detector: str = Field(pattern=r"^[^\x00-\x1f\x7f]{1,1024}$")
    length: LengthRule
    hdr: Literal["convert", "refuse"]
    shot: ShotRule
    single: SingleRule
    height: HeightRule
    border: BorderRule
    overlap: OverlapRule

    @property
    def prescreen_share(self) -> float:
        """A prescreen that sees no larger share of a clip's samples than this decides nothing under this policy."""
        return 0.0 if self.hdr == "refuse" else min(self.single.tolerance, self.border.tolerance)

    @property
    def hash(self) -> str:
        """16 hex digits over every threshold; the detector counts where it measured, not where it is judged."""
        return sha256_json(self.model_dump(mode="json", exclude={"detector", "name"}))[:16]


def find_policy(policy: Path) -> Path:
    """A policy file's absolute path; a bare name such as `default` that is no file here means a built-in policy."""
    return policy.absolute() if _is_file(policy) else _BUILT_IN.get(str(policy), policy.absolute())


def load_policy(policy: Path) -> Policy:
    """Read a policy by path or built-in name; `extends: default` in it takes what it does not say from there.

    What is extended is a built-in policy or a file beside this one, and extends nothing itself: whoever reads a policy
    reads two files at most. Raises UsageError with the file, the field and what is wrong with it.
    """
    path = find_policy(policy)
    values = _read(path)
    if (base := values.pop("extends", None)) is not None:
        beside = path.parent / base if isinstance(base, str) else path.parent
        found = beside if _is_file(beside) else _BUILT_IN.get(str(base))
        if found is None:
            what = f"there is no policy {_shown(base)}" if isinstance(base, str) else "this is no text"
            raise _wrong(path, "extends", f"{what}; write one of {', '.join(_BUILT_IN)}, or a file beside this one")
        parent = _read(found)
        if "extends" in parent:
            raise _wrong(path, "extends", f"{_shown(base)} extends another policy itself; extend that one")
        values = _merged(parent, values)
    try:
        return Policy.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(_shown, first["loc"])) or "the file"
        raise _wrong(path, where, _SAID.get(first["type"], first["msg"])) from error


_BUILT_IN = {path.stem: path for path in sorted((Path(__file__).parent / "policies").glob("*.yaml"))}
_SAID = {
    "missing": "this field is missing; add it, or begin the file with extends: default",
    "extra_forbidden": "there is no such field; remove it or correct its name",
    "string_pattern_mismatch": "these characters cannot be used here; write a plain name",
    "model_type": "this must be a mapping of fields",
}


def _wrong(path: Path, where: str, what: str) -> UsageError:
    return UsageError(f"The policy {path.name} is wrong at {where}: {what}.")


def _shown(part: str | int) -> str:
    """A name from a file, short and without anything that a terminal would obey."""
    name = str(part)
    return name if name.isprintable() and len(name) <= 42 else ascii(name)[:42]


class _Loader(yaml.SafeLoader):
    """Plain YAML: a field given twice is a mistake; so is a merge key, whose nesting can grow beyond any memory."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys are not taken; use extends", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    what = f"the field {_shown(key.value)} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            LookupError,
            AttributeError,
            TypeError,
        ):  # what PyYAML raises for a date or number that is none
            what = f"{_shown(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None


def _is_file(path: Path) -> bool:
    # Unlike Path.is_file, this takes a name that is too long for one of no file.
    return os.path.isfile(path)  # noqa: PTH113


def _read(path: Path) -> dict[str, Any]:
    if not _is_file(path):
        what = "it is a folder" if os.path.isdir(path) else "there is no such file"  # noqa: PTH112
        raise UsageError(f"The policy {path} cannot be read: {what}; built in are {', '.join(_BUILT_IN)}.")
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"The policy {path} cannot be read: {error.strerror}.") from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"The policy {path.name} is over {_MAX_BYTES >> 10} KiB: that is no policy file.")
    try:
        values = yaml.load(data.decode("utf-8-sig"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        said = "it is nested too deeply" if isinstance(error, RecursionError) else getattr(error, "problem", None)
        what = " ".join(str(said or error).split())[:200] + (f", in line {mark.line + 1}" if mark else "")
        raise UsageError(f"The policy {path.name} is not valid YAML: {what}.") from error
    if not isinstance(values, dict):
        raise UsageError(f"The policy {path.name} must be a mapping; see policies/default.yaml.")
    return values


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Changes over a base, one level down: a part that is changed keeps its other fields."""
    both = {name: (base[name], value) for name, value in changes.items() if name in base}
    parts = {n: old | new if isinstance(old, dict) and isinstance(new, dict) else new for n, (old, new) in both.items()}
    return base | changes | parts


def judge(observations: Observations, policy: Policy) -> Verdict:
    """What the policy says of these measurements: accept if all pass, reject if any fails, unknown otherwise."""
    observations = _taken(observations, policy)
    people = _Subjects(observations, policy)
    if observations.kind == "keyframes":
        results = _judge_prescreen(observations, policy, people)
    else:
        results = (
            _too_short(observations, policy),
            _hdr(observations, policy),
            _shot(observations, policy, people),
            _single(policy, people),
            _height(policy, people),
            _border(observations, policy, people),
            _overlap(observations, policy, people),
        )
    outcomes = {result.outcome for result in results}
    decision = "reject" if "fail" in outcomes else "unknown" if "unknown" in outcomes else "accept"
    return Verdict(
        clip_id=observations.clip_id,
        policy_name=policy.name,
        policy_hash=policy.hash,
        decision=decision,  # type: ignore[arg-type]
        criteria=tuple(results),
    )


def part_taken(observations: Observations, policy: Policy) -> Part:
    """The part of the picture that the policy takes: the whole, or what lies over a blurred copy of itself.

    In whole pixels, and inside the measured edge by what it may be off, which is at least a pixel.
    """
    if policy.border.copies != "crop" or observations.surround != "copy":
        return WHOLE
    x1, y1, x2, y2 = observations.active
    width, height = observations.width, observations.height
    margin = max(1.0, _EDGE_ERROR * max(width, height))
    (left, right), (top, bottom) = _inwards(x1, x2, width, margin), _inwards(y1, y2, height, margin)
    return (left, top, right, bottom) if left < right and top < bottom else WHOLE  # too small a picture is refused


def _inwards(low: float, high: float, pixels: int, margin: float) -> tuple[float, float]:
    """Both ends of a side, fractions; where it ends with the whole picture it stays."""
    first = math.ceil(low * pixels + margin) if low > 0 else 0
    last = math.floor(high * pixels - margin) if high < 1 else pixels
    return first / pixels, last / pixels


def _taken(observations: Observations, policy: Policy) -> Observations:
    """The measurements as they are of the part that the policy takes; boxes with no more than half in it are left out.

    Nobody in the inner picture reaches out of it, so these are seen in its blurred copy.
    """
    if (part := part_taken(observations, policy)) == WHOLE:
        return observations
    x1, y1, x2, y2 = part
    moved = (observations.box_xyxy - np.array([x1, y1] * 2)) / np.array([x2 - x1, y2 - y1] * 2)
    boxes = moved.clip(0, 1).astype(np.float32)
    kept = np.flatnonzero(2 * _area(boxes) > _area(moved))
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


def subject_boxes(observations: Observations, policy: Policy) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The subject's box in every sample: (s, 4) xyxy and (s,) confidence; NaN where unseen.

    The boxes are fractions of the part of the picture that the policy takes.
    """
    observations = _taken(observations, policy)
    people = _Subjects(observations, policy)
    boxes = np.full((people.samples, 4), np.nan, np.float32)
    confidence = np.full(people.samples, np.nan, np.float32)
    for sample, box in enumerate(people.subject):
        if box is not None:
            boxes[sample] = observations.box_xyxy[box]
            confidence[sample] = observations.box_confidence[box]
    return boxes, confidence


class _Subjects:
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
            # Large and certain: a small confident face in the background is not the subject.
            weight = _area(xyxy[clear]) * confidence[clear]
            subject = int(clear[np.argmax(weight)])
            rest = [box for box in boxes.tolist() if box != subject]
            rest = [box for box in rest if not _same_person(xyxy, confidence, subject, box, rule)]
            self.subject.append(subject)
            self.others.append([box for box in rest if confidence[box] >= rule.other_confidence])
            self.faint.append(any(confidence[box] >= rule.faint_confidence for box in rest))

    @property
    def seen(self) -> list[int]:
        """Box numbers of the subject where it is seen."""
        return [box for box in self.subject if box is not None]

    @property
    def heights(self) -> NDArray[np.float32]:
        """Heights of the subject's boxes over the height of the image, where it is seen."""
        boxes = self._xyxy[self.seen]
        return boxes[:, 3] - boxes[:, 1]


def _same_person(
    xyxy: NDArray[np.float32], confidence: NDArray[np.float32], subject: int, box: int, rule: SingleRule
) -> bool:
    shared = _intersection(xyxy[subject], xyxy[box])
    areas = float(_area(xyxy[subject])), float(_area(xyxy[box]))
    if shared / max(areas[0] + areas[1] - shared, 1e-9) >= rule.merge_iou:
        return True
    return confidence[box] <= rule.merge_max_confidence and shared / max(areas[1], 1e-9) >= rule.merge_inside


def _area(xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
    return (xyxy[..., 2] - xyxy[..., 0]) * (xyxy[..., 3] - xyxy[..., 1])


def _intersection(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return float(max(width, 0.0) * max(height, 0.0))


@overload
def _us(seconds: float) -> int: ...
@overload
def _us(seconds: NDArray[np.float64]) -> NDArray[np.int64]: ...
def _us(seconds: float | NDArray[np.float64]) -> int | NDArray[np.int64]:
    """Whole microseconds, in which times are compared: sums of binary fractions miss a limit by their last bit."""
    rounded = np.rint(np.multiply(seconds, 1e6)).astype(np.int64)
    return rounded if rounded.ndim else int(rounded)


def _too_short(observations: Observations, policy: Policy) -> CriterionResult:
    rule, duration, samples = policy.length, observations.duration_s, len(observations.sample_times_s)
    reasons = []
    if _us(duration) < _us(rule.min_duration_s):
        reasons.append(f"lasts {duration:.6g} s, {rule.min_duration_s:g} s are needed")
    if samples < rule.min_samples:
        reasons.append(f"has {samples} samples, {rule.min_samples} are needed")
    return _result("too_short", reasons, duration_s=duration, samples=float(samples))


def _hdr(observations: Observations, policy: Policy) -> CriterionResult:
    refused = policy.hdr == "refuse" and observations.transfer != "sdr"
    return _result("hdr", [f"HDR ({observations.transfer.upper()}) is refused by this policy"] if refused else [])


def _shot(observations: Observations, policy: Policy, people: _Subjects) -> CriterionResult:
    rule = policy.shot
    times = observations.times_s
    if len(times) < 2:
        # One frame cannot hold an edit; whether it is long enough is the business of another criterion.
        return _result("shot", [])
    gap_ratio = _stands_out(times, observations.gap, rule.ratio_window_s, floor=0.01)
    person_ratio = _stands_out(times, observations.person_gap, rule.ratio_window_s, floor=0.03)
    edit = _crosses(observations.gap, gap_ratio, rule.edits)
    jump = _crosses(observations.person_gap, person_ratio, rule.person_edits) & ~edit
    cut = (observations.content >= rule.cut_content) & (observations.gap >= rule.cut_gap)
    cut[0] = False
    flash = _flashes(observations, rule)
    reasons = [f"cut at {times[n]:.2f} s" for n in np.flatnonzero((cut | edit) & ~flash)]
    reasons += [f"jump of the person at {times[n]:.2f} s" for n in np.flatnonzero(jump & ~flash & ~cut)]
    reasons += [f"fade from {times[a]:.2f} to {times[b]:.2f} s" for a, b in _fades(observations, rule)]
    mixed = np.flatnonzero(observations.dissolve >= rule.dissolve)
    if len(mixed) >= rule.dissolve_frames and rule.dissolve < 1:
        reasons.append(f"dissolve around {times[mixed[len(mixed) // 2]]:.2f} s")
    reasons += _teleports(observations, rule, people)
    return _result(
        "shot",
        reasons,
        max_content=float(observations.content.max()),
        max_gap=float(observations.gap.max()),
        max_person_gap=float(observations.person_gap.max()),
        max_dissolve=float(observations.dissolve.max()),
    )


def _stands_out(
    times: NDArray[np.float64], change: NDArray[np.float32], window_s: float, floor: float
) -> NDArray[np.float64]:
    """Each change over the second largest within the window; a change over a longer pause counts less.

    The second largest, so that two cuts within the window do not hide each other.
    """
    steps = np.diff(times, prepend=times[0])
    usual = max(float(np.median(steps[1:])), 1e-6)
    rate = change / np.maximum(1.0, steps / usual)
    reach, moments = _us(max(window_s, 2.5 * usual)), _us(times)
    first = np.searchsorted(moments, moments - reach)
    last = np.searchsorted(moments, moments + reach, side="right")
    ratio = np.zeros(len(times))
    for n in range(1, len(times)):
        around = np.concatenate([rate[max(first[n], 1) : n], rate[n + 1 : last[n]]])
        if len(around):
            second = np.partition(around, -2)[-2] if len(around) > 4 else around.max()
            ratio[n] = rate[n] / (second + floor)
    return ratio


def _crosses(change: NDArray[np.float32], ratio: NDArray[np.float64], lines: tuple[EditLine, ...]) -> NDArray[np.bool_]:
    crossed = np.zeros(len(change), bool)
    for line in lines:
        crossed |= (change >= line.gap) & (ratio >= line.ratio)
    return crossed


def _flashes(observations: Observations, rule: ShotRule) -> NDArray[np.bool_]:
    """Moments where the light changes and explains what is seen: small changes anywhere, all changes at the ends."""
    count = len(observations.luma)
    near = np.zeros(count, bool)
    if rule.edge_frames:
        near[: rule.edge_frames + 1] = True
        near[count - rule.edge_frames :] = True
    jump = np.abs(np.diff(observations.luma, prepend=observations.luma[0]))
    return (jump >= rule.flash_luma) & (near | (observations.gap < rule.flash_gap))


def _fades(observations: Observations, rule: ShotRule) -> list[tuple[int, int]]:
    """First and last frame of every stretch that is blank for long enough."""
    blank = observations.contrast < rule.fade_contrast * np.median(observations.contrast)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], blank, [False]]).astype(np.int8)))
    stretches = zip(edges[::2], edges[1::2] - 1, strict=True)
    shown_until = np.append(observations.times_s[1:], observations.end_s)  # the last blank frame stays on screen too
    least = _us(rule.fade_s)
    return [(int(a), int(b)) for a, b in stretches if _us(shown_until[b] - observations.times_s[a]) >= least]


def _teleports(observations: Observations, rule: ShotRule, people: _Subjects) -> list[str]:
    if rule.max_heights_per_s is None:
        return []
    reasons = []
    before: tuple[float, NDArray[np.float32]] | None = None
    aspect = observations.width / observations.height
    for sample, box in enumerate(people.subject):
        # With others about, the subject may simply be another person than before: that is for another criterion.
        if box is None or people.others[sample] or people.faint[sample]:
            before = None
            continue
        time, xyxy = float(observations.sample_times_s[sample]), observations.box_xyxy[box]
        if before is not None:
            centre = ((xyxy[:2] + xyxy[2:]) - (before[1][:2] + before[1][2:])) / 2
            height = max(float(xyxy[3] - xyxy[1]), float(before[1][3] - before[1][1]), 1e-6)
            speed = math.hypot(float(centre[0]) * aspect, float(centre[1])) / height / max(time - before[0], 1e-6)
            if speed > rule.max_heights_per_s:
                reasons.append(f"the box jumps by {speed:.1f} heights a second at {time:.2f} s")
        before = time, xyxy
    return reasons


def _single(policy: Policy, people: _Subjects) -> CriterionResult:
    rule, samples = policy.single, people.samples
    missing = sum(box is None for box in people.subject) / max(samples, 1)
    several = sum(bool(others) for others in people.others) / max(samples, 1)
    faint = sum(people.faint) / max(samples, 1)
    wrong = sum(box is None or bool(o) for box, o in zip(people.subject, people.others, strict=True)) / max(samples, 1)
    reasons = []
    if samples and wrong > rule.tolerance:
        reasons.append(f"not exactly one person in {wrong:.0%} of the samples")
        if missing:
            reasons.append(f"no person in {missing:.0%} of the samples")
        if several:
            reasons.append(f"more than one person in {several:.0%} of the samples")
    if samples and faint > rule.faint_share:
        reasons.append(f"another person is faintly seen in {faint:.0%} of the samples")
    outcome: Outcome | None = "unknown" if not samples else None
    return _result("single", reasons, outcome, no_person=missing, several_people=several, faint_others=faint)


def _height(policy: Policy, people: _Subjects) -> CriterionResult:
    if not people.seen:
        return _result("height", ["no person to measure"], "unknown")
    mean = float(people.heights.mean())
    low = mean <= policy.height.min_mean
    reasons = (
        [f"the mean height is {mean:.2f} of the image, over {policy.height.min_mean:.2f} is needed"] if low else []
    )
    return _result("height", reasons, mean_height=mean)


def _border(observations: Observations, policy: Policy, people: _Subjects) -> CriterionResult:
    rule = policy.border
    refused = rule.copies != "keep" and observations.surround == "copy"
    reasons = ["the picture lies within a blurred copy of itself, which this policy refuses"] if refused else []
    if not people.seen:
        return _result("border", reasons or ["no person to measure"], "fail" if refused else "unknown")
    touching = _touching(observations, people, observations.active if rule.inside_bars else WHOLE, rule.margin)
    share = float(touching.any(1).mean())
    if share > rule.tolerance:
        reasons.append(f"within {rule.margin:.1%} of the border in {share:.0%} of the samples")
        sides = ("left", "top", "right", "bottom")
        reasons += [f"{side} in {touching[:, n].mean():.0%}" for n, side in enumerate(sides) if touching[:, n].any()]
    return _result("border", reasons, touching=share)


def _touching(observations: Observations, people: _Subjects, active: Part, margin: float) -> NDArray[np.bool_]:
    """(seen, 4): where the subject's box comes within the margin of the left, top, right and bottom of `active`."""
    x1, y1, x2, y2 = active
    boxes = observations.box_xyxy[people.seen]
    distances = np.stack(
        [
            (boxes[:, 0] - x1) / (x2 - x1),
            (boxes[:, 1] - y1) / (y2 - y1),
            (x2 - boxes[:, 2]) / (x2 - x1),
            (y2 - boxes[:, 3]) / (y2 - y1),
        ],
        axis=1,
    )
    return distances < margin


def _overlap(observations: Observations, policy: Policy, people: _Subjects) -> CriterionResult:
    rule = policy.overlap
    if not people.seen:
        return _result("overlap", ["no person to measure"], "unknown")
    hit = 0
    by_class: dict[str, int] = {}
    for sample, subject in enumerate(people.subject):
        if subject is None:
            continue
        names = {
            observations.box_class[box]
            for box in np.flatnonzero(observations.box_sample == sample)
            if box != subject and _overlaps(observations, int(box), subject, people.others[sample], rule)
        }
        hit += bool(names)
        for name in names:
            by_class[name] = by_class.get(name, 0) + 1
    share = hit / len(people.seen)
    reasons = []
    if share > rule.tolerance:
        reasons.append(f"another box overlaps in {share:.0%} of the samples")
        ranked = sorted(by_class.items(), key=lambda item: (-item[1], item[0]))
        reasons += [f"{name} in {count / len(people.seen):.0%}" for name, count in ranked]
    return _result("overlap", reasons, overlapped=share)


def _overlaps(observations: Observations, box: int, subject: int, others: list[int], rule: OverlapRule) -> bool:
    name = observations.box_class[box]
    if observations.box_confidence[box] < rule.confidence or name in rule.ignore_classes:
        return False
    if name == PERSON and box not in others:
        return False  # the subject, seen twice
    xyxy = observations.box_xyxy
    shared = _intersection(xyxy[subject], xyxy[box])
    if shared <= 0:
        return False
    of_subject, of_other = float(_area(xyxy[subject])), float(_area(xyxy[box]))
    if shared / max(of_subject + of_other - shared, 1e-9) >= rule.merge_iou and name != PERSON:
        return False
    return shared >= rule.min_of_subject * of_subject or shared >= rule.min_of_other * of_other


def _judge_prescreen(observations: Observations, policy: Policy, people: _Subjects) -> tuple[CriterionResult, ...]:
    """Key frames can only reject, and only what the full pass must reject whatever the samples between them show.

    The key frames are samples of the full pass (see `prescreen`), so what fails on them fails there too. They are no
    fair selection: encoders put them where the picture changes. So the shares are of all samples that the clip can
    have, and every sample that was not seen counts as a good one. Everything else is unknown.
    """
    reasons: dict[str, list[str]] = {name: [] for name in CRITERIA}
    reasons["hdr"] += _hdr(observations, policy).reasons
    fps = observations.provenance.get("sample_fps")
    if fps is not None:
        samples = math.floor((observations.duration_s + TIE_S) * fps) + 2  # no sampling of the clip has more
        # Two key frames nearest to one tick are not both samples; measurements of earlier versions have such.
        ticks = np.rint((observations.sample_times_s - observations.start_s) * fps)

        def count(which: Iterable[int]) -> int:
            return len(np.unique(ticks[list(which)]))

        certain = policy.border.copies != "crop"  # otherwise whoever is seen may be seen in a blurred copy
        wrong = count(n for n, box in enumerate(people.subject) if box is None or (certain and people.others[n]))
        if wrong / samples > policy.single.tolerance:
            reasons["single"].append(f"not exactly one person in {wrong} of at most {samples} samples")
        faint = count(np.flatnonzero(people.faint))
        if certain and faint / samples > policy.single.faint_share:
            reasons["single"].append(f"another person is faintly seen in {faint} of at most {samples} samples")
        touching = _touching(observations, people, WHOLE, min(policy.border.margin, _MARGIN_IN_BARS)).any(1)
        seen = np.flatnonzero([box is not None for box in people.subject])
        at_border = count(seen[touching])
        if certain and at_border / samples > policy.border.tolerance:
            reasons["border"] = [f"at the border in {at_border} of at most {samples} samples"]
    return tuple(
        CriterionResult(name, "fail" if reasons[name] else "unknown", tuple(reasons[name] or ["only key frames seen"]))
        for name in CRITERIA
    )


def _result(criterion: str, reasons: list[str], outcome: Outcome | None = None, **measured: float) -> CriterionResult:
    decided: Outcome = outcome or ("fail" if reasons else "pass")
    return CriterionResult(
        criterion, decided, tuple(reasons), {key: round(value, 6) for key, value in measured.items()}
    )


def describe(policy: Policy) -> dict[str, Any]:
    """The policy as plain data, for provenance records."""
    return {"name": policy.name, "hash": policy.hash, **policy.model_dump(mode="json", exclude={"name"})}
