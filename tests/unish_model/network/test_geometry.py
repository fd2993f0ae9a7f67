from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import roma
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares

from tests.support.examples import examples
from tests.support.tiny_network import gap, random_input
from unish_model.network import geometry, released

SEEDS = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotations(seed: int, *shape: int) -> torch.Tensor:
    return roma.rotvec_to_rotmat(2 * normal(seed, *shape, 3))


@given(SEEDS)
@settings(max_examples=examples(30), deadline=None)
def test_nearest_rotation_is_the_procrustes_solution_with_its_gradient(seed: int) -> None:
    matrix = normal(seed, 20, 3, 3)
    singular = torch.linalg.svdvals(matrix)
    sign = torch.linalg.det(matrix).sign()
    matrix = matrix[(singular[:, 1] + sign * singular[:, 2]) > 0.05]  # elsewhere the answer is not unique
    matrix.requires_grad_()
    ours, theirs = geometry.nearest_rotation(matrix), roma.special_procrustes(matrix)
    assert torch.allclose(ours, theirs, atol=1e-9)
    weights = normal(seed + 1, *ours.shape)
    (mine,) = torch.autograd.grad((ours * weights).sum(), matrix)
    (reference,) = torch.autograd.grad((theirs * weights).sum(), matrix)
    assert torch.allclose(mine, reference, atol=1e-5, rtol=1e-4)


@given(SEEDS)
@settings(max_examples=examples(20), deadline=None)
def test_inverse_se3_undoes_a_transform(seed: int) -> None:
    transform = geometry.se3(rotations(seed, 5), normal(seed, 5, 3))
    points = normal(seed + 1, 5, 3)
    moved = geometry.transform_points(geometry.inverse_se3(transform), geometry.transform_points(transform, points))
    assert torch.allclose(moved, points, atol=1e-12)


def test_rotations_of_the_release_agree_with_ours_away_from_pi() -> None:
    matrix = rotations(3, 500)
    ours, theirs = geometry.axis_angle(matrix), released.axis_angle(matrix)
    assert gap(geometry.rotation_from_axis_angle(theirs), matrix) < 1e-6
    assert gap(geometry.rotation_from_axis_angle(ours), matrix) < 1e-9


def test_unprojected_pixels_project_onto_themselves() -> None:
    depth = 1 + random_input("depth", 2, 5, 7).abs()
    intrinsics = torch.tensor([[6.0, 0, 3.2], [0, 5.0, 2.9], [0, 0, 1]]).expand(2, 3, 3)
    points = geometry.unproject(depth, intrinsics)
    pixels = geometry.project(points.flatten(1, 2), intrinsics).view(2, 5, 7, 2)
    assert gap(pixels, geometry.pixel_grid(5, 7).expand(2, -1, -1, -1)) < 1e-5
    assert torch.equal(points[..., 2], depth)


def pinhole_points(focal: float, shift: float, height: int = 40, width: int = 60) -> torch.Tensor:
    """Points of a camera whose z lacks `shift`."""
    depth = 2 + random_input("surface", height, width).abs()
    pixels = torch.tensor([[focal * geometry.half_diagonal(height, width)]])
    points = geometry.unproject(depth[None], geometry.intrinsics_matrix(pixels[0], height, width))
    return points - torch.tensor([0, 0, shift])


@given(st.floats(0.4, 4), st.floats(-1, 1.5))
@settings(max_examples=examples(20), deadline=None)
def test_focal_and_shift_of_a_pinhole_are_found(focal: float, shift: float) -> None:
    fit = geometry.recover_focal_shift(pinhole_points(focal, shift))
    assert fit.valid.all()
    assert abs(fit.focal.item() - focal) < 2e-3 * focal
    assert abs(fit.shift.item() - shift) < 5e-3


def test_given_intrinsics_fix_the_shift_even_off_centre() -> None:
    height, width, shift = 40, 60, 0.4
    intrinsics = torch.tensor([[50.0, 0, 20.0], [0, 70.0, 25.0], [0, 0, 1]])
    points = geometry.unproject(2 + random_input("surface", height, width).abs(), intrinsics)
    fit = geometry.recover_focal_shift(points - torch.tensor([0, 0, shift]), intrinsics=intrinsics)
    assert abs(fit.shift.item() - shift) < 1e-3


def test_too_few_points_are_told_and_guarded() -> None:
    points = pinhole_points(1.0, 0.2)
    mask = torch.zeros(1, 40, 60, dtype=torch.bool)
    fit = geometry.recover_focal_shift(points, mask)
    assert (fit.focal.item(), fit.shift.item(), fit.valid.item()) == (1.0, 0.0, False)


@pytest.mark.parametrize("seed", range(3))
def test_guarded_fits_keep_points_in_front_and_focal_positive(seed: int) -> None:
    points = normal(seed, 4, 30, 40, 3).float()
    fit = geometry.recover_focal_shift(points)
    used = fit.valid
    assert (fit.focal > 0).all()
    sampled = torch.nn.functional.interpolate(points[..., 2][:, None], (geometry.GRID, geometry.GRID))
    assert ((sampled.amin((1, 2, 3)) + fit.shift)[used] > -1e-6).all()


@given(SEEDS)
@settings(max_examples=examples(20), deadline=None)
def test_levenberg_marquardt_stops_where_scipy_stops(seed: int) -> None:
    """Three hard one-parameter problems at once, each against SciPy's MINPACK by itself."""
    a, b = normal(seed, 3, 40), normal(seed + 1, 3, 40)

    def residual(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(a * x[:, None]) * b + (x[:, None] - 0.7) * a

    ours = geometry.levenberg_marquardt(residual, torch.zeros(3, dtype=torch.float64), ftol=1e-3)
    for row in range(3):

        def single(x: np.ndarray, row: int = row) -> np.ndarray:
            return residual(torch.full((3,), float(x[0]), dtype=torch.float64))[row].numpy()

        reference = least_squares(single, x0=0.0, ftol=1e-3, method="lm")
        assert ours[row].item() == pytest.approx(float(reference.x[0]), abs=1e-5)


@given(SEEDS, st.booleans())
@settings(max_examples=examples(25), deadline=None)
def test_roe_scale_cannot_be_improved(seed: int, points: bool) -> None:
    shape = (4, 15, 3) if points else (4, 15)
    source, target = normal(seed, *shape), normal(seed + 1, *shape)
    weight = normal(seed + 2, 4, 15).abs() * (normal(seed + 3, 4, 15) > -1)
    scale = geometry.roe_scale(source, target, weight)

    def cost(s: torch.Tensor) -> torch.Tensor:
        wide = s.view(-1, *[1] * (source.ndim - 1))
        error = (wide * source - target).abs()
        return ((error.sum(-1) if points else error) * weight).sum(-1)

    best = cost(scale)
    for other in (target / source).flatten(1).unbind(1):  # the optimum of a piecewise linear cost is at a kink
        assert (best <= cost(other) + 1e-9).all()


@given(SEEDS)
@settings(max_examples=examples(15), deadline=None)
def test_roe_affine_is_the_best_line_of_all(seed: int) -> None:
    source = normal(seed, 2, 14)
    target = 2 * source - 1 + normal(seed + 1, 2, 14) ** 5
    weight = normal(seed + 2, 2, 14).abs()
    weight[:, 10:] = 0
    target[:, 10:] = 1e6

    def cost(scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return (weight * (scale[:, None] * source + shift[:, None] - target).abs()).sum(-1)

    best = cost(*geometry.roe_affine(source, target, weight, step=4))
    for i, j in itertools.combinations(range(10), 2):  # a best L1 line passes through two of the samples
        slope = (target[:, i] - target[:, j]) / (source[:, i] - source[:, j])
        assert (best <= cost(slope, target[:, i] - slope * source[:, i]) + 1e-9).all()


def test_roe_affine_of_a_single_sample_is_the_identity() -> None:
    weight = torch.tensor([1.0, 0, 0])
    scale, shift = geometry.roe_affine(torch.rand(3), torch.rand(3), weight)
    assert (scale.item(), shift.item()) == (1.0, 0.0)


def test_body_to_world_about_the_pelvis_moves_every_vertex_rigidly() -> None:
    """A body that turns about its pelvis, carried by the camera, must be the carried body."""
    pelvis, translation = normal(1, 3), normal(2, 3)
    pose = rotations(3, 24)
    c2w = geometry.se3(rotations(4), normal(5, 3))
    vertices = normal(6, 10, 3)

    def posed(root: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (vertices - pelvis) @ root.mT + pelvis + t

    world_pose, world_translation = geometry.body_to_world(pose, translation, c2w, pelvis)
    expected = geometry.transform_points(c2w, posed(pose[0], translation))
    assert torch.allclose(posed(world_pose[0], world_translation), expected, atol=1e-12)
    assert torch.equal(world_pose[1:], pose[1:])
    _, inexact = geometry.body_to_world(pose, translation, c2w)
    assert torch.allclose(inexact - world_translation, pelvis - c2w[:3, :3] @ pelvis, atol=1e-12)


def test_half_diagonal_is_the_unit_of_the_image_plane() -> None:
    corner = geometry.image_plane(300, 400)[-1, -1] * geometry.half_diagonal(300, 400)
    assert corner.tolist() == pytest.approx([199.5, 149.5])
    assert geometry.half_diagonal(300, 400) == pytest.approx(math.hypot(300, 400) / 2)
