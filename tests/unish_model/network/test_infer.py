from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.support.tiny_network import Clip, gap, random_input
from unish_model.network import geometry, released
from unish_model.network.body import Body
from unish_model.network.geometry import FocalShift
from unish_model.network.model import Prediction, UniSH, concatenate


def tensors(prediction: Prediction) -> dict[str, torch.Tensor]:
    found = {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}
    fit = found.pop("focal_shift")
    return found | {field.name: getattr(fit, field.name) for field in dataclasses.fields(FocalShift)}


@pytest.fixture
def prediction(tiny: UniSH, clip: Clip) -> Prediction:
    return tiny.infer(*clip.inputs)


@pytest.fixture
def body() -> Body:
    """A body with SMPL's sizes and no likeness to anyone."""
    import numpy as np

    rng = np.random.default_rng(0)
    weights = rng.random((6890, 24)) ** 8
    regressor = rng.random((24, 6890)) ** 20
    return Body(
        {
            "v_template": rng.standard_normal((6890, 3)),
            "shapedirs": 0.1 * rng.standard_normal((6890, 3, 10)),
            "posedirs": 0.001 * rng.standard_normal((6890, 3, 207)),
            "J_regressor": regressor / regressor.sum(1, keepdims=True),
            "weights": weights / weights.sum(1, keepdims=True),
            "kintree_table": np.stack([np.arange(-1, 23), np.arange(24)]),
            "f": rng.integers(0, 6890, (13776, 3)),
        }
    )


def test_a_batch_equals_its_clips(tiny: UniSH, clip: Clip, prediction: Prediction) -> None:
    singles = [tensors(tiny.infer(*clip[slice(i, i + 1)].inputs)) for i in range(2)]
    for name, value in tensors(prediction).items():
        other = torch.cat([single[name] for single in singles])
        assert value.shape == other.shape, name
        assert gap(value.float(), other.float()) < 1e-4, name


def test_released_mode_takes_batches_too(tiny: UniSH, clip: Clip) -> None:
    both = tiny.infer(*clip.inputs, compat="released")
    second = tiny.infer(*clip[1:].inputs, compat="released")
    assert gap(both.depth[1:], second.depth) < 1e-4


def test_inputs_and_weights_are_left_alone_and_outputs_do_not_alias(tiny: UniSH, clip: Clip) -> None:
    before = [part.clone() for part in clip.inputs]
    first = tiny.infer(*clip.inputs)
    kept = {name: value.clone() for name, value in tensors(first).items()}
    second = tiny.infer(*clip.inputs)
    second.depth.zero_()
    second.local_points.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, clip.inputs, strict=True))
    assert all(torch.equal(kept[name], value) for name, value in tensors(first).items())
    assert second.point_map.abs().sum() > 0 and second.world_points.abs().sum() > 0


def test_the_metric_scale_is_the_mean_distance_of_valid_points(tiny: UniSH, clip: Clip) -> None:
    """What ties training to inference: s is metres, the unit follows from the points."""
    prediction = tiny.infer(*clip.inputs, compat="released")
    confident = prediction.confidence > 0.1
    distance = prediction.local_points.norm(dim=-1)
    for item in range(2):
        assert distance[item][confident[item]].mean().item() == pytest.approx(
            prediction.scale[item, 0].item(), rel=1e-4
        )


def test_one_positive_focal_per_clip_and_one_shape_per_video(prediction: Prediction) -> None:
    focal = prediction.intrinsics[..., 0, 0]
    assert (focal > 0).all()
    assert torch.equal(focal, focal[:, :1].expand_as(focal))
    assert torch.equal(prediction.betas, prediction.betas[:, :1].expand_as(prediction.betas))
    assert gap(prediction.betas[:, 0], prediction.frame_betas.mean(1)) < 1e-6


def test_every_output_agrees_about_the_shift(tiny: UniSH, clip: Clip, prediction: Prediction) -> None:
    assert gap(prediction.local_points[..., 2], prediction.depth) < 1e-6
    assert torch.equal(prediction.point_map[..., 2], prediction.depth)
    world = geometry.transform_points(prediction.c2w[:, :, None, None], prediction.local_points)
    assert gap(prediction.world_points, world) < 1e-6
    moved = geometry.transform_points(prediction.c2w, prediction.trans_cam)
    assert gap(prediction.trans_world, moved) < 1e-6
    assert not (prediction.mask & (prediction.depth <= 0)).any()


def test_the_default_world_pose_is_right_and_the_released_one_is_not(tiny: UniSH, clip: Clip) -> None:
    for compat, close in (("default", True), ("released", False)):
        prediction = tiny.infer(*clip.inputs, compat=compat)
        turned = prediction.c2w[..., :3, :3] @ prediction.pose_cam[..., 0, :, :]
        assert (gap(prediction.pose_world[..., 0, :, :], turned) < 1e-5) is close
        assert torch.equal(prediction.pose_world[..., 1:, :, :], prediction.pose_cam[..., 1:, :, :])


def test_given_intrinsics_are_honoured(tiny: UniSH, clip: Clip, prediction: Prediction) -> None:
    height, width = clip.images.shape[-2:]
    given = torch.tensor([[90.0, 0, width / 2 + 3], [0, 80.0, height / 2 - 2], [0, 0, 1]]).expand(2, 1, 3, 3)
    ours = tiny.infer(*clip.inputs, intrinsics=given)
    assert torch.equal(ours.intrinsics, given.expand(2, 3, 3, 3))
    assert gap(ours.pose_cam, prediction.pose_cam) > 1e-4  # the boxes are seen through another camera
    assert gap(ours.point_map, geometry.unproject(ours.depth, ours.intrinsics)) < 1e-6
    with torch.no_grad():
        shifted = clip.bbox - torch.tensor([3.0, -2.0, 0.0])
        direct = tiny(clip.images, clip.patches, shifted / 85)
    assert gap(ours.pose_cam, direct.human.rotations) < 1e-5
    with pytest.raises(ValueError, match="released"):
        tiny.infer(*clip.inputs, intrinsics=given, compat="released")


def test_intrinsics_that_were_estimated_change_nothing_when_given(
    tiny: UniSH, clip: Clip, prediction: Prediction
) -> None:
    again = tiny.infer(*clip.inputs, intrinsics=prediction.intrinsics)
    assert gap(again.depth, prediction.depth) < 1e-4
    assert gap(again.pose_cam, prediction.pose_cam) < 1e-4


def test_low_memory_and_half_precision_runs_predict_the_same(tiny: UniSH, clip: Clip, prediction: Prediction) -> None:
    stepped = tiny.infer(*clip.inputs, frame_step=1)
    assert gap(stepped.depth, prediction.depth) < 1e-4
    half = tiny.infer(*clip.inputs, autocast=torch.bfloat16)
    assert half.depth.dtype == torch.float32
    assert 0 < gap(half.betas, prediction.betas) < 5e-2


def test_windows_are_laid_behind_each_other_with_one_shape(tiny: UniSH, clip: Clip) -> None:
    parts = [tiny.infer(*(x[:1, window] for x in clip.inputs)) for window in (slice(0, 2), slice(2, 3))]
    whole = concatenate(parts)
    assert whole.depth.shape[1] == whole.focal_shift.shift.shape[1] == 3
    expected = torch.cat([part.frame_betas for part in parts], 1).mean(1)
    assert gap(whole.betas[:, 0], expected) < 1e-6
    assert torch.equal(whole.betas, whole.betas[:, :1].expand_as(whole.betas))
    theirs = concatenate(parts, compat="released")
    assert torch.equal(theirs.betas, torch.cat([part.betas for part in parts], 1))


def test_a_body_makes_the_world_translation_exact(tiny: UniSH, clip: Clip, body: Body) -> None:
    exact = tiny.infer(*clip.inputs, body=body)
    vertices, joints = body(exact.pose_cam, exact.betas, exact.trans_cam)
    world, world_joints = body(exact.pose_world, exact.betas, exact.trans_world)
    carried = geometry.transform_points(exact.c2w[:, :, None], vertices)
    assert gap(world, carried) < 1e-5
    assert gap(world_joints, geometry.transform_points(exact.c2w[:, :, None], joints)) < 1e-5
    released_translation = tiny.infer(*clip.inputs).trans_world
    assert gap(released_translation, exact.trans_world) > 1e-4


def test_a_clip_without_confident_points_still_has_a_size(tiny: UniSH, clip: Clip) -> None:
    prediction = tiny.infer(*clip.inputs, confidence=1.0)
    assert not prediction.mask.any()
    assert all(value.isfinite().all() for value in tensors(prediction).values())


def test_infer_refuses_to_drop_things_at_random(tiny: UniSH, clip: Clip) -> None:
    with pytest.raises(ValueError, match="eval"):
        tiny.train().infer(*clip.inputs)


def test_pelvis_is_the_first_joint_at_rest(body: Body) -> None:
    betas = random_input("betas", 4, 10)
    rest = torch.eye(3).expand(4, 24, 3, 3)
    _, joints = body(rest, betas, torch.zeros(4, 3))
    assert gap(body.pelvis(betas), joints[:, 0]) < 1e-5


def test_mistaken_root_is_the_identity_under_an_identity_camera() -> None:
    rotations = geometry.rotation_from_axis_angle(random_input("roots", 5, 24, 3))
    unchanged = released.mistaken_root(rotations, torch.eye(4).expand(5, 4, 4))
    assert gap(unchanged, rotations) < 1e-5
