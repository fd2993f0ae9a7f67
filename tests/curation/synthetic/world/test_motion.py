"""Dances: planted feet, nothing through the floor, limbs outside the trunk, independent of the frame rate."""

import numpy as np
import pytest

from curation.render.body import LANDMARKS, PARENTS, global_rotations, load_body, pose_body, rotation_matrices
from curation.synthetic.world.motion import Place, dance


def joints_of(motion):
    """(N, 24, 3) by forward kinematics alone, without the skin."""
    rest = load_body().rest_joints(motion.betas)
    placed = np.empty((len(motion.pose), 24, 3))
    for frame, pose in zip(placed, motion.pose, strict=True):
        world = global_rotations(rotation_matrices(pose))
        frame[0] = rest[0]
        for joint, parent in list(enumerate(PARENTS))[1:]:
            frame[joint] = frame[parent] + world[parent] @ (rest[joint] - rest[parent])
    return placed + motion.transl[:, None]


@pytest.mark.parametrize("seed", range(2))
def test_feet_stand_on_the_floor_and_do_not_slide(seed):
    body, times = load_body(), np.arange(60) / 30
    motion = dance(body, np.random.default_rng(seed).normal(0, 0.8, 10), times, seed)
    posed = [pose_body(body, motion.betas, p, t) for p, t in zip(motion.pose, motion.transl, strict=True)]
    lowest = np.array([one.vertices[:, 1].min() for one in posed])
    assert lowest.min() > -0.005 and lowest.max() < 0.005  # someone always stands, no one sinks
    still = []
    for side in (0, 1):
        foot = np.array([one.joints[[7 + side, 10 + side]] for one in posed])
        still.append(np.linalg.norm(np.diff(foot, axis=0), axis=2).max(1) < 1e-9)
        heel = np.array([one.vertices[LANDMARKS["left_heel" if side == 0 else "right_heel"]] for one in posed])
        assert np.ptp(heel[1:][still[-1]][:, 1]) < 0.03  # skin gives a little where the ankle bends
        assert 0.25 < still[-1].mean() < 1.0
    assert (still[0] | still[1]).mean() > 0.95


def segment_distance(a, b, c, d):
    """Least distance between segments ab and cd, (N,), by sampling: good to a few millimetres."""
    s = np.linspace(0, 1, 15)[:, None, None]
    first, second = a + s * (b - a), c + s * (d - c)
    return np.linalg.norm(first[:, None] - second[None], axis=-1).min((0, 1))


def test_arms_stay_out_of_the_trunk_and_legs_apart():
    inside, crossed, total = 0, 0, 0
    for seed in range(8):
        joints = joints_of(dance(load_body(), np.zeros(10), np.arange(60) / 10, seed))
        pelvis, chest = joints[:, 3], joints[:, 9]
        for elbow, wrist, hand in ((18, 20, 22), (19, 21, 23)):
            fore = segment_distance(joints[:, elbow], joints[:, wrist], pelvis, chest)
            tip = segment_distance(joints[:, wrist], joints[:, hand], pelvis, chest)
            inside += int((np.minimum(fore, tip) < 0.07).sum())
        crossed += int((segment_distance(joints[:, 4], joints[:, 7], joints[:, 5], joints[:, 8]) < 0.05).sum())
        total += len(joints)
    assert inside <= 0.01 * 2 * total
    assert crossed <= 0.02 * total


def test_frame_rate_and_length_do_not_matter():
    body = load_body()
    slow = dance(body, np.zeros(10), np.arange(10) / 5, 3)
    fast = dance(body, np.zeros(10), np.arange(150) / 25, 3)
    np.testing.assert_allclose(slow.pose, fast.pose[:50:5], atol=1e-9)
    np.testing.assert_allclose(slow.transl, fast.transl[:50:5], atol=1e-9)


def test_it_dances_where_it_is_told_and_really_moves():
    joints = joints_of(dance(load_body(), np.zeros(10), np.arange(80) / 10, 5, Place(x=2.0, z=-1.0, radius=0.2)))
    assert np.abs(joints[:, 0, [0, 2]].mean(0) - (2.0, -1.0)).max() < 0.35
    assert np.linalg.norm(joints[:, 22] - joints[:, 0], axis=1).std() > 0.05
    assert np.ptp(joints[:, 22, 1]) > 0.3
