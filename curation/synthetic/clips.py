"""Clips for every kind of video, as H.264 files, each with its true outcome per criterion, derived from geometry.

A clip is generated again until geometry shows its case clearly: a good dancer stays well inside the picture, a
truncated one is truncated for most of the clip. The truth is then measured on the rendered frames, with the same
definitions for every case, without a detector or a policy. Frames are a pure function of the plan.
"""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from curation.files import atomic_path
from curation.observe.sampling import sample_indices
from curation.pool import run_all
from curation.records import Outcome
from curation.render.body import load_body
from curation.synthetic.world.camera import Shot, film
from curation.synthetic.world.motion import Place, dance
from curation.synthetic.world.scene import KINDS, Builder, build_scene
from curation.synthetic.world.take import Dancer, Frame, Seen, Take, held_ball
from curation.synthetic.world.wardrobe import Dressed, Outfit, dress

Array = NDArray[np.float64]
Image = NDArray[np.uint8]
CRITERIA = ("shot", "single", "height", "border", "overlap")
MIN_HEIGHT, TOLERATED, MARGIN, MIN_SHOWN, MIN_SECONDS = 0.40, 0.10, 0.005, 0.25, 1.0
CASES = (
    "good",
    "hard_cut",
    "good",
    "two_people",
    "truncated_bottom",
    "good",
    "fade",
    "small",
    "good",
    "occluded",
    "jump_cut",
    "good",
    "truncated_left",
    "strobe",
    "no_person",
    "good",
    "held_object",
    "letterboxed",
    "truncated_right",
    "good",
    "rotated",
    "truncated_top",
    "variable_rate",
    "too_short",
    "corrupt",
    "good",
    "letterbox_truncated",
    "good",
)


@dataclass(frozen=True)
class ClipPlan:
    """Everything that a clip's pixels depend on. size is (width, height) as displayed; case is one of CASES."""

    name: str
    case: str
    seed: int
    size: tuple[int, int] = (640, 360)
    fps: int = 24
    seconds: float = 3.0


@dataclass(frozen=True)
class ClipTruth:
    """The truth about a clip.

    criteria: pass or fail per criterion, unknown if there is no person to measure. first_reason: the first criterion
    that fails, in the order of CRITERIA; too_short or decode for clips that do not get so far; "" for an accepted one.
    """

    plan: ClipPlan
    file: str
    expected: str
    first_reason: str
    criteria: dict[str, Outcome]
    measured: dict[str, float]


@dataclass(frozen=True, eq=False)
class Footage:
    """A clip before encoding: its takes in order, and how each frame is edited.

    parts: (take, index) per frame; finish(image, i) returns frame i as shown; times_s (N,) presentation times;
    active: the part of the picture without bars, as xyxy.
    """

    parts: tuple[tuple[Take, int], ...]
    times_s: Array
    active: tuple[int, int, int, int]
    cuts_s: tuple[float, ...]
    finish: Callable[[Image, int], Image]

    def frame(self, index: int, *, measure: bool = True) -> Frame:
        """One rendered frame before `finish`, in the coordinates of the active picture."""
        take, at = self.parts[index]
        return take.frame(at, measure=measure)


def plan_clips(count: int, seed: int = 0, fps: int = 24, seconds: float = 3.0) -> list[ClipPlan]:
    """Plans for `count` clips that cycle through all cases; a third of them are good."""
    plans = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        case = CASES[index % len(CASES)]
        may_stand = case in ("good", "strobe", "truncated_bottom", "two_people") and rng.random() < 0.3
        upright = case == "rotated" or (may_stand and case != "two_people")  # two people do not fit side by side
        plans.append(
            ClipPlan(
                f"{index:03d}_{case}",
                case,
                int(rng.integers(2**31)),
                (360, 640) if upright else (640, 360),
                fps,
                0.4 if case == "too_short" else seconds,
            )
        )
    return plans


def make_clips(
    folder: Path,
    plans: Sequence[ClipPlan],
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ClipTruth]:
    """Write every plan's clip, and cases.csv, the table of the truth."""
    folder.mkdir(parents=True, exist_ok=True)
    truths: dict[str, ClipTruth] = {}
    for plan, result in run_all(partial(make_clip, folder=folder), plans, workers):
        if isinstance(result, BaseException):
            raise result
        truths[plan.name] = result
        if progress:
            progress(len(truths), len(plans))
    ordered = [truths[plan.name] for plan in plans]
    with atomic_path(folder / "cases.csv") as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "expected", "first_reason", *CRITERIA, "note"])
        for truth in ordered:
            outcomes = [{"unknown": "na"}.get(truth.criteria[name], truth.criteria[name]) for name in CRITERIA]
            writer.writerow([truth.file, truth.expected, truth.first_reason, *outcomes, truth.plan.case])
    return ordered


def make_clip(plan: ClipPlan, folder: Path) -> ClipTruth:
    """Render and encode one clip into folder/<name>.mp4, and return the truth about it."""
    footage = shoot(plan)
    target = folder / f"{plan.name}.mp4"
    sampled = set(_sampled(footage.times_s))
    frames: list[Frame] = []

    def pictures() -> Iterator[Image]:
        for index in range(len(footage.parts)):
            frame = footage.frame(index, measure=index in sampled)
            if index in sampled:
                frames.append(frame)
            yield footage.finish(frame.rendered.rgb, index)

    with atomic_path(target) as temporary:
        encode(pictures(), footage.times_s, plan, temporary)
    return truth_of(plan, footage, frames)


def shoot(plan: ClipPlan) -> Footage:
    """The footage of a plan; generated again until geometry shows the planned case clearly."""
    for attempt in range(200):
        footage = _draw(plan, np.random.default_rng([plan.seed, attempt]))
        if footage is not None:
            return footage
    raise RuntimeError(f"no clear footage for case {plan.case} from seed {plan.seed}")


def write_oracle(plan: ClipPlan, clip_id: str, folder: Path) -> None:
    """Write the world's exact depth of a clip into a depth folder, for the folder teacher under the name `oracle`.

    Covers the frames sampled at 6 per second. Bars and sky are invalid.
    """
    footage = shoot(plan)
    indices = _sampled(footage.times_s)
    x0, y0, x1, y1 = footage.active
    height = _barred(plan.size)[1] if plan.case.startswith("letterbox") else plan.size[1]
    depth = np.zeros((len(indices), height, plan.size[0]), np.float32)
    intrinsics = np.empty((len(indices), 3, 3))
    for row, index in enumerate(indices):
        take, at = footage.parts[index]
        depth[row, y0:y1, x0:x1] = take.depth(at)
        intrinsics[row] = take.cameras[at].intrinsics
        intrinsics[row, 1, 2] += y0
    with atomic_path(folder / f"{clip_id}.npz") as temporary, temporary.open("wb") as stream:
        np.savez_compressed(
            stream, depth=depth, valid=depth > 0, intrinsics=intrinsics, times_s=footage.times_s[indices]
        )


def truth_of(plan: ClipPlan, footage: Footage, frames: Sequence[Frame]) -> ClipTruth:
    """The truth, from measured frames. Definitions are in `measure`."""
    measured = measure(footage, frames)
    nobody = measured["one_person"] == 0 and measured["people"] == 0
    height: Outcome = "unknown" if nobody else ("pass" if measured["height"] > MIN_HEIGHT else "fail")
    border: Outcome = "unknown" if nobody else ("pass" if measured["truncated"] <= TOLERATED else "fail")
    overlap: Outcome = "unknown" if nobody else ("pass" if measured["overlapped"] <= TOLERATED else "fail")
    criteria: dict[str, Outcome] = {
        "shot": "fail" if footage.cuts_s else "pass",
        "single": "pass" if measured["one_person"] >= 1 - TOLERATED else "fail",
        "height": height,
        "border": border,
        "overlap": overlap,
    }
    failing = next((name for name in CRITERIA if criteria[name] == "fail"), "")
    if plan.case == "corrupt":
        failing, expected, criteria = "decode", "error", dict.fromkeys(CRITERIA, "unknown")
    else:
        if footage.times_s[-1] + 1 / plan.fps < MIN_SECONDS:
            failing = "too_short"
        expected = "reject" if failing else "accept"
    return ClipTruth(plan, f"{plan.name}.mp4", expected, failing, criteria, measured)


def measure(footage: Footage, frames: Sequence[Frame]) -> dict[str, float]:
    """Shares and means over sampled frames.

    people: mean number of people with more than a quarter visible. one_person: share of frames with exactly one.
    height: mean height of the largest person's visible box, relative to the picture inside bars. truncated: share of
    frames in which this person's body leaves that picture. overlapped: share of frames in which this person's visible
    box overlaps the visible box of anything else.
    """
    counts, heights, truncated, overlapped = [], [], [], []
    for frame in frames:
        width, height = frame.camera.size
        people = [
            one for one in frame.seen if one.name == "person" and one.visible is not None and one.shown > MIN_SHOWN
        ]
        counts.append(len(people))
        if not people:
            continue
        first = max(people, key=lambda one: _area(one.visible))
        assert first.visible is not None
        heights.append((first.visible[3] - first.visible[1]) / height)
        truncated.append(_outside(first.box, (width, height)) > MARGIN)
        overlapped.append(any(_meets(first, other) for other in frame.seen if other is not first))
    return {
        "people": float(np.mean(counts)),
        "one_person": float(np.mean(np.array(counts) == 1)),
        "height": float(np.mean(heights)) if heights else 0.0,
        "truncated": float(np.mean(truncated)) if truncated else 0.0,
        "overlapped": float(np.mean(overlapped)) if overlapped else 0.0,
    }


def encode(pictures: Iterator[Image], times_s: Array, plan: ClipPlan, target: Path) -> None:
    """H.264 in MP4 through ffmpeg, one thread and bit-exact, so that the same plan gives the same file."""
    from imageio_ffmpeg import get_ffmpeg_exe

    rotated = plan.case == "rotated"
    width, height = plan.size[::-1] if rotated else plan.size
    if plan.case.startswith("letterbox"):
        height = _barred(plan.size)[1]
    uneven = (
        ["-vf", f"setpts='{_pts_expression(plan.fps)}'", "-fps_mode", "passthrough"]
        if plan.case == "variable_rate"
        else []
    )
    stored = target.with_name(f"{target.stem}-stored.mp4") if rotated else target
    command = [
        get_ffmpeg_exe(),
        "-v",
        "error",
        "-y",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{width}x{height}",
        "-r",
        str(plan.fps),
        "-i",
        "-",
        *uneven,
        "-c:v",
        "libx264",
        "-preset",
        "veryfast",
        "-crf",
        "23",
        "-pix_fmt",
        "yuv420p",
        "-threads",
        "1",
        "-video_track_timescale",
        "24000",
        "-fflags",
        "+bitexact",
        "-flags:v",
        "+bitexact",
        "-map_metadata",
        "-1",
        str(stored),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    for picture in pictures:
        process.stdin.write(np.ascontiguousarray(np.rot90(picture) if rotated else picture).tobytes())
    process.stdin.close()
    if process.wait() != 0:
        raise RuntimeError(f"ffmpeg could not encode {plan.name}")
    if rotated:
        turn = ["-display_rotation:v:0", "-90", "-i", str(stored), "-c", "copy", "-fflags", "+bitexact"]
        subprocess.run([get_ffmpeg_exe(), "-v", "error", "-y", *turn, str(target)], check=True)
        stored.unlink()
    if plan.case == "corrupt":  # an ordinary MP4 has its index at the end: an interrupted download lacks it
        target.write_bytes(target.read_bytes()[: int(target.stat().st_size * 0.6)])


def _sampled(times_s: Array) -> list[int]:
    """Indices of the frames sampled at 6 per second."""
    return sample_indices(times_s, 6.0).tolist()


def _pts_expression(fps: int) -> str:
    """Presentation time as an ffmpeg expression: the full frame rate for one second, then half of it."""
    return f"round(if(lt(N,{fps}),N/{fps},1+(N-{fps})/{fps / 2:g})/TB)"  # a sum just below a tick would lose the tick


def _times(plan: ClipPlan) -> Array:
    count = max(2, round(plan.fps * plan.seconds))
    index = np.arange(count)
    if plan.case != "variable_rate":
        return index / plan.fps
    times = np.where(index < plan.fps, index / plan.fps, 1 + (index - plan.fps) / (plan.fps / 2))
    return times[times < plan.seconds]


def _barred(size: tuple[int, int]) -> tuple[int, int]:
    """The size of a picture with bars above and below."""
    return size[0], int(size[1] / 0.76) // 2 * 2


@dataclass(frozen=True, eq=False)
class _Set:
    """Everything that stays the same between the takes of one clip."""

    kind: str
    scene_seed: int
    wearers: tuple[Dressed, ...]
    betas: tuple[Array, ...]
    shot: Shot
    furnish: Callable[[Builder], None]


def _draw(plan: ClipPlan, rng: np.random.Generator) -> Footage | None:
    times = _times(plan)
    case = plan.case
    active = (0, 0, *plan.size)
    finish: Callable[[Image, int], Image] = lambda image, _: image  # noqa: E731
    cuts: tuple[float, ...] = ()
    first = _set(plan, rng)
    takes: list[tuple[Take, int]]
    if case in ("hard_cut", "fade", "jump_cut"):
        at = int(len(times) * rng.uniform(0.4, 0.6))
        aside = 0.62 if case == "jump_cut" else 0.0
        second = first if case == "jump_cut" else _set(plan, rng)
        one = _take(plan, rng, first, times[:at], -aside)
        two = _take(plan, rng, second, times[at:], aside)
        if case == "jump_cut":  # the camera does not move, only the dancer does
            one, two = (
                replace(one, cameras=(one.cameras[0],) * at),
                replace(two, cameras=(one.cameras[0],) * (len(times) - at)),
            )
        if not (_clear(one, case) and _clear(two, case)):
            return None
        takes = [(one, i) for i in range(at)] + [(two, i) for i in range(len(times) - at)]
        cuts = (float(times[at]),)
        if case == "fade":
            finish = _fade(at, max(4, plan.fps // 3))
    else:
        take = _take(plan, rng, first, times, 0.0)
        if not _clear(take, case):
            return None
        takes = [(take, i) for i in range(len(times))]
    if case == "strobe":
        finish = _strobe(rng, len(times), plan.fps)
    if case.startswith("letterbox"):
        width, height = _barred(plan.size)
        top = (height - plan.size[1]) // 2
        active = (0, top, width, top + plan.size[1])
        finish = _bars(top, height)
    return Footage(tuple(takes), times, active, cuts, finish)


def _set(plan: ClipPlan, rng: np.random.Generator) -> _Set:
    case = plan.case
    yaw = rng.uniform(-0.35, 0.35)
    upright = plan.size[1] > plan.size[0]
    height, shift = rng.uniform(0.56, 0.68), (rng.normal(0, 0.03), rng.normal(0.0, 0.01))
    move = str(rng.choice(["static", "static", "handheld", "pan", "orbit", "dolly"]))
    if upright:
        height = rng.uniform(0.48, 0.56)
    if case == "small":
        height = rng.uniform(0.22, 0.30)
    elif case in ("truncated_bottom", "letterbox_truncated"):
        height, shift = rng.uniform(0.8, 0.95), (0.0, rng.uniform(0.28, 0.34))
    elif case == "truncated_top":
        height, shift = rng.uniform(0.8, 0.95), (0.0, -rng.uniform(0.26, 0.32))
    elif case in ("truncated_left", "truncated_right"):
        sign = -1 if case.endswith("left") else 1
        height, shift = rng.uniform(0.66, 0.8), (sign * rng.uniform(0.44, 0.48), 0.0)
    elif case in ("hard_cut", "jump_cut", "fade"):
        move = "static"
    shot = Shot(
        float(height),
        move,
        float(yaw),
        float(rng.uniform(0.9, 1.5)),
        float(rng.uniform(34, 52)),
        shift,
        int(rng.integers(2**31)),
    )
    kind = str(rng.choice(list(KINDS)))
    body_count = 2 if case == "two_people" else 1
    wearers = tuple(dress(Outfit.draw(rng)) for _ in range(body_count))
    betas = tuple(rng.normal(0, 0.8, 10) for _ in range(body_count))
    return _Set(kind, int(rng.integers(2**31)), wearers, betas, shot, _furnisher(case, yaw, upright, rng))


def _furnisher(case: str, yaw: float, upright: bool, rng: np.random.Generator) -> Callable[[Builder], None]:
    """Things at the sides, away from the dancer; a thing between dancer and camera if the case needs one."""
    toward = np.array([np.sin(yaw), np.cos(yaw)])
    across = np.array([toward[1], -toward[0]])
    spots = [across * side * rng.uniform(1.5, 2.3) - toward * rng.uniform(-0.2, 1.0) for side in (-1, 1)]
    chosen = [int(rng.integers(3)) if rng.random() < 0.45 and not upright else None for _ in spots]
    before = toward * rng.uniform(0.75, 1.0) + across * rng.uniform(-0.12, 0.12)
    blocker = int(rng.integers(2))
    turns, size = rng.uniform(-np.pi, np.pi, 3), rng.uniform(0.9, 1.2)

    def furnish(builder: Builder) -> None:
        for spot, what, turn in zip(spots, chosen, turns[:2], strict=True):
            if what == 0:
                builder.chair(float(spot[0]), float(spot[1]), float(turn))
            elif what == 1:
                builder.plant(float(spot[0]), float(spot[1]), 1.1 * float(size))
            elif what == 2:
                builder.toy_ball(float(spot[0]), 0.15, float(spot[1]), 0.15)
        if case == "occluded" and blocker == 0:
            builder.chair(float(before[0]), float(before[1]), float(turns[2]), 1.25)
        elif case == "occluded":
            builder.plant(float(before[0]), float(before[1]), 1.6)

    return furnish


def _take(plan: ClipPlan, rng: np.random.Generator, stage: _Set, times: Array, aside: float) -> Take:
    scene = build_scene(stage.kind, stage.scene_seed, stage.furnish)
    yaw = stage.shot.yaw
    across = np.array([np.cos(yaw), -np.sin(yaw)])
    apart = (-0.75, 0.75) if len(stage.wearers) == 2 else (aside,)
    dancers = []
    for wearer, betas, offset in zip(stage.wearers, stage.betas, apart, strict=True):
        at = across * offset
        place = Place(float(at[0]), float(at[1]), float(yaw + rng.normal(0, 0.3)), 0.16)
        dancers.append(
            Dancer(wearer, dance(load_body(), betas, times + rng.uniform(0, 3), int(rng.integers(2**31)), place))
        )
    stride = max(1, len(times) // 12)
    clouds = np.stack([_cloud(dancers, i) for i in range(0, len(times), stride)])
    cameras = film(clouds, times[::stride], times, plan.size, stage.shot)
    held = held_ball(int(rng.integers(2**31)), int(rng.integers(2))) if plan.case == "held_object" else None
    people = () if plan.case == "no_person" else tuple(dancers)
    return Take(scene, people, tuple(cameras), times, held)


def _cloud(dancers: Sequence[Dancer], index: int) -> Array:
    clouds = [
        one.dressed.pose(one.motion.betas, one.motion.pose[index], one.motion.transl[index]).vertices[::40]
        for one in dancers
    ]
    return np.concatenate(clouds)


def _clear(take: Take, case: str) -> bool:
    """Whether geometry shows the case clearly; each share is far from the thresholds that `truth_of` uses."""
    if not take.dancers:
        return True
    width, height = take.cameras[0].size
    size = np.array([width, height, width, height])
    indices = _sampled(take.times_s)
    boxes = [take.boxes(index) for index in indices]
    person = np.array([box[1] for box in boxes]) / size
    tall = np.clip(person[:, 3], 0, 1) - np.clip(person[:, 1], 0, 1)
    beyond = np.column_stack([-person[:, :2], person[:, 2:] - 1])  # left, top, right, bottom
    others = [np.array([box[i] for box in boxes]) / size for i in boxes[0] if i != 1]
    meets, covers = np.zeros(len(boxes), bool), np.zeros(len(boxes), bool)
    for other in others:
        gap = np.maximum(other[:, :2] - person[:, 2:], person[:, :2] - other[:, 2:]).max(1)
        seen = (other[:, :2] < 1).all(1) & (other[:, 2:] > 0).all(1)
        meets |= (gap < 0.02) & seen
        shared = np.prod(
            np.maximum(np.minimum(other[:, 2:], person[:, 2:]) - np.maximum(other[:, :2], person[:, :2]), 0), 1
        )
        covers |= (shared > 0.08 * np.prod(person[:, 2:] - person[:, :2], 1)) | (
            shared > 0.7 * np.prod(other[:, 2:] - other[:, :2], 1)
        )
    inside = (beyond < -0.025).all()
    if case.startswith("truncated") or case == "letterbox_truncated":
        side = {"left": 0, "top": 1, "right": 2, "bottom": 3}.get(case.split("_")[1], 3)
        cut = beyond[:, side] * size[side] > 0.10 * (person[:, 3] - person[:, 1]) * height * (
            0.6 if side in (0, 2) else 1
        )
        shows = (np.clip(person[:, 2], 0, 1) - np.clip(person[:, 0], 0, 1)) / (person[:, 2] - person[:, 0])
        return bool(cut.mean() > 0.8 and tall.min() > 0.45 and shows.min() > 0.35 and not meets.any())
    if case == "small":
        return bool(inside and tall.mean() < 0.33 and not meets.any())
    if case == "two_people":
        second = np.array([box[2] for box in boxes]) / size
        both = np.concatenate([person, second])
        apart = np.maximum(second[:, 0] - person[:, 2], person[:, 0] - second[:, 2])
        return bool((both > 0.0).all() and (both < 1.0).all() and apart.mean() > -0.02)
    if case in ("occluded", "held_object"):
        return bool(inside and tall.mean() > 0.48 and covers.mean() > 0.6)
    return bool(inside and tall.mean() > 0.48 and not meets.any())


def _fade(at: int, length: int) -> Callable[[Image, int], Image]:
    def finish(image: Image, index: int) -> Image:
        level = np.clip(abs(index - at + 0.5) / length, 0, 1)
        return (image * level).astype(np.uint8)

    return finish


def _strobe(rng: np.random.Generator, count: int, fps: int) -> Callable[[Image, int], Image]:
    """Flashes of one or two frames, two or three a second, without a cut."""
    lit = np.zeros(count, bool)
    index = int(rng.integers(2, fps // 2))
    while index < count:
        lit[index : index + int(rng.integers(1, 3))] = True
        index += int(rng.integers(fps // 3, fps // 2 + 1))

    def finish(image: Image, at: int) -> Image:
        return np.clip(image * 1.5 + 70, 0, 255).astype(np.uint8) if lit[at] else image

    return finish


def _bars(top: int, height: int) -> Callable[[Image, int], Image]:
    def finish(image: Image, _: int) -> Image:
        framed = np.zeros((height, image.shape[1], 3), np.uint8)
        framed[top : top + image.shape[0]] = image
        return framed

    return finish


def _area(box: Array | None) -> float:
    return 0.0 if box is None else float((box[2] - box[0]) * (box[3] - box[1]))


def _outside(box: Array, size: tuple[int, int]) -> float:
    """How far a box extends beyond the picture, relative to the picture's side."""
    width, height = size
    return float(max(-box[0] / width, -box[1] / height, box[2] / width - 1, box[3] / height - 1))


def _meets(first: Seen, other: Seen) -> bool:
    if first.visible is None or other.visible is None:
        return False
    low, high = np.maximum(first.visible[:2], other.visible[:2]), np.minimum(first.visible[2:], other.visible[2:])
    return bool((high > low).all())
