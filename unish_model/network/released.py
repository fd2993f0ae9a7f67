"""Formulas of the released inference only, with its branches and mistakes, kept apart from the correct ones.

Only `compat="released"` uses these.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from unish_model.network.geometry import compose, rotation_from_axis_angle


def quaternion(matrix: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """Quaternion (w, x, y, z) with the released branches; also defined for matrices that are not rotations."""
    m = matrix
    d0, d1, d2 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    a, b, c = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    p, q, r = m[..., 1, 0] + m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 2, 1] + m[..., 1, 2]
    traces = (1 + d0 - d1 - d2, 1 - d0 + d1 - d2, 1 - d0 - d1 + d2, 1 + d0 + d1 + d2)
    candidates = (
        (a, traces[0], p, q),
        (b, p, traces[1], r),
        (c, q, r, traces[2]),
        (traces[3], a, b, c),
    )
    low, choose_x, choose_z = d2 < 1e-6, d0 > d1, d0 < -d1
    branch = torch.where(low, torch.where(choose_x, 0, 1), torch.where(choose_z, 2, 3))[..., None]
    scaled = [
        torch.stack(candidate, -1) * (0.5 / trace.clamp_min(1e-30).sqrt())[..., None]
        for candidate, trace in zip(candidates, traces, strict=True)
    ]
    result = scaled[3]
    for index in range(3):
        result = torch.where(branch == index, scaled[index], result)
    return result


def axis_angle(matrix: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 3"]:
    """Axis times angle; also defined for matrices that are not exactly rotations."""
    q = quaternion(matrix)
    square = q[..., 1:].square().sum(-1, keepdim=True)
    sine, cosine = (square + 1e-8).sqrt(), q[..., :1]
    angle = 2 * torch.where(cosine < 0, torch.atan2(-sine, -cosine), torch.atan2(sine, cosine))
    return q[..., 1:] * (angle / sine)


def mistaken_root(
    rotations: Float[Tensor, "*batch J 3 3"], c2w: Float[Tensor, "*batch 4 4"]
) -> Float[Tensor, "*batch J 3 3"]:
    """The released world pose: it treats row 0 of the root matrix as an axis-angle vector and rotates that.

    The root of the result is not a rotation.
    """
    turned = axis_angle(compose(c2w[..., :3, :3], rotation_from_axis_angle(rotations[..., 0, 0, :])))
    root = torch.cat((turned[..., None, :], rotations[..., 0, 1:, :]), -2)
    return torch.cat((root[..., None, :, :], rotations[..., 1:, :, :]), -3)
