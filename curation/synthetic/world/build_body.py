"""Builds the embedded body file from primitives: run once by a developer, never by a user.

    python -m curation.synthetic.world.build_body curation/render/body.npz

Smooth union of ellipsoids and round cones -> marching cubes -> simplification -> exactly 6890 vertices -> relaxation
-> skinning by bone distance and diffusion -> shape directions from bone offsets -> joint regressor by non-negative
least squares. Every number below is our own; none of SMPL's data is used, only its format (vertex, face and joint
counts, joint order, and the vertex ids that `smplx` reads as extra joints). Frame: metres, y up, facing +z, the
body's left is +x.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curation.files import atomic_path
from curation.render.body import JOINT_COUNT, LANDMARKS, PARENTS, SHAPE_COUNT, VERTEX_COUNT

Array = NDArray[np.float64]
VOXEL_M = 0.0055
CHEST_Y = 1.20  # the origin of the finished body: mid-chest, so that the root joint is not at zero by accident


def _mirror(point: tuple[float, float, float]) -> tuple[float, float, float]:
    return (-point[0], point[1], point[2])


_SIDES: dict[str, tuple[float, float, float]] = {  # left side; the right one mirrors it
    "hip": (0.088, 0.905, 0.000),
    "knee": (0.095, 0.495, 0.008),
    "ankle": (0.097, 0.085, -0.022),
    "foot": (0.108, 0.028, 0.095),
    "collar": (0.070, 1.385, -0.012),
    "shoulder": (0.180, 1.405, -0.020),
    "elbow": (0.440, 1.400, -0.032),
    "wrist": (0.690, 1.402, -0.020),
    "hand": (0.775, 1.398, -0.016),
}
_CENTRE = {
    "pelvis": (0.0, 0.955, -0.005),
    "spine1": (0.0, 1.055, -0.015),
    "spine2": (0.0, 1.165, -0.015),
    "spine3": (0.0, 1.255, -0.010),
    "neck": (0.0, 1.455, -0.022),
    "head": (0.0, 1.535, 0.000),
}
_ORDER = [
    "pelvis",
    "hip",
    "hip",
    "spine1",
    "knee",
    "knee",
    "spine2",
    "ankle",
    "ankle",
    "spine3",
    "foot",
    "foot",
    "neck",
    "collar",
    "collar",
    "head",
    "shoulder",
    "shoulder",
    "elbow",
    "elbow",
    "wrist",
    "wrist",
    "hand",
    "hand",
]


def joint_positions() -> Array:
    """(24, 3) rest joints, floor at y = 0, metres."""
    seen: set[str] = set()
    rows = []
    for name in _ORDER:
        if name in _CENTRE:
            rows.append(_CENTRE[name])
        elif name in seen:
            rows.append(_mirror(_SIDES[name]))
        else:
            seen.add(name)
            rows.append(_SIDES[name])
    return np.array(rows)


# where a bone without a child joint ends
_TIPS = {15: (0.0, 1.72, 0.02), 10: (0.113, 0.02, 0.175), 11: (-0.113, 0.02, 0.175)}
_TIPS |= {22: (0.87, 1.395, -0.016), 23: (-0.87, 1.395, -0.016)}


@dataclass(frozen=True)
class Cone:
    """A round cone from a (radius ra) to b (radius rb), blended into the rest over k metres."""

    a: tuple[float, float, float]
    b: tuple[float, float, float]
    ra: float
    rb: float
    k: float


@dataclass(frozen=True)
class Blob:
    """An ellipsoid, blended into the rest over k metres."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    k: float


Part = Cone | Blob


def _flip(part: Part) -> Part:
    if isinstance(part, Cone):
        return Cone(_mirror(part.a), _mirror(part.b), part.ra, part.rb, part.k)
    return Blob(_mirror(part.centre), part.radii, part.k)


def _parts() -> list[Part]:
    middle: list[Part] = [
        Blob((0, 1.265, -0.005), (0.152, 0.175, 0.108), 0.05),
        Blob((0, 1.10, -0.002), (0.128, 0.14, 0.096), 0.05),
        Blob((0, 0.975, -0.005), (0.160, 0.105, 0.110), 0.05),
        Cone((-0.12, 1.385, -0.015), (0.12, 1.385, -0.015), 0.062, 0.062, 0.05),
        Cone((0, 1.40, -0.022), (0, 1.56, 0.002), 0.060, 0.054, 0.04),
        Blob((0, 1.640, 0.008), (0.074, 0.098, 0.094), 0.02),
        Blob((0, 1.585, 0.040), (0.056, 0.072, 0.060), 0.03),
        Blob((0, 1.535, 0.070), (0.026, 0.020, 0.024), 0.025),  # chin
        Cone((0, 1.634, 0.096), (0, 1.592, 0.116), 0.008, 0.0125, 0.012),  # nose
        Blob((0, 1.557, 0.094), (0.024, 0.010, 0.012), 0.012),  # mouth
        Blob((0, 1.652, 0.090), (0.048, 0.010, 0.012), 0.014),  # brow
    ]
    left: list[Part] = [
        Blob((0.072, 0.915, -0.058), (0.086, 0.088, 0.078), 0.04),  # buttock
        Blob((0.070, 1.295, 0.062), (0.070, 0.062, 0.040), 0.04),  # chest
        Cone((0.03, 1.455, -0.03), (0.155, 1.415, -0.022), 0.040, 0.042, 0.04),  # trapezius
        Blob((0.186, 1.402, -0.020), (0.060, 0.056, 0.056), 0.035),  # deltoid
        Cone((0.180, 1.403, -0.020), (0.440, 1.400, -0.032), 0.047, 0.036, 0.03),
        Blob((0.300, 1.402, -0.020), (0.085, 0.046, 0.044), 0.03),  # biceps
        Cone((0.440, 1.400, -0.032), (0.690, 1.402, -0.020), 0.037, 0.025, 0.02),
        Blob((0.515, 1.400, -0.028), (0.080, 0.038, 0.042), 0.03),  # forearm
        Cone((0.690, 1.402, -0.020), (0.735, 1.400, -0.018), 0.024, 0.020, 0.02),
        Blob((0.748, 1.399, -0.016), (0.052, 0.015, 0.041), 0.012),  # palm
        Cone((0.090, 0.895, 0.000), (0.095, 0.495, 0.008), 0.088, 0.052, 0.045),
        Blob((0.100, 0.760, 0.012), (0.078, 0.160, 0.080), 0.04),  # thigh
        Cone((0.095, 0.495, 0.008), (0.097, 0.085, -0.022), 0.049, 0.034, 0.03),
        Blob((0.098, 0.375, -0.022), (0.050, 0.120, 0.054), 0.03),  # calf
        Blob((0.095, 0.495, 0.028), (0.040, 0.042, 0.034), 0.02),  # knee cap
        Blob((0.098, 0.040, -0.048), (0.036, 0.040, 0.040), 0.02),  # heel
        Cone((0.098, 0.062, -0.015), (0.106, 0.030, 0.100), 0.038, 0.028, 0.025),
        Blob((0.110, 0.023, 0.115), (0.046, 0.023, 0.066), 0.02),  # toes
        Blob((0.078, 1.622, -0.004), (0.011, 0.031, 0.020), 0.008),  # ear
        Cone((0.725, 1.396, 0.010), (0.765, 1.390, 0.040), 0.014, 0.0105, 0.008),  # thumb
        Cone((0.765, 1.390, 0.040), (0.792, 1.387, 0.053), 0.0105, 0.0085, 0.005),
    ]
    for (x, z), length in zip(
        ((0.790, 0.018), (0.795, -0.006), (0.792, -0.029), (0.784, -0.050)), _FINGERS, strict=True
    ):
        spread = (z + 0.016) * 0.35
        tip = (x + length, 1.395, z + spread)
        left.append(Cone((x - 0.02, 1.399, z * 0.9 - 0.002), tip, 0.0105, 0.0080, 0.004))
    return middle + left + [_flip(part) for part in left]


_FINGERS = (0.062, 0.070, 0.064, 0.048)  # beyond the knuckles; with the palm 7 to 9 cm

# landmarks on the skin that smplx reads by fixed vertex ids
_SKIN = {
    "nose": (0, 1.588, 0.140),
    "eye": (0.032, 1.630, 0.105),
    "ear": (0.092, 1.622, -0.004),
    "thumb": (0.800, 1.387, 0.058),
    "index": (0.862, 1.395, 0.031),
    "middle": (0.875, 1.395, -0.002),
    "ring": (0.866, 1.395, -0.034),
    "pinky": (0.842, 1.395, -0.064),
    "big_toe": (0.092, 0.020, 0.185),
    "small_toe": (0.150, 0.018, 0.150),
    "heel": (0.098, 0.030, -0.090),
}


def _field(points: Array, part: Part) -> Array:
    """Signed distance of points (..., 3) to a part; exact for cones' sides, first order for ellipsoids."""
    if isinstance(part, Blob):
        local = (points - np.array(part.centre, np.float32)) / np.array(part.radii, np.float32)
        length = np.sqrt((local**2).sum(-1)) + 1e-9
        gradient = np.sqrt(((local / np.array(part.radii, np.float32)) ** 2).sum(-1)) + 1e-9
        return length * (length - 1.0) / gradient
    a, b = np.array(part.a, np.float32), np.array(part.b, np.float32)
    axis = b - a
    t = np.clip(((points - a) @ axis) / (axis @ axis), 0, 1)
    return np.linalg.norm(points - (a + t[..., None] * axis), axis=-1) - (part.ra + t * (part.rb - part.ra))


def _surface() -> tuple[Array, NDArray[np.int64]]:
    """Marching cubes over the smooth union, each part evaluated only in its own neighbourhood."""
    from skimage.measure import marching_cubes

    low, high = np.array([-0.93, -0.03, -0.20]), np.array([0.93, 1.80, 0.24])
    axes = [np.arange(lo, hi, VOXEL_M, dtype=np.float32) for lo, hi in zip(low, high, strict=True)]
    field = np.full([len(axis) for axis in axes], 0.2, np.float32)
    for part in _parts():
        if isinstance(part, Blob):
            ends = np.array([part.centre, part.centre])
            reach = np.array(part.radii) + 0.07
        else:
            ends = np.array([part.a, part.b])
            reach = np.full(3, max(part.ra, part.rb) + 0.07)
        window = tuple(
            slice(*np.searchsorted(axis, [ends[:, i].min() - reach[i], ends[:, i].max() + reach[i]]))
            for i, axis in enumerate(axes)
        )
        grid = np.stack(np.meshgrid(*[axis[cut] for axis, cut in zip(axes, window, strict=True)], indexing="ij"), -1)
        new, old = _field(grid, part), field[window]
        h = np.clip(0.5 + 0.5 * (old - new) / part.k, 0, 1)
        field[window] = old * (1 - h) + new * h - part.k * h * (1 - h)
    vertices, faces, _, _ = marching_cubes(field, 0.0, spacing=(VOXEL_M,) * 3)
    return vertices.astype(np.float64) + low, faces.astype(np.int64)


def _edges(faces: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1), axis=0)


def _exact_count(vertices: Array, faces: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64]]:
    """Simplify to just below the vertex count, then split the longest edges until the count is met."""
    import fast_simplification

    target = 2 * (VERTEX_COUNT - 2)
    points, triangles = vertices, faces
    for _ in range(20):
        points, triangles = fast_simplification.simplify(
            vertices.astype(np.float32), faces.astype(np.int32), target_count=target - 60, agg=3.0
        )
        used, triangles = np.unique(triangles, return_inverse=True)
        points, triangles = points[used].astype(np.float64), triangles.reshape(-1, 3)
        if len(points) <= VERTEX_COUNT:
            break
        target -= 200
    corners, table = list(points), [tuple(map(int, face)) for face in triangles]
    while len(corners) < VERTEX_COUNT:
        lengths = {}
        for face in table:
            for i in range(3):
                a, b = face[i], face[(i + 1) % 3]
                lengths[min(a, b), max(a, b)] = float(np.sum((corners[a] - corners[b]) ** 2))
        for a, b in sorted(lengths, key=lambda edge: -lengths[edge])[:1]:
            new = len(corners)
            corners.append((corners[a] + corners[b]) / 2)
            split = []
            for face in table:
                if a in face and b in face:
                    split.append(tuple(new if v == b else v for v in face))
                    split.append(tuple(new if v == a else v for v in face))
                else:
                    split.append(face)
            table = split
    return np.array(corners), np.array(table)


def _laplacian(vertices: Array, faces: NDArray[np.int64]) -> Any:
    """Row-normalised neighbour average."""
    from scipy.sparse import coo_matrix, diags

    edges = _edges(faces)
    rows, columns = np.concatenate([edges, edges[:, ::-1]]).T
    matrix = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(vertices),) * 2).tocsr()
    return diags(1 / np.asarray(matrix.sum(1)).ravel()) @ matrix


def _normals(vertices: Array, faces: NDArray[np.int64]) -> Array:
    a, b, c = vertices[faces].transpose(1, 0, 2)
    normals = np.zeros_like(vertices)
    for corner in faces.T:
        np.add.at(normals, corner, np.cross(b - a, c - a))
    return normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-12)


def _relax(vertices: Array, faces: NDArray[np.int64]) -> Array:
    """Even out triangles: tangential smoothing only, so that the shape stays."""
    average = _laplacian(vertices, faces)
    for _ in range(8):
        step = average @ vertices - vertices
        normals = _normals(vertices, faces)
        vertices = vertices + 0.5 * (step - (step * normals).sum(1, keepdims=True) * normals)
    return vertices


def _bones(joints: Array) -> list[tuple[int, Array, Array]]:
    """(joint, start, end) segments; a joint with several children has one segment to each."""
    segments = []
    for joint in range(JOINT_COUNT):
        children = [child for child in range(JOINT_COUNT) if PARENTS[child] == joint]
        ends = [joints[child] for child in children] or [np.array(_TIPS[joint])]
        if joint == 0:
            ends = [joints[3], joints[0] + (0.06, -0.03, 0), joints[0] + (-0.06, -0.03, 0)]
        if joint == 9:  # the collar bones start at the upper spine, whose own flesh is the chest below the neck
            ends = [joints[12], joints[9] + (0.05, 0.08, 0), joints[9] + (-0.05, 0.08, 0)]
        segments += [(joint, joints[joint], end) for end in ends]
    return segments


_RADIUS = {0: 1.25, 9: 1.2, 3: 1.1, 6: 1.1, 15: 1.5, 12: 0.8}  # how far a bone's flesh reaches, relative


def _along(points: Array, start: Array, end: Array) -> tuple[Array, Array]:
    axis = end - start
    t = np.clip((points - start) @ axis / (axis @ axis), 0, 1)
    return t, np.linalg.norm(points - start - t[:, None] * axis, axis=1)


def _weights(vertices: Array, faces: NDArray[np.int64], joints: Array) -> Array:
    """(V, 24) skinning weights, at most four per vertex: nearest bone, diffused over the surface."""
    distance = np.full((len(vertices), JOINT_COUNT), np.inf)
    for joint, start, end in _bones(joints):
        distance[:, joint] = np.minimum(distance[:, joint], _along(vertices, start, end)[1] / _RADIUS.get(joint, 1.0))
    weights = np.eye(JOINT_COUNT)[distance.argmin(1)]
    average = _laplacian(vertices, faces)
    for _ in range(14):
        weights = 0.4 * weights + 0.6 * (average @ weights)
    smallest = np.sort(weights, axis=1)[:, -4][:, None]
    weights[weights < np.maximum(smallest, 0.01)] = 0
    return weights / weights.sum(1, keepdims=True)


def _shape_directions(vertices: Array, weights: Array, joints: Array) -> tuple[Array, Array]:
    """(V, 3, 10) vertex and (24, 3, 10) joint displacements per unit of shape.

    In order: size, girth, leg length, arm length, shoulder width, hip width, belly, head, muscle, torso length.
    """
    moves = np.zeros((SHAPE_COUNT, JOINT_COUNT, 3))
    grow = np.zeros((SHAPE_COUNT, JOINT_COUNT))  # radial growth of a bone's flesh, relative
    root = joints[0]
    moves[0] = (joints - root) * 0.035
    grow[0] = 0.03
    grow[1] = 0.10
    grow[1, [15, 20, 21, 22, 23, 7, 8, 10, 11]] = 0.02
    stretch = {2: ((1, 4, 7, 10), 0.06), 3: ((16, 18, 20, 22), 0.05)}
    for index, (chain, factor) in stretch.items():
        for side in (0, 1):
            for above, below in pairwise(chain):
                if below + side in (10, 11):
                    moves[index, below + side] = moves[index, above + side]
                    continue
                bone = joints[below + side] - joints[above + side]
                moves[index, below + side] = moves[index, above + side] + bone * factor
    for side, sign in ((0, 1.0), (1, -1.0)):
        moves[4, [j + side for j in (16, 18, 20, 22)]] = (0.014 * sign, 0, 0)
        moves[4, 13 + side] = (0.006 * sign, 0, 0)
        moves[5, [j + side for j in (1, 4, 7, 10)]] = (0.008 * sign, 0, 0)
    grow[5, [0, 1, 2]] = 0.06
    grow[7, 15] = 0.05
    grow[8, [1, 2, 4, 5, 16, 17, 18, 19]] = 0.08
    grow[8, [9, 13, 14]] = 0.03
    upper = [joint for joint in range(JOINT_COUNT) if joint in (3, 6, 9) or joint >= 12]
    for joint in upper:
        moves[9, joint] = (0, 0.05 * min(joints[joint, 1] - root[1], 0.45), 0)

    shift = np.zeros((len(vertices), 3, SHAPE_COUNT))
    share = np.zeros(len(vertices))
    for joint, start, end in _bones(joints):
        siblings = sum(1 for other, _, _ in _bones(joints) if other == joint)
        weight = weights[:, joint] / siblings
        t, _ = _along(vertices, start, end)
        radial = vertices - start - t[:, None] * (end - start)
        child = next((c for c in range(JOINT_COUNT) if PARENTS[c] == joint and np.allclose(joints[c], end)), None)
        for index in range(SHAPE_COUNT):
            at_start = moves[index, joint]
            at_end = moves[index, child] if child is not None else at_start
            along = at_start + t[:, None] * (at_end - at_start)
            if index == 0 and child is None:
                along = at_start + (start + t[:, None] * (end - start) - joints[joint]) * 0.035
            shift[:, :, index] += weight[:, None] * (along + grow[index, joint] * radial)
        share += weight
    assert np.allclose(share, 1)
    belly = np.exp(-(((vertices - (0, 1.09, 0.10)) / (0.12, 0.10, 0.09)) ** 2).sum(1))
    shift[:, 2, 6] += 0.035 * belly
    shift[:, 0, 6] += 0.02 * belly * np.sign(vertices[:, 0]) * np.minimum(1, np.abs(vertices[:, 0]) / 0.05)
    return shift, moves.transpose(1, 2, 0)


def _regressor(vertices: Array, shift: Array, joints: Array, moves: Array) -> Array:
    """(24, V) non-negative rows of sum one that give the joints of the template and of every shape direction."""
    from scipy.optimize import nnls

    regressor = np.zeros((JOINT_COUNT, len(vertices)))
    for joint in range(JOINT_COUNT):
        near = np.argsort(np.linalg.norm(vertices - joints[joint], axis=1))[:240]
        system = np.concatenate([vertices[near].T, shift[near].transpose(1, 2, 0).reshape(-1, len(near))])
        target = np.concatenate([joints[joint], moves[joint].reshape(-1)])
        system = np.concatenate([system * 10, np.full((1, len(near)), 100.0)])
        solution, _ = nnls(system, np.append(target * 10, 100.0))
        regressor[joint, near] = solution / solution.sum()
    return regressor


def _landmark_order(vertices: Array) -> NDArray[np.int64]:
    """A permutation that puts the vertex nearest to each landmark at the id smplx reads it from."""
    order = np.arange(len(vertices))
    for name, index in LANDMARKS.items():
        side, _, part = name.partition("_")
        x, y, z = _SKIN[part or name]
        wanted = np.array((-x if side == "right" else x, y, z))
        taken = [order[other] for other in LANDMARKS.values() if other != index]
        distance = np.linalg.norm(vertices - wanted, axis=1)
        distance[[vertex for vertex in taken if distance[vertex] < 1e-9]] = np.inf
        nearest = int(distance.argmin())
        at = int(np.flatnonzero(order == nearest)[0])
        order[[index, at]] = order[[at, index]]
    return order


def build() -> dict[str, NDArray]:
    """The arrays of the body file; a second run gives the same ones."""
    vertices, faces = _exact_count(*_surface())
    vertices = _relax(vertices, faces)
    order = _landmark_order(vertices)
    inverse = np.argsort(order)
    vertices, faces = vertices[order], inverse[faces]
    joints = joint_positions()
    weights = _weights(vertices, faces, joints)
    shift, moves = _shape_directions(vertices, weights, joints)
    regressor = _regressor(vertices, shift, joints, moves)
    influences = np.argsort(-weights, axis=1, kind="stable")[:, :4]
    row, column = np.nonzero(regressor)
    return {
        "v_template": (vertices - (0, CHEST_Y, 0)).astype(np.float32),
        "faces": faces.astype(np.uint16),
        "weight_joint": influences.astype(np.uint8),
        "weight_value": np.take_along_axis(weights, influences, 1).astype(np.float32),
        "shapedirs": shift.astype(np.float16),
        "regressor_joint": row.astype(np.uint8),
        "regressor_vertex": column.astype(np.uint16),
        "regressor_value": regressor[row, column],
    }


def main() -> None:
    """Write the body file to the path given on the command line."""
    arrays = build()
    with atomic_path(Path(sys.argv[1])) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
