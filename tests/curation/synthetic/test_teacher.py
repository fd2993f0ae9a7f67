"""The small MoGe-2 that is shipped: loaded as any teacher is, and right enough about the embedded world."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from curation.records import Frames
from curation.settings import TeacherSettings
from curation.shards.codec import encode_jpeg
from curation.synthetic.teacher import NAME, NUM_TOKENS, WEIGHTS
from curation.synthetic.teacher.data import SIZES, Pictures, read_scenes, scene, write_scenes
from curation.teach.small_backbone import BACKBONE, register
from curation.teach.teacher import check_teacher, load_teacher

pytest.importorskip("moge")


def test_it_loads_as_any_checkpoint_does():
    from moge.model.v2 import MoGeModel

    register()
    network = MoGeModel.from_pretrained(WEIGHTS)
    assert WEIGHTS.stat().st_size <= 5_000_000
    assert network.encoder.backbone_name == BACKBONE
    assert sum(p.numel() for p in network.parameters()) <= 2_500_000


@pytest.fixture(scope="module")
def fresh() -> Pictures:
    return scene(990_003)


def test_it_knows_the_depth_of_fresh_renders(fresh: Pictures):
    from curation.synthetic.teacher.train import teacher_errors

    for made in (fresh, scene(990_005)):
        one = Pictures(made.rgb[:1], made.depth_m[:1], made.intrinsics[:1])
        [error] = teacher_errors(WEIGHTS, one)
        assert error["affine"] < 0.2 and error["metric"] < 0.5 and error["missing"] < 0.1


def test_its_camera_is_that_of_the_picture_also_on_a_stretched_grid(fresh: Pictures):
    """With one focal length for both axes, each would be off by three percent or more."""
    teacher = load_teacher(TeacherSettings(model=str(WEIGHTS), name=NAME, num_tokens=NUM_TOKENS, device="cpu"))
    _, height, width, _ = fresh.rgb.shape
    focal = []
    for grid in (width, width - 14):
        shown = [cv2.resize(rgb, (grid, height), interpolation=cv2.INTER_AREA) for rgb in fresh.rgb]
        jpeg = tuple(encode_jpeg(rgb) for rgb in shown)
        answer = teacher(Frames(grid, height, np.arange(len(jpeg)) / 6, jpeg, grid / width), "0" * 16)
        focal.append(answer.intrinsics[:, [0, 1], [0, 1]] * (width / grid, 1))
    np.testing.assert_allclose(focal[1], focal[0], rtol=0.01)


def test_provenance_says_what_it_is():
    settings = check_teacher(TeacherSettings(model=str(WEIGHTS), name=NAME, num_tokens=NUM_TOKENS, device="cpu"))
    provenance = load_teacher(settings).provenance
    assert provenance["name"] == "synthetic-moge" and provenance["model"] == "synthetic-moge.pt"


def test_scenes_are_those_of_their_seed_and_points_lie_behind_their_pixels(tmp_path: Path):
    from curation.synthetic.teacher.train import point_maps

    paths = write_scenes(tmp_path, 1, 41, workers=1)
    [(size, pictures)] = read_scenes(paths).items()
    again = scene(41)
    assert size in SIZES and pictures.rgb.shape[1:3] == size[::-1]
    assert np.array_equal(pictures.rgb, again.rgb) and np.array_equal(pictures.depth_m, again.depth_m)
    points = point_maps(pictures.depth_m, pictures.intrinsics)
    v, u = np.nonzero(pictures.depth_m[0] > 0)
    seen = points[0, v, u] @ pictures.intrinsics[0].T
    assert np.allclose(seen[:, :2] / seen[:, 2:], np.column_stack([u, v]) + 0.5, atol=1e-2)
    assert np.isinf(points[0][pictures.depth_m[0] == 0]).any(-1).all()


@pytest.mark.slow
def test_the_same_seed_and_steps_give_the_same_weights(tmp_path: Path):
    import torch

    from curation.synthetic.teacher.train import train

    states = []
    for _ in range(2):
        checkpoint = torch.load(train(tmp_path, 1, steps=1, workers=1), weights_only=True)
        states.append(checkpoint["model"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    with pytest.raises(ValueError, match="either"):
        train(tmp_path, 1)
