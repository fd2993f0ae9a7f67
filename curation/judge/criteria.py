"""From a clip's observations to a verdict with every reason: one function per criterion.

Pure: reads no pixel, file or network. A criterion passes, fails or is unknown; unknown does not reject.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import overload

import numpy as np
from numpy.typing import NDArray

from curation.judge.policy import EditLine, OverlapRule, Policy, ShotRule
from curation.judge.subject import PERSON, Subjects, area, intersection, taken
from curation.observe.observations import Observations
from curation.observe.sampling import TIE_S
from curation.records import WHOLE, CriterionResult, Outcome, Part, Verdict

# A verdict's first reason is the first of these that failed or is unknown.
CRITERIA = ("too_short", "hdr", "shot", "single", "height", "border", "overlap")
# A box within this share of the whole picture's border is also within it inside any bars: of two opposite bars, the
# thinner is at least 0.8 times as thick as the other.
_MARGIN_IN_BARS = 0.4


def judge(observations: Observations, policy: Policy) -> Verdict:
    """The policy's verdict on these measurements: accept if all pass, reject if any fails, unknown otherwise."""
    observations = taken(observations, policy)
    people = Subjects(observations, policy)
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


@overload
def _us(seconds: float) -> int: ...


@overload
def _us(seconds: NDArray[np.float64]) -> NDArray[np.int64]: ...


def _us(seconds: float | NDArray[np.float64]) -> int | NDArray[np.int64]:
    """Times are compared in whole microseconds: sums of binary fractions miss a limit by their last bit."""
    rounded = np.rint(np.multiply(seconds, 1e6)).astype(np.int64)
    return rounded if rounded.ndim else int(rounded)


def _too_short(observations: Observations, policy: Policy) -> CriterionResult:
    rule, duration, samples = policy.length, observations.duration_s, len(observations.sample_times_s)
    reasons = []
    if _us(duration) < _us(rule.min_duration_s):
        reasons.append(f"lasts {duration:.6g} s; the minimum is {rule.min_duration_s:g} s")
    if samples < rule.min_samples:
        reasons.append(f"has {samples} samples; the minimum is {rule.min_samples}")
    return _result("too_short", reasons, duration_s=duration, samples=float(samples))


def _hdr(observations: Observations, policy: Policy) -> CriterionResult:
    refused = policy.hdr == "refuse" and observations.transfer != "sdr"
    return _result("hdr", [f"HDR ({observations.transfer.upper()}) is refused by this policy"] if refused else [])


def _shot(observations: Observations, policy: Policy, people: Subjects) -> CriterionResult:
    rule = policy.shot
    times = observations.times_s
    if len(times) < 2:
        # One frame cannot contain an edit; `too_short` decides whether the clip is long enough.
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
    """Each change divided by the second largest in the window around it; a change over a longer pause counts less.

    The second largest, because two cuts within the window must not hide each other.
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
    """Moments where a change of light explains the difference: small ones anywhere, any at the clip's ends."""
    count = len(observations.luma)
    near = np.zeros(count, bool)
    if rule.edge_frames:
        near[: rule.edge_frames + 1] = True
        near[count - rule.edge_frames :] = True
    jump = np.abs(np.diff(observations.luma, prepend=observations.luma[0]))
    return (jump >= rule.flash_luma) & (near | (observations.gap < rule.flash_gap))


def _fades(observations: Observations, rule: ShotRule) -> list[tuple[int, int]]:
    """First and last frame of every blank period that is long enough."""
    blank = observations.contrast < rule.fade_contrast * np.median(observations.contrast)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], blank, [False]]).astype(np.int8)))
    stretches = zip(edges[::2], edges[1::2] - 1, strict=True)
    shown_until = np.append(observations.times_s[1:], observations.end_s)  # the last blank frame stays on screen too
    least = _us(rule.fade_s)
    return [(int(a), int(b)) for a, b in stretches if _us(shown_until[b] - observations.times_s[a]) >= least]


def _teleports(observations: Observations, rule: ShotRule, people: Subjects) -> list[str]:
    if rule.max_heights_per_s is None:
        return []
    reasons = []
    before: tuple[float, NDArray[np.float32]] | None = None
    aspect = observations.width / observations.height
    for sample, box in enumerate(people.subject):
        # Where others are seen, the subject may be another person than before; `single` judges that.
        if box is None or people.others[sample] or people.faint[sample]:
            before = None
            continue
        time, xyxy = float(observations.sample_times_s[sample]), observations.box_xyxy[box]
        if before is not None:
            centre = ((xyxy[:2] + xyxy[2:]) - (before[1][:2] + before[1][2:])) / 2
            height = max(float(xyxy[3] - xyxy[1]), float(before[1][3] - before[1][1]), 1e-6)
            speed = math.hypot(float(centre[0]) * aspect, float(centre[1])) / height / max(time - before[0], 1e-6)
            if speed > rule.max_heights_per_s:
                reasons.append(f"the person moves {speed:.1f} box heights a second at {time:.2f} s")
        before = time, xyxy
    return reasons


def _single(policy: Policy, people: Subjects) -> CriterionResult:
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


def _height(policy: Policy, people: Subjects) -> CriterionResult:
    if not people.seen:
        return _result("height", ["no person to measure"], "unknown")
    mean = float(people.heights.mean())
    low = mean <= policy.height.min_mean
    reasons = (
        [f"the mean height is {mean:.2f} of the image; it must exceed {policy.height.min_mean:.2f}"] if low else []
    )
    return _result("height", reasons, mean_height=mean)


def _border(observations: Observations, policy: Policy, people: Subjects) -> CriterionResult:
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


def _touching(observations: Observations, people: Subjects, active: Part, margin: float) -> NDArray[np.bool_]:
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


def _overlap(observations: Observations, policy: Policy, people: Subjects) -> CriterionResult:
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
        return False  # the subject, detected twice
    xyxy = observations.box_xyxy
    shared = intersection(xyxy[subject], xyxy[box])
    if shared <= 0:
        return False
    of_subject, of_other = float(area(xyxy[subject])), float(area(xyxy[box]))
    if shared / max(of_subject + of_other - shared, 1e-9) >= rule.merge_iou and name != PERSON:
        return False
    return shared >= rule.min_of_subject * of_subject or shared >= rule.min_of_other * of_other


def _judge_prescreen(observations: Observations, policy: Policy, people: Subjects) -> tuple[CriterionResult, ...]:
    """Key frames can only reject a clip, and only one that the full pass rejects whatever its other samples show.

    The key frames are samples of the full pass (see `prescreen`), so a key frame that fails here fails there too. They
    are not a fair selection: encoders put them where the picture changes. So shares are of the most samples that the
    clip can have, and every sample that was not seen counts as good. Everything else is unknown.
    """
    reasons: dict[str, list[str]] = {name: [] for name in CRITERIA}
    reasons["hdr"] += _hdr(observations, policy).reasons
    fps = observations.provenance.get("sample_fps")
    if fps is not None:
        samples = math.floor((observations.duration_s + TIE_S) * fps) + 2  # no sampling of the clip has more
        # Of two key frames nearest to one tick only one is a sample; measurements of earlier versions have both.
        ticks = np.rint((observations.sample_times_s - observations.start_s) * fps)

        def count(which: Iterable[int]) -> int:
            return len(np.unique(ticks[list(which)]))

        certain = policy.border.copies != "crop"  # under crop, a person may be seen only in the blurred copy
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
