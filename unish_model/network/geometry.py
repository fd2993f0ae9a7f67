"""Rotations, rigid transforms, pinhole cameras, focal and shift recovery, robust alignment. Pure functions of tensors.

Cameras look along +z with x right and y down. `c2w` maps camera coordinates to world coordinates; matrices are row
major and multiply column vectors. Nothing here has weights, reads files or changes its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import roma
import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor
from torch.nn import functional as F

# --- rotations ------------------------------------------------------------------------------------------------------


def rotation_from_6d(x: Float[Tensor, "*batch 6"]) -> Float[Tensor, "*batch 3 3"]:
    """A rotation from six numbers: the first three give the first column, the last three the second."""
    return roma.special_gramschmidt(x.unflatten(-1, (2, 3)).transpose(-1, -2))


def axis_angle(rotation: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3"]:
    """Axis times angle in [0, pi]. Its sign is arbitrary at exactly pi."""
    return roma.rotmat_to_rotvec(rotation)


def rotation_from_axis_angle(vector: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3 3"]:
    """The rotation about `vector` by its length in radians."""
    return roma.rotvec_to_rotmat(vector)


def _horn(m: Tensor) -> Tensor:
    """The symmetric 4x4 matrix whose top eigenvector is the quaternion (w, x, y, z) of the rotation nearest to m."""
    (xx, yx, zx), (xy, yy, zy), (xz, yz, zz) = ([m[..., i, j] for i in range(3)] for j in range(3))
    rows = (
        (xx + yy + zz, zy - yz, xz - zx, yx - xy),
        (zy - yz, xx - yy - zz, xy + yx, zx + xz),
        (xz - zx, xy + yx, yy - xx - zz, yz + zy),
        (yx - xy, zx + xz, yz + zy, zz - xx - yy),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def rotation_from_quaternion(q: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """The rotation of a quaternion (w, x, y, z) of any nonzero length."""
    w, x, y, z = F.normalize(q, dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def nearest_rotation(m: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3 3"]:
    """The rotation nearest to m in the Frobenius norm: U diag(1, 1, det) V^T of its singular values.

    A singular value decomposition synchronises a CUDA device with its host and cannot be exported to ONNX. Instead,
    repeated squaring in float64 finds the dominant eigenvector of Horn's matrix. One Newton step on the result carries
    the gradient, which equals that of the decomposition.
    """
    wide = m.double()
    with torch.no_grad():
        horn = _horn(wide)
        # shifted by at least the nuclear norm, so that the largest eigenvalue is also the largest in magnitude
        lift = math.sqrt(3.0) * wide.square().sum((-1, -2), keepdim=True).sqrt()
        power = horn + lift * torch.eye(4, dtype=wide.dtype, device=m.device)
        for _ in range(20):
            power = power / power.square().sum((-1, -2), keepdim=True).sqrt().clamp_min(1e-300)
            power = power @ power
        best = power.diagonal(dim1=-2, dim2=-1).argmax(-1)
        index = best[..., None, None].expand(*best.shape, 4, 1)
        base = rotation_from_quaternion(power.gather(-1, index)[..., 0])
    aligned = base.mT @ wide
    skew = aligned - aligned.mT
    twist = torch.stack((skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]), -1)
    stretch = aligned.detach()
    stretch = (stretch + stretch.mT) / 2
    eye = torch.eye(3, dtype=wide.dtype, device=m.device)
    system = stretch.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] * eye - stretch
    step = solve_3x3(system, twist)
    half = torch.cat((torch.ones_like(step[..., :1]), step / 2), -1)
    return (base @ rotation_from_quaternion(half)).to(m.dtype)


def solve_3x3(a: Float[Tensor, "*batch 3 3"], b: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    """Solve a x = b by cofactors; x is zero where a is singular."""
    first, second, third = a.unbind(-1)
    adjugate = torch.stack(
        (
            torch.linalg.cross(second, third, dim=-1),
            torch.linalg.cross(third, first, dim=-1),
            torch.linalg.cross(first, second, dim=-1),
        ),
        -2,
    )
    determinant = (first * adjugate[..., 0, :]).sum(-1, keepdim=True)
    size = a.square().sum((-1, -2)).sqrt()[..., None]
    regular = determinant.abs() > 1e-12 * size**3
    x = (adjugate * b[..., None, :]).sum(-1) / torch.where(regular, determinant, 1)
    return torch.where(regular, x, 0)


# --- rigid transforms -----------------------------------------------------------------------------------------------


def se3(rotation: Float[Tensor, "*batch 3 3"], translation: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 4 4"]:
    """The rigid transform that rotates, then translates."""
    top = torch.cat((rotation, translation[..., None]), -1)
    return torch.cat((top, F.pad(torch.zeros_like(top[..., :1, :3]), (0, 1), value=1.0)), -2)


def compose(a: Float[Tensor, "*#batch n n"], b: Float[Tensor, "*#batch n n"]) -> Float[Tensor, "*#batch n n"]:
    """The product of small matrices, computed elementwise because autocast would round an ordinary product."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(-2)


def rotate_points(
    rotation: Float[Tensor, "*#batch 3 3"], points: Float[Tensor, "*#batch 3"]
) -> Float[Tensor, "*#batch 3"]:
    """Rotate points; leading dimensions broadcast without a copy of the matrix for every point."""
    first, second, third = rotation.unbind(-1)
    x, y, z = points[..., :1], points[..., 1:2], points[..., 2:]
    return first * x + second * y + third * z


def inverse_se3(transform: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Inverse of rigid transforms, in closed form."""
    rotation = transform[..., :3, :3].mT
    return se3(rotation, -rotate_points(rotation, transform[..., :3, 3]))


def transform_points(
    transform: Float[Tensor, "*#batch 4 4"], points: Float[Tensor, "*#batch 3"]
) -> Float[Tensor, "*#batch 3"]:
    """Rotate and translate points; leading dimensions broadcast."""
    return rotate_points(transform[..., :3, :3], points) + transform[..., :3, 3]


def scale_translation(
    transform: Float[Tensor, "*batch 4 4"], scale: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch 4 4"]:
    """Multiply the translations of rigid transforms."""
    return se3(transform[..., :3, :3], transform[..., :3, 3] * scale[..., None])


def body_to_world(
    rotations: Float[Tensor, "*batch J 3 3"],
    translation: Float[Tensor, "*batch 3"],
    c2w: Float[Tensor, "*#batch 4 4"],
    pelvis: Float[Tensor, "*#batch 3"] | None = None,
) -> tuple[Float[Tensor, "*batch J 3 3"], Float[Tensor, "*batch 3"]]:
    """A posed SMPL body from camera to world coordinates.

    Returns the rotations with the root rotated, and the translation. SMPL rotates about its rest pelvis, so with
    `pelvis` the result is exact: t_w = R (J0 + t) + T - J0. Without it, t_w = R t + T, the released formula, which is
    off by (R - 1) J0.
    """
    turn = c2w[..., :3, :3]
    root = compose(turn, rotations[..., 0, :, :])[..., None, :, :]
    moved = transform_points(c2w, translation if pelvis is None else translation + pelvis)
    return torch.cat((root, rotations[..., 1:, :, :]), -3), moved if pelvis is None else moved - pelvis


# --- pinhole cameras ------------------------------------------------------------------------------------------------


def pixel_grid(height: int, width: int, device: torch.device | None = None) -> Float32[Tensor, "H W 2"]:
    """Pixel centres (x, y) = (column + 0.5, row + 0.5)."""
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def unproject(
    depth: Float[Tensor, "*batch H W"], intrinsics: Float[Tensor, "*#batch 3 3"]
) -> Float[Tensor, "*batch H W 3"]:
    """Depth and intrinsics in pixels to points in the camera frame; z is the depth."""
    height, width = depth.shape[-2:]
    grid = pixel_grid(height, width, depth.device)
    focal = torch.stack((intrinsics[..., 0, 0], intrinsics[..., 1, 1]), -1)[..., None, None, :]
    rays = (grid - intrinsics[..., None, None, :2, 2]) / focal
    return torch.cat((rays * depth[..., None], depth[..., None]), -1)


def project(
    points: Float[Tensor, "*batch N 3"], intrinsics: Float[Tensor, "*#batch 3 3"]
) -> Float[Tensor, "*batch N 2"]:
    """Points in the camera frame to pixels; z must be positive."""
    image = rotate_points(intrinsics[..., None, :, :], points)
    return image[..., :2] / image[..., 2:]


def half_diagonal(height: int, width: int) -> float:
    """Half the image diagonal in pixels: the unit of `FocalShift.focal`."""
    return math.hypot(height, width) / 2


def intrinsics_matrix(focal: Float[Tensor, "*batch"], height: int, width: int) -> Float[Tensor, "*batch 3 3"]:
    """Focal length in pixels to intrinsics with the principal point in the image centre."""
    zero, one = torch.zeros_like(focal), torch.ones_like(focal)
    rows = ((focal, zero, one * (width / 2)), (zero, focal, one * (height / 2)), (zero, zero, one))
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


# --- focal length and depth shift -----------------------------------------------------------------------------------

GRID = 64
"""Side of the grid of nearest-neighbour samples that focal and shift are fitted to."""


@dataclass(frozen=True)
class FocalShift:
    """The focal length and depth shift with which a point map projects onto its own pixels."""

    focal: Float32[Tensor, "*batch"]
    """Focal length in half image diagonals."""
    shift: Float32[Tensor, "*batch"]
    """Added to z, in the unit of the points."""
    valid: Bool[Tensor, "*batch"]
    """False where the points do not determine the camera; focal is then 1 and shift 0."""


def _trust_region_damping(
    slope: Tensor, curvature: Tensor, scale: Tensor, radius: Tensor, damping: Tensor, done: Tensor
) -> Tensor:
    """MINPACK's `lmpar`: the damping with which the step is as long as the trust region, within ten per cent.

    All (N,). Zero where the undamped step stays inside. `damping`: that of the last step, the starting value.
    """
    tiny = torch.finfo(slope.dtype).tiny
    newton = slope / curvature.square()
    length = scale * newton.abs()
    excess = length - radius
    inside = excess <= 0.1 * radius
    lower = torch.where(inside, 0, excess / radius * (curvature / scale).square())
    gradient = slope.abs() / scale
    upper = gradient / radius
    upper = torch.where(upper == 0, tiny / radius.clamp_max(0.1), upper)
    trial = damping.maximum(lower).minimum(upper)
    trial = torch.where(trial == 0, gradient / length.clamp_min(tiny), trial)
    settled = inside | done
    for _ in range(10):
        if bool(settled.all()):
            break
        trial = torch.where(trial == 0, (0.001 * upper).clamp_min(tiny), trial)
        stiffness = curvature.square() + trial * scale.square()
        length = scale * (slope / stiffness).abs()
        previous, excess = excess, length - radius
        settled = settled | (excess.abs() <= 0.1 * radius) | ((lower == 0) & (excess <= previous) & (previous < 0))
        correction = excess / radius * stiffness / scale.square()
        lower = torch.where(excess > 0, lower.maximum(trial), lower)
        upper = torch.where(excess < 0, upper.minimum(trial), upper)
        trial = torch.where(settled, trial, lower.maximum(trial + correction))
    return torch.where(inside, 0, trial)


def levenberg_marquardt(
    residual: Callable[[Float64[Tensor, " N"]], Float64[Tensor, "N M"]],
    start: Float64[Tensor, " N"],
    ftol: float,
    steps: int = 60,
) -> Float64[Tensor, " N"]:
    """Minimise the sum of squares of residual(x) for N independent problems, each with one parameter. No gradient.

    MINPACK's `lmder` as SciPy calls it (forward differences, column-norm scaling, factor 100), for all problems in
    parallel; a problem that has converged keeps its x. Trial points with an infinite residual are rejected. Each step:
    the slope, a damped move, its actual against its predicted gain, the next trust region.
    """
    tol = 1e-8  # SciPy's xtol and gtol
    x, r = start, residual(start)
    norm = r.square().sum(-1).sqrt()
    radius, damping = torch.full_like(x, float("nan")), torch.zeros_like(x)
    scale = torch.zeros_like(x)
    done = norm == 0
    tiny = torch.finfo(x.dtype).tiny
    for step in range(steps):
        h = 2.0**-26 * torch.where(x < 0, -1.0, 1.0) * x.abs().clamp_min(1.0)
        moved = x + h
        jacobian = (residual(moved) - r) / (moved - x)[:, None]
        slope = (jacobian * r).sum(-1)
        curvature = jacobian.square().sum(-1).sqrt()
        done = done | (curvature == 0) | ~curvature.isfinite() | (slope.abs() <= tol * curvature * norm)
        safe = torch.where(done, 1, curvature)
        scale = torch.maximum(scale, safe)
        if step == 0:
            radius = 100 * scale * x.abs()
            radius = torch.where(radius == 0, torch.full_like(radius, 100), radius)
        damping = torch.where(done, damping, _trust_region_damping(slope, safe, scale, radius, damping, done))
        move = -slope / (safe.square() + damping * scale.square())
        length = scale * move.abs()
        if step == 0:
            radius = radius.minimum(length)
        candidate = x + move
        r_new = residual(candidate)
        norm_new = r_new.square().sum(-1).sqrt()
        safe_norm = norm.clamp_min(tiny)
        actual = torch.where(0.1 * norm_new < norm, 1 - (norm_new / safe_norm).square(), -1)
        linear, damped = (safe * move.abs() / safe_norm).square(), damping * (length / safe_norm).square()
        predicted = linear + 2 * damped
        directional = -(linear + damped)
        ratio = torch.where(predicted > 0, actual / predicted.clamp_min(tiny), 0)
        shrink = torch.where(actual >= 0, 0.5, 0.5 * directional / (directional + 0.5 * actual))
        shrink = torch.where((0.1 * norm_new >= norm) | (shrink < 0.1), 0.1, shrink)
        poor, good = ratio <= 0.25, (damping == 0) | (ratio >= 0.75)
        new_radius = torch.where(poor, shrink * radius.minimum(10 * length), torch.where(good, 2 * length, radius))
        new_damping = torch.where(poor, damping / shrink, torch.where(good, 0.5 * damping, damping))
        radius, damping = torch.where(done, radius, new_radius), torch.where(done, damping, new_damping)
        accept = ~done & (ratio >= 1e-4)
        x = torch.where(accept, candidate, x)
        r = torch.where(accept[:, None], r_new, r)
        norm = torch.where(accept, norm_new, norm)
        done = done | ((actual.abs() <= ftol) & (predicted <= ftol) & (0.5 * ratio <= 1))
        done = done | (radius <= tol * scale * x.abs())
        if bool(done.all()):
            break
    return x


def image_plane(height: int, width: int, device: torch.device | None = None) -> Float32[Tensor, "H W 2"]:
    """Pixel centres relative to the image centre, in half image diagonals."""
    centre = torch.tensor((width / 2, height / 2), device=device)
    return (pixel_grid(height, width, device) - centre) / half_diagonal(height, width)


def _sample(x: Tensor) -> Tensor:
    """Samples (N, C, H, W) on the fitting grid by nearest neighbour: (N, GRID * GRID, C)."""
    return F.interpolate(x, (GRID, GRID), mode="nearest").flatten(2).transpose(1, 2)


def _best_focal(xy: Tensor, uv: Tensor, mask: Tensor) -> Tensor:
    """The focal length (N,) that minimises |f xy - uv| over the masked points."""
    tiny = torch.finfo(xy.dtype).tiny
    return (xy * uv * mask).sum((-1, -2)) / (xy.square() * mask).sum((-1, -2)).clamp_min(tiny)


@torch.no_grad()
def recover_focal_shift(
    points: Float[Tensor, "*batch H W 3"],
    mask: Bool[Tensor, "*batch H W"] | None = None,
    *,
    intrinsics: Float[Tensor, "*#batch 3 3"] | None = None,
    focal: Float[Tensor, "*#batch"] | None = None,
    guarded: bool = True,
) -> FocalShift:
    """Fit each frame's focal length and depth shift: minimise |f xy / (z + s) - uv|^2 (MoGe).

    points: in the camera frame, x right, y down, known up to a shift of z.
    mask: points to use. With fewer than two, focal is 1 and shift 0, not valid.
    intrinsics: in pixels; or focal: in half diagonals. With either, only the shift is fitted, and the returned
        focal is the given one (for intrinsics, the mean of fx and fy).
    guarded: reject shifts that put a used point behind the camera and focal lengths that are not positive, and
        converge fully; otherwise do as the released code, which stops early and checks nothing.
    """
    lead, (height, width) = points.shape[:-3], points.shape[-3:-1]
    flat = points.float().reshape(-1, height, width, 3)
    count = flat.shape[0]
    sampled = _sample(flat.permute(0, 3, 1, 2))
    plane = image_plane(height, width, points.device).expand(count, -1, -1, -1)
    uv = _sample(plane.permute(0, 3, 1, 2))
    if mask is None:
        keep = torch.ones_like(sampled[..., 0], dtype=torch.bool)
    else:
        keep = _sample(mask.reshape(-1, 1, height, width).float())[..., 0] > 0.5
    keep = keep & sampled.isfinite().all(-1)
    sampled = torch.where(keep[..., None], sampled, 1.0)
    known: Tensor | None = None
    if intrinsics is not None:
        unit = half_diagonal(height, width)
        flat_k = intrinsics.float().expand(*lead, 3, 3).reshape(-1, 3, 3)
        known = torch.stack((flat_k[:, 0, 0], flat_k[:, 1, 1]), -1)[:, None, :] / unit
        centre = torch.tensor((width / 2, height / 2), device=points.device)
        uv = uv + ((centre - flat_k[:, :2, 2]) / unit)[:, None, :]
    elif focal is not None:
        known = focal.float().expand(lead).reshape(-1, 1, 1)
    weight = keep[..., None].double()
    xy, z, target = sampled[..., :2].double(), sampled[..., 2:].double(), uv.double()

    def residual(shift: Tensor) -> Tensor:
        depth = z + shift[:, None, None]
        projected = xy / depth
        f = _best_focal(projected, target, weight) if known is None else known.double()
        scaled = projected * (f[:, None, None] if known is None else f)
        error = ((scaled - target) * weight).flatten(1)
        if guarded:
            legal = ((depth > 0) | (weight == 0)).all((1, 2))
            if known is None:
                legal = legal & (f > 0)
            error = torch.where(legal[:, None], error, float("inf"))
        return error

    enough = keep.sum(-1) >= 2
    start = torch.zeros(count, dtype=torch.float64, device=points.device)
    if guarded:
        # start with all points in front of the camera, even if some of them are behind it
        nearest = torch.where(keep, sampled[..., 2], float("inf")).amin(-1).double()
        farthest = torch.where(keep, sampled[..., 2], -float("inf")).amax(-1).double()
        start = torch.where(nearest > 0, start, 0.1 * (farthest - nearest) - nearest)
        start = torch.where(enough, start, 0)
    # unlike the forward pass, this may synchronise with the device: a fit takes only a few steps
    shift = levenberg_marquardt(residual, start, *((1e-10, 30) if guarded else (1e-3, 100))).float()
    if known is None:
        found = _best_focal(sampled[..., :2] / (sampled[..., 2:] + shift[:, None, None]), uv, keep[..., None].float())
    else:
        found = known.mean((1, 2)).expand(count)
    valid = enough & found.isfinite() & shift.isfinite()
    if guarded:
        valid = valid & (found > 0)
    if known is None:
        found = torch.where(valid, found, 1.0)
    shift = torch.where(valid, shift, 0.0)
    return FocalShift(found.reshape(lead), shift.reshape(lead), valid.reshape(lead))


# --- robust optimal alignment (ROE) ---------------------------------------------------------------------------------


def weighted_median(values: Float[Tensor, "*batch N"], weights: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch"]:
    """The x that minimises sum w |x - v| over the last dimension. Values of zero weight are ignored.

    If all weights are zero, the result is the smallest value.
    """
    order = values.argsort(-1)
    total = weights.gather(-1, order).cumsum(-1)
    index = (total < 0.5 * total[..., -1:]).sum(-1, keepdim=True).clamp_max(values.shape[-1] - 1)
    return values.gather(-1, order).gather(-1, index)[..., 0]


@torch.no_grad()
def roe_scale(
    source: Float[Tensor, "*samples"], target: Float[Tensor, "*samples"], weight: Float[Tensor, "*#batch N"]
) -> Float[Tensor, "*#batch"]:
    """The s that minimises sum w |s source - target|_1 exactly. No gradient.

    source, target: (*batch, N) depths or (*batch, N, 3) points; weight: zero excludes a sample.
    """
    if source.ndim == weight.ndim + 1:
        weight = weight[..., None].expand_as(source).flatten(-2)
        source, target = source.flatten(-2), target.flatten(-2)
    used = (source != 0) & (weight > 0)
    ratio = torch.where(used, target / torch.where(used, source, 1), 0)
    return weighted_median(ratio, torch.where(used, weight * source.abs(), 0))


@torch.no_grad()
def roe_affine(
    source: Float[Tensor, "*batch N"],
    target: Float[Tensor, "*batch N"],
    weight: Float[Tensor, "*batch N"],
    *,
    step: int = 64,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """The (s, t) that minimise sum w |s source + t - target| exactly. No gradient.

    Zero weight excludes a sample. Returns s and t; s = 1 and t = 0 if fewer than two samples are used. The best line
    passes through a sample, so every sample is tried as anchor, `step` at a time: O(N^2 log N) time, O(step N) memory.
    """
    count = source.shape[-1]
    best_cost = torch.full_like(source[..., 0], float("inf"))
    best_scale, best_shift = torch.ones_like(best_cost), torch.zeros_like(best_cost)
    pairs = weight[..., None, :]
    for begin in range(0, count, step):
        part = slice(begin, begin + step)
        anchor_x, anchor_y = source[..., part, None], target[..., part, None]
        scale = roe_scale(source[..., None, :] - anchor_x, target[..., None, :] - anchor_y, pairs)
        shift = anchor_y[..., 0] - scale * anchor_x[..., 0]
        error = (scale[..., None] * source[..., None, :] + shift[..., None] - target[..., None, :]).abs()
        cost = torch.where(pairs > 0, error * pairs, 0).sum(-1)
        cost = torch.where(weight[..., part] > 0, cost, float("inf"))
        low, index = cost.min(-1)
        better = low < best_cost
        best_cost = torch.where(better, low, best_cost)
        index = index[..., None]
        best_scale = torch.where(better, scale.gather(-1, index)[..., 0], best_scale)
        best_shift = torch.where(better, shift.gather(-1, index)[..., 0], best_shift)
    enough = (weight > 0).sum(-1) >= 2
    return torch.where(enough, best_scale, 1), torch.where(enough, best_shift, 0)
