"""Dance-like motion from a seed: planted feet by footsteps and leg IK, arms between poses on the beat.

Poses are SMPL's (24 axis-angle rotations and a translation). The module knows a body's rest joints, never its skin, and
promises planted feet and arms outside the trunk, not choreography. Frame: world, y up, floor at y = 0, metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import minimum_filter1d, uniform_filter1d
from scipy.spatial.transform import Rotation, Slerp

from curation.render.body import JOINT_COUNT, Body

Array = NDArray[np.float64]
_GRID_HZ = 60.0

# arm poses: direction of the upper arm and of the forearm, as (outward, up, forward) in the chest's frame
_ARMS = {
    "low": ((0.30, -0.94, 0.05), (0.25, -0.88, 0.40)),
    "hips": ((0.72, -0.66, -0.22), (-0.30, -0.50, 0.80)),
    "wide": ((0.99, 0.00, 0.08), (0.93, 0.10, 0.34)),
    "vee": ((0.66, 0.74, 0.05), (0.38, 0.91, 0.14)),
    "cactus": ((0.97, 0.05, 0.08), (0.18, 0.96, 0.22)),
    "push": ((0.38, -0.05, 0.92), (0.02, 0.24, 0.97)),
    "pump": ((0.66, -0.72, 0.20), (0.10, 0.42, 0.90)),
    "wave": ((0.62, 0.28, 0.74), (0.00, 0.86, 0.50)),
    "gather": ((0.45, -0.80, 0.40), (-0.25, -0.25, 0.93)),
    "crown": ((0.50, 0.85, 0.12), (-0.22, 0.94, 0.26)),
    "swing": ((0.42, -0.82, -0.38), (0.34, -0.88, 0.32)),
    "side": ((0.90, -0.38, 0.22), (0.85, 0.12, 0.50)),
}
_STEPS = ("side", "front", "march", "kick", "turn", "bounce")


@dataclass(frozen=True, eq=False)
class Motion:
    """One body's motion: betas (10,); pose (N, 24, 3) axis-angle; transl (N, 3) m; times_s (N,)."""

    betas: Array
    pose: Array
    transl: Array
    times_s: Array


@dataclass(frozen=True)
class Place:
    """Where a dancer stays: x, z and roaming radius in metres; yaw about y in radians, 0 looks along +z."""

    x: float = 0.0
    z: float = 0.0
    yaw: float = 0.0
    radius: float = 0.25


def dance(body: Body, betas: Array, times_s: Array, seed: int, place: Place | None = None) -> Motion:
    """A dance over the given times, seconds, any spacing. The same seed gives the same dance at any frame rate."""
    place = place or Place()
    for_steps, for_sway, for_arms = np.random.default_rng(seed).spawn(3)  # so that a longer dance starts the same
    rest = body.rest_joints(betas)
    floor = float((body.v_template + body.shapedirs @ betas)[:, 1].min())
    end = float(times_s[-1]) + 1.0
    steps = _Footsteps.plan(for_steps, rest, place, end)
    sway = _Sway.draw(for_sway, steps.beat_s)
    arms = [
        _arm_keys(rng_side, steps.beat_s, end, side) for side, rng_side in zip((1, -1), _paired(for_arms), strict=True)
    ]

    # the pelvis is smoothed on a fixed time grid, so that the frame rate does not matter
    grid = np.arange(-0.5, end + 0.5, 1 / _GRID_HZ)
    share, path = _pelvis_path(grid, steps, sway, rest, floor)
    pelvis_at = np.column_stack([np.interp(times_s, grid, column) for column in path.T])
    feet = steps.feet(times_s)

    local = np.tile(np.eye(3), (len(times_s), JOINT_COUNT, 1, 1))
    local[:, 0] = sway.pelvis(times_s, feet, np.interp(times_s, grid, share)).as_matrix()
    for joint, turn in sway.spine(times_s).items():
        local[:, joint] = turn.as_matrix()
    for side, keys in zip((0, 1), arms, strict=True):
        local[:, 13 + side], local[:, 16 + side], local[:, 18 + side] = _arm(keys, times_s, 1 - 2 * side)
        local[:, 20 + side] = _about("z", (0.25 - 0.5 * side) * np.sin(times_s * 5 + side))
    for side, foot in enumerate(feet):
        legs = _leg(rest, side, pelvis_at, local[:, 0], foot, rest[7 + side, 1] - floor)
        local[:, 1 + side], local[:, 4 + side], local[:, 7 + side], local[:, 10 + side] = legs
    pose = Rotation.from_matrix(local.reshape(-1, 3, 3)).as_rotvec().reshape(-1, JOINT_COUNT, 3)
    return Motion(betas, pose, pelvis_at - rest[0], times_s)


@dataclass(frozen=True, eq=False)
class _Foot:
    """One foot over time: sole position (N, 3), yaw (N,), pitch of the sole (N,), and how much it carries (N,)."""

    at: Array
    yaw: Array
    pitch: Array
    load: Array


@dataclass(frozen=True, eq=False)
class _Footsteps:
    """Where each foot stands after each of its steps; between steps it does not move at all."""

    beat_s: float
    starts: tuple[Array, Array]  # times at which a side's steps begin
    spots: tuple[Array, Array]  # (K + 1, 3): x, z, yaw before the first and after each step
    lifts: tuple[Array, Array]  # (K,) height of the swing, metres

    @classmethod
    def plan(cls, rng: np.random.Generator, rest: Array, place: Place, end: float) -> _Footsteps:
        beat = 60 / rng.uniform(96, 132)
        half = abs(rest[7, 0]) + 0.02
        phase = rng.uniform(0, 2 * np.pi, 4)
        drift = rng.uniform(0.12, 0.3, 2)

        def base(t: float) -> Array:
            return np.array(
                [
                    place.x + place.radius * np.sin(2 * np.pi * drift[0] * t + phase[0]) * 0.8,
                    place.z + place.radius * np.sin(2 * np.pi * drift[1] * t + phase[1]) * 0.6,
                    place.yaw + 0.35 * np.sin(2 * np.pi * 0.17 * t + phase[2]),
                ]
            )

        starts: tuple[list[float], list[float]] = ([], [])
        spots: tuple[list[Array], list[Array]] = ([], [])
        lifts: tuple[list[float], list[float]] = ([], [])

        def spot(t: float, side: int, outward: float, forward: float, turn: float) -> Array:
            x, z, yaw = base(t)
            yaw = yaw + turn
            sign = 1 - 2 * side
            dx, dz = sign * (half + outward), forward
            return np.array([x + dx * np.cos(yaw) + dz * np.sin(yaw), z - dx * np.sin(yaw) + dz * np.cos(yaw), yaw])

        turned = 0.0
        for side in (0, 1):  # both feet stand from long before the start
            starts[side].append(-10.0)
            spots[side].extend([spot(-1.0, side, 0.05, 0.0, 0.0)] * 2)
            lifts[side].append(0.0)
        kind, step, time = "side", int(rng.integers(2)), -0.7
        count = 0
        spin = 0.0
        while time < end + 1:
            if count % 8 == 0:
                kind = str(rng.choice(_STEPS, p=[0.3, 0.2, 0.15, 0.12, 0.13, 0.10]))
                spin = float(rng.choice([-1, 1])) * np.pi / 4 if kind == "turn" else 0.0
            side = step % 2
            outward, forward, lift = 0.04, 0.0, 0.06
            if kind == "side":
                outward = 0.22 if count % 4 < 2 else 0.02
            elif kind == "front":
                forward = 0.20 if count % 4 < 2 else -0.10
            elif kind == "march":
                lift = 0.24
            elif kind == "kick":
                lift, forward = 0.30, 0.05
            elif kind == "turn":
                turned += spin
            outward += rng.uniform(-0.02, 0.05)
            forward += rng.uniform(-0.05, 0.05)
            if kind != "bounce" or count % 8 in (0, 3):
                starts[side].append(time)
                spots[side].append(spot(time + beat, side, outward, forward, turned))
                lifts[side].append(lift * rng.uniform(0.8, 1.2))
            step += 1
            count += 1
            time += beat
        return cls(
            beat,
            (np.array(starts[0]), np.array(starts[1])),
            (np.array(spots[0]), np.array(spots[1])),
            (np.array(lifts[0]), np.array(lifts[1])),
        )

    def feet(self, times: Array) -> tuple[_Foot, _Foot]:
        """Left and right foot at the given times."""
        left, right = (self._foot(times, side) for side in (0, 1))
        share = left.load / (left.load + right.load)
        return _Foot(left.at, left.yaw, left.pitch, share), _Foot(right.at, right.yaw, right.pitch, 1 - share)

    def _foot(self, times: Array, side: int) -> _Foot:
        duration = 0.72 * self.beat_s
        starts, spots, lifts = self.starts[side], self.spots[side], self.lifts[side]
        index = np.searchsorted(starts, times, side="right")
        since = np.where(index > 0, times - starts[np.maximum(index - 1, 0)], 1e9)
        progress = np.clip(since / duration, 0, 1)
        before, after = spots[np.maximum(index - 1, 0)], spots[index]
        eased = progress**2 * (3 - 2 * progress)
        flat = before + (after - before) * eased[:, None]
        swing = np.sin(np.pi * progress) ** 2
        lift = lifts[np.maximum(index - 1, 0)] * swing
        at = np.column_stack([flat[:, 0], lift, flat[:, 1]])
        # the other foot must carry before this one leaves and until it has landed
        until = starts[np.minimum(index, len(starts) - 1)] - times
        unload = np.clip(1 - until / (0.5 * self.beat_s), 0, 1) * (until > 0)
        load = 0.15 + 0.85 * np.minimum(1 - swing, 1 - 0.8 * unload**2)
        return _Foot(at, flat[:, 2], 0.9 * lift, load)


@dataclass(frozen=True, eq=False)
class _Sway:
    """The trunk's movement to the beat; amplitudes and phases are drawn once."""

    beat_s: float
    size: Array
    phase: Array

    @classmethod
    def draw(cls, rng: np.random.Generator, beat_s: float) -> _Sway:
        return cls(beat_s, rng.uniform(0.4, 1.0, 12), rng.uniform(0, 2 * np.pi, 12))

    def wave(self, times: Array, index: int, beats: float) -> Array:
        return self.size[index] * np.sin(2 * np.pi * times / (beats * self.beat_s) + self.phase[index])

    def pelvis(self, times: Array, feet: tuple[_Foot, _Foot], share: Array) -> Rotation:
        """The pelvis' orientation in the world; share (N,) is the left foot's share of the weight."""
        yaw = (feet[0].yaw + feet[1].yaw) / 2 + 0.16 * self.wave(times, 0, 2)
        roll = 0.07 * self.wave(times, 1, 2) + 0.10 * (share - 0.5)
        pitch = 0.05 + 0.05 * self.wave(times, 2, 4)
        return Rotation.from_euler("YXZ", np.column_stack([yaw, pitch, roll]))

    def drop(self, times: Array) -> Array:
        """How far bending the knees on the beat lowers the pelvis, metres."""
        slow = 0.04 * (1 + self.wave(times, 3, 8))
        return 0.02 + slow + 0.030 * (1 - np.cos(2 * np.pi * times / self.beat_s)) * self.size[4]

    def spine(self, times: Array) -> dict[int, Rotation]:
        """Local rotations of the spine, neck and head joints."""
        turns = {}
        for index, joint in enumerate((3, 6, 9)):
            pitch = 0.04 + 0.06 * self.wave(times, 5, 4) + 0.03 * self.wave(times, 5 + index, 1)
            yaw = -0.07 * self.wave(times, 0, 2) + 0.06 * self.wave(times, 8, 8)
            roll = -0.05 * self.wave(times, 1, 2)
            turns[joint] = Rotation.from_euler("YXZ", np.column_stack([yaw, pitch, roll]))
        nod = np.column_stack(
            [0.18 * self.wave(times, 9, 8), -0.10 + 0.08 * self.wave(times, 10, 1), 0.08 * self.wave(times, 11, 4)]
        )
        turns[12] = turns[15] = Rotation.from_euler("YXZ", nod)
        return turns


def _pelvis_path(times: Array, steps: _Footsteps, sway: _Sway, rest: Array, floor: float) -> tuple[Array, Array]:
    """The left foot's share of weight (N,), and the pelvis' path (N, 3): between the feet, as high as legs allow."""
    feet = steps.feet(times)
    share = 0.15 + 0.7 * uniform_filter1d(feet[0].load, int(0.3 * _GRID_HZ))
    middle = share[:, None] * feet[0].at + (1 - share)[:, None] * feet[1].at
    turn = sway.pelvis(times, feet, share).as_matrix()
    limit = np.full(len(times), rest[0, 1] - floor)
    for side, foot in enumerate(feet):
        hip, knee, ankle = rest[1 + side], rest[4 + side], rest[7 + side]
        length = 0.995 * (np.linalg.norm(knee - hip) + np.linalg.norm(ankle - knee))
        offset = turn @ (hip - rest[0])
        target = foot.at + _ankle_offset(foot, ankle[1] - floor)
        across = np.sum((middle + offset - target)[:, [0, 2]] ** 2, axis=1)
        limit = np.minimum(limit, target[:, 1] + np.sqrt(np.maximum(length**2 - across, 0.09)) - offset[:, 1])
    window = int(0.25 * _GRID_HZ) | 1
    height = uniform_filter1d(minimum_filter1d(limit, window), window) - sway.drop(times)
    return share, np.column_stack([middle[:, 0], height, middle[:, 2]])


def _about(axis: str, angles: Array) -> Array:
    """(N, 3, 3) rotations about one axis."""
    return Rotation.from_euler(axis, angles[:, None]).as_matrix()


def _ankle_offset(foot: _Foot, height: float) -> Array:
    """From the sole's reference point to the ankle, as the sole pitches about its ball."""
    ball = 0.12
    back, up = ball * (1 - np.cos(foot.pitch)) - height * np.sin(-foot.pitch), ball * np.sin(foot.pitch)
    return np.column_stack([back * np.sin(foot.yaw), up + height * np.cos(foot.pitch), back * np.cos(foot.yaw)])


def _leg(
    rest: Array, side: int, pelvis_at: Array, pelvis: Array, foot: _Foot, ankle_height: float
) -> tuple[Array, Array, Array, Array]:
    """Local hip, knee, ankle and toe rotations (N, 3, 3) that put the ankle where the foot needs it."""
    hip, knee, ankle = rest[1 + side], rest[4 + side], rest[7 + side]
    upper, lower = knee - hip, ankle - knee
    target = foot.at + _ankle_offset(foot, ankle_height)
    start = pelvis_at + pelvis @ (hip - rest[0])
    reach = target - start
    # bend the knee about x until the rest leg is as long as the reach: |u + Rx(a) l| = d, with a >= 0
    flat = upper[1] * lower[1] + upper[2] * lower[2]
    cross = upper[2] * lower[1] - upper[1] * lower[2]
    wanted = (np.sum(reach**2, 1) - upper @ upper - lower @ lower) / 2 - upper[0] * lower[0]
    size, phase = np.hypot(flat, cross), np.arctan2(cross, flat)
    bend = phase + np.arccos(np.clip(wanted / size, -1, 1))
    knee_turn = _about("x", bend)
    leg = upper + knee_turn @ lower
    forward = np.column_stack([np.sin(foot.yaw), np.zeros(len(bend)), np.cos(foot.yaw)])
    forward = forward + 0.6 * pelvis[:, :, 2]  # the knee points between the toes and the pelvis' front
    hip_world = _frame(reach, forward) @ _frame(leg, np.broadcast_to([0.0, 0.0, 1.0], leg.shape)).transpose(0, 2, 1)
    sole = Rotation.from_euler("YX", np.column_stack([foot.yaw + (0.12 - 0.24 * side), foot.pitch])).as_matrix()
    toe = _about("x", -0.6 * foot.pitch)
    return (
        pelvis.transpose(0, 2, 1) @ hip_world,
        knee_turn,
        (hip_world @ knee_turn).transpose(0, 2, 1) @ sole,
        toe,
    )


def _frame(along: Array, toward: Array) -> Array:
    """(N, 3, 3) orthonormal frames: first column along `along`, second as close to `toward` as possible."""
    first = along / np.linalg.norm(along, axis=1, keepdims=True)
    second = toward - np.sum(toward * first, 1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=2)


@dataclass(frozen=True, eq=False)
class _ArmKeys:
    times: Array
    upper: Rotation
    bend: Array


def _paired(rng: np.random.Generator) -> tuple[np.random.Generator, np.random.Generator]:
    """Generators for both arms; often the same stream, so that the arms mirror each other."""
    seed = int(rng.integers(2**31))
    same = rng.random() < 0.5
    return np.random.default_rng(seed), np.random.default_rng(seed if same else seed + 1)


def _arm_keys(rng: np.random.Generator, beat_s: float, end: float, sign: int) -> _ArmKeys:
    """Arm poses on every second beat or so, never the same twice in a row."""
    names = list(_ARMS)
    times, turns, bends = [-2.0 * beat_s], [], []
    name = "low"
    while True:
        upper, fore = (np.array(direction) * (sign, 1, 1) for direction in _ARMS[name])
        upper = upper + rng.normal(0, 0.06, 3)
        turn, bend = _arm_pose(upper, fore, sign)
        turns.append(turn)
        bends.append(bend)
        if times[-1] > end + 2:
            break
        name = str(rng.choice([other for other in names if other != name]))
        times.append(times[-1] + beat_s * float(rng.choice([1, 2, 2, 4])))
    return _ArmKeys(np.array(times), Rotation.concatenate(turns), np.array(bends))


def _arm_pose(upper: Array, fore: Array, sign: int) -> tuple[Rotation, float]:
    """Shoulder rotation in the chest's frame and elbow angle; at rest the arm lies along x and bends toward +z."""
    upper, fore = upper / np.linalg.norm(upper), fore / np.linalg.norm(fore)
    hinge = np.cross(upper, fore)
    hinge /= np.linalg.norm(hinge)
    goal = np.column_stack([upper, hinge, np.cross(upper, hinge)])
    along, axis = np.array([sign, 0.0, 0.0]), np.array([0.0, -sign, 0.0])
    rest = np.column_stack([along, axis, np.cross(along, axis)])
    return Rotation.from_matrix(goal @ rest.T), float(np.arccos(np.clip(upper @ fore, -1, 1)))


def _arm(keys: _ArmKeys, times: Array, sign: int) -> tuple[Array, Array, Array]:
    """Local collar, shoulder and elbow rotations (N, 3, 3)."""
    index = np.clip(np.searchsorted(keys.times, times, side="right") - 1, 0, len(keys.times) - 2)
    start, stop = keys.times[index], keys.times[index + 1]
    # arrive early and hold: a pose is hit on the beat
    progress = np.clip((times - start) / (0.8 * (stop - start)), 0, 1)
    eased = progress**3 * (progress * (6 * progress - 15) + 10)
    shoulder = Slerp(keys.times, keys.upper)(start + eased * (stop - start))
    bend = keys.bend[index] + eased * (keys.bend[index + 1] - keys.bend[index])
    elevation = np.clip(shoulder.apply([sign, 0.0, 0.0])[:, 1], -1, 1)
    collar = _about("z", sign * 0.22 * np.maximum(elevation + 0.2, 0))
    elbow = _about("y", -sign * bend)
    return collar, collar.transpose(0, 2, 1) @ shoulder.as_matrix(), elbow
